"""`saving`: what is packed, what stays exact, how often, and that no gradient is ever wrong."""

import fnmatch
import gc
import re
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import TensorWeakRef

import packlight
import packlight.fewbit
import packlight.groupquant as gq
import packlight.inverted
from packlight import _torch, sharing
from packlight._seeds import operands
from packlight._torch import graph
from packlight.errors import DoubleBackwardError, InputError
from packlight.groupquant import GroupQuant
from packlight.profile import MemoryReport, profile
from packlight.saving import lossless, rules, saving, tensors
from tests.helpers import relative_error

FOUR = GroupQuant(bits=4, code="minmax")
EIGHT = GroupQuant(bits=8, code="minmax")
NEAREST = GroupQuant(bits=8, rounding="nearest")


def packed(elements: int, bits: int = 4) -> int:
    """Bytes of a pack in groups of 128."""
    return elements * bits // 8 + elements // 128 * 4


def kept(model, *inputs, method=FOUR, **options) -> MemoryReport:
    with saving(method, **options):
        return profile(model, *inputs)


def floats(report: MemoryReport) -> list[tuple[str, int]]:
    """What is kept in floating point, scalars apart."""
    rows = [row for row in report.rows if "float" in row.dtype and row.bytes > 8]
    return [(row.operation, row.bytes) for row in rows]


def pack_bytes(report: MemoryReport) -> int:
    return sum(row.bytes for row in report.rows if row.dtype in ("uint8", "int32"))


def activation(*shape: int, dtype=torch.float32) -> Tensor:
    """A tensor with a history: leaves are never packed."""
    return torch.randn(*shape, dtype=dtype, requires_grad=True) * 1


def gradients(model, x: Tensor, method=None, **options) -> Tensor:
    """All gradients of the parameters, in one vector; the same random numbers in every call."""
    packlight.manual_seed(1)
    if method is None:
        y = model(x)
    else:
        with saving(method, **options):
            y = model(x)
    grads = torch.autograd.grad(y.square().mean(), list(model.parameters()))
    return torch.cat([grad.flatten().float() for grad in grads])


def error(model, x: Tensor, method: GroupQuant, **options) -> float:
    exact = gradients(model, x)
    return relative_error(gradients(model, x, method, **options), exact)


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Recurrent(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.lstm = nn.Linear(width, width), nn.LSTM(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.first(x))[0]


def mlp() -> nn.Module:
    layers = [nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64)]
    return nn.Sequential(*layers)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(784, 10),
    )  # fmt: skip


# --- How much is kept, and how often.


def test_a_gpt_block_keeps_a_third():
    width, tokens = 128, 256
    block = Block(width).bfloat16()
    x = activation(4, 64, width, dtype=torch.bfloat16)
    unit = width * tokens

    def model(x):
        return block(x * 1)  # as a block before it would give it

    exact = profile(model, x).activation_bytes
    assert 32 * unit < exact < 32.3 * unit
    report = kept(model, x)
    # Inputs of both norms and of qkv and fc1, and fc1's and GELU's outputs; q, k, v, attention's
    # output, which the projection shares.
    expected = packed(4 * unit + 8 * unit) + packed(4 * unit, 8)
    assert pack_bytes(report) == expected == 10.5 * unit
    statistics = report.activation_bytes - expected
    assert statistics < 0.2 * unit
    assert dict(floats(report)).keys() == {
        "NativeLayerNormBackward0",
        "ScaledDotProductFlashAttentionForCpuBackward0",
    }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (4, 16, 128)], ids=["matrix", "batched"])
def test_readers_of_one_tensor_share_its_pack(shape, autocast):
    layers = [nn.Linear(128, 128) for _ in range(3)]
    x = activation(*shape)

    def model(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return [layer(x) for layer in layers]

    report = kept(model, x)
    assert pack_bytes(report) == packed(x.numel())
    assert {len(row.holders) for row in report.rows if row.dtype == "uint8"} == {3}
    # Casts of the weights, which autocast keeps for all uses.
    assert floats(report) == [("AddmmBackward0", 128 * 128 * 2)] * 3 * autocast


def test_views_of_a_whole_tensor_share_its_pack():
    x = activation(32, 128)
    report = kept(lambda x: [x.sin(), x.t().sin(), x.view(-1).cos(), x.view(8, 4, 128).sin()], x)
    assert pack_bytes(report) == packed(x.numel())


def test_other_views_are_packed_by_their_own_elements():
    x = activation(32, 256)
    report = kept(lambda x: [x[:, :128].sin(), x.unsqueeze(0).expand(64, 32, 256).sin()], x)
    assert pack_bytes(report) == packed(32 * 128) + packed(32 * 256)


def test_a_tensor_modified_in_between_is_packed_again():
    def model(x):
        first = x.sin()
        x.add_(1)
        return first + x.sin()

    x = activation(32, 128)
    assert pack_bytes(kept(model, x)) == 2 * packed(x.numel())


def test_more_bits_are_a_pack_of_their_own_and_fewer_are_not():
    x = activation(32, 128)
    eight_first = kept(lambda x: [x.tanh().sin(), x.cos()], x, overrides={"cos": EIGHT})
    assert pack_bytes(eight_first) == packed(x.numel(), 4) + packed(x.numel(), 8)
    both = kept(lambda x: [x.sin(), x.cos()], x, overrides={"cos": EIGHT})
    assert pack_bytes(both) == packed(x.numel(), 4) + packed(x.numel(), 8)
    one = kept(lambda x: [x.cos(), x.sin()], x, overrides={"cos": EIGHT})
    assert pack_bytes(one) == packed(x.numel(), 8)


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_packlight_layer_and_a_torch_layer_share_a_pack(ours_first):
    weight, layer = torch.randn(128, 128, requires_grad=True), nn.Linear(128, 128)
    x = activation(4, 16, 128)

    def model(x):
        parts = [lambda: gq.linear(x, weight, code="minmax"), lambda: layer(x)]
        return [part() for part in (parts if ours_first else parts[::-1])]

    report = kept(model, x)
    assert pack_bytes(report) == packed(x.numel())
    assert not floats(report)


def test_a_torch_layer_reads_what_a_packlight_producer_keeps():
    layer = nn.Linear(128, 128)
    x = activation(4, 16, 128)
    report = kept(lambda x: layer(gq.gelu(x, code="minmax")), x)
    assert pack_bytes(report) == packed(x.numel())
    assert not floats(report)
    x = x.detach().requires_grad_()

    def weight_gradient(function):
        return torch.autograd.grad(function(x).sum(), layer.weight)[0]

    with saving(FOUR):
        approximate = weight_gradient(lambda x: layer(gq.gelu(x, bits=8)))
    torch.testing.assert_close(
        approximate, weight_gradient(lambda x: layer(F.gelu(x))), rtol=0.02, atol=0.1
    )


def test_what_packlight_layers_keep_stays_as_it_is():
    layer = nn.Linear(128, 128)
    x = activation(4, 16, 128)
    codes = kept(lambda x: packlight.fewbit.gelu(x).sum(), x)
    assert (
        codes.activation_bytes
        == profile(lambda x: packlight.fewbit.gelu(x).sum(), x).activation_bytes
    )
    # An output that `inverted` needs exactly serves the next layer at no cost.
    report = kept(lambda x: layer(packlight.inverted.gelu(x)), x)
    ((_, size),) = floats(report)
    assert size == x.numel() * 4
    assert pack_bytes(report) == x.numel() // 8


def test_masks_take_one_bit_and_are_lossless():
    x = activation(64, 128)
    bytes_ = torch.randint(0, 2, (64, 128), dtype=torch.uint8)

    def model(x):
        dropped, _ = torch.native_dropout(x, 0.5, True)
        return torch.where(x > 0, dropped, x) + x * bytes_

    report = kept(model, x)
    assert report.activation_bytes - 8 <= 3 * 64 * 128 // 8
    packlight.manual_seed(3)
    (exact,) = torch.autograd.grad(model(x).sum(), x)
    packlight.manual_seed(3)
    with saving(GroupQuant(bits=2, code="minmax")):
        y = model(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], exact)
    codes = kept(lambda x: x * (x.detach().abs() * 100).to(torch.uint8), x)
    assert codes.activation_bytes >= x.numel()


