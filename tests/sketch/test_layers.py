"""The contract of every layer (docs/architecture.md) for layers that keep a sketch.

Layers of two tensors, input and weight, do not fit the table of `tests/test_contract.py`; the
numbers are the same.
"""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import Sketch, convert, revert, saving, sketch
from packlight._seeds import rounding_tensor
from packlight.errors import CannotConvertError, DoubleBackwardError, InputError
from packlight.groupquant import GroupQuant
from packlight.method import Method
from packlight.sketch import functional, kernels, ops, reference
from packlight.sketch.method import KINDS, ROW_KINDS
from tests.graphs import captured
from tests.helpers import DTYPES, EPSILON, dtype_name, kept_bytes

IN, OUT, TOKENS = 12, 6, 40
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@pytest.fixture(autouse=True)
def _said_nothing():
    functional._said.clear()
    yield
    functional._said.clear()


def on_device(name):
    """The operator as a device has it: kernels compute in float32, and float64 has none."""

    def operator(first, *others):
        module = reference if first.dtype == torch.float64 else kernels
        return getattr(module, name)(first, *others)

    return operator


@pytest.fixture(params=["reference", "kernel"])
def backend(request, monkeypatch):
    if request.param == "kernel":
        for name in ("keep", "weight_gradient"):
            monkeypatch.setattr(ops, name, on_device(name))
    return request.param


def problem(shape=(2, TOKENS // 2), dtype=torch.float32):
    x = torch.randn(*shape, IN, dtype=dtype, requires_grad=True)
    weight = torch.randn(OUT, IN, dtype=dtype, requires_grad=True)
    bias = torch.randn(OUT, dtype=dtype, requires_grad=True)
    return x, weight, bias


def gradients(function, inputs, dy=None):
    y = function(*inputs)
    dy = torch.ones_like(y) if dy is None else dy
    return torch.autograd.grad(y, inputs, dy)


def ours(**options):
    return lambda *inputs: sketch.linear(*inputs, **options)


def drawn(kind, rows, tokens, x):
    """S [tokens, rows], for the seed that the stream gives next, in float64."""
    seed = rounding_tensor(x)
    if kind not in ROW_KINDS:
        eye = torch.eye(tokens, dtype=torch.float64)
        s = torch.empty(rows, tokens, dtype=torch.float64)
        reference.apply(eye, seed, kind, s)
        return s.t()
    index, weight = reference.select(*reference.row_statistics(x, seed), kind, rows)
    s = torch.zeros(tokens, rows, dtype=torch.float64)
    s[index.long(), torch.arange(rows)] = weight.double().sqrt()
    return s


# --- 1, 2: forward and backward.


@every_dtype
@every_kind
def test_forward_is_torchs_and_backward_is_the_sketchs(kind, dtype, backend):
    inputs = problem(dtype=dtype)
    x = inputs[0]
    dy = torch.randn(2, TOKENS // 2, OUT, dtype=dtype)
    assert torch.equal(sketch.linear(*inputs, kind=kind, rows=16), F.linear(*inputs))
    packlight.manual_seed(1)
    dx, dweight, dbias = gradients(ours(kind=kind, rows=16), inputs, dy)
    expected_dx, _, expected_dbias = gradients(F.linear, inputs, dy)
    assert torch.equal(dx, expected_dx)
    torch.testing.assert_close(dbias, expected_dbias)
    packlight.manual_seed(1)
    s = drawn(kind, 16, TOKENS, x.detach().view(-1, IN))
    exact = (s.t() @ dy.double().view(-1, OUT)).t() @ (s.t() @ x.double().view(-1, IN))
    error = (dweight.double() - exact).norm() / exact.norm()
    # Entries of S are made in float32, and S is where 16 bits round more than once.
    assert error < max(4 * EPSILON[dtype], 1e-5 if kind in ("gaussian", *ROW_KINDS) else 0)
    assert {g.dtype for g in (dx, dweight, dbias)} == {dtype}


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_convolutions_are_linear_layers_at_every_position(axes, batched, last):
    shape = (3, IN, 4, 5)[: axes + 2] if batched else (IN, 6, 7)[: axes + 1]
    layout = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    weight = torch.randn(OUT, IN, *[1] * axes, requires_grad=True)
    bias = torch.randn(OUT, requires_grad=True)
    plain, conv = getattr(F, f"conv{axes}d"), getattr(sketch, f"conv{axes}d")
    y = conv(x, weight, bias, rows=4, min_rows=1)
    assert torch.equal(y, plain(x, weight, bias))
    dy = torch.randn_like(y)
    del y  # whose sketch the next call would share
    packlight.manual_seed(1)
    dx, dweight, dbias = torch.autograd.grad(
        conv(x, weight, bias, rows=4, min_rows=1), (x, weight, bias), dy
    )
    expected = gradients(plain, (x, weight, bias), dy)
    torch.testing.assert_close((dx, dbias), (expected[0], expected[2]))
    packlight.manual_seed(1)
    rows = [t.detach().movedim(-axes - 1, -1) for t in (x, dy)]
    flat = weight.detach().view(OUT, IN).requires_grad_()
    (linear,) = torch.autograd.grad(sketch.linear(rows[0], flat, rows=4, min_rows=1), flat, rows[1])
    torch.testing.assert_close(dweight.view(OUT, IN), linear)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.view(-1, IN),
        lambda x: x.view(2, 2, 10, IN),
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x], -1)[..., ::2],
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x.view(-1, IN).t().contiguous().t(),
    ],
)
@pytest.mark.parametrize("kind", ["srht", "rademacher", "top_rows"])
def test_any_shape_and_stride(kind, view, backend, poison):
    x, weight, bias = problem()
    x = view(x.detach()).requires_grad_()
    options = {"kind": kind, "rows": 8}
    dy = torch.randn(*x.shape[:-1], OUT)
    packlight.manual_seed(1)
    actual = gradients(ours(**options), (x, weight, bias), dy)
    packlight.manual_seed(1)
    copy = x.detach().contiguous().requires_grad_()
    expected = gradients(ours(**options), (copy, weight, bias), dy)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_no_tokens_and_one_token():
    _, weight, bias = problem()
    for shape in ((0, IN), (3, 0, IN)):
        inputs = (torch.randn(shape, requires_grad=True), weight, bias)
        assert torch.equal(gradients(ours(), inputs)[1], torch.zeros(OUT, IN))
    inputs = (torch.randn(IN, requires_grad=True), weight, bias)
    with pytest.warns(UserWarning, match="keeps it exactly"):
        actual = gradients(ours(), inputs)
    torch.testing.assert_close(actual, gradients(F.linear, inputs))


