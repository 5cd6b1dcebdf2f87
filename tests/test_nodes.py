"""Functions of ours as nodes of the graph that `torch.compile` traces (`_torch/nodes.py`)."""

import copy
import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import packlight
from packlight import GroupQuant, _torch
from tests.helpers import gradients

NEAREST = GroupQuant(bits=8, rounding="nearest")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


class Targets:
    """A backend that runs the graph as it is and keeps what its nodes call."""

    def __init__(self):
        self.names = []

    def __call__(self, graph, _):
        nodes = (node for node in graph.graph.nodes if node.op == "call_function")
        self.names += [getattr(node.target, "__name__", str(node.target)) for node in nodes]
        return graph


def test_each_layer_is_one_node(fresh_compiler):
    converted = model()
    packlight.convert(converted, NEAREST)
    backend = Targets()
    compiled = torch.compile(converted, backend=backend, fullgraph=True)
    x = torch.randn(32, 64)
    found = gradients(compiled, x)
    applied = [name for name in backend.names if "apply" in name]
    assert applied == ["apply_LayerNorm", "apply_Linear", "apply_GELU", "apply_Linear"]
    for a, b in zip(found, gradients(converted, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_without_nodes_the_tracer_follows_the_layers(backend, monkeypatch, fresh_compiler):
    monkeypatch.setattr(_torch.GRAPH_NODES, "values", None, raising=False)
    plain, x = model(), torch.randn(32, 64)
    converted = copy.deepcopy(plain)
    packlight.convert(converted, NEAREST)
    followed = gradients(torch.compile(converted, backend=backend, fullgraph=True), x)
    for a, b in zip(gradients(plain, x), followed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * float(a.abs().max()))


def test_another_method_is_another_graph(fresh_compiler):
    converted = model()
    packlight.convert(converted, NEAREST)
    counter = CompileCounter()
    compiled = torch.compile(converted, backend=counter, fullgraph=True)
    x = torch.randn(32, 64)
    compiled(x), compiled(x)
    assert counter.frame_count == 1
    converted[1].method = dataclasses.replace(NEAREST, group_size=64)
    compiled(x)
    assert counter.frame_count == 2


# ---- arguments -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Shift:
    by: float
    shape: tuple[int, ...]


class Pair(NamedTuple):
    factor: float
    shift: Shift


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pair, given, parts):
        ctx.factor = pair.factor * given.bits
        assert tuple(x.shape) == pair.shift.shape
        return x * ctx.factor + pair.shift.by + sum(parts)

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.factor, None, None, None


_affine = _torch.applied(_Affine)


def test_arguments_are_tensors_symbols_constants_and_what_is_made_of_them(fresh_compiler):
    def run(x):
        return _affine(x, Pair(2.0, Shift(1.0, tuple(x.shape))), NEAREST, [x.shape[0], 3])

    backend = Targets()
    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 4, 5):
        x = torch.randn(rows, 2, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, run(x))
        y.sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 16.0))
    assert backend.names.count("apply_Affine") == 1


class _Called(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, function):
        return function(x)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


_called = _torch.applied(_Called)


def test_with_any_other_argument_the_tracer_follows(fresh_compiler):
    def run(x, z):
        return _called(x, lambda y: y + z)

    backend = Targets()
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    ones = compiled(torch.zeros(3, requires_grad=True), torch.ones(3))
    assert torch.equal(ones, torch.ones(3))
    assert "apply_Called" not in backend.names
