"""Attention, norms and experts that a model writes out: what calls keep, and their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from packlight import DoubleBackwardError, FixedPoint, GroupQuant, ModifiedWeightError, convert
from packlight.layers.extremes import amax, maximum, minimum
from tests.helpers import kept_bytes, pack_bytes, relative_error

NEAREST = GroupQuant(bits=8, group_size=32, rounding="nearest")
BATCH, HEADS, TOKENS, WIDTH = 2, 4, 64, 16
HEAD = BATCH * HEADS * TOKENS * WIDTH  # elements of query, key or value
PACKS = 3 * pack_bytes(HEAD, 8, 32)


class Code(nn.Module):
    """A function as a model's own code."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, *args):
        return self.function(self, *args)


def inputs(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def run(model, xs):
    y = model(*(x * 1 for x in xs))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, [*xs, *model.parameters()], dy)


def compare(model, xs, tolerance=0.03, method=NEAREST):
    """Converts a model; results are equal, gradients near. Gives what it keeps of its inputs."""
    y, expected = run(model, xs)
    convert(model, method, functional=True)
    ours, found = run(model, xs)
    assert torch.equal(ours, y)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < tolerance
    return kept_bytes(lambda: model(*(x * 1 for x in xs)))


QKV = [(BATCH, HEADS, TOKENS, WIDTH)] * 3
MASK = torch.full((1, 1, TOKENS, TOKENS), -math.inf).triu(1)


def written_out(self, q, k, v):
    return F.softmax(q @ k.mT / math.sqrt(WIDTH) + MASK, dim=-1) @ v


def capped(self, q, k, v):
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * 0.25 / 20.0) * 20.0
    return torch.softmax(scores.masked_fill(MASK < 0, -1e9), -1).matmul(v)


def in_place(self, q, k, v):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
    scores *= 0.25
    scores += MASK
    return torch.einsum("bhqk,bhkd->bhqd", nn.Softmax(dim=-1)(scores), v)


def selected(self, q, k, v):
    scores = torch.where(MASK == 0, q @ k.mT * 0.25, torch.tensor(-1e9))
    return scores.softmax(-1) @ v


