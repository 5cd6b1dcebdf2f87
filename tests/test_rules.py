"""Every rule of every method: a converted layer of torch.nn computes what the plain one does.

The table is the registry of rules itself, so a new method is tested by writing its rules; the
samples are in `rule_samples.py`.
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import FewBit, FixedPoint, Inverted, Method, Quantiser
from packlight.sketch import Sketch
from tests.helpers import dtype_name, kept_bytes, relative_error
from tests.rule_samples import METHODS, RULES, sample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# How far a gradient may lie from torch's, relative to its norm, by method: 8 bits, normal inputs. A
# derivative that jumps (SELU at 0) has the worst: a code may lie on the wrong side.
BOUND = {FewBit: 0.02, FixedPoint: 0.05, Quantiser: 0.05, Inverted: 1e-4, Method: 0.0}
# What the rounding of the output adds, in the dtype.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# The gradients of input and bias need no packed input.
LINEAR = (
    nn.Linear,
    *(getattr(nn, f"Conv{kind}{n}d") for kind in ("", "Transpose") for n in (1, 2, 3)),
)
# Derivatives that are steps, so that bits tell all.
STEPS = (
    nn.Dropout, nn.Hardshrink, nn.Hardsigmoid, nn.Hardtanh, nn.LeakyReLU, nn.MaxPool1d,
    nn.MaxPool2d, nn.MaxPool3d, nn.ReLU, nn.ReLU6, nn.Softshrink, nn.Threshold,
)  # fmt: skip

# Of these torch has kernels for CUDA only.
NOT_ON_A_CPU = [
    *((kind, dtype) for kind in (nn.AvgPool3d, nn.LPPool3d) for dtype in DTYPES[1:]),
    (nn.RReLU, torch.float16),
]
# Layers that draw random numbers in training.
DRAWING = (nn.Dropout, nn.RReLU)

every_rule = pytest.mark.parametrize(
    ("method", "kind"), RULES, ids=[f"{method.__name__}-{kind.__name__}" for method, kind in RULES]
)


def pair(method, kind, dtype=torch.float32):
    """A plain layer, a converted copy of it, and an input."""
    plain, x = sample(method, kind)
    plain = plain.to(dtype)
    converted = copy.deepcopy(plain)
    packlight.convert(converted, METHODS[method])
    return plain, converted, x.to(dtype)


def step(layer, x, run=lambda layer, x: layer(x)):
    """Output and gradients, by name; the same random numbers at each call."""
    packlight.manual_seed(1)
    x = x.clone().requires_grad_()
    y = run(layer, x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    leaves = {"input": x, **dict(layer.named_parameters())}
    layer.zero_grad()
    y.backward(dy)  # not `grad`, which a re-entrant checkpoint refuses
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@every_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_forward_and_gradients_are_those_of_the_plain_layer(method, kind, dtype):
    plain, converted, x = pair(method, kind, dtype)
    if (kind, dtype) in NOT_ON_A_CPU:
        pytest.skip("torch has no kernel of it")
    y, grads = step(plain, x)
    ours, our_grads = step(converted, x)
    if kind is nn.Dropout:  # its own mask, of which the gradient is that of torch's formula
        kept = ours != 0
        torch.testing.assert_close(ours[kept], (x / 0.7)[kept])
        assert 0.6 < kept.float().mean() < 0.8
        assert torch.equal(our_grads["input"] != 0, kept)
        return
    assert torch.equal(ours, y)
    for name, buffer in converted.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name))
    for name, grad in grads.items():
        assert our_grads[name].dtype == grad.dtype
        if method is Method:
            assert torch.equal(our_grads[name], grad)
            assert our_grads[name].stride() == grad.stride()
        elif kind in STEPS:  # windows that overlap are summed in another order
            tolerance = ROUNDING[dtype]
            torch.testing.assert_close(our_grads[name], grad, rtol=tolerance, atol=tolerance)
        elif kind in LINEAR and name != "weight":
            torch.testing.assert_close(our_grads[name], grad)
        elif method is Sketch:
            assert torch.isfinite(our_grads[name]).all()  # unbiased: see the tests of sketches
        else:
            assert relative_error(our_grads[name], grad) < BOUND[method] + ROUNDING[dtype], name


@every_rule
def test_without_training_or_gradients_it_is_the_plain_layer(method, kind):
    plain, converted, x = pair(method, kind)
    if kind not in DRAWING:
        with torch.no_grad():
            packlight.manual_seed(1)
            y = converted(x)
            packlight.manual_seed(1)
            assert torch.equal(y, plain(x))
    plain.eval(), converted.eval()
    (y, grads), (ours, our_grads) = step(plain, x), step(converted, x)
    assert torch.equal(ours, y)
    for name, grad in grads.items():
        assert torch.equal(our_grads[name], grad)


@every_rule
def test_autocast_gives_what_torch_gives(method, kind):
    plain, converted, x = pair(method, kind)
    with torch.autocast("cpu", torch.bfloat16):
        (y, grads), (ours, our_grads) = step(plain, x), step(converted, x)
    assert ours.dtype == y.dtype
    if kind is not nn.Dropout:
        assert torch.equal(ours, y)
    for name, grad in grads.items():
        assert our_grads[name].dtype == grad.dtype
        if kind is not nn.Dropout and method is not Sketch:
            bound = BOUND[method] + ROUNDING[torch.bfloat16]
            assert relative_error(our_grads[name], grad) < bound, name


@every_rule
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_changes_nothing(method, kind, reentrant):
    _, converted, x = pair(method, kind)
    again = copy.deepcopy(converted)
    y, grads = step(converted, x)
    ours, our_grads = step(again, x, lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    assert torch.equal(ours, y)
    for name, grad in grads.items():
        # The second pass of the non-reentrant kind draws a sketch, or rounds, of its own.
        if (method is not Sketch and kind is not nn.PReLU) or name != "weight":
            assert torch.equal(our_grads[name], grad)


@every_rule
def test_it_keeps_no_more_than_the_plain_layer(method, kind):
    plain, converted, x = pair(method, kind)

    def kept(layer):
        factor = torch.ones(1, requires_grad=True)
        y = layer(x.clone().requires_grad_())
        # `Inverted` saves where the consumer keeps the output, as this product does.
        return y * factor if method is Inverted else y

    ours, theirs = kept_bytes(lambda: kept(converted)), kept_bytes(lambda: kept(plain))
    assert ours <= theirs
    if method is not Inverted:
        assert ours < 0.75 * theirs


@every_rule
def test_it_reverts_to_what_it_was(method, kind):
    plain, converted, x = pair(method, kind)
    before = {name: value for name, value in vars(plain).items() if not name.startswith("_")}
    step(converted, x)
    packlight.revert(converted)
    assert type(converted) is type(plain)
    assert vars(converted).keys() == vars(plain).keys()
    assert {name: vars(converted)[name] for name in before} == before
    assert repr(converted) == repr(plain)


# --- What is done to outputs.

IN_PLACE = {
    "add_": lambda y: y.add_(1.0),
    "relu_": lambda y: y.relu_(),
    "mul_": lambda y: y.mul_(2.0),
}


def inputs(x):
    """An input of so many dimensions, one of the batch, and of rows ones of more."""
    more = [(4, 8, 64), (2, 4, 4, 64)] if x.dim() == 2 else []
    return [x, x[0], *(x.expand(*shape[:-2], *x.shape)[..., : shape[-2], :] for shape in more)]


@pytest.mark.filterwarnings("ignore:a sketch of")
@every_rule
def test_an_output_may_be_modified_in_place_where_torch_s_may(method, kind):
    plain, converted, x = pair(method, kind)
    if method is Inverted and kind not in LINEAR:
        return  # this method keeps the output, which must stay
    for given, write in itertools.product(inputs(x), IN_PLACE.values()):
        try:
            y, grads = step(plain, given, lambda layer, x, write=write: write(layer(x * 1.0)))
        except (RuntimeError, ValueError):
            continue  # torch keeps that output, or takes no such input
        ours, our_grads = step(
            converted, given, lambda layer, x, write=write: write(layer(x * 1.0))
        )
        if kind is nn.Dropout:
            continue  # its own mask
        torch.testing.assert_close(ours, y)
        for name, grad in grads.items():
            if method is not Sketch or name != "weight":
                error = (our_grads[name] - grad).norm()
                assert error <= BOUND.get(method, 1e-4) * grad.norm() + 1e-4, name


# --- Tensors that packlight has no kernels for, and what needs torch's own functions.


def other_tensors(x):
    with torch.inference_mode():
        inference = x.clone()
    found = {
        "integers": x.long(),
        "complex": x.to(torch.complex64),
        "of inference mode": inference,
        "sparse": x.to_sparse(),
        "float8": x.to(torch.float8_e5m2),
    }
    if x.dim() == 2:
        found["jagged"] = torch.nested.nested_tensor([x[:5], x[5:9]], layout=torch.jagged)
    return found


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@every_rule
def test_other_tensors_are_left_to_torch(method, kind):
    if kind is nn.RReLU:
        pytest.skip("torch.func has no RReLU")
    plain, converted, x = pair(method, kind)
    if kind.__name__.startswith("InstanceNorm"):  # torch's forward, of which we replace a part
        with pytest.raises(packlight.InputError, match="takes float32"):
            converted(x.long())
        return
    for name, given in other_tensors(x).items():
        results = []
        for layer in (plain, converted):
            torch.manual_seed(1)
            try:
                results.append(layer(given))
            except (RuntimeError, TypeError, ValueError) as error:
                results.append((type(error), str(error)))
        expected, actual = results
        if isinstance(expected, tuple):
            assert actual == expected, name
        else:
            assert type(actual) is type(expected), name
            assert (actual.dtype, actual.shape[0]) == (expected.dtype, expected.shape[0])


@pytest.mark.filterwarnings("ignore:a sketch of")
@every_rule
def test_transforms_of_torch_func_take_torch_s_own_functions(method, kind):
    if kind is nn.RReLU:
        pytest.skip("torch.func has no RReLU")
    plain, converted, x = pair(method, kind)
    if kind.__name__.startswith("InstanceNorm"):
        with pytest.raises(packlight.InputError, match="torch's own function"):
            torch.func.grad(lambda x: converted(x).sum())(x)
        return

    def gradients(layer):
        parameters = {name: value.detach() for name, value in layer.named_parameters()}

        def loss(parameters, x):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        torch.manual_seed(1)
        return torch.func.grad(loss, argnums=(0, 1))(parameters, x)

    if list(plain.buffers()):  # running statistics, which no transform lets a layer write
        for layer in (plain, converted):
            with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
                gradients(layer)
        return
    torch.testing.assert_close(gradients(converted), gradients(plain))
    if kind in (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.RReLU):
        return  # torch draws for no batches
    rows = torch.func.vmap(converted, randomness="different")(x[:4, None])
    assert rows.shape == plain(x[:4]).unsqueeze(1).shape


def test_what_is_exported_in_training_is_the_plain_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    x = torch.randn(16, 64)
    expected = model(x)
    packlight.convert(model, functional=True)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    assert not any("packlight" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_functions_say_that_they_cannot_be_transformed():
    x = torch.randn(4, 64)
    for function in (packlight.groupquant.gelu, packlight.fewbit.silu, packlight.inverted.mish):
        with pytest.raises(packlight.InputError, match=r"torch\.func .* cannot differentiate"):
            torch.func.grad(lambda x, function=function: function(x).sum())(x)
        with torch.no_grad():
            torch.func.vmap(function)(x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(packlight.InputError):
        packlight.groupquant.gelu(torch.autograd.forward_ad.make_dual(x, x))


# Of each Function one layer.
FUNCTIONS = (
    nn.BatchNorm1d, nn.Conv2d, nn.Dropout, nn.GELU, nn.GLU, nn.GroupNorm, nn.LayerNorm, nn.Linear,
    nn.MaxPool2d, nn.ReLU,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("method", "kind"), [row for row in RULES if row[1] in FUNCTIONS])
def test_compiled_autograd_gives_the_gradients(method, kind, fresh_compiler):
    """Behind a norm, whose pack a reader shares."""
    _, converted, x = pair(method, kind)
    norm = nn.LayerNorm(x.shape[-1])
    packlight.convert(norm, METHODS[Quantiser])
    model = nn.Sequential(norm, converted)
    compiler = torch.compile(backend="eager")
    packlight.manual_seed(1)
    _, expected = step(model, x)
    packlight.manual_seed(1)
    with torch._dynamo.compiled_autograd._enable(compiler):
        _, actual = step(model, x)
    torch.testing.assert_close(actual, expected)


# --- A weight that changes before the backward pass has read it.


@pytest.mark.parametrize(
    ("method", "kind"), [row for row in RULES if row[1] in LINEAR and row[0] is not Inverted]
)
def test_a_weight_modified_before_the_backward_pass_is_named(method, kind):
    """As by a discriminator's step between the passes of the generator, under autocast."""
    _, converted, x = pair(method, kind)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = converted(x)
    with torch.no_grad():
        converted.weight.add_(1.0)
    with pytest.raises(packlight.ModifiedWeightError, match="step after the backward pass"):
        y.float().sum().backward()
