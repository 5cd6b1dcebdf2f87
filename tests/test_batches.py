"""A batch is a tensor, several, or one mapping of keywords, wherever a model is called with one."""

import collections
import re

import pytest
import torch
from torch import nn

import packlight
from packlight.batches import arguments_of, call
from packlight.errors import InputError


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.act = nn.GELU()

    def forward(self, x, scale=None):
        y = self.act(self.first(x))
        return (y if scale is None else y * scale).square().mean()


class Whole(Keywords):
    """Takes a batch as its loader makes it, and the names of two tensors are in it."""

    def forward(self, batch):
        return super().forward(batch["x"], batch["scale"])


class Anything(Keywords):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


TENSORS = {"x": torch.randn(6, 8), "scale": torch.ones(6, 16)}
WAYS = {
    "tensors": lambda use: use(Keywords(), *TENSORS.values()),
    "keywords": lambda use: use(Keywords(), **TENSORS),
    "mapping": lambda use: use(Keywords(), TENSORS),
    "mapping of a class of its own": lambda use: use(Keywords(), collections.UserDict(TENSORS)),
    "mapping and a keyword": lambda use: use(
        Keywords(), {"x": TENSORS["x"]}, scale=TENSORS["scale"]
    ),
    "mapping that is one argument": lambda use: use(Whole(), TENSORS),
    "mapping for a forward that takes anything": lambda use: use(Anything(), TENSORS),
}
USES = {
    "profile": packlight.profile,
    "predict": packlight.predict,
    "bytes": lambda model, *batch, **kwargs: (
        packlight.convert(model).bytes(*batch, **kwargs).before
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use", USES)
def test_reports_take_a_batch_in_every_way(use, way):
    expected = packlight.profile(Keywords(), *TENSORS.values()).activation_bytes
    assert WAYS[way](USES[use]).activation_bytes == expected


ONE_OBJECT = {
    "tuple": tuple(TENSORS.values()),
    "list": list(TENSORS.values()),
    "mapping": TENSORS,
    "mapping of a class of its own": collections.UserDict(TENSORS),
}


@pytest.mark.parametrize("way", ONE_OBJECT)
def test_what_takes_batches_as_one_object_takes_them_in_every_way(way):
    batch, model = ONE_OBJECT[way], Keywords()
    assert torch.equal(call(model, batch), model(*TENSORS.values()))
    error = packlight.gradient_error(model, batch, packlight.GroupQuant(8), draws=1)
    assert error.rows[0].weights[0].error < 0.1
    assert packlight.fewbit.calibrate(model, [batch]).layers[0].name == "act"
    assert packlight.sketch.choose(model, [batch], kinds=["rows"]).layers[0].name == "first"


@pytest.mark.parametrize("batch", [(TENSORS,), tuple(TENSORS.values())], ids=["mapping", "tensors"])
def test_a_plan_takes_what_reports_take(batch):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    model.forward = lambda x, scale: nn.Sequential.forward(model, x).mean() * scale.mean()
    plan = packlight.plan(model, *batch, memory=1.0, device="H100")
    assert plan.kept_bytes <= plan.plain.kept


def test_keys_that_a_model_does_not_take_are_named():
    message = re.escape("the batch has x, labels, and Keywords takes (x, scale=None); pass a map")
    with pytest.raises(InputError, match=message):
        packlight.predict(Keywords(), {"x": TENSORS["x"], "labels": TENSORS["scale"]})


def test_keys_that_are_no_names_are_no_keywords():
    assert arguments_of(Whole(), {1: 2}) == (({1: 2},), {})


def test_functions_take_mappings_as_their_parameters_say():
    assert arguments_of(lambda batch: None, TENSORS) == ((TENSORS,), {})
    assert arguments_of(lambda x, scale: None, TENSORS) == ((), TENSORS)


def test_a_script_whose_parameters_are_not_known_takes_keywords(monkeypatch):
    monkeypatch.setattr("inspect.signature", lambda function: int("x"))  # a ValueError
    assert arguments_of(Keywords(), TENSORS) == ((), TENSORS)


@pytest.mark.parametrize("loss", [lambda y: 2 * y, lambda model, x: 2 * model(*x)])
def test_a_loss_is_of_the_output_or_of_model_and_batch(loss):
    batch = tuple(TENSORS.values())
    report = packlight.gradient_error(Keywords(), batch, packlight.GroupQuant(8), loss=loss)
    assert report.rows[0].weights[0].error < 0.1


WRONG = {
    "predict": lambda *batch: packlight.predict(nn.Sequential(nn.Linear(8, 8)), *batch),
    "plan": lambda *batch: packlight.plan(
        nn.Sequential(nn.Linear(8, 8)), *batch, memory=1.0, device="H100"
    ),
}


@pytest.mark.parametrize("use", WRONG)
def test_a_model_that_fails_says_where_and_torch_logs_nothing(use, caplog):
    with pytest.raises(RuntimeError) as raised:
        WRONG[use](torch.randn(4, 9))
    (note,) = raised.value.__notes__
    assert note.startswith("The forward pass of 0 (Linear) failed where packlight ran it without v")
    assert not caplog.records


@pytest.mark.parametrize("use", WRONG)
def test_the_batch_of_a_loader_is_one_argument(use):
    with pytest.raises(TypeError) as raised:
        WRONG[use]([torch.randn(4, 8), torch.randn(4)])
    assert "The list was passed as one argument; *batch passes what" in raised.value.__notes__[1]


def test_a_device_that_is_none_is_named():
    with pytest.raises(InputError, match=re.escape("device='gpu' is no device of torch's")):
        packlight.predict(nn.Linear(8, 8), torch.randn(4, 8), device="gpu")
