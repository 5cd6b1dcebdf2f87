"""Attention that runs once more in the backward pass: how near, what is kept, dropout, refusals."""

import copy
import dataclasses
import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import packlight
from packlight import Grade, GroupQuant, InputError, Quantiser, groupquant, profile
from packlight._seeds import can_draw_again, drawn_again, draws_at
from packlight.layers import attention
from packlight.layers.attention import scaled_dot_product_attention
from packlight.pack import EXACT
from tests.helpers import crossing, pack_bytes, relative_error


@dataclasses.dataclass(frozen=True)
class Whole(Quantiser):
    """Keeps the values themselves: what is then wrong with a gradient is no pack's fault."""

    @property
    def grade(self) -> Grade:
        return EXACT

    @property
    def stochastic(self) -> bool:
        return False

    def keep(self, flat: Tensor, seed: object) -> tuple[Tensor, ...]:
        return (flat.clone(),)

    def restore(self, dtype: torch.dtype, count: int, *kept: Tensor) -> Tensor:
        return kept[0].to(dtype)


def correlated(heads, length, width, batch=4, tied=0.5):
    """Query, key and value as projections make them: rows in memory hold all heads of a token.

    Query and key have much in common and channels a mean of their own, as those of BERTs.
    """
    torch.manual_seed(0)
    shape = (batch, length, heads * width)
    common, means = torch.randn(shape), torch.randn(2, heads * width)
    query = tied * common + torch.randn(shape) + tied * means[0]
    key = tied * common + torch.randn(shape) + tied * means[1]
    tensors = (query, key, torch.randn(shape))
    return [x.view(*shape[:2], heads, width).transpose(1, 2).requires_grad_() for x in tensors]


# Those of MiniLM (12 heads of 32 channels), and of a small GPT.
SHAPES = {"bert": ((12, 64, 32), 0.7, False), "gpt": ((6, 128, 64), 0.0, True)}


def errors(tensors, causal, **options):
    """Of the gradients of query, key and value together."""
    y = F.scaled_dot_product_attention(*tensors, is_causal=causal)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    exact = torch.autograd.grad(y, tensors, dy)
    y = groupquant.scaled_dot_product_attention(*tensors, is_causal=causal, **options)
    found = torch.autograd.grad(y, tensors, dy)
    return relative_error(*(torch.cat([g.flatten() for g in grads]) for grads in (found, exact)))


NEAREST = {"rounding": "nearest"}


def minmax(bits):
    return {"bits": bits, "code": "minmax"}


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_at_eight_and_four_bits(shape):
    sizes, tied, causal = SHAPES[shape]
    tensors = correlated(*sizes, tied=tied)
    kept, again = (
        {bits: errors(tensors, causal, recompute=form, **minmax(bits)) for bits in (8, 4)}
        for form in (False, True)
    )
    assert again[8] < {"bert": 0.65, "gpt": 0.85}[shape] * kept[8]
    assert again[8] < 0.02
    assert again[4] < {"bert": 0.6, "gpt": 0.8}[shape] * kept[4]
    assert again[4] < 0.35


def test_scores_as_far_apart_as_in_a_first_layer():
    """A statistic that is not the decoded scores' own makes 4 bits useless there."""
    tensors = correlated(12, 64, 32, tied=1.5)
    kept, again = (errors(tensors, False, bits=4, recompute=form) for form in (False, True))
    assert kept > 1
    assert again < 0.5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_gradient_is_that_of_attention_of_what_is_decoded(dtype, causal):
    """Of the query less its mean over tokens, and that mean."""
    method = GroupQuant(4, rounding="nearest")
    tensors = [x.detach().to(dtype).requires_grad_() for x in correlated(4, 64, 32)]
    y = scaled_dot_product_attention(*tensors, is_causal=causal, method=method)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, tensors, dy)
    mean = tensors[0].detach().mean((0, 2), keepdim=True)
    wide = torch.promote_types(dtype, torch.float32)  # in which a mean is added
    decoded = []
    for x, less in zip(tensors, (mean, 0.0, 0.0), strict=True):
        pack = method.pack(x.detach() - less, None)
        again = method.unpack(wide, tuple(x.shape), x.stride(), *pack) + less
        decoded.append(again.to(dtype).requires_grad_())
    again = F.scaled_dot_product_attention(*decoded, is_causal=causal)
    expected = torch.autograd.grad(again, decoded, dy)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(y, F.scaled_dot_product_attention(*tensors, is_causal=causal))