def with_sinks(self, q, k, v):
    scores = q @ k.mT * 0.25 + MASK
    sinks = self.sinks.reshape(1, -1, 1, 1).expand(BATCH, -1, TOKENS, -1)
    joined = torch.cat([scores, sinks], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    return F.softmax(joined, dim=-1)[..., :-1] @ v


def test_scores_with_sinks_are_computed_from_packs():
    """And so is the slice of the probabilities that leaves the sinks out."""
    model = Code(with_sinks, sinks=torch.randn(HEADS))
    kept = compare(model, inputs(*QKV))
    rows = 4 * BATCH * HEADS * TOKENS  # the greatest score of each, and its place
    assert kept <= PACKS + 2 * MASK.nbytes + 3 * rows + model.sinks.nbytes


def test_what_is_joined_to_scores_is_not_kept_where_it_is_large():
    def code(self, q, k, v, other):
        return F.softmax(torch.cat([q @ k.mT * 0.25, other], dim=-1), dim=-1)[..., :TOKENS] @ v

    other = (BATCH, HEADS, TOKENS, TOKENS)
    kept = compare(Code(code), inputs(*QKV, other))
    both = BATCH * HEADS * TOKENS * 2 * TOKENS
    assert kept <= PACKS + pack_bytes(both, 8, 32) + pack_bytes(both // 2, 8, 32)


def _written(when, write):
    """Attention whose mask is written to after the scores or after the probabilities."""

    def code(self, q, k, v):
        mask = torch.zeros(TOKENS, TOKENS)
        mask[:, TOKENS // 2 :] = -3
        scores = q @ k.mT * 0.25 + mask
        if when == "scores":
            write(mask)
        probabilities = scores.softmax(-1)
        if when == "probabilities":
            write(mask)
        return probabilities @ v

    return Code(code)


@pytest.mark.parametrize("write", [Tensor.zero_, lambda mask: mask[:, :8].fill_(1)])
def test_a_mask_that_is_written_to(write):
    """Before a softmax has read the scores they are not computed from it; after, it says so."""
    compare(_written("scores", write), inputs(*QKV))
    model, xs = _written("probabilities", write), inputs(*QKV)
    run(model, xs)  # torch keeps no mask that it adds
    convert(model, NEAREST)
    with pytest.raises(ModifiedWeightError, match="a mask, a bias or a weight"):
        run(model, xs)


def test_a_mask_of_inference_mode():
    with torch.inference_mode():
        mask = MASK.clone()

    def code(self, q, k, v):
        return (q @ k.mT * 0.25 + mask).softmax(-1) @ v

    compare(Code(code), inputs(*QKV))


@pytest.mark.parametrize("code", [written_out, capped, in_place, selected])
def test_scores_and_their_softmax_are_computed_from_packs(code):
    kept = compare(Code(code), inputs(*QKV))
    assert kept <= PACKS + 2 * MASK.nbytes  # and no more of the size of the scores


def test_a_bias_of_positions_is_kept_once_for_all_layers():
    def layers(self, q, k, v):
        bias = self.table[None].expand(1, -1, -1, -1) * 1
        for _ in range(2):
            v = F.softmax(q @ k.mT * 0.25 + bias, -1) @ v
        return v

    table = torch.randn(HEADS, TOKENS, TOKENS)
    kept = compare(Code(layers, table=table), inputs(*QKV))
    assert kept <= 5 * PACKS / 3 + table.nbytes  # of q, and of k and v in each layer


def test_a_product_with_alibi():
    alibi = torch.linspace(-1, 0, TOKENS).view(1, 1, TOKENS).expand(BATCH * HEADS, 1, TOKENS) * 1

    def bloom(self, q, k, v):
        scores = alibi.baddbmm(batch1=q, batch2=k.mT, beta=1.0, alpha=0.25)
        return torch.bmm(F.softmax(scores, dim=-1, dtype=torch.float32), v)

    kept = compare(Code(bloom), inputs(*[(BATCH * HEADS, TOKENS, WIDTH)] * 3))
    assert kept <= PACKS + alibi.nbytes


def test_a_softmax_of_other_scores_keeps_a_pack_of_its_result():
    def code(self, x, v):
        return F.softmax(x, dim=-1) @ v

    xs = inputs((BATCH, HEADS, TOKENS, TOKENS), QKV[0])
    kept = compare(Code(code), xs)
    assert kept == pack_bytes(xs[0].numel(), 8, 32) + PACKS // 3  # the product shares it


@pytest.mark.parametrize("heads", [1, HEADS])
def test_torch_s_composition_of_attention_runs_once_more(heads):
    def code(self, q, k, v):
        bias = None if heads == 1 else self.bias * 1
        return F.scaled_dot_product_attention(q, k, v, bias)

    shapes = (QKV[0], *[(BATCH, heads, TOKENS, WIDTH)] * 2)
    parameters = {} if heads == 1 else {"bias": torch.randn(1, HEADS, TOKENS, TOKENS)}
    model = Code(code, **parameters)
    kept = compare(model, inputs(*shapes))
    packs = sum(pack_bytes(math.prod(shape), 8, 32) for shape in shapes)
    bias = 4 * HEADS * TOKENS * TOKENS if parameters else 0  # as it is: a mask may be in it
    assert kept == packs + bias


def biased(self, q, k, v, bias):
    return F.scaled_dot_product_attention(q, k, v, bias.mul(2).masked_fill(self.mask, self.low))


@pytest.mark.parametrize("low", [-math.inf, -1e4, torch.finfo(torch.float32).min])
def test_a_bias_as_large_as_the_scores_is_packed_with_bits_of_its_mask(low):
    model = Code(biased)
    model.low, model.mask = low, MASK < 0
    model.mask[..., 0, :] = low == -math.inf  # where nothing is left all keys count alike, or NaN
    scores = (BATCH, HEADS, TOKENS, TOKENS)
    if low == -math.inf:
        model.mask[..., 0, 0] = False
    kept = compare(model, inputs(*QKV, scores))
    rows, elements = BATCH * HEADS * TOKENS, BATCH * HEADS * TOKENS**2
    mask = model.mask.numel()  # of masked_fill
    assert kept == PACKS + pack_bytes(elements, 8, 32) + elements // 8 + 4 * rows + mask


@pytest.mark.parametrize("weights", [False, True])
def test_multi_head_attention_keeps_a_pack_of_its_input(weights):
    layer = nn.MultiheadAttention(64, 4, batch_first=True)

    def code(self, x):
        y, probabilities = layer(x, x, x, need_weights=weights)
        return y if probabilities is None else y + probabilities.sum()

    model = Code(code)
    model.layer = layer
    kept = compare(model, inputs((BATCH, TOKENS, 64)))
    assert kept <= pack_bytes(BATCH * TOKENS * 64, 8, 32) + sum(
        p.nbytes for p in layer.parameters()
    )


def test_a_transformer_layer_of_torch_s_is_covered():
    model = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    x = torch.randn(BATCH, TOKENS, 64, requires_grad=True)
    weights = sum(p.nbytes for p in model.parameters())
    plain = kept_bytes(lambda: model(x * 1))
    y, expected = run(model, [x])
    convert(model, functional=True)
    ours, found = run(model, [x])
    assert torch.equal(ours, y)
    assert all(relative_error(a, b) < 0.3 for a, b in zip(found, expected, strict=True))
    assert kept_bytes(lambda: model(x * 1)) - weights < (plain - weights) / 6


def test_dropout_that_cannot_be_drawn_again_leaves_attention_to_torch():
    model = Code(lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    xs = inputs(*[(BATCH, HEADS, TOKENS, 12)] * 3)
    torch.manual_seed(3)
    y, expected = run(model, xs)
    convert(model, NEAREST, functional=True)
    torch.manual_seed(3)
    ours, found = run(model, xs)
    assert torch.equal(ours, y)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- Products.


def test_a_product_with_a_parameter_is_a_linear_layer():
    xs = inputs((TOKENS, 64))
    model = Code(
        lambda self, x: torch.addmm(self.bias, x, self.weight),
        weight=torch.randn(64, 32),
        bias=torch.randn(32),
    )
    _y, expected = run(model, xs)
    kept = compare(model, xs)
    assert kept == pack_bytes(TOKENS * 64, 8, 32) + model.weight.nbytes
    _, found = run(model, xs)
    assert torch.equal(found[0], expected[0])  # dx is exact
    assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bjk->bik", [(3, 8, 16), (3, 16, 32)]),
        ("...qhd,...khd->...hqk", [(2, 8, 4, 16), (2, 8, 4, 16)]),
        ("bhxd,byhd->bhyx", [(2, 4, 8, 16), (2, 8, 4, 16)]),
        ("bi,bj->bij", [(16, 32), (16, 32)]),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_an_equation_of_two_tensors_keeps_packs(equation, shapes, listed):
    def code(self, a, b):
        return torch.einsum(equation, [a, b]) if listed else torch.einsum(equation, a, b)

    kept = compare(Code(code), inputs(*shapes))
    assert kept == sum(pack_bytes(math.prod(shape), 8, 32) for shape in shapes)


@pytest.mark.parametrize("equation", ["bij,bjk->ik", "ii,ij->j", "bij,bjk->bi"])
def test_other_equations_are_torch_s_or_right(equation):
    shape = (16, 16) if equation[:2] == "ii" else (2, 16, 16)
    compare(
        Code(lambda self, a, b: torch.einsum(equation, a, b)),
        inputs(shape, shape[-2:] if shape[0] == 16 else shape),
    )


def test_experts_by_groups_of_rows():
    if not hasattr(F, "grouped_mm"):
        pytest.skip("torch.nn.functional.grouped_mm is of torch 2.10 and later")
    offsets = torch.tensor([20, 20, 64], dtype=torch.int32)

    def code(self, x):
        return F.grouped_mm(F.grouped_mm(x, self.up, offs=offsets), self.down.mT, offs=offsets)

    up, down = torch.randn(3, 64, 32), torch.randn(3, 64, 32)
    model = Code(code, up=up, down=down)
    kept = compare(model, inputs((64, 64)))
    assert kept == pack_bytes(64 * 64, 8, 32) + pack_bytes(64 * 32, 8, 32) + up.nbytes + down.nbytes


def adapted_experts(self, x):
    """As PEFT folds the adapter of a stack of experts into its weight."""
    weight = torch.baddbmm(self.weight, self.second, self.first, alpha=0.5)
    offsets = torch.tensor([20, 20, 64], dtype=torch.int32)
    return F.grouped_mm(x, weight.mT, offs=offsets)


def adapted_matrix(self, x):
    weight = torch.addmm(self.weight[0], self.second[0], self.first[0], alpha=0.5)
    return x @ weight.mT


def several_adapters(self, x):
    delta = torch.einsum("eor,eri->eoi", self.second, self.first) * 0.5
    delta = delta + torch.bmm(self.second * 0.1, self.first)
    return torch.bmm(x[None].expand(3, -1, -1), (self.weight + delta).mT)


@pytest.mark.parametrize("code", [adapted_experts, adapted_matrix, several_adapters])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_adapted_weight_is_computed_again(code, frozen):
    """Nothing of the weight's size is kept, and the gradient of the rows is exact."""
    if code is adapted_experts and not hasattr(F, "grouped_mm"):
        pytest.skip("torch.nn.functional.grouped_mm is of torch 2.10 and later")
    shapes = {"weight": (3, 32, 64), "second": (3, 32, 2), "first": (3, 2, 64)}
    model = Code(code, **{name: torch.randn(shape) for name, shape in shapes.items()})
    xs = inputs((64, 64))
    plain = torch.autograd.grad(code(model, xs[0]).square().sum(), xs)[0]
    model.weight.requires_grad_(not frozen)
    method = GroupQuant(bits=4, group_size=32, rounding="nearest")
    y = code(model, xs[0])
    convert(model, method, functional=True)
    own = sum(p.nbytes for p in model.parameters())
    small = 2 * model.second.nbytes  # what torch keeps of products of small factors
    rows = (3 if code is several_adapters else 1) * 64 * 64
    assert kept_bytes(lambda: model(xs[0] * 1)) <= own + small + pack_bytes(rows, 4, 32)
    ours = model(xs[0] * 1)
    assert torch.equal(ours, y)
    found = torch.autograd.grad(ours.square().sum(), xs)[0]
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-3)


def test_an_adapted_weight_whose_parts_changed_is_refused():
    shapes = {"weight": (3, 32, 64), "second": (3, 32, 2), "first": (3, 2, 64)}
    model = Code(adapted_matrix, **{name: torch.randn(shape) for name, shape in shapes.items()})
    convert(model, NEAREST, functional=True)
    y = model(*inputs((64, 64)))
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(ModifiedWeightError, match="write to a copy"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(BATCH, 1, WIDTH), (BATCH, TOKENS, 1), (BATCH, TOKENS, WIDTH)])
def test_a_gate_of_any_shape(shape):
    xs = inputs((BATCH, TOKENS, WIDTH), shape)
    kept = compare(Code(lambda self, x, gate: x * (1 + gate)), xs)
    gate = math.prod(shape)
    small = gate * 16 <= xs[0].numel()
    assert kept == pack_bytes(xs[0].numel(), 8, 32) + (
        4 * gate if small else pack_bytes(gate, 8, 32)
    )


# --- Functions of one tensor, and norms.


def rms_norm(self, x):
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_a_norm_written_out_keeps_one_pack():
    x = inputs((TOKENS, 64))
    kept = compare(Code(rms_norm, weight=torch.randn(64)), x)
    pack = pack_bytes(TOKENS * 64, 8, 32)
    assert kept <= pack + 4 * 4 * TOKENS + 2 * 4 * 64


@pytest.mark.parametrize(
    "code",
    [
        lambda self, x: x.square(),
        lambda self, x: x**3,
        lambda self, x: torch.exp(x),
        lambda self, x: torch.erf(x),
        lambda self, x: F.normalize(x, dim=-1),
        lambda self, x: x / x.norm(dim=-1, keepdim=True),
        lambda self, x: x / torch.linalg.vector_norm(x, dim=(0, 1), keepdim=True),
        lambda self, x: x / (1 + x.square().sum(-1, keepdim=True)),
    ],
)
def test_functions_of_one_tensor(code):
    x = inputs((BATCH, TOKENS, 64))
    plain = kept_bytes(lambda: code(None, x[0] * 1))
    assert compare(Code(code), x, 0.05) < plain / 2


@pytest.mark.parametrize("width", [8, 16, 24])
def test_narrow_norms_are_packed(width):
    x = inputs((BATCH, TOKENS, width))
    kept = compare(nn.LayerNorm(width), x)
    rows = BATCH * TOKENS
    assert kept == pack_bytes(rows * width, 8, 32) + 4 * rows + 2 * 4 * width


class Normed(nn.LayerNorm):
    """As ConvNeXt has it."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 1)).permute(0, 2, 1)


class OwnLinear(nn.Linear):
    """A subclass with nothing of its own."""


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Normed(64), (BATCH, 64, TOKENS)),
        (lambda: OwnLinear(64, 64), (BATCH, TOKENS, 64)),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 16, 3)), (BATCH, 16, TOKENS)),
    ],
)
def test_subclasses_of_torch_s_layers_are_the_model_s_code(make, shape):
    layer = make()
    model = Code(lambda self, x: layer(x))
    model.layer = layer
    plain = kept_bytes(lambda: model(torch.randn(shape, requires_grad=True) * 1))
    x = inputs(shape)
    saved = 0.6 * x[0].nbytes
    assert compare(model, x) <= plain - saved


# --- Exact ones.


def test_extremes_are_exact():
    x, y = (torch.randint(-3, 4, (6, 40)).float().requires_grad_() for _ in range(2))
    for ours, torch_s in (
        (lambda: amax(x * 1, 1), lambda: torch.amax(x * 1, 1)),
        (
            lambda: amax(x * 1, (0, 1), keepdim=True),
            lambda: torch.amax(x * 1, (0, 1), keepdim=True),
        ),
        (lambda: maximum(x * 1, y), lambda: torch.maximum(x * 1, y)),
        (lambda: minimum(x * 1, y[:1]), lambda: torch.minimum(x * 1, y[:1])),
    ):
        a, b = ours(), torch_s()
        assert torch.equal(a, b)
        dy = torch.randn_like(a)
        pairs = [torch.autograd.grad(z, [x, y], dy, allow_unused=True) for z in (a, b)]
        for one, two in zip(*pairs, strict=True):
            assert (one is None and two is None) or torch.equal(one, two)
    assert kept_bytes(lambda: maximum(x * 1, y)) < 2 * x.nbytes / 8


# --- The contract.


@pytest.mark.parametrize("code", [written_out, rms_norm])
def test_a_second_derivative_raises(code):
    model = Code(code, **({"weight": torch.randn(64)} if code is rms_norm else {}))
    convert(model, NEAREST, functional=True)
    xs = inputs(*(QKV if code is written_out else [(TOKENS, 64)]))
    y = model(*xs).sum()
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(y, xs, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_a_checkpoint(reentrant):
    model = Code(written_out)
    convert(model, NEAREST, functional=True)
    xs = inputs(*QKV)
    expected = torch.autograd.grad(model(*xs).square().sum(), xs)
    y = checkpoint(model, *xs, use_reentrant=reentrant)
    found = []
    if reentrant:
        y.square().sum().backward()
        found = [x.grad for x in xs]
    else:
        found = torch.autograd.grad(y.square().sum(), xs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("code", [written_out, capped])
def test_under_autocast(code):
    model, xs = Code(code), inputs(*QKV)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = run(model, xs)
        convert(model, NEAREST, functional=True)
        ours, found = run(model, xs)
    assert torch.equal(ours, y)
    assert all(relative_error(a, b) < 0.05 for a, b in zip(found, expected, strict=True))


def test_without_gradients_nothing_is_kept():
    model = Code(written_out)
    convert(model, NEAREST, functional=True)
    with torch.no_grad():
        assert kept_bytes(lambda: model(*inputs(*QKV))) == 0


def test_unbiased_at_4_bits():
    """The mean of products' gradients over draws is the exact one, within its standard error."""
    a, b = inputs((8, 32, 64), (8, 64, 32))
    model = Code(lambda self, a, b: torch.bmm(a, b))
    _, (exact, _) = run(model, (a, b))
    convert(model, GroupQuant(bits=8, group_size=32), functional=True)
    draws = torch.stack([run(model, (a, b))[1][0] for _ in range(64)])
    error = (draws.mean(0) - exact).norm()
    assert error < 2 * draws.std(0).norm() / 8


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_runs_once_more_in_a_checkpoint(reentrant):
    model = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    convert(model, NEAREST, functional=True)
    x = torch.randn(BATCH, TOKENS, 64, requires_grad=True)
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# ---- masks in what is added ----------------------------------------------------------------------


def _scores(q, k):
    return q @ k.transpose(-1, -2)


ADDED = {
    "to torch's own": lambda b, q, k, v, m: F.scaled_dot_product_attention(q, k, v, b + m),
    "as one": lambda b, q, k, v, m: (_scores(q, k) + (b + m)).softmax(-1) @ v,
    "one by one": lambda b, q, k, v, m: (_scores(q, k) + m + b).softmax(-1) @ v,
    "of the size of scores": lambda b, q, k, v, m: (
        (_scores(q, k) + (b + m).expand(BATCH, -1, -1, -1).clone()).softmax(-1) @ v
    ),
    "before a scale": lambda b, q, k, v, m: ((_scores(q, k) + b + m) * 0.5).softmax(-1) @ v,
    "behind a cap": lambda b, q, k, v, m: (
        (torch.tanh(_scores(q, k) / 20) * 20 + b + m).softmax(-1) @ v
    ),
    "filled": lambda b, q, k, v, m: (
        (_scores(q, k) + b).masked_fill(m < 0, m.min().item()).softmax(-1) @ v
    ),
    "chosen": lambda b, q, k, v, m: torch.where(m < 0, m, _scores(q, k) + b).softmax(-1) @ v,
    "by one operator": lambda b, q, k, v, m: (
        torch.baddbmm((b + m).expand(BATCH, -1, -1, -1).flatten(0, 1), *_flat(q, k))
        .softmax(-1)
        .bmm(v.flatten(0, 1))
    ),
}


def _flat(q, k):
    return q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)


@pytest.mark.parametrize("least", [-1e4, torch.finfo(torch.float32).min, -math.inf])
@pytest.mark.parametrize("way", ADDED)
def test_a_mask_leaves_what_stands_beside_it(way, least):
    """Its numbers are large, and a group of codes that had one of them would have no other."""
    masks = torch.zeros(TOKENS, TOKENS).masked_fill(torch.ones(TOKENS, TOKENS).triu(1) > 0, least)
    model = Code(
        lambda self, *xs: ADDED[way](self.bias, *xs, masks),
        bias=0.1 * torch.randn(1, HEADS, TOKENS, TOKENS),
    )
    compare(model, inputs(*QKV))


def standardised(self, x):
    """A convolution whose weight a batch norm standardises, as those of BiT and NFNets."""
    weight = F.batch_norm(
        self.weight.reshape(1, len(self.weight), -1), None, None,
        weight=None if self.gain is None else self.gain * 0.5, training=True, momentum=0.0,
    ).reshape_as(self.weight)  # fmt: skip
    return F.conv2d(x, weight, padding=1)


CHANNELS = 32


@pytest.mark.parametrize("methods", [NEAREST, (FixedPoint(4), NEAREST)], ids=["pack", "codes"])
@pytest.mark.parametrize("gain", [False, True])
def test_a_standardised_weight_is_computed_again(methods, gain):
    parameters = {"weight": torch.randn(CHANNELS, CHANNELS, 3, 3)}
    model = Code(standardised, **parameters, **({"gain": torch.rand(CHANNELS)} if gain else {}))
    model.gain = model.gain if gain else None
    x = torch.randn(2, CHANNELS, 8, 8, requires_grad=True)
    before = kept_bytes(lambda: model(x * 1))
    y, (dx, *_) = run(model, [x])
    convert(model, methods, rest=None)
    ours, (found, *_) = run(model, [x])
    assert torch.equal(ours, y)
    assert torch.equal(found, dx)  # by the very weight
    kept = kept_bytes(lambda: model(x * 1))
    statistics = 8 * CHANNELS + (4 * CHANNELS if gain else 0)
    # The weight itself counts, which the model holds.
    assert kept == model.weight.nbytes + pack_bytes(x.numel(), 8, 32) + statistics
    assert before > kept + model.weight.nbytes  # torch keeps the standardised one as well
    y = model(x * 1)
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


def test_a_quotient_counts_an_error_by_its_divisor_once():
    """Attention without a softmax: where a row's sum is small, so is what is divided by it."""
    draws = torch.Generator().manual_seed(2)
    values = torch.randn(TOKENS, 8, generator=draws)  # groups of four rows
    small = torch.logspace(-6, 0, TOKENS)[torch.randperm(TOKENS, generator=draws), None]
    x = [(values * small).requires_grad_(), small.requires_grad_()]
    model = Code(lambda self, a, b: a / b)
    _, (_, exact) = run(model, x)
    before = kept_bytes(lambda: model(*(y * 1 for y in x)))
    assert compare(model, x, 0.03) == small.nbytes + pack_bytes(values.numel(), 8, 32) < before / 2
    _, (_, ours) = run(model, x)
    assert ((ours - exact).abs() <= 0.1 * values.abs().max() / small).all()
