"""RNN, LSTM and GRU run once more on a pack of what they read."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import GroupQuant, convert, revert
from packlight.packing.layout import dense_stride
from tests.helpers import kept_bytes, pack_bytes, relative_error

METHOD = GroupQuant(bits=8, group_size=32, rounding="nearest")
STEPS, BATCH, WIDTH, HIDDEN = 7, 4, 16, 24
SHAPE = (STEPS, BATCH, WIDTH)


def decoded(x: Tensor) -> Tensor:
    """What comes back of a pack of x."""
    stride = dense_stride(x)
    return METHOD.unpack(x.dtype, tuple(x.shape), stride, *METHOD.pack(x.detach(), None))


def flat(results) -> list[Tensor]:
    y, last = results
    y = y.data if isinstance(y, PackedSequence) else y
    return [y, *(last if isinstance(last, tuple) else (last,))]


def step(layer, x, *state, seed=3):
    """Results, and the gradients of the input, the states and the weights."""
    torch.manual_seed(seed)
    results = flat(layer(x, *state))
    generator = torch.Generator().manual_seed(5)
    dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in results]
    leaves = [x.data if isinstance(x, PackedSequence) else x, *layer.parameters()]
    leaves += [h for given in state for h in (given if isinstance(given, tuple) else (given,))]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [y.detach() for y in results], torch.autograd.grad(results, wanted, dys)


def assert_of_packed(layer, x, again, *state):
    """Results are torch's, and gradients those of torch's layer for `again`, the packed x."""
    plain = copy.deepcopy(layer)
    convert(layer, METHOD)
    expected, _ = step(plain, x, *state)
    ours, found = step(layer, x, *state)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(found, step(plain, again, *state)[1], strict=True):
        torch.testing.assert_close(a, b)


OPTIONS = [
    {},
    {"batch_first": True, "bidirectional": True},
    {"num_layers": 2, "bias": False, "dropout": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_the_gradient_is_that_of_the_packed_sequence(kind, options):
    torch.manual_seed(0)
    layer = kind(WIDTH, HIDDEN, **options)
    x = torch.randn(SHAPE, requires_grad=True)
    assert_of_packed(layer, x, decoded(x).requires_grad_())


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_states_and_sequences_of_several_lengths(kind):
    torch.manual_seed(0)
    layer = kind(WIDTH, HIDDEN)
    lengths = torch.tensor([7, 5, 5, 2])
    sequence = pack_padded_sequence(torch.randn(SHAPE), lengths)
    x = PackedSequence(sequence.data.requires_grad_(), *sequence[1:])
    again = PackedSequence(decoded(x.data).requires_grad_(), *sequence[1:])
    state = torch.randn(1, BATCH, HIDDEN, requires_grad=True)
    given = (state, torch.randn(1, BATCH, HIDDEN, requires_grad=True)) if kind is nn.LSTM else state
    assert_of_packed(layer, x, again, given)
    y = layer(x, given)[0]
    assert isinstance(y, PackedSequence)
    assert torch.equal(y.batch_sizes, sequence.batch_sizes)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_projections_without_a_batch():
    layer = nn.LSTM(WIDTH, HIDDEN, proj_size=8)
    x = torch.randn(STEPS, WIDTH, requires_grad=True)
    assert_of_packed(layer, x, decoded(x).requires_grad_())


def test_dropout_between_layers_is_left_to_torch():
    """What it draws cannot be drawn again."""
    layer, x = nn.LSTM(WIDTH, HIDDEN, 3, dropout=0.4), torch.randn(SHAPE, requires_grad=True)
    expected = step(layer, x)
    convert(layer, METHOD)
    for ours, theirs in zip(step(layer, x), expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_pack_of_the_input_is_all_that_is_kept(kind):
    layer, x = kind(WIDTH, HIDDEN, num_layers=2), torch.randn(SHAPE, requires_grad=True)
    convert(layer, METHOD)
    weights = sum(parameter.nbytes for parameter in layer.parameters())
    assert kept_bytes(lambda: layer(x)[0]) == weights + pack_bytes(x.numel(), 8, 32)
    with torch.no_grad():
        assert not layer(x)[0].requires_grad
    assert layer.eval()(x)[0].grad_fn.name() != "_ReplayedBackward"


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_that_a_hook_makes():
    torch.manual_seed(0)
    layer = nn.utils.weight_norm(nn.LSTM(WIDTH, HIDDEN), "weight_hh_l0")
    x = torch.randn(SHAPE, requires_grad=True)
    expected = step(layer, x)[1]
    convert(layer, METHOD)
    for a, b in zip(step(layer, x)[1], expected, strict=True):
        assert relative_error(a, b) < 0.02


def test_some_weights_frozen_and_two_backward_passes():
    torch.manual_seed(0)
    layer, x = nn.GRU(WIDTH, HIDDEN), torch.randn(SHAPE)
    layer.weight_ih_l0.requires_grad_(False)
    expected = step(layer, x)[1]
    convert(layer, METHOD)
    y, other = layer(x)[0], layer(x * 2)[0]
    wanted = [p for p in layer.parameters() if p.requires_grad]
    other.sum().backward(retain_graph=True)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    for a, b in zip(torch.autograd.grad(y, wanted, dy), first, strict=True):
        assert torch.equal(a, b)
    assert len(step(layer, x)[1]) == len(expected)
    for a, b in zip(step(layer, x)[1], expected, strict=True):
        assert relative_error(a, b) < 0.02


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_weights_of_one_call(kind):
    """As `functional_call` puts them into the layer: the backward pass is of them."""
    torch.manual_seed(0)
    layer, x = kind(WIDTH, HIDDEN), torch.randn(SHAPE)
    others = {name: torch.randn_like(p).requires_grad_() for name, p in layer.named_parameters()}

    def found():
        y = torch.func.functional_call(layer, others, (x,))[0]
        return torch.autograd.grad(y.square().sum(), list(others.values()))

    expected = found()
    convert(layer, METHOD)
    for a, b in zip(found(), expected, strict=True):
        assert relative_error(a, b) < 0.05


def test_a_weight_that_is_modified_is_refused():
    layer, x = nn.LSTM(WIDTH, HIDDEN), torch.randn(SHAPE, requires_grad=True)
    convert(layer, METHOD)
    y = layer(x)[0]
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(packlight.ModifiedWeightError):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_in_a_checkpoint(reentrant):
    torch.manual_seed(0)
    layer, x = nn.LSTM(WIDTH, HIDDEN, 2), torch.randn(SHAPE, requires_grad=True)
    convert(layer, METHOD)
    _, expected = step(layer, x)
    torch.manual_seed(3)
    results = checkpoint(lambda x: tuple(flat(layer(x))), x, use_reentrant=reentrant)
    generator = torch.Generator().manual_seed(5)
    sum((y * torch.randn(y.shape, generator=generator)).sum() for y in results).backward()
    for leaf, gradient in zip([x, *layer.parameters()], expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_copies_pickles_and_the_way_back():
    layer, x = nn.LSTM(WIDTH, HIDDEN), torch.randn(SHAPE, requires_grad=True)
    conversion = convert(layer, METHOD)
    assert "LSTM" in str(conversion)
    expected = step(layer, x)[1]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for a, b in zip(step(other, x)[1], expected, strict=True):
            assert torch.equal(a, b)
        revert(other)
        assert type(other) is nn.LSTM
    assert layer.state_dict().keys() == nn.LSTM(WIDTH, HIDDEN).state_dict().keys()