LAYOUTS = {
    "one projection": lambda q, k, v: torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)
    .permute(2, 0, 3, 1, 4),
    "query, key and value one behind the other": lambda q, k, v: torch.stack(
        [x.transpose(1, 2) for x in (q, k, v)]
    ).transpose(2, 3),
    "keys first": lambda q, k, v: torch.stack([x.transpose(1, 2) for x in (k, q, v)], 2)
    .permute(2, 0, 3, 1, 4)[[1, 0, 2]],
    "tokens first": lambda q, k, v: torch.stack([x.permute(2, 0, 1, 3) for x in (q, k, v)], 2)
    .permute(2, 1, 3, 0, 4),
    "heads first": lambda q, k, v: torch.stack([x.contiguous() for x in (q, k, v)]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [64, 1])
def test_a_query_s_mean_costs_its_pack_nothing_in_any_order_of_memory(layout, length, monkeypatch):
    """Errors are a tenth of deviations, and of a mean four times as large where that is packed."""
    q, k, v = (x.detach()[:, :, :length] for x in correlated(12, 64, 32))
    q = q / q.std() + torch.randn(1, q.shape[1], 1, 32) * 4
    given = LAYOUTS[layout](q, k, v).requires_grad_()
    seen, plain = [], attention.prepared

    def prepared(inputs, kernel):
        seen.append(inputs)
        return plain(inputs, kernel)

    monkeypatch.setattr(attention, "prepared", prepared)
    y = scaled_dot_product_attention(*given, method=GroupQuant(4))
    y.backward(torch.randn_like(y))
    _, decoded = seen
    assert relative_error(decoded[0], q) < 0.045
    assert relative_error(decoded[1], k) < 0.2
    assert relative_error(decoded[2], v) < 0.2


def test_values_that_are_kept_whole_give_torch_s_gradient():
    tensors = correlated(4, 64, 32)
    y = F.scaled_dot_product_attention(*tensors)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, tensors, dy)
    y = scaled_dot_product_attention(*tensors, method=Whole(), recompute=True)
    assert all(map(torch.equal, torch.autograd.grad(y, tensors, dy), expected))


# ---- what is kept --------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention between projections that are packed at 4 bits."""

    def __init__(self, **options):
        super().__init__()
        self.qkv, self.out = (groupquant.Linear(128, n, **minmax(4)) for n in (384, 128))
        self.options = options

    def forward(self, x):
        heads = self.qkv(x).unflatten(-1, (3, 4, 32)).permute(2, 0, 3, 1, 4)
        y = groupquant.scaled_dot_product_attention(*heads, is_causal=True, **self.options)
        return self.out(y.transpose(1, 2).flatten(2))


def kept_by(shape, **options):
    report = profile(Block(**options), torch.randn(shape).requires_grad_() * 1.0)
    return report.activation_bytes


@pytest.mark.parametrize("bits", [4, 8])
def test_packs_of_query_key_and_value_are_kept_and_nothing_else(bits):
    """The output is the next Linear's to keep, by its own bits."""
    shape = (2, 64, 128)
    count = math.prod(shape)
    linears = 2 * pack_bytes(count, 4)
    mean = 4 * 128 if bits < 8 else 0  # of the query
    packs = 3 * pack_bytes(count, bits) + mean
    assert kept_by(shape, recompute=True, **minmax(bits)) == packs + linears
    statistic = 4 * 2 * 4 * 64
    expected = 4 * pack_bytes(count, 8) + pack_bytes(count, 4) + statistic
    assert kept_by(shape, recompute=False, **minmax(8)) == expected


