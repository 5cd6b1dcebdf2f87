"""The contract of every layer (docs/architecture.md), over the tables of all methods.

`both_backends` runs a test on the plain-PyTorch reference of every layer, and on the Triton kernels
once for each path through them; on the CPU the interpreter executes them. What only one method
promises is tested in its own folder.
"""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tests.fewbit.layers
import tests.groupquant.layers
import tests.inverted.layers
from packlight import use_reference
from packlight.errors import DoubleBackwardError, InputError
from packlight.packing.layout import dense_stride, memory_order
from tests.graphs import captured
from tests.helpers import DTYPES, SHAPES, dtype_name, gradient, kept_bytes, sample
from tests.layers import on_both_backends

LAYERS = [
    *tests.fewbit.layers.LAYERS,
    *tests.groupquant.layers.LAYERS,
    *tests.inverted.layers.LAYERS,
]


def over(layers):
    return pytest.mark.parametrize("layer", layers, ids=lambda layer: f"{layer.method}-{layer}")


every_layer = over(LAYERS)
every_inplace_layer = over([layer for layer in LAYERS if layer.inplace])
both_backends = on_both_backends(LAYERS)
every_module = over([layer for layer in LAYERS if layer.module is not None])


def assert_same_gradient(layer, dx, expected):
    torch.testing.assert_close(dx, expected, rtol=layer.tolerance, atol=layer.tolerance)


# --- 1: forward. The backward is each method's own.


@every_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_forward_is_bit_equal_to_torch(layer, dtype):
    x = sample(7, 33, dtype=dtype)
    y, _ = gradient(layer.apply, x)
    assert torch.equal(y, layer.torch(x))


# --- 3: drop-in.


def named_parameters(function):
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


@every_module
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
    ours, theirs = named_parameters(layer.module), named_parameters(layer.plain_module)
    pairs = zip(ours, theirs, strict=False)
    assert all((a.name, a.default) == (b.name, b.default) for a, b in pairs)
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@every_module
def test_eval_runs_the_plain_operation(layer):
    module, x = layer.make().eval(), sample(5, 9).double()
    y, dx = gradient(module, x)
    expected_y, expected = gradient(layer.torch, x)
    assert torch.equal(y, expected_y)
    assert torch.equal(dx, expected)
    x.requires_grad_()
    (first,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    torch.testing.assert_close(first, expected)


# --- 4: what is kept.


@both_backends
def test_keeps_what_it_says_and_nothing_else(layer, backend):
    for shape in [(1,), (64,), (3, 41), (5, 8, 8)]:
        x = sample(*shape).requires_grad_()
        assert kept_bytes(lambda x=x: layer.apply(x)) == layer.kept_bytes(x)


# --- 5: shapes and strides.


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@both_backends
def test_any_shape_and_stride(layer, shape, backend, poison):
    x = shape()
    dy = torch.randn(x.shape)
    y, dx = gradient(layer.apply, x, dy)
    expected = layer.torch(x)
    assert y.stride() in (dense_stride(x), expected.stride())  # torch's logsigmoid drops its own
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=1e-6)
    # The same elements in the same order, in one dimension: the same groups, so the same codes.
    x, dy, dx = (memory_order(tensor, y.stride()) for tensor in (x, dy, dx))
    _, flat = gradient(layer.apply, x, dy)
    near = min(layer.tolerance, 1e-3)  # outputs that are kept may differ in their last digit
    torch.testing.assert_close(dx, flat, rtol=near, atol=near)


# --- 6: how autograd may use it.


@every_layer
def test_nothing_is_kept_without_gradient(layer, monkeypatch):
    def forbidden(*_):
        raise AssertionError("packed without need")

    for operator in layer.operators:
        monkeypatch.setattr(f"packlight.{layer.method}.ops.{operator}", forbidden)
    x = sample(4, 4)

    def run():
        assert not layer.apply(x).requires_grad
        with torch.no_grad():
            assert torch.equal(layer.apply(x.clone().requires_grad_()), layer.torch(x))

    assert kept_bytes(run) == 0


