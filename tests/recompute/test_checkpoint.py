"""Blocks that are checkpointed with packed inputs, against the plain blocks."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import packlight
from packlight import Checkpoint, FixedPoint, GroupQuant, InputError, NothingMatchedError, Tiles
from packlight.method import Method
from packlight.method_files import format_methods, parse_methods
from packlight.recompute import checkpoint
from tests.helpers import pack_bytes, relative_error

WIDTH = 32
EIGHT = GroupQuant(8)


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.norm, self.first = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64)
        self.dropout, self.second = nn.Dropout(dropout), nn.Linear(64, WIDTH)
        self.runs = 0

    def forward(self, x, memory=None, *, scale=None, mask=None):
        if not torch.compiler.is_compiling():
            self.runs += 1
        h = torch.tanh(self.first(self.norm(x if memory is None else x + memory)))
        h = h if scale is None else h * scale
        h = h if mask is None else h.masked_fill(mask, 0.0)
        return x + self.second(self.dropout(h))


class Model(nn.Module):
    def __init__(self, blocks: int = 3, **options):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(**options) for _ in range(blocks))

    def forward(self, x, **kwargs):
        x = self.stem(x + x.roll(1, -2))
        for block in self.blocks:
            x = block(x, **kwargs)
        return x


def gradients(model, x, seed=3, **kwargs):
    model.zero_grad()
    packlight.manual_seed(seed)
    x = x.detach().requires_grad_()
    y = model(x, **kwargs)
    y.square().sum().backward()
    return {"output": y.detach(), "input": x.grad} | {
        n: p.grad for n, p in model.named_parameters()
    }


def converted(plain, methods):
    model = copy.deepcopy(plain)
    return model, packlight.convert(model, methods)


def test_an_exact_checkpoint_is_the_plain_model_bit_for_bit():
    torch.manual_seed(0)
    plain = Model(dropout=0.5)
    model, conversion = converted(plain, Checkpoint(keep=None))
    assert [row.names for row in conversion.replaced] == [(f"blocks.{i}",) for i in range(3)]
    x = torch.randn(2, 64, WIDTH)
    expected = gradients(plain, x)
    for name, value in gradients(model, x).items():
        assert torch.equal(value, expected[name]), name
    assert [block.runs for block in model.blocks] == [2, 2, 2]
    model.eval()
    gradients(model, x)
    assert [block.runs for block in model.blocks] == [3, 3, 3]


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_and_error_are_those_of_the_packs(bits):
    torch.manual_seed(0)
    plain = Model()
    model, _ = converted(plain, Checkpoint(GroupQuant(bits, code="minmax")))
    x = torch.randn(2, 64, WIDTH)
    report = packlight.profile(model, x)
    packs = 3 * pack_bytes(x.numel(), bits)
    assert report.activation_bytes == packs + x.nbytes  # the stem's input
    assert 3 * report.activation_bytes < packlight.profile(plain, x).activation_bytes
    expected, found = gradients(plain, x), gradients(model, x)
    assert torch.equal(found["output"], expected["output"])
    for name, value in expected.items():
        assert relative_error(found[name], value) < (0.01 if bits == 8 else 0.12), name
        assert (
            bits == 8
            or name in ("output", "blocks.2.second.bias")
            or not torch.equal(found[name], value)
        )


def test_predict_counts_what_profile_measures():
    model, _ = converted(Model(), (Checkpoint(), EIGHT))
    x = torch.randn(2, 64, WIDTH)
    measured = packlight.profile(model, x).activation_bytes
    assert packlight.predict(model, x).activation_bytes == measured


def test_nothing_but_the_packs_is_alive():
    x = torch.randn(2, 64, WIDTH, requires_grad=True) * 1
    held = weakref.ref(x)
    y = checkpoint(Block(), x, keep=EIGHT)
    del x
    gc.collect()
    assert held() is None
    y.sum().backward()


def test_a_tensor_that_several_blocks_read_is_packed_once():
    blocks = [Block() for _ in range(3)]
    memory = torch.randn(4, 64, WIDTH, requires_grad=True) * 1
    x = torch.randn(4, 64, WIDTH, requires_grad=True)

    def run():
        y = x
        for block in blocks:
            y = checkpoint(block, y, memory, keep=EIGHT)
        return y

    report = packlight.profile(run)
    assert report.activation_bytes == 4 * pack_bytes(x.numel(), 8)


def test_inputs_by_keyword_and_others():
    torch.manual_seed(0)
    block = Block().double().float()
    scale = torch.rand(2, 64, 64, requires_grad=True)
    mask = torch.rand(2, 64, 64) > 0.5
    x = torch.randn(2, 64, WIDTH, requires_grad=True)
    leaves = [x, scale, *block.parameters()]

    def run(call):
        y = call(block, x=x, scale=scale, mask=mask)
        return torch.autograd.grad(y.square().sum(), leaves)

    expected = run(lambda block, **kwargs: block(**kwargs))
    for keep in (None, EIGHT):
        found = run(lambda block, keep=keep, **kwargs: checkpoint(block, keep=keep, **kwargs))
        for value, true in zip(found, expected, strict=True):
            assert relative_error(value, true) < (1e-6 if keep is None else 0.01)
    report = packlight.profile(lambda: checkpoint(block, x * 1, scale=scale * 1, mask=mask))
    packs = pack_bytes(x.numel(), 8) + pack_bytes(scale.numel(), 8)
    assert packs <= report.activation_bytes <= packs + mask.nbytes


def test_small_inputs_parameters_and_double_precision_are_kept_as_they_are():
    for x in (
        torch.randn(4, WIDTH),
        torch.randn(64, WIDTH).double(),
        nn.Parameter(torch.randn(64, WIDTH)),
    ):
        block = Block().to(x.dtype)
        x = x if isinstance(x, nn.Parameter) else x.requires_grad_()
        expected = torch.autograd.grad(block(x).square().sum(), x)[0]
        found = torch.autograd.grad(checkpoint(block, x, keep=GroupQuant(2)).square().sum(), x)[0]
        assert torch.equal(found, expected)


def test_an_input_that_was_changed_since_gives_the_gradient_of_what_it_was():
    block, x = Block(), torch.randn(64, WIDTH, requires_grad=True) * 1
    y = checkpoint(block, x, keep=EIGHT)
    expected = torch.autograd.grad(block(x).sum(), block.first.weight)[0]
    x.add_(1)
    found = torch.autograd.grad(y.sum(), block.first.weight)[0]
    assert relative_error(found, expected) < 0.01


def test_no_gradients_no_packs():
    block, x = Block(), torch.randn(64, WIDTH)
    with torch.no_grad():
        assert not checkpoint(block, x).requires_grad
    assert block.runs == 1
    with pytest.raises(InputError, match="cannot be called"):
        checkpoint(3, x)


# ---- which modules -------------------------------------------------------------------------------


class Deep(nn.Module):
    """Blocks of blocks."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(Model(2), Model(2)) for _ in range(2))
        self.acts = nn.ModuleList([nn.GELU(), nn.GELU()])

    def forward(self, x):
        for stage, act in zip(self.stages, self.acts, strict=True):
            x = act(stage(x))
        return x