# --- What stays exact.


def test_weights_data_and_small_tensors_stay_exact():
    layer = nn.Linear(128, 128)
    frozen = nn.Linear(128, 128).requires_grad_(False)
    table, data = torch.randn(64, 128), torch.randn(64, 128)

    def model(x):
        with torch.autocast("cpu", torch.bfloat16):
            cast = frozen(x)  # a copy of a weight, without history
        return [
            cast,
            x * table,
            layer(data),
            x[:1].sin(),
            F.linear(data[:, :64], layer.weight.t()[:, :64]),
        ]

    report = kept(model, activation(64, 128))
    assert pack_bytes(report) == 0
    # Only autocast's copy is a tensor that the forward pass adds.
    assert floats(report) == [("AddmmBackward0", 128 * 128 * 2)]


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(64, 64, dtype=torch.float64, requires_grad=True),
        torch.randn(64, 64, dtype=torch.complex64, requires_grad=True),
    ],
    ids=["float64", "complex"],
)
def test_other_dtypes_stay_exact(x):
    y = x * 1
    with saving(FOUR):
        z = y.sin()
    assert torch.equal(*torch.autograd.grad([z.abs().sum()] * 2, [x, y], retain_graph=True))
    assert pack_bytes(kept(lambda y: y.sin(), y)) == 0


def test_sparse_tensors_and_unknown_subclasses_stay_exact():
    class Marked(Tensor):
        pass

    sparse = torch.eye(64).to_sparse().requires_grad_()
    x = activation(64, 64)
    marked = (x * 1).as_subclass(Marked)
    with saving(FOUR, min_bytes=0):
        y = torch.sparse.mm(sparse * 1, x.detach()).sum() + marked.sin().as_subclass(Tensor).sum()
    (dx,) = torch.autograd.grad(y, x)
    assert torch.equal(dx, x.detach().cos())


LOSSES = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.zeros(64, dtype=torch.long)),
    "mse_loss": lambda x: F.mse_loss(x, torch.ones_like(x)),
    "bce": lambda x: F.binary_cross_entropy_with_logits(x, torch.ones_like(x)),
    "kl_div": lambda x: F.kl_div(x, torch.ones_like(x), reduction="sum"),
    "cosine": lambda x: F.cosine_embedding_loss(x, x.detach() + 1, torch.ones(64)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_softmax_and_losses_are_exact(loss):
    x = activation(64, 128)
    (exact,) = torch.autograd.grad(loss(x).sum(), x)
    with saving(GroupQuant(bits=2, code="minmax")):
        y = loss(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], exact)


def test_a_probability_that_softmax_keeps_is_not_packed_too():
    scores, values = activation(4, 64, 64), activation(4, 64, 64)
    report = kept(lambda s, v: s.softmax(-1) @ v, scores, values)
    assert floats(report) == [("SoftmaxBackward0", scores.numel() * 4)]
    assert pack_bytes(report) == packed(values.numel())


def test_attention_takes_masks_with_infinities():
    q = activation(2, 4, 64, 32)
    mask = torch.zeros(64, 64).masked_fill(torch.ones(64, 64).triu(1) > 0, float("-inf"))
    for attn_mask in (mask, mask == 0):
        y = F.scaled_dot_product_attention(q, q, q, attn_mask)
        (exact,) = torch.autograd.grad(y.square().sum(), q)
        with saving(FOUR):
            y = F.scaled_dot_product_attention(q, q, q, attn_mask)
        (ours,) = torch.autograd.grad(y.square().sum(), q)
        assert (ours - exact).norm() < 0.05 * exact.norm()


def test_attention_composed_of_matmuls_is_at_eight_bits_too():
    q, k, v = (activation(2, 4, 64, 32) for _ in range(3))

    def model(q, k, v):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)

    report = kept(model, q, k, v)
    assert pack_bytes(report) == packed(3 * q.numel(), 8)
    assert floats(report) == [("SafeSoftmaxBackward0", 2 * 4 * 64 * 64 * 4)]


def test_which_shapes_may_be_masks_of_attention():
    """Where the values cannot be looked at; meta stands for a GPU."""
    x = torch.empty(2, 3, 4, 4, device="meta")
    for mask in (x[0, 0], x[:, :1], x[:, :1].expand(2, 3, 4, 4), x[:, :1, :1]):
        assert tensors.may_be_a_mask(mask)
        assert not tensors.may_be_a_mask(torch.empty_like(mask, device="cpu"))
    for other in (x, x[0], x[0, 0, 0], x[0, 0, :2], x[0, :1], x[:, :1, None]):
        assert not tensors.may_be_a_mask(other)