# --- 3: drop-in.

LAYERS = [
    (sketch.Linear, nn.Linear, (IN, OUT), (TOKENS, IN)),
    (sketch.Conv1d, nn.Conv1d, (IN, OUT, 1), (2, IN, TOKENS)),
    (sketch.Conv2d, nn.Conv2d, (IN, OUT, 1), (2, IN, 4, TOKENS)),
]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer[1].__name__)


@every_layer
def test_modules_are_drop_in(layer):
    kind, plain_kind, arguments, shape = layer
    module, plain = kind(*arguments, rows=0.3, kind="rows"), plain_kind(*arguments)
    assert isinstance(module, plain_kind)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert plain.extra_repr() in module.extra_repr()
    assert "rows=0.3, kind=rows, min_rows=16, max_rows=None" in module.extra_repr()
    clone = pickle.loads(pickle.dumps(module))
    assert repr(clone) == repr(module) == repr(copy.deepcopy(module))
    mine, theirs = (list(inspect.signature(k).parameters.values()) for k in (kind, plain_kind))
    assert [p.name for p in mine[: len(theirs)]] == [p.name for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(theirs) :])
    x = torch.randn(shape)
    with torch.no_grad():
        plain.load_state_dict(module.state_dict())
        assert torch.equal(module(x), plain(x))


@every_layer
def test_eval_runs_the_plain_operation(layer):
    kind, _, arguments, shape = layer
    module, x = kind(*arguments).eval(), torch.randn(shape, requires_grad=True)
    (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    torch.autograd.grad(first.sum(), x)
    assert kept_bytes(lambda: module(x)) >= x.numel() * 4


@every_layer
def test_conversion(layer):
    kind, plain_kind, arguments, shape = layer
    model = nn.Sequential(plain_kind(*arguments))
    convert(model, Sketch(rows=0.3, kind="rows"))
    assert type(model[0]) is kind
    assert model[0].method == Sketch(0.3, "rows")
    model(torch.randn(shape)).sum().backward()
    revert(model)
    assert type(model[0]) is plain_kind


def test_what_cannot_be_converted():
    for module in (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, stride=2), nn.Conv1d(4, 4, 1, groups=2)):
        with pytest.raises((CannotConvertError, packlight.NothingMatchedError), match="is not 1"):
            convert(nn.Sequential(module), {nn.Conv1d: Sketch(), nn.Conv2d: Sketch()})