def names(conversion):
    return [row.names[0] for row in conversion.replaced]


def test_blocks_are_the_outermost_in_lists():
    model = Deep()
    conversion = packlight.convert(model, Checkpoint())
    assert names(conversion) == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]
    assert packlight.revert(model) == 4
    conversion = packlight.convert(model, {Block: Checkpoint()})
    assert len(names(conversion)) == 8
    # None within another, whatever the pattern matches.
    packlight.revert(model)
    conversion = packlight.convert(model, {"stages.?.*": Checkpoint()})
    assert names(conversion) == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]
    with pytest.raises(NothingMatchedError):
        packlight.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), Checkpoint())


def test_sequentials_of_the_same_layers_are_blocks_in_a_list_of_modules():
    def branch(width):
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8))

    alike = nn.ModuleList(branch(16) for _ in range(3))
    assert names(packlight.convert(alike, Checkpoint())) == ["0", "1", "2"]
    # In a Sequential they may be stages, and these are of blocks or differ.
    unlike = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    for others in (
        nn.Sequential(*(branch(16) for _ in range(3))),
        nn.ModuleList([branch(16), unlike]),
    ):
        with pytest.raises(NothingMatchedError):
            packlight.convert(others, Checkpoint())
    stages = nn.ModuleList(nn.Sequential(Block(), Block(), nn.Linear(8, 8)) for _ in range(2))
    with pytest.raises(NothingMatchedError):
        packlight.convert(stages, Checkpoint())