def test_the_tables_of_operations_are_of_those_that_torch_has():
    nodes = {name: getattr(torch._C._functions, name) for name in graph.node_names()}
    slots = {}
    for name, node in nodes.items():
        slots.setdefault(lossless.operation_of(name), set()).update(graph._slot_names(node))
    tables = (
        lossless._AT_ZERO, lossless._AT_LIMITS, lossless._SHAPE_ONLY, lossless._LARGER,
        lossless._EXTREME, rules._UNBOUNDED, rules._COMPARING, rules._EXACT_SLOTS,
    )  # fmt: skip
    patterns = {pattern for table in tables for pattern in table}
    for pattern in patterns - (set() if HAS_AMINMAX else {"Aminmax"}):
        assert fnmatch.filter(slots, pattern), pattern
    for operation, exact in rules._EXACT_SLOTS.items():
        assert slots[operation] >= set(exact)
    # Pools and paddings that keep their input; those of MKL-DNN keep it in a layout of their own.
    sized = {name for name in slots if re.search(r"(Pool|Pad)\dD", name) and "self" in slots[name]}
    others = {name for name in sized if name.startswith("Mkldnn")} | {"MaxPool2D"}
    others |= {"Cummax", "Cummin", "Gather", "MaskedSelect", "Take"}
    assert sized - others == lossless._SHAPE_ONLY - others


def test_overrides_are_tried_in_order_before_the_defaults():
    x = activation(64, 128)

    def model(x):
        return [x.sigmoid().softmax(-1), x.tanh()]

    n = x.numel()
    overrides = {"SoftmaxBackward0": EIGHT, "Tanh*": None, "*": GroupQuant(bits=2, code="minmax")}
    report = kept(model, x, overrides=overrides)
    assert floats(report) == [("TanhBackward0", n * 4)]
    assert pack_bytes(report) == packed(n, 8) + packed(n, 2)
    by_function = kept(model, x, overrides={"softmax": FOUR, "tanh": None})
    assert floats(by_function) == [("TanhBackward0", n * 4)]


def test_skip_and_min_bytes():
    x, y = activation(64, 128), activation(64, 128)
    report = kept(lambda x, y: [x.sin(), y.sin()], x, y, skip=lambda tensor: tensor is y)
    assert pack_bytes(report) == packed(x.numel())
    assert pack_bytes(kept(lambda x: x.sin(), x, min_bytes=64 * 128 * 4 + 1)) == 0
    assert pack_bytes(kept(lambda x: x.sin(), x, min_bytes=64 * 128 * 4)) > 0


def test_statistics_of_a_function_stay_exact():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            rms = x.square().mean(-1, keepdim=True).rsqrt()
            ctx.save_for_backward(rms, x * rms)
            return x * rms

        @staticmethod
        def backward(ctx, grad):
            rms, y = ctx.saved_tensors
            return (grad - y * (grad * y).mean(-1, keepdim=True)) * rms

    x = activation(2048, 64)

    def model(x):
        return Scale.apply(x).sum()

    report = kept(model, x)
    assert floats(report) == [("ScaleBackward", 2048 * 4)]
    assert pack_bytes(report) == packed(x.numel())
    assert not pack_bytes(kept(model, x, overrides={"ScaleBackward": None}))


def test_arguments_are_checked():
    for bad in (None, 4, packlight.fewbit.FewBit()):
        with pytest.raises(InputError, match="GroupQuant"), saving(bad):
            pass
    for options, match in [
        ({"min_bytes": -1}, "min_bytes"),
        ({"skip": 3}, "skip"),
        ({"overrides": {"Gelu*": 4}}, "Gelu"),
        ({"overrides": {3: None}}, "3"),
        ({"overrides": ["Gelu*"]}, "mapping"),
    ]:
        with pytest.raises(InputError, match=match), saving(FOUR, **options):
            pass


# --- What comes back.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.t(),
        lambda x: x.view(4, 8, 4, 32).permute(0, 3, 1, 2),
        lambda x: x[3:, ::2],
        lambda x: x.unsqueeze(1).expand(32, 5, 128),
        lambda x: x[:, :1].expand(32, 128),
    ],
    ids=["whole", "transposed", "channels-last", "slice", "expanded", "broadcast"],
)
def test_unpacked_tensors_have_shape_strides_and_values(view, dtype):
    source = activation(32, 128, dtype=dtype)
    x = view(source)
    with saving(NEAREST, min_bytes=0):
        y = x.sin()
    with torch.no_grad():
        back = y.grad_fn._saved_self
        again = y.grad_fn._saved_self
    assert back.dtype == dtype
    assert back.shape == x.shape
    if x.is_contiguous() or x.numel() == source.numel():
        assert back.stride() == x.stride()
    assert torch.equal(back, again)
    assert (back - x).abs().max() <= (source.max() - source.min()) / 255


@pytest.mark.parametrize(
    ("make", "shape", "bounds"),
    [
        (mlp, (128, 64), (0.005, 0.06, 0.3)),
        (lambda: nn.Sequential(nn.Linear(64, 64), Block(64)), (4, 32, 64), (0.01, 0.1, 0.5)),
        (conv_net, (8, 3, 16, 16), (0.02, 0.12, 0.4)),
        (lambda: Recurrent(64), (16, 8, 64), (0.01, 0.1, 0.4)),
    ],
    ids=["mlp", "gpt", "conv", "lstm"],
)
def test_gradients_are_close(make, shape, bounds):
    model, x = make(), torch.randn(shape)
    errors = [error(model, x, GroupQuant(bits, code="minmax"), min_bytes=0) for bits in (8, 4, 2)]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert all(found < bound for found, bound in zip(errors, bounds, strict=True)), errors


def test_forward_values_do_not_change():
    block, x = Block(64), torch.randn(4, 32, 64)
    expected = block(x)
    with saving(GroupQuant(bits=2, code="minmax")):
        assert torch.equal(block(x), expected)


def test_the_weight_gradient_is_unbiased():
    layer, x = nn.Linear(64, 8), activation(32, 64)
    exact = gradients(layer, x)
    draws = []
    for _ in range(200):
        with saving(GroupQuant(bits=2, code="minmax"), min_bytes=0):
            loss = layer(x).square().mean()
        draws.append(torch.autograd.grad(loss, layer.weight)[0].flatten())
    found = torch.stack(draws)
    deviation = (found.mean(0) - exact[: 64 * 8]) / (found.std(0) / 200**0.5 + 1e-9)
    assert deviation.square().mean() < 1.5