@both_backends
def test_retain_graph_and_two_backwards(layer, backend):
    x = sample(4, 5).requires_grad_()
    y = layer.apply(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@over([layer for layer in LAYERS if not layer.derivable_twice])
def test_second_derivative_raises(layer):
    x = sample(4, 5).requires_grad_()
    with pytest.raises(DoubleBackwardError, match="differentiated twice"):
        torch.autograd.grad((layer.apply(x) + x**2).sum(), x, create_graph=True)


@both_backends
def test_inputs_and_gradients_are_left_alone(layer, backend):
    x, dy = sample(4, 5), torch.randn(4, 5)
    before = x.clone(), dy.clone()
    gradient(layer.apply, x, dy)
    assert torch.equal(x, before[0])
    assert torch.equal(dy, before[1])


@over([layer for layer in LAYERS if not layer.keeps_output])
def test_output_that_is_not_kept_may_be_modified_in_place(layer):
    x = sample(4, 5)
    _, expected = gradient(layer.apply, x)
    _, dx = gradient(lambda x: layer.apply(x).add_(1.0), x)
    assert torch.equal(dx, expected)


@on_both_backends([layer for layer in LAYERS if layer.keeps_output])
def test_output_that_is_kept_must_not_be_modified_in_place(layer, backend):
    x = sample(4, 5).requires_grad_()
    y = layer.apply(x)
    y.add_(torch.randn(4, 5))  # as adapters do
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@on_both_backends([layer for layer in LAYERS if layer.inplace])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sliced"])
def test_inplace(layer, dense, backend):
    leaf = sample(6, 10)
    view = (lambda x: x) if dense else (lambda x: x[:, ::3])
    y, dx = gradient(lambda x: layer.apply(view(x.clone()), inplace=True), leaf)
    expected_y, expected = gradient(lambda x: layer.apply(view(x)), leaf)
    torch.testing.assert_close(y, expected_y, rtol=2e-7, atol=0)
    assert_same_gradient(layer, dx, expected)

    written = leaf.clone().requires_grad_() * 1.0
    result = layer.apply(written, inplace=True)
    assert result.data_ptr() == written.data_ptr()
    with torch.no_grad():
        x = leaf.clone()
        assert layer.apply(x, inplace=True).data_ptr() == x.data_ptr()


@every_inplace_layer
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
    assert kept == layer.kept_bytes(y)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.dtype == x.dtype


# --- 8: torch.compile. The operator checks are each method's own.


@every_layer
def test_compiles_without_a_break_to_the_same_gradients(layer, fresh_compiler):
    def loss(x, weight):
        return (layer.apply(x @ weight) * 2).sum()

    x, weight = sample(6, 8), torch.randn(8, 8, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(x, weight), weight)
    (actual,) = torch.autograd.grad(compiled(x, weight), weight)
    torch.testing.assert_close(actual, expected)


@every_module
def test_modules_compile(layer, fresh_compiler):
    model = nn.Sequential(nn.Linear(8, 8), layer.make(), nn.Linear(8, 1))
    x = sample(6, 8)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(x).sum(), list(model.parameters()))
    torch.testing.assert_close(actual, expected)


@every_inplace_layer
def test_inplace_compiles(layer, fresh_compiler):
    def loss(x):
        return layer.apply(x * 1.0, inplace=True).sum()

    x = sample(6, 8).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(x), x)
    (actual,) = torch.autograd.grad(compiled(x), x)
    assert torch.equal(actual, expected)


# --- 9: checkpointing.


@every_layer
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_gives_the_same_gradients(layer, reentrant):
    x = sample(4, 5)
    _, expected = gradient(layer.apply, x)
    x.requires_grad_()
    checkpoint(layer.apply, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, expected)


# --- 12: what is refused.


@every_layer
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_unsupported_dtypes_raise(layer, dtype):
    with pytest.raises(InputError, match="takes float32, bfloat16, float16 or float64"):
        layer.apply(torch.zeros(3).to(dtype))


@every_layer
def test_not_a_tensor_raises(layer):
    with pytest.raises(InputError, match="takes a tensor, got list"):
        layer.apply([1.0])


def test_use_reference_nests():
    from packlight import _library

    with use_reference(), use_reference():
        assert _library._reference_depth == 2
    assert _library._reference_depth == 0


# --- What only a device can show.


@pytest.mark.gpu
@over([layer for layer in LAYERS if layer.name in ("gelu", "tanhshrink")])
def test_more_than_2_to_the_31_elements(layer):
    count = 2**31 + 128  # whole groups, so that the tail has groups of its own
    x = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    tail = torch.randn(1 << 20, device="cuda").to(torch.bfloat16)
    x[-tail.numel() :] = tail
    x.requires_grad_()
    y = layer.apply(x)
    y.backward(torch.ones_like(y))
    small = tail.clone().requires_grad_()
    layer.apply(small).sum().backward()
    assert torch.equal(x.grad[-tail.numel() :], small.grad)
    assert torch.equal(y.detach()[-tail.numel() :], layer.apply(small).detach())


@pytest.mark.gpu
@every_layer
def test_cuda_graph_capture(layer):
    x = torch.randn(1 << 16, device="cuda", requires_grad=True)
    dy = torch.randn(1 << 16, device="cuda")

    def step():
        return torch.autograd.grad(layer.apply(x), x, dy)[0]

    graph, result = captured(step)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(result, step())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@every_layer
def test_compiles_on_the_device(layer, fresh_compiler):
    def loss(x, weight):
        return (layer.apply(x @ weight) * 2).sum()

    x = torch.randn(64, 64, device="cuda")
    weight = torch.randn(64, 64, device="cuda", requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x, weight), weight)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, weight), weight)
    # Compiled products differ in their last digits, and a code or two with them.
    tolerance = max(1e-3, layer.tolerance)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