def test_method_is_a_value():
    method = Sketch(rows=64, kind="dct", max_rows=100)
    assert Method.from_dict(method.to_dict()) == method
    assert hash(Sketch()) == hash(Sketch(rows=0.2))
    assert Sketch(0.2).row_count(1000) == 200
    assert Sketch(0.1).row_count(16384) == 1638
    assert Sketch(0.01).row_count(100) == 16
    assert Sketch(0.5, max_rows=30).row_count(100) == 30
    assert Sketch(50).row_count(100) == 50
    assert Sketch(50).row_count(10) == 10  # below min_rows


# --- 4: what is kept.


@every_kind
@every_dtype
def test_keeps_the_sketch_and_its_draw(kind, dtype):
    inputs = problem(dtype=dtype)
    weight = inputs[1].numel() * inputs[1].element_size()
    own = 8 * 8 if kind in ROW_KINDS else 8
    rows = 8 * IN * inputs[0].element_size()
    assert kept_bytes(lambda: sketch.linear(*inputs, rows=8, kind=kind)) == weight + rows + own


def test_what_needs_no_gradient_keeps_nothing():
    x, weight, bias = problem()
    frozen = weight.detach()
    assert kept_bytes(lambda: sketch.linear(x, frozen, bias)) == kept_bytes(
        lambda: F.linear(x, frozen, bias)
    )
    assert kept_bytes(lambda: sketch.linear(x.detach(), frozen, bias)) == 0
    # An input without gradient needs no weight in the backward pass.
    kept = kept_bytes(lambda: sketch.linear(x.detach(), weight, bias, rows=8, kind="srht"))
    assert kept == 8 * IN * 4 + 8
    (dweight,) = torch.autograd.grad(sketch.linear(x.detach(), weight, rows=8).sum(), weight)
    assert dweight.shape == weight.shape
    (dx,) = torch.autograd.grad(sketch.linear(x, weight, rows=8).sum(), x)
    torch.testing.assert_close(dx, gradients(F.linear, (x, weight, bias))[0])


# --- 6: how autograd may use it.


def test_nothing_is_sketched_without_gradient(monkeypatch):
    def forbidden(*_):
        raise AssertionError("sketched without need")

    monkeypatch.setattr(ops, "keep", forbidden)
    inputs = problem()
    with torch.no_grad():
        for kind in KINDS:
            assert torch.equal(sketch.linear(*inputs, kind=kind), F.linear(*inputs))


@every_kind
def test_retain_graph_and_second_derivatives(kind):
    x, weight, _ = problem()
    y = sketch.linear(x, weight, rows=8, kind=kind).sum()
    first, second = (torch.autograd.grad(y, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(DoubleBackwardError, match="differentiated twice"):
        torch.autograd.grad(y, x, create_graph=True)


@every_kind
def test_inputs_and_gradients_are_left_alone(kind, backend):
    inputs, dy = problem(), torch.randn(2, TOKENS // 2, OUT)
    before = [t.detach().clone() for t in (*inputs, dy)]
    gradients(ours(kind=kind, rows=8), inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip((*inputs, dy), before, strict=True))


# --- 7: autocast.


@every_kind
def test_autocast_keeps_16_bits(kind, backend):
    inputs = problem()
    with torch.autocast("cpu", torch.bfloat16):
        y = sketch.linear(*inputs, rows=8, kind=kind)
        kept = kept_bytes(lambda: sketch.linear(*inputs, rows=8, kind=kind))
        assert torch.equal(y, F.linear(*inputs))
    own = 8 * 8 if kind in ROW_KINDS else 8
    assert kept == 8 * IN * 2 + own + inputs[1].numel() * 4
    assert [g.dtype for g in torch.autograd.grad(y.sum(), inputs)] == [torch.float32] * 3


# --- 8: torch.compile.


@every_kind
def test_compiles_without_a_break(kind, fresh_compiler):
    def loss(x, weight, bias):
        return sketch.linear(x * 1.0, weight, bias, rows=8, kind=kind).square().sum()

    inputs = problem()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    packlight.manual_seed(1)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    packlight.manual_seed(1)
    actual = torch.autograd.grad(compiled(*inputs), inputs)
    torch.testing.assert_close(actual, expected)
    assert kept_bytes(lambda: compiled(*inputs)) < TOKENS * IN * 4 + 2 * TOKENS * OUT * 4


@every_layer
def test_modules_compile(layer, fresh_compiler):
    kind, _, arguments, shape = layer
    module, x = kind(*arguments, rows=0.3), torch.randn(shape)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    packlight.manual_seed(1)
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    packlight.manual_seed(1)
    actual = torch.autograd.grad(compiled(x).square().sum(), list(module.parameters()))
    torch.testing.assert_close(actual, expected)


def test_the_number_of_tokens_may_vary_when_compiled(fresh_compiler):
    _, weight, _ = problem()
    compiled = torch.compile(
        lambda x: sketch.linear(x, weight, rows=0.25), fullgraph=True, backend="aot_eager",
        dynamic=True,
    )  # fmt: skip
    for tokens in (80, 96, 200):
        x = torch.randn(tokens, IN)
        packlight.manual_seed(tokens)
        (expected,) = torch.autograd.grad(sketch.linear(x, weight, rows=0.25).sum(), weight)
        packlight.manual_seed(tokens)
        torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), weight)[0], expected)


