"""Every rule of every method: a converted layer of torch.nn computes what the plain one does.

The table is the registry of rules itself, so a new method is tested by writing its rules; the
samples are in `rule_samples.py`.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import FewBit, FixedPoint, GroupQuant, Inverted
from packlight.sketch import Sketch
from tests.helpers import dtype_name, kept_bytes
from tests.rule_samples import METHODS, RULES, sample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# How far a gradient may lie from torch's, relative to its norm, by method: 8 bits, normal inputs. A
# derivative that jumps (SELU at 0) has the worst: a code may lie on the wrong side.
BOUND = {FewBit: 0.02, FixedPoint: 0.05, GroupQuant: 0.05, Inverted: 1e-4}
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


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@every_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_forward_and_gradients_are_those_of_the_plain_layer(method, kind, dtype):
    plain, converted, x = pair(method, kind, dtype)
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
        if kind in STEPS:  # windows that overlap are summed in another order
            tolerance = ROUNDING[dtype]
            torch.testing.assert_close(our_grads[name], grad, rtol=tolerance, atol=tolerance)
        elif kind in LINEAR and name != "weight":
            torch.testing.assert_close(our_grads[name], grad)
        elif method is Sketch:
            assert torch.isfinite(our_grads[name]).all()  # unbiased: see the tests of sketches
        else:
            assert distance(our_grads[name], grad) < BOUND[method] + ROUNDING[dtype], name


@every_rule
def test_without_training_or_gradients_it_is_the_plain_layer(method, kind):
    plain, converted, x = pair(method, kind)
    if kind is not nn.Dropout:
        with torch.no_grad():
            assert torch.equal(converted(x), plain(x))
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
            assert distance(our_grads[name], grad) < bound, name


@every_rule
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_changes_nothing(method, kind, reentrant):
    _, converted, x = pair(method, kind)
    again = copy.deepcopy(converted)
    y, grads = step(converted, x)
    ours, our_grads = step(again, x, lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    assert torch.equal(ours, y)
    for name, grad in grads.items():
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