def test_a_prediction_knows_the_bytes():
    model, x = Block(bits=4, recompute=True), torch.randn(2, 64, 128)
    assert packlight.predict(model, x).activation_bytes == profile(model, x).activation_bytes


@pytest.mark.parametrize("bits", [4, 8])
def test_packs_cross_to_a_compiled_backward_pass(bits, fresh_compiler):
    """The kernel runs again in the backward pass: nothing that it gives crosses."""
    given = torch.randn(2, 64, 128, requires_grad=True)

    def run(x):
        q, k, v = (x * f for f in (1.0, 2.0, 3.0))
        q, k, v = (t.unflatten(-1, (4, 32)).transpose(1, 2) for t in (q, k, v))
        options = {"is_causal": True, "recompute": True, **minmax(bits)}
        return groupquant.scaled_dot_product_attention(q, k, v, **options)

    _, *kept = crossing(run, given)
    mean = 4 * 128 if bits < 8 else 0  # of the query
    packs = 3 * pack_bytes(given.numel(), bits) + mean
    assert sum(x.numel() * x.element_size() for x in kept) == packs


def test_under_autocast_what_is_packed_is_16_bits_wide():
    tensors = correlated(4, 64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = groupquant.scaled_dot_product_attention(*tensors, bits=8, recompute=True)
        expected = F.scaled_dot_product_attention(*tensors)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    pairs = (torch.autograd.grad(z, tensors, dy) for z in (y, expected))
    assert all(relative_error(a, b) < 0.04 for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("which", ["query", "key"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_where_it_is(which, value):
    q, k, v = (x.detach().clone() for x in correlated(4, 64, 32))
    (q if which == "query" else k)[0, 0, 0, 0] = value
    tensors = [x.requires_grad_() for x in (q, k, v)]
    y = groupquant.scaled_dot_product_attention(*tensors, bits=4, recompute=True)
    dq, dk, _ = torch.autograd.grad(y.sum(), tensors)
    assert (dk if which == "query" else dq)[0, 0].isnan().all()
    assert dq[1].isfinite().all()
    assert dk[1].isfinite().all()


# ---- what is refused, and the defaults -----------------------------------------------------------


@pytest.mark.parametrize("recompute", [True, False])
def test_two_bits_are_refused_by_name(recompute):
    q = torch.randn(1, 2, 32, 32, requires_grad=True)
    with pytest.raises(InputError, match=r"GroupQuant\(bits=2, .*2 bits.*take 4 bits or 8"):
        groupquant.scaled_dot_product_attention(q, q, q, bits=2, recompute=recompute)


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("method", "attention_bits"),
    [
        *((GroupQuant(bits, code="minmax"), 8) for bits in (2, 4, 8)),
        *((GroupQuant(bits, code="rotated"), 4) for bits in (2, 4)),
        *((GroupQuant(bits, code="auto"), 4) for bits in (2, 3)),
        *((GroupQuant(bits, code="auto"), 8) for bits in (4, 8)),
        *((GroupQuant(2, code="auto", **given), 8) for given in ({"group_size": 32}, NEAREST)),
    ],
    ids=str,
)
def test_a_conversion_gives_attention_bits_enough(method, attention_bits):
    model, tensors = Attention(), correlated(4, 64, 32)
    packlight.convert(model, method, functional=True)
    report = profile(lambda: model(*(x * 1.0 for x in tensors)))
    codes = sum(row.bytes for row in report.rows if row.dtype == "uint8")
    assert codes == 3 * tensors[0].numel() * attention_bits // 8


@pytest.mark.parametrize(
    ("bits", "keys", "name"),
    [(8, 256, "_Recomputed"), (8, 257, "_Kept"), (4, 257, "_Recomputed")],
)
def test_the_form_follows_from_bits_and_keys(bits, keys, name):
    y = groupquant.scaled_dot_product_attention(*correlated(4, keys, 32), bits=bits)
    assert y.grad_fn.name() == f"{name}AttentionBackward"


# ---- dropout -------------------------------------------------------------------------------------


class Generator:
    """What `_seeds` asks of a CUDA generator."""

    def __init__(self):
        self.seed, self.offset = 7, 40

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def manual_seed(self, seed):
        self.seed, self.offset = seed, 0

    def set_offset(self, offset):
        self.offset = offset


def test_a_replay_leaves_the_generator_where_it_was(monkeypatch):
    generator = Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    x = SimpleNamespace(is_cuda=True, get_device=lambda: 0)
    place = draws_at(x)
    generator.manual_seed(9)
    generator.offset = 12

    def fails():
        with drawn_again(x, place):
            assert (generator.seed, generator.offset) == (7, 40)
            generator.offset += 4
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert (generator.seed, generator.offset) == (9, 12)


def test_where_dropout_cannot_be_drawn_again_the_form_is_the_kept_one_at_8_bits(monkeypatch):
    """As in a compiled region and in a captured graph; here the CPU, with a kernel that drops."""
    assert not can_draw_again(torch.randn(3))
    plain = attention.run
    monkeypatch.setattr(
        attention, "run", lambda given, kernel, flags: plain(given, kernel, (0.0, *flags[1:]))
    )
    monkeypatch.setattr(attention, "kernel_of", lambda *_: (SDPBackend.FLASH_ATTENTION.value, 1))
    tensors = correlated(4, 64, 32)
    count = tensors[0].numel()
    for dropout_p, form, codes in ((0.1, "_Kept", 4 * count), (0.0, "_Recomputed", 3 * count // 2)):
        report = profile(
            functools.partial(groupquant.scaled_dot_product_attention, bits=4, recompute=True),
            *(x * 1.0 for x in tensors), None, dropout_p,
        )  # fmt: skip
        assert {row.operation for row in report.rows} == {f"{form}AttentionBackward"}
        assert sum(row.bytes for row in report.rows if row.dtype == "uint8") == codes


BACKENDS = {
    "flash": (SDPBackend.FLASH_ATTENTION, torch.bfloat16, False),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, torch.float32, False),
    "efficient with a mask": (SDPBackend.EFFICIENT_ATTENTION, torch.bfloat16, True),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, torch.bfloat16, False),
}


def on_device(name):
    backend, dtype, masked = BACKENDS[name]
    tensors = [x.detach().to("cuda", dtype).requires_grad_() for x in correlated(4, 128, 64)]
    mask = torch.ones(128, 128, dtype=torch.bool, device="cuda").tril() if masked else None
    return backend, tensors, mask


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_same_dropout_is_drawn_again(name, dropout_p):
    """Of values that are kept whole the gradient is torch's, bit for bit or nearly (atomics)."""
    backend, tensors, mask = on_device(name)
    results = []
    with sdpa_kernel(backend):
        for ours in (False, True):
            torch.manual_seed(3)
            torch.rand(5, device="cuda")
            options = {"method": Whole(), "recompute": True} if ours else {}
            function = scaled_dot_product_attention if ours else F.scaled_dot_product_attention
            try:
                y = function(*tensors, mask, dropout_p, **options)
            except RuntimeError:
                pytest.skip(f"torch has no {name} kernel here")
            if ours:
                assert y.grad_fn.name() == "_RecomputedAttentionBackward"
            torch.rand(7, device="cuda")  # what the model draws behind
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
            grads = torch.autograd.grad(y, tensors, dy)
            results.append((y.detach(), grads, torch.cuda.get_rng_state()))
    (y, expected, state), (ours, found, after) = results
    assert torch.equal(y, ours)
    assert torch.equal(state, after)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_errors_on_a_device(name):
    backend, tensors, mask = on_device(name)
    with sdpa_kernel(backend):
        try:
            y = F.scaled_dot_product_attention(*tensors, mask)
        except RuntimeError:
            pytest.skip(f"torch has no {name} kernel here")
        dy = torch.randn_like(y)
        exact = torch.autograd.grad(y, tensors, dy)
        for bits, allowed in ((8, 0.03), (4, 0.45)):
            options = {"bits": bits, "recompute": True}
            y = groupquant.scaled_dot_product_attention(*tensors, mask, **options)
            for one, other in zip(torch.autograd.grad(y, tensors, dy), exact, strict=True):
                assert relative_error(one, other) < allowed


@pytest.mark.usefixtures("collected")
@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_in_a_captured_graph(dropout_p):
    """Without dropout the kernel runs again in each replay; with it the form is the kept one."""
    _, tensors, _ = on_device("flash")
    names = []

    def both():
        y = groupquant.scaled_dot_product_attention(*tensors, None, dropout_p, bits=8)
        names.append(y.grad_fn.name())
        return torch.autograd.grad(y, tensors, torch.ones_like(y))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    assert names[0] == "_RecomputedAttentionBackward"
    assert names[-1] == ("_KeptAttentionBackward" if dropout_p else names[0])
    graph.replay()
    first = [x.clone() for x in found]
    graph.replay()
    assert all(x.isfinite().all() for x in found)
    # Rounding draws anew at each replay, and so do masks.
    distance = max(relative_error(a, b) for a, b in zip(first, found, strict=True))
    assert distance > 0
    if not dropout_p:
        y = F.scaled_dot_product_attention(*tensors)
        expected = torch.autograd.grad(y, tensors, torch.ones_like(y))
        # A gradient of ones leaves query and key next to none.
        assert relative_error(found[2], expected[2]) < 0.03


@pytest.mark.gpu
def test_a_compiled_region_with_dropout_keeps(fresh_compiler):
    _, tensors, _ = on_device("flash")

    def run(q, k, v):
        return groupquant.scaled_dot_product_attention(q * 1, k * 1, v * 1, dropout_p=0.2, bits=4)

    y = torch.compile(run, fullgraph=True)(*tensors)
    grads = torch.autograd.grad(y.square().sum(), tensors)
    assert all(x.isfinite().all() for x in grads)


def test_no_heads_at_all_give_what_torch_gives():
    tensors = [torch.randn(2, 0, 16, 8, requires_grad=True) for _ in range(3)]
    y = groupquant.scaled_dot_product_attention(*tensors, is_causal=True, bits=8)
    assert y.shape == (2, 0, 16, 8)
    assert all(x.shape == y.shape for x in torch.autograd.grad(y.sum(), tensors))


# ---- what stands in the place of torch's function ------------------------------------------------

_attention = F.scaled_dot_product_attention


def _in_its_place(query, key, value, **options):
    """As a ring: it calls torch's own, and gives something else."""
    return 2 * _attention(query, key, value, **options)


class _Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_stands_in_its_place_runs(compiled, monkeypatch, fresh_compiler):
    plain = _Attending()
    model = copy.deepcopy(plain)
    packlight.convert(model, GroupQuant(8, rounding="nearest"))
    x = torch.randn(2, 16, 64)
    expected = plain(x)
    expected.square().mean().backward()
    monkeypatch.setattr(F, "scaled_dot_product_attention", _in_its_place)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    y = run(x)
    torch.testing.assert_close(y, 2 * expected)
    (y / 2).square().mean().backward()
    weight = model.project.weight
    assert relative_error(weight.grad, plain.project.weight.grad) < 0.02


def test_a_call_of_ours_leaves_it_to_what_stands_there(monkeypatch):
    heads = torch.randn(3, 2, 2, 16, 32, requires_grad=True)
    truth = _attention(*heads)
    monkeypatch.setattr(F, "scaled_dot_product_attention", _in_its_place)
    torch.testing.assert_close(groupquant.scaled_dot_product_attention(*heads), 2 * truth)