# --- 9, 10: checkpointing and random numbers.


@pytest.mark.parametrize("reentrant", [True, False])
@every_kind
def test_checkpoint_gives_the_gradients(kind, reentrant):
    """The weight's too where the first pass makes no sketch; else the second makes another."""
    x, weight, bias = problem()
    packlight.manual_seed(1)
    expected = gradients(ours(kind=kind, rows=8), (x, weight, bias))
    packlight.manual_seed(1)
    y = checkpoint(ours(kind=kind, rows=8), x, weight, bias, use_reentrant=reentrant)
    y.sum().backward()
    found = (x.grad, weight.grad, bias.grad)
    compared = slice(None) if reentrant else slice(None, None, 2)
    torch.testing.assert_close(found[compared], expected[compared])


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_behind_a_checkpointed_sketch_drops_the_same_twice(reentrant, leaf):
    """The first pass of a checkpoint draws as often as the second, shared sketches or not."""
    x, weight, _ = problem()
    weight = torch.eye(IN).requires_grad_()
    seen = []

    def block(x):
        y = sketch.linear(x, weight, rows=8) + sketch.linear(x, weight, rows=8)
        y = F.dropout(y, 0.5)
        seen.append((y != 0).detach())
        return y

    # What needs its input, so that the recomputation goes to the end.
    loss = checkpoint(lambda x: block(x).square(), x if leaf else x * 1.0, use_reentrant=reentrant)
    loss.sum().backward()
    assert len(seen) == 2
    assert torch.equal(*seen)


@every_kind
def test_another_draw_at_every_step_and_layer(kind):
    x, weight, _ = problem()

    def step():
        y = sketch.linear(x, weight, rows=8, kind=kind)
        return torch.autograd.grad(y, weight, x[..., :OUT].detach())[0]

    packlight.manual_seed(1)
    first, second = step(), step()
    assert not torch.equal(first, second)
    packlight.manual_seed(1)
    assert torch.equal(step(), first)
    layers = [sketch.Linear(IN, IN, rows=8, kind=kind) for _ in range(2)]
    for layer in layers:
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    layers[1](layers[0](x)).square().sum().backward()  # the same values and gradients
    assert not torch.equal(layers[0].weight.grad, layers[1].weight.grad)


# --- 11: NaN and infinity.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@every_kind
def test_non_finite_values_are_never_silently_finite(kind, value):
    for where in range(0, TOKENS, 7):
        for bad in ("x", "dy"):
            x, weight, _ = problem((TOKENS,))
            dy = torch.randn(TOKENS, OUT)
            (x.detach() if bad == "x" else dy)[where, 2] = value
            y = sketch.linear(x, weight, rows=8, kind=kind)
            (dweight,) = torch.autograd.grad(y, weight, dy)
            exact = dy.t() @ x.detach()
            assert not dweight[~exact.isfinite()].isfinite().any()


# --- 12: what is refused, and what is exact.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "keeps nothing"),
        ({"rows": -0.1}, "keeps nothing"),
        ({"rows": -3}, "keeps nothing"),
        ({"rows": float("nan")}, "keeps nothing"),
        ({"rows": 1.5}, "a share above 1"),
        ({"rows": True}, "neither a share"),
        ({"rows": "many"}, "neither a share"),
        ({"kind": "fft"}, "gaussian, rademacher, srht, dct, dft, rows, rows_norm, top_rows"),
        ({"min_rows": 0}, "min_rows=0 is not a number of rows"),
        ({"max_rows": 2.5}, "max_rows=2.5 is not a number of rows"),
        ({"min_rows": 20, "max_rows": 10}, "max_rows=10 is below min_rows=20"),
    ],
)
def test_bad_methods_raise(options, message):
    inputs = problem()
    for make in (lambda: Sketch(**options), lambda: sketch.linear(*inputs, **options)):
        with pytest.raises(InputError, match=message):
            make()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_unsupported_dtypes_raise(dtype):
    _, weight, _ = problem()
    with pytest.raises(InputError, match="takes float32, bfloat16, float16 or float64"):
        sketch.linear(torch.zeros(TOKENS, IN).to(dtype), weight)


