"""Layers that read one packed tensor one after the other rebuild it once."""

import pytest
import torch
from torch import nn

import packlight
from packlight import GroupQuant, reading
from packlight.groupquant import Linear
from packlight.quantiser import Restore
from tests.helpers import relative_error

METHOD = GroupQuant(bits=8, group_size=32, rounding="nearest")


@pytest.fixture
def rebuilt(monkeypatch):
    """The dtypes in which packs were rebuilt."""
    dtypes = []
    plain = Restore.__call__

    def call(self, dtype, *kept):
        dtypes.append(dtype)
        return plain(self, dtype, *kept)

    monkeypatch.setattr(Restore, "__call__", call)
    return dtypes


def layers(count=3):
    made = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(count))
    packlight.convert(made, METHOD)
    return made


def gradients(made):
    return [layer.weight.grad for layer in made]


def test_layers_in_a_row_rebuild_their_input_once(rebuilt):
    made, x = layers(), torch.randn(8, 64, requires_grad=True)
    sum(layer(x).sum() for layer in made).backward()
    assert rebuilt == [torch.float32]
    kept = METHOD.unpack(torch.float32, (8, 64), (64, 1), *METHOD.pack(x.detach(), None))
    for gradient in gradients(made):
        assert torch.equal(gradient, torch.ones(64, 8) @ kept)


def test_each_layer_for_itself_where_another_stands_between(rebuilt):
    first, between, last = layers()
    x = torch.randn(8, 64, requires_grad=True)
    (between(first(x)) + last(x)).sum().backward()
    assert len(rebuilt) == 3


def test_a_graph_may_be_gone_through_again_and_in_parts(rebuilt):
    made, x = layers(), torch.randn(8, 64, requires_grad=True)
    outputs = [layer(x) for layer in made]
    loss = sum(output.sum() for output in outputs)
    loss.backward(retain_graph=True)
    once = [gradient.clone() for gradient in gradients(made)]
    for output in outputs:
        output.sum().backward(retain_graph=True)
    loss.backward()
    for gradient, first in zip(gradients(made), once, strict=True):
        assert torch.equal(gradient, 3 * first)


def test_nothing_is_left_where_a_layer_has_no_gradient():
    made, x = layers(2), torch.randn(8, 64, requires_grad=True)
    read = []
    plain = reading.Reading.__call__

    def call(self, *args):
        read.append((self, plain(self, *args)))
        return read[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading.Reading, "__call__", call)
        outputs = [layer(x) for layer in made]
        outputs[1].sum().backward()
    (found, rebuilt), *others = read
    assert not others
    assert rebuilt.shape == (8, 64)
    assert found.rebuilt is None
    outputs[0].sum().backward()
    assert relative_error(made[0].weight.grad, made[1].weight.grad) == 0


def test_another_dtype_is_rebuilt_for_itself(rebuilt):
    x = torch.randn(8, 64, requires_grad=True)
    made = [Linear(64, 64, bias=False, bits=8) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [made[0](x)]
    outputs.append(made[1](x))
    sum(output.float().sum() for output in outputs).backward()
    assert sorted(map(str, rebuilt)) == ["torch.bfloat16", "torch.float32"]


@pytest.mark.parametrize("lost", ["stream", "end"])
def test_nothing_is_kept_without_its_stream_or_without_an_end(lost, rebuilt, monkeypatch):
    if lost == "stream":
        monkeypatch.setattr("packlight._torch.current_stream", lambda x: None)
    else:
        monkeypatch.setattr("packlight._torch.at_end_of_backward", lambda function: False)
    made, x = layers(), torch.randn(8, 64, requires_grad=True)
    sum(layer(x).sum() for layer in made).backward()
    assert len(rebuilt) == 3


def test_another_stream_rebuilds_for_itself(rebuilt, monkeypatch):
    streams = iter([1, 2, 2])
    monkeypatch.setattr("packlight._torch.current_stream", lambda x: next(streams))
    made, x = layers(), torch.randn(8, 64, requires_grad=True)
    sum(layer(x).sum() for layer in made).backward()
    assert len(rebuilt) == 2