def test_batch_norms_are_left():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2)))
    with pytest.raises(packlight.CannotConvertError, match="would count each batch twice"):
        packlight.convert(model, {"0": Checkpoint()})


def test_beside_other_methods():
    torch.manual_seed(0)
    plain = Model()
    methods = (Checkpoint(), Tiles(16, keep=EIGHT), FixedPoint(8), EIGHT)
    model, conversion = converted(plain, methods)
    kinds = {row.names[0]: row.method for row in conversion.replaced}
    assert kinds["blocks.0"] == Checkpoint()
    assert kinds["stem"] == EIGHT
    # Blocks that are MLPs themselves are checkpointed, by the first method, and converted within.
    assert kinds["blocks.0.first"] == EIGHT
    x = torch.randn(2, 64, WIDTH)
    expected, found = gradients(plain, x), gradients(model, x)
    for name, value in expected.items():
        assert relative_error(found[name], value) < 0.02, name


def test_copies_and_revert():
    torch.manual_seed(0)
    plain = Model()
    model, _ = converted(plain, Checkpoint(keep=None))
    x = torch.randn(2, 64, WIDTH)
    expected = gradients(plain, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = gradients(other, x)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert other.blocks[0].runs == 2
    assert packlight.revert(model) == 3
    assert type(model.blocks[0]) is Block


def test_compiled():
    torch.manual_seed(0)
    plain = Model(2)
    model, _ = converted(plain, Checkpoint())
    x = torch.randn(2, 64, WIDTH)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, found = gradients(plain, x), gradients(model, x)
    model.zero_grad()
    compiled(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        # Traced, inputs are kept as they are.
        torch.testing.assert_close(parameter.grad, expected[name])
        assert relative_error(found[name], expected[name]) < 0.01
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the tracer looks for one
def test_compiled_beside_packs():
    """Not with `fullgraph=True`: what a pack notes for others is a side effect in a checkpoint."""
    torch.manual_seed(0)
    plain = Model(2)
    model, _ = converted(plain, (Checkpoint(), GroupQuant(8, rounding="nearest")))
    x = torch.randn(2, 64, WIDTH)
    expected = gradients(plain, x)
    torch.compile(model, backend="aot_eager")(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 0.02, name
    torch._dynamo.reset()


# ---- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [Checkpoint(), Checkpoint(keep=None), Tiles(64), Tiles(keep=GroupQuant(8))]
)
def test_methods_travel_as_text_and_data(method):
    assert parse_methods(format_methods(method)) == method
    assert Method.from_dict(method.to_dict()) == method
    assert hash(method) == hash(copy.deepcopy(method))


def test_texts():
    assert parse_methods("Checkpoint(GroupQuant(4))") == Checkpoint(keep=GroupQuant(4))
    assert parse_methods("Checkpoint(None), Tiles(), GroupQuant(4)") == (
        Checkpoint(None),
        Tiles(),
        GroupQuant(4),
    )
    longest = (Checkpoint(), Tiles(), *packlight.DEFAULT_METHODS)
    assert parse_methods("Checkpoint(), Tiles(), default") == longest
    with pytest.raises(InputError, match="bits=5 is not"):
        parse_methods("Checkpoint(GroupQuant(5))")
    with pytest.raises(InputError, match="keep=4 is neither a quantiser"):
        parse_methods("Checkpoint(4)")