def test_a_seed_repeats_the_run():
    model, x = mlp(), torch.randn(32, 64)
    assert torch.equal(gradients(model, x, FOUR), gradients(model, x, FOUR))


def test_a_nan_is_loud():
    x = activation(64, 128)
    with torch.no_grad():
        x[0, 0] = float("nan")
    with saving(FOUR):
        y = x.sin()
    assert torch.autograd.grad(y.sum(), x)[0][0].isnan().any()


def test_a_pack_holds_the_value_at_save_time_and_an_exact_tensor_raises():
    leaf = torch.randn(64, 128, requires_grad=True)
    x = leaf * 1
    before = x.detach().clone()
    with saving(NEAREST):
        y = x.sin()
        x.mul_(3)
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    torch.testing.assert_close(dx, before.cos(), rtol=0, atol=0.02)

    x = leaf * 1
    with saving(NEAREST, skip=lambda tensor: True):
        y = x.sin()
        x.mul_(3)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version 1.*0"):
        torch.autograd.grad(y.sum(), leaf)


def test_an_optimizer_step_between_forward_and_backward_raises():
    weight = torch.ones(128, requires_grad=True)
    x = activation(64, 128)
    with saving(FOUR):
        y = x * weight
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_a_graph_can_be_used_twice():
    model, x = mlp(), torch.randn(64, 64)
    with saving(FOUR):
        loss = model(x).square().mean()
    weights = list(model.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    second = torch.autograd.grad(loss, weights)
    assert all(map(torch.equal, first, second))


def test_a_second_derivative_raises_or_is_right():
    x = torch.randn(64, 128, requires_grad=True)
    with saving(FOUR):
        y = (x * 1).sin().sum()
    with pytest.raises(DoubleBackwardError, match="create_graph"):
        torch.autograd.grad(y, x, create_graph=True)
    with saving(FOUR, skip=lambda tensor: True):
        y = (x * 1).sin().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        (dxx,) = torch.autograd.grad(dx.sum(), x)
    assert torch.equal(dxx, -x.sin())


# --- Beside other hooks, modes and threads.


def test_the_inner_context_wins():
    x = activation(64, 128)

    def model(x):
        with saving(EIGHT):
            inner = x.sin()
        return inner + x.tanh()

    report = kept(model, x)
    assert {row.operation for row in report.rows if row.dtype == "uint8"} == {
        "SinBackward0",
        "TanhBackward0",
    }
    assert pack_bytes(report) == packed(x.numel(), 8) + packed(x.numel(), 4)


def test_other_hooks_inside_and_outside():
    x = activation(64, 128)
    exact = x.detach().cos()
    with saving(FOUR), save_on_cpu():
        y = x.sin()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], exact)
    with save_on_cpu(), saving(FOUR):
        y = x.sin()
    assert not torch.equal(torch.autograd.grad(y.sum(), x)[0], exact)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_keeps_its_inputs_exactly_and_nothing_else(reentrant):
    model = mlp()
    x = torch.randn(64, 64, requires_grad=True)

    def run(x):
        return checkpoint(model, x * 1, use_reentrant=reentrant)

    assert floats(kept(run, x))[0][1] == x.numel() * 4
    assert len(floats(kept(run, x))) == 1
    run(x).square().sum().backward()
    exact, x.grad = x.grad, None
    with saving(GroupQuant(bits=2, code="minmax")):
        y = run(x)
    y.square().sum().backward()
    assert torch.equal(x.grad, exact)
    lossy = kept(run, x, overrides={"checkpoint": EIGHT})
    assert pack_bytes(lossy) == packed(x.numel(), 8)


class Custom(torch.autograd.Function):
    """Whose saved tensors are packed when the next call begins."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0].cos()


def test_a_function_is_kept_as_torch_s_operation_of_its_name():
    class Log(Custom):
        """Whose derivative has no bound, by its name."""

    x = activation(64, 128)
    assert floats(kept(lambda x: Log.apply(x * 1) * 1, x)) == [("LogBackward", x.nbytes)]
    assert not floats(kept(lambda x: Custom.apply(x * 1) * 1, x))


def test_a_cast_that_is_kept_exactly_is_not_the_tensor_it_was_made_of():
    x, weight = activation(64, 128), torch.randn(128, 128, requires_grad=True)

    def run(x):
        x = x * 1
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, weight), x.sin()

    report = kept(run, x, overrides={"linear": None})
    assert ("SinBackward0", x.nbytes) not in floats(report)
    assert pack_bytes(report) == packed(x.numel())


@pytest.mark.parametrize("reentrant", [False, True])
def test_packed_inputs_of_checkpoints_around_converted_blocks(reentrant):
    """The two passes of a block keep alike, though its input comes back as another tensor."""
    model = nn.Sequential(
        *[
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            for _ in range(3)
        ]
    )
    x = activation(4, 8, 16, 16)
    exact = gradients(model, x.detach())
    packlight.convert(model, NEAREST)
    with saving(FOUR, overrides={"checkpoint": EIGHT}):
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=reentrant)
    y.square().mean().backward()
    ours = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    assert (ours - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_packed_inputs_of_checkpoints_use_up_no_random_numbers(reentrant):
    """A checkpoint has noted the generator's state by then: else dropout draws another mask."""
    x = torch.rand(64, 128, requires_grad=True)
    with saving(EIGHT, overrides={"checkpoint": EIGHT}):
        y = checkpoint(nn.Dropout(0.5), Custom.apply(x + 0.1), use_reentrant=reentrant)
    y.sum().backward()
    assert torch.equal(x.grad == 0, y == 0)


def _in_a_list(run, x):
    return checkpoint(lambda parts: run(parts[0]), [x], use_reentrant=False)


def _by_keyword(run, x):
    return checkpoint(lambda *, x: run(x), x=x, use_reentrant=False)


def _within_a_device(run, x):
    with torch.device("cpu"):
        return checkpoint(run, x, use_reentrant=False)


def _within_hooks(run, x):
    with saving(NEAREST):
        return checkpoint(run, x, use_reentrant=False)


