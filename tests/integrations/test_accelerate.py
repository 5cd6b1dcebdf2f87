"""`accelerate.Accelerator`: a model is converted before `prepare`, or after."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import packlight
from packlight import FewBit, GroupQuant
from tests.integrations.models import batch, make, worst_error

EIGHT = (GroupQuant(bits=8, group_size=32, rounding="nearest"), FewBit(bits=8))

every_precision = pytest.mark.parametrize("precision", ["no", "bf16"])


@pytest.fixture
def accelerator(precision):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(mixed_precision=precision, cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(accelerator, model, convert=None, steps=2):
    """Gradients of the last step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if convert == "before":
        packlight.convert(model, EIGHT)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if convert == "after":
        packlight.convert(prepared, EIGHT)
    inputs = batch("bert")
    for _ in range(steps):
        optimizer.zero_grad()
        with accelerator.accumulate(prepared):
            loss = prepared(**inputs).loss
            accelerator.backward(loss)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    return prepared, gradients


@every_precision
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_prepared_model_trains(when, accelerator, precision):
    plain = make("bert")
    converted = copy.deepcopy(plain)
    _, expected = train(accelerator, plain)
    prepared, actual = train(accelerator, converted, when)
    assert worst_error(actual, expected) < (0.05 if precision == "no" else 0.08)
    assert type(converted.classifier) is packlight.groupquant.Linear
    inputs = batch("bert")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        kept = [packlight.profile(m, **inputs).activation_bytes for m in (plain, prepared)]
    assert kept[0] > 3 * kept[1]


@every_precision
def test_the_model_comes_back_plain(accelerator, precision, tmp_path):
    model = make("bert")
    prepared, _ = train(accelerator, model, "before")
    state = accelerator.get_state_dict(prepared)
    unwrapped = accelerator.unwrap_model(prepared)
    assert packlight.revert(unwrapped) > 0
    assert {type(m) for m in unwrapped.modules()} == {type(m) for m in make("bert").modules()}
    assert state.keys() == make("bert").state_dict().keys()
    make("bert").load_state_dict(state)


@pytest.mark.parametrize("precision", ["bf16"])
def test_a_bare_layer_is_converted_before_it_is_prepared(accelerator, precision):
    """With mixed precision accelerate replaces the forward of what it is given, on the instance."""
    layer = accelerator.prepare(nn.Linear(64, 64))
    with pytest.raises(packlight.CannotConvertError, match="convert before that"):
        packlight.convert(layer, GroupQuant())
    other = nn.Linear(64, 64)
    packlight.convert(other, GroupQuant(bits=4, code="minmax"))
    x = torch.randn(64, 64, requires_grad=True)
    prepared = accelerator.prepare(other)
    kept = packlight.profile(prepared, x).activation_bytes
    assert kept == x.numel() // 2 + 4 * x.numel() // 128


@pytest.mark.parametrize("precision", ["no"])
def test_a_saved_state_is_loaded(accelerator, precision, tmp_path):
    model = make("bert")
    train(accelerator, model, "before")
    accelerator.save_state(tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
