"""The contract of every layer (docs/architecture.md), over the table of few-bit activations.

`backend` runs each test on the plain-PyTorch reference and on the Triton kernels, which the
interpreter executes on the CPU.
"""

import copy
import dataclasses
import inspect
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from packlight import use_reference
from packlight.errors import DoubleBackwardError, InputError
from packlight.fewbit import activations, kernels, ops
from packlight.fewbit.codebook import default_codebook
from packlight.packing.layout import dense_stride, packed_bytes
from tests.fewbit.layers import CONTINUOUS, EXACT, INPLACE, LAYERS, MODULES, kept_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rounding of one operation, and twice that: the interpreter truncates fp32 to bf16.
EPSILON = {
    torch.float64: 1e-12,
    torch.float32: 4e-7,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
SPECIAL = [0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 0.375, -0.375, 1e-6, -1e-6, 30.0, -30.0]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(params=["reference", "kernel"])
def backend(request, monkeypatch):
    if request.param == "kernel":
        for name in ("activation", "activation_", "encode", "decode_backward"):
            monkeypatch.setattr(ops, name, getattr(kernels, name))
    return request.param


def sample(*shape, dtype=torch.float32):
    """Normal values with sigma 3, the special points first."""
    x = torch.randn(shape) * 3
    flat = x.view(-1)
    count = min(len(SPECIAL), flat.numel())
    flat[:count] = torch.tensor(SPECIAL[:count])
    return x.to(dtype)


def gradient(function, x, dy=None):
    x = x.detach().requires_grad_()
    y = function(x)
    dy = torch.ones_like(y) if dy is None else dy
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


def derivative(layer, x, bits):
    """The coded derivative by the book, in float64."""
    book = default_codebook(layer.name, bits, layer.parameters)
    book = dataclasses.replace(book, borders=book.short_borders)
    return torch.from_numpy(book.derivative(x.double().numpy().ravel())).view(x.shape)


# --- 1 and 2: forward and backward.


@every_layer
@every_dtype
def test_forward_is_bit_equal_to_torch(layer, dtype):
    x = sample(7, 33, dtype=dtype)
    y, _ = gradient(layer.apply, x)
    assert torch.equal(y, layer.torch(x))


@pytest.mark.parametrize("layer", EXACT, ids=str)
@every_dtype
def test_exact_layers_have_torch_gradients(layer, dtype, backend):
    if backend == "kernel" and dtype == torch.float64:
        return  # kernels compute in fp32; float64 takes the reference
    x, dy = sample(7, 33, dtype=dtype), torch.randn(7, 33).to(dtype)
    _, dx = gradient(layer.apply, x, dy)
    _, expected = gradient(layer.torch, x, dy)
    torch.testing.assert_close(dx, expected, rtol=EPSILON[dtype] / 2, atol=0)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("layer", CONTINUOUS, ids=str)
def test_continuous_layers_multiply_by_the_coded_derivative(layer, bits, backend):
    x, dy = sample(3, 71), torch.randn(3, 71)
    _, dx = gradient(lambda x: layer.apply(x, bits=bits), x, dy)
    torch.testing.assert_close(
        dx.double(), dy.double() * derivative(layer, x, bits), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("layer", CONTINUOUS, ids=str)
@every_dtype
def test_continuous_layers_in_every_dtype(layer, dtype, backend):
    if backend == "kernel" and dtype == torch.float64:
        return
    x, dy = sample(7, 33, dtype=dtype), torch.randn(7, 33).to(dtype)
    _, dx = gradient(layer.apply, x, dy)
    assert dx.dtype == dtype
    expected = dy.double() * derivative(layer, x, 3)
    torch.testing.assert_close(dx.double(), expected, rtol=EPSILON[dtype], atol=1e-7)


@pytest.mark.parametrize("layer", CONTINUOUS, ids=str)
def test_gradient_error_is_bounded_by_the_distance_to_the_levels(layer):
    x = torch.linspace(-9.99, 9.99, 4001, dtype=torch.float64)
    _, exact = gradient(layer.torch, x)
    errors = []
    for bits in range(1, 9):
        _, coded = gradient(lambda x, bits=bits: layer.apply(x, bits=bits), x)
        errors.append((coded - exact).square().mean().sqrt().item())
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[7] < 0.02 * errors[0]


# --- 3: drop-in.


@pytest.mark.parametrize("layer", MODULES, ids=str)
def test_modules_are_drop_in(layer):
    module = layer.make()
    assert list(module.state_dict()) == []
    clone = pickle.loads(pickle.dumps(module))
    assert repr(clone) == repr(module) == repr(copy.deepcopy(module))
    x = sample(5, 9)
    y, dx = gradient(module, x)
    assert torch.equal(y, layer.torch(x))
    assert torch.equal(dx, gradient(clone, x)[1])
    assert torch.equal(dx, gradient(layer.apply, x)[1])
    if layer.plain_module is None:
        return
    plain = layer.plain_module(*layer.arguments)
    assert isinstance(module, type(plain))
    assert plain.extra_repr() in module.extra_repr()
    ours = list(inspect.signature(layer.module).parameters.values())
    signature = inspect.signature(layer.plain_module)
    theirs = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    pairs = zip(ours, theirs, strict=False)
    assert all((a.name, a.default) == (b.name, b.default) for a, b in pairs)
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("layer", MODULES, ids=str)
def test_eval_runs_the_plain_operation(layer):
    module, x = layer.make(bits=1).eval(), sample(5, 9).double()
    y, dx = gradient(module, x)
    expected_y, expected = gradient(layer.torch, x)
    assert torch.equal(y, expected_y)
    assert torch.equal(dx, expected)
    x.requires_grad_()
    (first,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    torch.testing.assert_close(first, expected)


# --- 4: what is kept.


@pytest.mark.parametrize("bits", range(1, 9))
@every_layer
def test_keeps_the_bits_and_nothing_else(layer, bits, backend):
    for shape in [(1,), (64,), (3, 41), (5, 8, 8)]:
        x = sample(*shape).requires_grad_()
        count, kept = x.numel(), kept_bytes(lambda x=x: layer.apply(x, bits=bits))
        code_bits = layer.code_bits(bits)
        flag = layer.bits is None
        assert kept == packed_bytes(count, code_bits) + flag
        assert kept <= code_bits * count / 8 + 64


def test_module_keeps_what_its_bits_say():
    x = torch.randn(8, 64, requires_grad=True)
    layer = next(layer for layer in CONTINUOUS if layer.name == "gelu")
    assert kept_bytes(lambda: layer.make(bits=2)(x)) == 8 * 64 * 2 // 8 + 1


# --- 5: shapes and strides.

SHAPES = {
    "scalar": lambda: sample(),
    "empty": lambda: sample(0, 5),
    "one": lambda: sample(1),
    "sliced": lambda: sample(6, 10)[:, ::3],
    "transposed": lambda: sample(5, 7).t(),
    "expanded": lambda: sample(1, 9).expand(4, 9),
    "channels-last": lambda: sample(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "six dimensions": lambda: sample(2, 1, 3, 1, 2, 2),
    "tail": lambda: sample(513),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@every_layer
def test_any_shape_and_stride(layer, shape, backend, poison):
    x = shape()
    dy = torch.randn(x.shape)
    y, dx = gradient(layer.apply, x, dy)
    expected = layer.torch(x)
    assert y.stride() == dense_stride(x)  # as torch, but for logsigmoid, which drops it
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=1e-6)
    _, contiguous = gradient(layer.apply, x.contiguous(), dy)
    torch.testing.assert_close(dx, contiguous, rtol=0, atol=0)


# --- 6: how autograd may use it.


@every_layer
def test_nothing_is_packed_without_gradient(layer, monkeypatch):
    def forbidden(*args):
        raise AssertionError("packed without need")

    monkeypatch.setattr(ops, "activation", forbidden)
    x = sample(4, 4)
    assert not layer.apply(x).requires_grad
    with torch.no_grad():
        y = layer.apply(x.requires_grad_())
    assert torch.equal(y, layer.torch(x))


@every_layer
def test_retain_graph_and_two_backwards(layer, backend):
    x = sample(4, 5).requires_grad_()
    y = layer.apply(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@every_layer
def test_second_derivative_raises(layer):
    x = sample(4, 5).requires_grad_()
    with pytest.raises(DoubleBackwardError, match="differentiated twice"):
        torch.autograd.grad((layer.apply(x) + x**2).sum(), x, create_graph=True)


@every_layer
def test_inputs_and_gradients_are_left_alone(layer, backend):
    x, dy = sample(4, 5), torch.randn(4, 5)
    before = x.clone(), dy.clone()
    gradient(layer.apply, x, dy)
    assert torch.equal(x, before[0])
    assert torch.equal(dy, before[1])


@every_layer
def test_output_may_be_modified_in_place(layer):
    """Nothing keeps the output, so writing over it changes no gradient."""
    x = sample(4, 5)
    _, expected = gradient(layer.apply, x)
    _, dx = gradient(lambda x: layer.apply(x).add_(1.0), x)
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("layer", INPLACE, ids=str)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sliced"])
def test_inplace(layer, dense, backend):
    leaf = sample(6, 10)
    view = (lambda x: x) if dense else (lambda x: x[:, ::3])
    y, dx = gradient(lambda x: layer.apply(view(x.clone()), inplace=True), leaf)
    expected_y, expected = gradient(lambda x: layer.apply(view(x)), leaf)
    assert torch.equal(y, expected_y)
    assert torch.equal(dx, expected)

    written = leaf.clone().requires_grad_() * 1.0
    result = layer.apply(written, inplace=True)
    assert result.data_ptr() == written.data_ptr()
    with torch.no_grad():
        x = leaf.clone()
        assert layer.apply(x, inplace=True).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("layer", INPLACE, ids=str)
def test_inplace_obeys_autograd(layer):
    leaf = sample(4).requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        layer.apply(leaf, inplace=True)
    x = leaf * 1.0
    square = x**2  # keeps x
    layer.apply(x, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


# --- 7: autocast.


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_gives_the_dtype_that_torch_gives(layer, dtype):
    x = sample(4, 8, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer.torch(x)
        y = layer.apply(x)
        kept = kept_bytes(lambda: layer.apply(x))
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    assert kept <= layer.code_bits() * x.numel() / 8 + 64
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.dtype == x.dtype


# --- 8: torch.compile and the operator checks.


@pytest.fixture
def fresh_compiler():
    """Compiled code is kept a function, and one of another layer counts as a recompilation."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_layer
def test_compiles_without_a_break_to_the_same_gradients(layer, fresh_compiler):
    def loss(x, weight):
        return (layer.apply(x @ weight) * 2).sum()

    x, weight = sample(6, 8), torch.randn(8, 8, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(x, weight), weight)
    (actual,) = torch.autograd.grad(compiled(x, weight), weight)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layer", MODULES, ids=str)
def test_modules_compile(layer, fresh_compiler):
    model = nn.Sequential(nn.Linear(8, 8), layer.make(), nn.Linear(8, 1))
    x = sample(6, 8)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(x).sum(), list(model.parameters()))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layer", INPLACE, ids=str)
def test_inplace_compiles(layer, fresh_compiler):
    def loss(x):
        return layer.apply(x * 1.0, inplace=True).sum()

    x = sample(6, 8).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(x), x)
    (actual,) = torch.autograd.grad(compiled(x), x)
    assert torch.equal(actual, expected)


def crossing(function, *inputs):
    """Shapes and dtypes of the tensors that the compiled forward hands to its backward."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def forward(graph, example_inputs):
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        seen.extend(node.meta["val"] for node in outputs if hasattr(node, "meta"))
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph),
        partition_fn=torch._functorch.partitioners.min_cut_rematerialization_partition,
    )
    result = torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    result.sum().backward()
    torch._dynamo.reset()
    return seen


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.1])
def test_codes_cross_to_the_compiled_backward(budget, fresh_compiler):
    """Under default settings the codes cross, and with a budget nothing larger than they."""

    def function(x, weight):
        h = x @ weight
        return next(layer for layer in LAYERS if layer.name == "gelu").apply(h, bits=2) * 3.0

    x = torch.randn(64, 32, requires_grad=True)
    weight = torch.randn(32, 48, requires_grad=True)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        tensors = crossing(function, x, weight)
    hidden = [t for t in tensors if t.shape == (64, 48)][1:]  # the first is the output itself
    assert not hidden
    if budget == 1.0:
        assert any(t.dtype == torch.uint8 and t.numel() == 64 * 48 * 2 // 8 + 1 for t in tensors)
    (expected,) = torch.autograd.grad(function(x, weight).sum(), weight)
    assert torch.equal(weight.grad, expected)


@every_layer
def test_operators_pass_opcheck(layer):
    poison = activations.CONTINUOUS[layer.name].poison if layer.bits is None else 0
    borders, parity, bits = (), "none", layer.bits or 2
    if layer.bits is None:
        book = default_codebook(layer.name, bits, layer.parameters)
        borders, parity = book.short_borders, book.parity
    coding = (bits, list(borders), parity, poison)
    for x in (
        sample(3, 7),
        sample(4, 6).t(),
        sample(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ):
        arguments = (x, layer.name, list(layer.parameters), *coding)
        torch.library.opcheck(torch.ops.packlight.few_bit_activation.default, arguments)
        torch.library.opcheck(torch.ops.packlight.few_bit_activation_.default, arguments)
        torch.library.opcheck(
            torch.ops.packlight.few_bit_encode.default, (x, *coding, list(x.stride()))
        )
        codes = ops.encode(x, *coding, x.stride())
        levels = [0.1 * i for i in range(2**bits)]
        torch.library.opcheck(
            torch.ops.packlight.few_bit_backward.default,
            (x, codes, bits, levels, False, list(x.stride())),
        )


# --- 9: checkpointing.


@every_layer
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_gives_the_same_gradients(layer, reentrant):
    x = sample(4, 5)
    _, expected = gradient(layer.apply, x)
    x.requires_grad_()
    checkpoint(layer.apply, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, expected)


# --- 11: NaN and infinity.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("layer", CONTINUOUS, ids=str)
def test_nonfinite_inputs_are_never_silently_finite(layer, value, backend):
    x = torch.randn(70)
    x[33] = value
    y, dx = gradient(layer.apply, x)
    plain_y, plain = gradient(layer.torch, x.double())
    # torch's vectorised GELU gives NaN at infinity where its scalar one gives infinity.
    plain_y = layer.torch(x) if backend == "reference" else plain_y.float()
    torch.testing.assert_close(y, plain_y, rtol=1e-5, atol=1e-6, equal_nan=True)
    # torch's vectorised loops and its scalar tails disagree about NaN; any NaN in is NaN out here.
    if math.isnan(value) or not plain[33].isfinite():
        assert dx.isnan().all()
    else:
        assert dx.isfinite().all()


@pytest.mark.parametrize("layer", CONTINUOUS, ids=str)
def test_the_table_of_poisons_is_what_torch_does(layer):
    def scalar(x):
        return torch.stack([layer.torch(value.repeat(64))[0] for value in x])

    assert activations.nonfinite_derivative(scalar) == activations.CONTINUOUS[layer.name].poison


@every_layer
def test_nonfinite_gradients_pass(layer, backend):
    x = sample(64)
    dy = torch.ones(64)
    dy[20:40:3], dy[21:40:3], dy[22:40:3] = math.nan, math.inf, -math.inf
    _, dx = gradient(layer.apply, x, dy)
    _, expected = gradient(layer.torch, x, dy)
    if layer.bits is not None:
        torch.testing.assert_close(dx, expected, equal_nan=True)
    else:
        assert not dx[20:40].isfinite().any()
        assert dx[:20].isfinite().all()


@pytest.mark.parametrize("layer", EXACT, ids=str)
def test_exact_layers_at_infinity(layer, backend):
    x = torch.tensor([math.inf, -math.inf] * 40)
    y, dx = gradient(layer.apply, x)
    expected_y, expected = gradient(layer.torch, x)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(dx, expected)


# --- 12: what is refused.


@every_layer
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_unsupported_dtypes_raise(layer, dtype):
    with pytest.raises(InputError, match="takes float32, bfloat16, float16 or float64"):
        layer.apply(torch.zeros(3).to(dtype))


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True, "3", None])
@pytest.mark.parametrize("layer", CONTINUOUS, ids=str)
def test_wrong_bits_raise(layer, bits):
    with pytest.raises(InputError, match="not a whole number from 1 to 8"):
        layer.apply(sample(3).requires_grad_(), bits=bits)
    with pytest.raises(InputError, match="not a whole number from 1 to 8"):
        layer.make(bits=bits)


def test_not_a_tensor_raises():
    with pytest.raises(InputError, match="takes a tensor, got list"):
        LAYERS[0].apply([1.0])


def test_use_reference_nests():
    from packlight import _library

    with use_reference(), use_reference():
        assert _library._reference_depth == 2
    assert _library._reference_depth == 0