def test_bad_shapes_and_devices_raise():
    x, weight, _ = problem()
    for bad in (x[..., :-1], torch.randn(())):
        with pytest.raises(InputError, match="takes 12 features"):
            sketch.linear(bad, weight)
    with pytest.raises(InputError, match="a weight of 2 dimensions"):
        sketch.linear(x, weight[0])
    with pytest.raises(InputError, match="the weight on meta"):
        sketch.linear(x, weight.to("meta"))
    with pytest.raises(InputError, match="takes a tensor, got list"):
        sketch.linear([1.0], weight)
    for options in ({"stride": 2}, {"padding": 1}, {"groups": 2}):
        (name,) = options
        with pytest.raises(InputError, match=f"{name}=.* is not"):
            sketch.conv2d(torch.randn(1, 4, 8, 8), torch.randn(4, 4, 1, 1), **options)
    with pytest.raises(InputError, match="kernel_size="):
        sketch.Conv2d(4, 4, 3)
    with pytest.raises(InputError, match="takes 4 features"):
        sketch.conv1d(torch.randn(2, 5, 30), torch.randn(4, 4, 1))
    assert sketch.Conv2d(4, 4, 1, padding="same")(torch.randn(2, 4, 5, 5)).shape == (2, 4, 5, 5)


def test_too_few_tokens_are_kept_exactly_and_said_once():
    x, weight, bias = problem((15,))
    with pytest.warns(UserWarning, match=r"15 tokens .* shape \(6, 12\)"):
        actual = gradients(ours(), (x, weight, bias))
    torch.testing.assert_close(actual, gradients(F.linear, (x, weight, bias)))
    gradients(ours(), (x, weight, bias))  # a second warning would be an error
    with pytest.warns(UserWarning, match="40 tokens"):
        sketch.linear(torch.randn(40, IN), weight[:5], rows=40)
    with torch.no_grad():
        sketch.linear(torch.randn(40, IN), weight[:4], rows=40)


# --- Beside other methods.


@pytest.mark.parametrize("kind", ["srht", "rows"])
def test_inside_saving_the_gradients_stay(kind):
    x, weight, bias = problem((256,))
    packlight.manual_seed(1)
    expected = gradients(ours(kind=kind), (x, weight, bias))
    packlight.manual_seed(1)
    with saving(GroupQuant(bits=8, rounding="nearest")):
        y = sketch.linear(x, weight, bias, kind=kind)
    actual = torch.autograd.grad(y.sum(), (x, weight, bias))
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05 * expected[1].abs().max())


@every_kind
def test_a_small_model_trains(kind):
    """Least squares with a batch larger than it needs: the noise of a fifth is soon averaged."""
    x, truth = torch.randn(256, IN), torch.randn(IN, OUT)
    layer = sketch.Linear(IN, OUT, rows=0.2, kind=kind)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(150):
        loss = (layer(x) - x @ truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * truth.square().sum(0).mean().item()


# --- What only a device can show.


@pytest.mark.gpu
@every_kind
def test_cuda_graph_capture(kind):
    x, weight, _ = (t.detach().cuda() for t in problem((4096,)))
    weight.requires_grad_()

    def step():
        y = sketch.linear(x, weight, kind=kind)
        return torch.autograd.grad(y, weight, torch.ones_like(y))[0]

    graph, result = captured(step)
    graph.replay()
    first = result.clone()
    graph.replay()
    assert not torch.equal(result, first)  # another draw at every replay
    exact = torch.ones(OUT, 4096, device="cuda") @ x
    assert (result - exact).norm() < 10 * exact.norm()


@pytest.mark.gpu
@every_kind
def test_same_gradient_on_every_device(kind):
    x, dy = torch.randn(2000, IN), torch.randn(2000, OUT)
    seed = torch.randint(2**63 - 1, (1,))

    def gradient(device):
        moved = [t.detach().to(device) for t in (x, dy, seed)]
        kept = ops.keep(moved[0], moved[2], kind, 300, torch.float32)
        total = moved[1].sum(0)
        return ops.weight_gradient(moved[1], kept, total, kind, 300, IN, torch.float32).cpu()

    torch.testing.assert_close(gradient("cuda"), gradient("cpu"), rtol=1e-3, atol=0.05)