class _OfAnotherPackage(torch.autograd.Function):
    """A checkpoint that torch's module has no part in."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.state, ctx.run = torch.get_rng_state(), run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            y = ctx.run(x)
        return None, torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize(
    "use", [_in_a_list, _by_keyword, _within_a_device, _within_hooks, _OfAnotherPackage.apply]
)
def test_what_is_packed_as_a_checkpoint_begins_uses_up_no_random_numbers(use, leaf):
    """However its input comes, and whatever lies between it and the context."""
    x = torch.rand(64, 128, requires_grad=True)
    h = torch.rand(64, 128, requires_grad=True)
    with saving(EIGHT):
        a = Custom.apply(x + 0.1)
        y = use(nn.Dropout(0.5), h if leaf else h * 1)
    (a.sum() + y.sum()).backward()
    assert torch.equal(h.grad == 0, y == 0)


def test_saving_inside_a_checkpoint():
    layer = nn.Linear(128, 128)
    x = torch.randn(64, 128, requires_grad=True)

    def block(x):
        with saving(EIGHT):
            return layer(x.sin()).sin()

    y = checkpoint(block, x, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), x)
    (exact,) = torch.autograd.grad(layer(x.sin()).sin().sum(), x)
    torch.testing.assert_close(dx, exact, rtol=0.05, atol=0.02)


def test_a_context_inside_the_profiled_model_is_counted():
    def model(x):
        with saving(FOUR):
            return x.sin()

    x = activation(64, 128)
    report = profile(model, x)
    assert pack_bytes(report) == packed(x.numel())
    assert not floats(report)


def test_backward_inside_the_context():
    model, x = mlp(), torch.randn(64, 64)
    with saving(FOUR):
        model(x).square().mean().backward()
    inside = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    exact = gradients(model, x)
    assert (inside - exact).norm() < 0.1 * exact.norm()


def test_nothing_is_packed_without_gradients():
    calls = []
    x = torch.randn(64, 128, requires_grad=True)
    with torch.no_grad(), saving(FOUR, skip=lambda tensor: bool(calls.append(tensor))):
        (x * 1).sin()
    assert not calls


def test_an_exception_leaves_no_hooks_and_no_mode():
    x = activation(64, 128)
    kept_outputs = []

    def fail():
        with saving(FOUR):
            kept_outputs.append(x.sin())
            torch.matmul(x, x)

    with pytest.raises(RuntimeError):
        fail()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert torch._C._len_torch_function_stack() == 0
    kept_outputs[0].sum().backward()


def test_an_exception_that_is_caught_inside():
    x = activation(64, 128)
    with saving(NEAREST):
        y = x.sin()
        with pytest.raises(RuntimeError):
            torch.matmul(y.cos(), y)
        z = y.cos()
    (dx,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(dx, -x.sin().sin() * x.cos(), rtol=0, atol=0.05)


def test_another_thread_is_not_concerned():
    x = activation(64, 128)
    results = []
    with saving(FOUR):
        thread = threading.Thread(target=lambda: results.append(x.sin()))
        thread.start()
        thread.join()
    assert torch.equal(torch.autograd.grad(results[0].sum(), x)[0], x.detach().cos())


def test_transforms_that_refuse_hooks_say_so():
    with saving(FOUR), pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(lambda x: x.sin().sum())(torch.randn(64, 128))


def test_packs_die_with_the_graph():
    data = torch.randn(64, 128)
    layer = nn.Linear(128, 128)
    packs, originals = [], []
    with saving(FOUR):
        h = data * layer.weight[:64]
        originals.append(weakref.ref(h))
        y = layer(h) + h.sin()
        pack = sharing.pack_of(h)
        packs += map(TensorWeakRef, pack.tensors)
        del h, pack
    gc.collect()
    # The graph alone holds the pack, and not the tensor.
    assert [original() for original in originals] == [None]
    assert all(reference() is not None for reference in packs)
    y.sum().backward()
    assert all(reference() is None for reference in packs)


def test_a_tensor_that_outlives_the_graph_holds_no_pack():
    h = activation(64, 128)
    with saving(FOUR):
        y = h.sin()
        reference = TensorWeakRef(sharing.pack_of(h).tensors[0])
    assert reference() is not None
    del y
    assert reference() is None


def test_the_meta_device():
    model = mlp().to("meta")
    x = torch.empty(64, 64, device="meta")
    assert pack_bytes(kept(model, x)) == packed(64 * 256 * 4)


# --- torch.compile.


@pytest.mark.usefixtures("fresh_compiler")
def test_packs_cross_a_compiled_region():
    model = Block(64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 64, 64)
    report = kept(compiled, x)
    exact = profile(compiled, x)
    # What is kept in floating point are statistics: of two norms, and of attention's rows.
    assert sum(size for _, size in floats(report)) <= 4 * (4 * 4 * 64 + 4 * 4 * 64)
    assert report.activation_bytes < 0.3 * exact.activation_bytes
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    errors = [error(compiled, x, EIGHT) for _ in range(3)]
    assert max(errors) < 0.02
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    two = GroupQuant(bits=2, code="auto")  # of which rotated packs know no sides
    coarse = error(compiled, x, EIGHT, overrides={"CompiledFunctionBackward": two})
    assert coarse > 10 * errors[0]


@pytest.mark.usefixtures("fresh_compiler")
def test_statistics_of_converted_layers_in_a_compiled_region_stay_exact():
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    packlight.convert(model, GroupQuant(bits=4, code="minmax"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4096, 64, requires_grad=True)
    exact = floats(profile(compiled, x))
    assert [size for _, size in exact] == [4 * 4096] * len(exact)
    assert exact
    assert floats(kept(compiled, x)) == exact


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_region_may_call_what_the_tracer_cannot_follow_within_a_mode():
    def model(x):
        return x.unflatten(-1, (8, -1)).sin()

    x = torch.randn(64, 64, requires_grad=True)
    with saving(GroupQuant(bits=8, code="minmax")):
        y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(y, model(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_weights_of_a_compiled_region_stay_exact():
    layer = nn.Linear(128, 256)

    def model(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x.sin())

    compiled = torch.compile(model, backend="aot_eager")
    report = kept(compiled, torch.randn(64, 128, requires_grad=True))
    assert {size for _, size in floats(report)} == {128 * 256 * 2}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the tracer looks at it
@pytest.mark.usefixtures("fresh_compiler")
def test_operations_between_two_graphs_keep_their_names():
    @torch.compiler.disable
    def between(x):
        return F.mse_loss(x, torch.zeros_like(x), reduction="none")

    def model(x):
        return between(x.sin()).cos()

    x = torch.randn(64, 128, requires_grad=True)
    report = kept(torch.compile(model, backend="aot_eager"), x)
    assert ("MseLossBackward0", 64 * 128 * 4) in floats(report)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_the_context_inside_a_compiled_function_is_refused(fullgraph):
    def model(x):
        with saving(FOUR):
            return x.sin()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match="outside, around the call of the compiled function"):
        compiled(torch.randn(64, 128, requires_grad=True))


# --- Against hooks that share nothing.


def plain_hooks():
    """Quantises each value when it is saved, with no memory of any other; deterministic."""

    def pack(x: Tensor) -> Tensor:
        weight = isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter)
        if weight or x.is_leaf or x.grad_fn is None:
            return x.detach().clone()
        with torch.no_grad():
            dense = torch.empty_like(x).stride()
            codes = gq.ops.quantize(x.detach(), dense, (8, 32), *operands(None))
            layout = (tuple(x.shape), dense, x.numel(), (8, 32))
            return gq.ops.dequantize(*codes, *layout, x.dtype, "", (), None, None)

    return saved_tensors_hooks(pack, lambda x: x)


SIZE = 16
SINGLE = {
    "sin": torch.sin,
    "sigmoid": torch.sigmoid,
    "cos": torch.cos,
    "transpose": lambda x: x.t(),
    "reshape": lambda x: x.reshape(-1, 8).cos().view(SIZE, SIZE),
    "slice": lambda x: F.pad(x[4:, :12].sin(), (0, 4, 4, 0)),
    "tanh": torch.tanh,
    "square": lambda x: x * x * 0.1,
}
index = st.integers(0, 100)
steps = st.one_of(
    st.tuples(st.sampled_from(sorted(SINGLE)), index),
    st.tuples(st.just("mul"), index, index),
    st.tuples(st.just("model"), index, st.integers(0, 1)),
    st.tuples(st.just("in place"), index, st.sampled_from(["mul_", "add_", "sigmoid_"])),
    st.tuples(st.just("no_grad"), index),
    st.tuples(st.just("fail"), index),
    st.tuples(st.just("drop"), index),
)


def run(program, models, leaf: Tensor) -> Tensor:
    pool = [leaf * 1]
    for name, first, *rest in program:
        x = pool[first % len(pool)]
        if name in SINGLE:
            pool.append(SINGLE[name](x))
        elif name == "mul":
            pool.append(x * pool[rest[0] % len(pool)])
        elif name == "model":
            pool.append(models[rest[0]](x))
        elif name == "in place":
            getattr(x, rest[0])(*[0.5][: rest[0] != "sigmoid_"])
        elif name == "no_grad":
            with torch.no_grad():
                models[0](x).sin()
        elif name == "fail":
            with pytest.raises(RuntimeError):
                torch.matmul(x.sin(), x[:3])
        elif len(pool) > 1:
            del pool[first % len(pool)]
    return torch.stack([x.sum() for x in pool]).sum()


@settings(max_examples=60)
@given(st.lists(steps, min_size=1, max_size=14))
def test_any_program_has_the_gradients_of_values_quantised_when_saved(program):
    packlight.manual_seed(0)
    models = [nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh()) for _ in range(2)]
    leaf = torch.randn(SIZE, SIZE, requires_grad=True)
    weights = [leaf, *models[0].parameters(), *models[1].parameters()]
    method = GroupQuant(bits=8, group_size=32, rounding="nearest")
    with plain_hooks():
        expected = run(program, models, leaf)
    with saving(method, min_bytes=SIZE * 12):
        found = run(program, models, leaf)
    assert torch.equal(found, expected)
    ours = torch.autograd.grad(found, weights, allow_unused=True)
    theirs = torch.autograd.grad(expected, weights, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one, other)


def test_what_a_layer_of_ours_keeps_stays_exact():
    """A second pack would be silent: Inverted takes the inverse of the very output."""
    from packlight import inverted

    for layer in (inverted.LayerNorm(64), inverted.GELU()):
        x = torch.randn(128, 64, requires_grad=True)
        dy = torch.randn(128, 64)
        (expected,) = torch.autograd.grad(layer(x * 1.0), x, dy)
        with packlight.saving(GroupQuant(4, rounding="nearest"), min_bytes=0):
            y = layer(x * 1.0)
        (actual,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(actual, expected)


# --- What needs no values.

SIDES = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x * 1, inplace=True),
    "relu of a view in place": lambda x: F.relu((x * 1)[:, ::2], inplace=True),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky_relu in place": lambda x: F.leaky_relu(x * 1, 0.2, inplace=True),
    "relu6": lambda x: F.relu6(4 * x),
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.7),
    "hardtanh in place": lambda x: F.hardtanh(x * 1, -0.3, 0.7, inplace=True),
    "threshold": lambda x: F.threshold(x, 0.1, 0.5),
    "threshold in place": lambda x: F.threshold(x * 1, 0.1, 0.5, inplace=True),
    "hardsigmoid": lambda x: F.hardsigmoid(3 * x),
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "clamp": lambda x: x.clamp(-0.3, 0.6),
    "clamp in place": lambda x: (x * 1).clamp_(-0.3, 0.6),
    "clamp from below": lambda x: x.clamp(min=0.1),
    "clamp from above": lambda x: torch.clamp_max(x, 0.1),
    "nan_to_num": lambda x: x.nan_to_num(),
    "rrelu": F.rrelu,
    "abs": torch.abs,
    "maximum": lambda x: torch.maximum(x, x.roll(1, 0)),
    "minimum of a column": lambda x: torch.minimum(x, x.sum(1, keepdim=True)),
    "amax": lambda x: x.amax(-1),
    "amin": lambda x: x.view(8, 8, 128).amin((0, -1), keepdim=True),
    "max": lambda x: x.max(),
    "median": lambda x: x.median(),
    "max_pool2d": lambda x: F.max_pool2d(x.view(1, 1, 64, 128), 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x.view(1, 1, 64, 128), 2),
    "channels-last max_pool2d": lambda x: F.max_pool2d(
        x.view(1, 8, 32, 32).contiguous(memory_format=torch.channels_last), 2
    ),
    "reflected padding": lambda x: F.pad(x.view(1, 64, 128), (1, 1), mode="reflect"),
    "gather": lambda x: x.gather(1, torch.zeros(64, 5, dtype=torch.long)),
}


def weighted_gradient(function, x: Tensor, method=None, **options) -> Tensor:
    """The gradient of a weighted sum of what the function gives."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    if method is None:
        y = function(x * 1)
    else:
        with saving(method, **options):
            y = function(x * 1)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((y.float() * weights).sum(), x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", SIDES.values(), ids=SIDES.keys())
def test_sides_signs_and_shapes_are_exact(function, dtype):
    x = torch.randn(64, 128).to(dtype)
    exact = weighted_gradient(function, x)
    assert torch.equal(
        weighted_gradient(function, x, GroupQuant(bits=2, code="minmax"), min_bytes=0), exact
    )


@pytest.mark.parametrize("function", SIDES.values(), ids=SIDES.keys())
def test_sides_signs_and_shapes_take_two_bits_at_most(function):
    if function is F.rrelu:
        pytest.skip("keeps its slopes, random where a value is negative, exactly")
    x = activation(64, 128)
    report = kept(function, x)
    kept_of_floats = [row.bytes for row in report.rows if row.dtype != "int64" and row.bytes > 512]
    assert sum(kept_of_floats) <= 2 * x.numel() // 8


# torch 2.11 has no derivative of it.
HAS_AMINMAX = "AminmaxBackward0" in graph.node_names()


def test_a_limit_is_not_a_sign_where_elements_repeat_or_limits_are_tensors():
    x = torch.randn(64, 128)
    for function in (
        lambda x: x[:, :1].expand(64, 128).abs(),
        lambda x: x.clamp(min=x.roll(1, 0)),
        lambda x: torch.fmax(x, x.roll(1, 0)),
        lambda x: torch.minimum(x[:, :1] * 1, x[:1] * 1),
        *([lambda x: torch.aminmax(x, dim=1).max] if HAS_AMINMAX else []),
    ):
        exact = weighted_gradient(function, x)
        assert torch.equal(weighted_gradient(function, x, FOUR, min_bytes=0), exact)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("relu_first", [True, False])
def test_a_relu_and_a_convolution_share_no_sign(inplace, relu_first):
    conv = nn.Conv2d(8, 8, 1)
    x = activation(2, 8, 32, 32)
    n = x.numel()

    def model(x):
        if relu_first:
            y = F.relu(x * 1, inplace)
            return conv(y)
        y = conv(x)
        return y + F.relu(x * 1 if inplace else x, inplace)

    assert pack_bytes(kept(model, x)) == packed(n) + n // 8


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("negative", [-0.2, 0.25])
def test_a_prelu_has_exact_sides_and_an_unbiased_weight_gradient(bits, negative):
    layer = nn.PReLU(init=negative)
    x = activation(64, 128)
    assert (
        pack_bytes(kept(layer, x, method=GroupQuant(bits, code="minmax")))
        == packed(x.numel(), bits) + 1024
    )
    (exact,) = torch.autograd.grad(layer(x).sum(), x, retain_graph=True)
    (weight,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    found = []
    for _ in range(50):
        with saving(GroupQuant(bits, code="minmax")):
            y = layer(x)
        dx, dw = torch.autograd.grad(y.sum(), [x, layer.weight], retain_graph=True)
        assert torch.equal(dx, exact)
        found.append(dw)
    draws = torch.cat(found)
    # The minimum is rounded down and the step up, so no value is clipped: some parts in 1000.
    assert (draws.mean() - weight).abs() < 4 * draws.std() / 50**0.5 + 0.002 * weight.abs()


def test_a_selu_flips_no_side():
    x = torch.randn(64, 128)
    plain = weighted_gradient(torch.selu, x, FOUR)
    exact = weighted_gradient(torch.selu, x)
    positive = x > 0
    assert torch.equal(plain[positive], exact[positive])
    assert (plain - exact).norm() < 0.1 * exact.norm()


# --- What has no bound.


UNBOUNDED = {
    "log": lambda x: x.abs().add(1e-4).log(),
    "log1p": lambda x: x.abs().sub(0.9999).log1p(),
    "sqrt": lambda x: x.abs().add(1e-4).sqrt(),
    "rsqrt": lambda x: x.abs().add(1e-4).rsqrt(),
    "reciprocal": torch.reciprocal,
    "power of -1": lambda x: x.pow(-1),
    "power of 1.5": lambda x: x.abs().pow(1.5),
    "power of a tensor": lambda x: x.abs().pow(x.roll(1, 0)),
    "denominator": lambda x: torch.ones_like(x) / x,
    "addcdiv": lambda x: torch.addcdiv(torch.ones_like(x), torch.ones_like(x), x),
    "atan2": lambda x: torch.atan2(x, x.roll(1, 0)),
    "acosh": lambda x: x.abs().add(1.0001).acosh(),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "std": lambda x: x.std(1),
    "prod": lambda x: x[:, :8].prod(1),
    "grid": lambda x: F.grid_sample(
        torch.ones(1, 1, 8, 8).cumsum(-1), x.view(1, 64, 64, 2), align_corners=False
    ),
}


@pytest.mark.parametrize("function", UNBOUNDED.values(), ids=UNBOUNDED.keys())
def test_unbounded_derivatives_are_exact(function):
    x = torch.randn(64, 128)
    exact = weighted_gradient(function, x)
    assert torch.equal(weighted_gradient(function, x, GroupQuant(bits=2, code="minmax")), exact)


def test_an_override_packs_what_is_exact_by_default():
    x = activation(64, 128)
    report = kept(lambda x: x.log(), x, overrides={"Log*": EIGHT})
    assert pack_bytes(report) == packed(x.numel(), 8)
    assert pack_bytes(kept(lambda x: x.square(), x)) == packed(x.numel())


# --- Infinities.


@pytest.mark.parametrize("value", [float("-inf"), torch.finfo(torch.float32).min, -1e9])
def test_masked_scores_spoil_nothing(value):
    mask = torch.rand(64, 128) < 0.2

    def softmax(x):
        scores = x.masked_fill(mask, value)
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        return e / e.sum(-1, keepdim=True)

    def gate(x):
        return F.logsigmoid(x.masked_fill(mask, value))

    x = torch.randn(64, 128)
    for function, bound in ((softmax, 0.05), (gate, 0)):
        exact = weighted_gradient(function, x)
        found = weighted_gradient(function, x, EIGHT)
        assert (found - exact).norm() <= bound * exact.norm()


def test_a_bias_of_attention_that_is_learned_stays_exact():
    q = torch.randn(2, 4, 64, 32)
    hidden = torch.ones(64, 64, dtype=torch.bool).triu(1)

    def attend(bias):
        bias = bias.masked_fill(hidden, float("-inf"))
        return F.scaled_dot_product_attention(q, q, q, bias)

    bias = torch.randn(64, 64)
    torch.testing.assert_close(
        weighted_gradient(attend, bias, FOUR), weighted_gradient(attend, bias)
    )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("value", [float("-inf"), torch.finfo(torch.float32).min])
def test_a_mask_that_a_compiled_region_makes_stays_exact(value):
    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.ones(64, 64, dtype=torch.bool).triu(1)
            mask = torch.zeros(2, 1, 64, 64).masked_fill(hidden, value)
            q = super().forward(x)
            return F.scaled_dot_product_attention(q, q, q, mask)

    compiled = torch.compile(Masked(32, 32), backend="aot_eager")
    assert error(compiled, torch.randn(2, 4, 64, 32), EIGHT) < 0.05


# --- Python Functions.


class Finished(torch.autograd.Function):
    """A loss that keeps its gradients: in another shape and dtype, of an inner graph or by hand."""

    @staticmethod
    def forward(ctx, x, weight, inner):
        if inner:
            with torch.enable_grad():
                leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
                loss = ((leaves[0] @ leaves[1].T).tanh() * 30).logsumexp(-1).sum()
                dx, dw = torch.autograd.grad(loss, leaves)
        else:
            loss = (x @ weight.T).sum()
            dx, dw = (
                weight.sum(0).expand_as(x).contiguous(),
                x.sum(0).expand_as(weight).contiguous(),
            )
        ctx.save_for_backward(dx.flatten(), dw.T.contiguous())
        return loss.detach()

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return grad * dx.view(64, 64), grad * dw.T, None


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_finished_gradients_are_exact(inner, read):
    x, weight = torch.randn(64, 64, requires_grad=True), nn.Parameter(torch.randn(500, 64) * 0.05)

    def run():
        loss = Finished.apply(x, weight, inner)
        return loss * 2 if read else loss

    exact = torch.autograd.grad(run(), [x, weight])
    with saving(GroupQuant(bits=2, code="minmax")):
        loss = run()
    assert all(map(torch.equal, torch.autograd.grad(loss, [x, weight]), exact))


def test_the_second_pass_of_a_loss_without_reduction_is_exact():
    class PerToken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.softmax(-1))
            return x.logsumexp(-1)

        @staticmethod
        def backward(ctx, grad):
            return grad[:, None] * ctx.saved_tensors[0]

    x = torch.randn(64, 128)
    exact = weighted_gradient(PerToken.apply, x)
    assert torch.equal(weighted_gradient(lambda x: PerToken.apply(x) * 1, x, FOUR), exact)


def test_functions_in_a_row_are_found_by_what_reads_the_last():
    x = activation(64, 128)

    def model(x):
        return Custom.apply(Custom.apply(Custom.apply(x))).sum()

    report = kept(model, x)
    assert pack_bytes(report) == packed(3 * x.numel())
    assert {row.operation for row in report.rows if row.dtype == "uint8"} == {"CustomBackward"}


def test_what_no_call_reads_stays_exact():
    x = torch.randn(64, 128)
    found = weighted_gradient(Custom.apply, x, GroupQuant(bits=2, code="minmax"))
    assert torch.equal(found, weighted_gradient(Custom.apply, x))


def test_a_function_within_a_call_is_found():
    @torch.library.custom_op("packlight_tests::sine", mutates_args=())
    def sine(x: Tensor) -> Tensor:
        return x.sin()

    sine.register_fake(torch.empty_like)
    sine.register_autograd(
        lambda ctx, grad: grad * ctx.saved_tensors[0].cos(),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    x = activation(64, 128)
    assert pack_bytes(kept(lambda x: sine(x), x)) == packed(x.numel())


def test_a_result_that_is_lost_leaves_nothing_behind():
    x = activation(64, 128)
    with saving(FOUR):
        lost = Custom.apply(x * 1)
        saved = weakref.ref(lost.grad_fn._raw_saved_tensors[0].data.kept)
        del lost
        gc.collect()
        assert saved() is None
        y = Custom.apply(x).sum()
    assert not torch.equal(torch.autograd.grad(y, x)[0], x.detach().cos())


# --- Overrides.


def test_an_override_that_names_nothing_raises():
    x = activation(64, 128)
    for pattern, near in (("*Softmx*", "Softmax"), ("geluu", "gelu"), ("Zzz", "")):
        match = f"(?i){pattern.strip('*')}.*{near}"
        with pytest.raises(InputError, match=match), saving(FOUR, overrides={pattern: None}):
            x.sin()


def test_an_override_may_name_what_did_not_run():
    class Elsewhere(Custom):
        pass

    names = ("*Softmax*", "gelu", "ElsewhereBackward", "checkpoint", "Compiled*", "FlashAttn*", "*")
    x = activation(64, 128)
    with saving(FOUR, overrides=dict.fromkeys(names)):
        x.sin()
    with torch.no_grad(), saving(FOUR, overrides={"MyKernelBackward": None}):
        x.sin()  # a pass that saves nothing says nothing of names
    with pytest.raises(RuntimeError, match="shapes"), saving(FOUR, overrides={"*Softmx*": None}):
        torch.matmul(x.sin(), x)


# --- Torches without names that it reads.


def test_a_torch_that_shows_no_nodes_is_refused(monkeypatch):
    monkeypatch.setattr(_torch.NODES, "values", None, raising=False)
    with pytest.raises(InputError, match="which operation"), saving(FOUR):
        pass


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (torch._C, "DisableTorchFunction"),
        (torch._C, "_functions"),
    ],
)
def test_without_a_name_gradients_are_as_good(monkeypatch, place, name):
    monkeypatch.delattr(place, name)
    model, x = mlp(), torch.randn(64, 64)
    assert error(model, x, EIGHT) < 0.02
    assert pack_bytes(kept(lambda x: Custom.apply(x).sum(), activation(64, 128))) == packed(8192)


def test_threads_have_calls_of_their_own():
    x = torch.randn(64, 128)
    exact = weighted_gradient(lambda x: F.relu(x).softmax(-1), x)
    results = []

    def work():
        results.append(weighted_gradient(lambda x: F.relu(x).softmax(-1), x, FOUR))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(result, exact) for result in results)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_inside_moves_no_random_numbers(reentrant):
    """And a ReLU that a checkpoint runs again in it keeps its sides."""
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Dropout(0.5))
    masks = []
    model[5].register_forward_hook(lambda module, args, out: masks.append(out.detach() != 0))
    x = torch.randn(64, 64, requires_grad=True)
    grads = []
    for method in (None, EIGHT):
        torch.manual_seed(0)
        if method is None:
            checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        else:
            with saving(method):
                checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        grads.append(x.grad)
        x.grad = None
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()
