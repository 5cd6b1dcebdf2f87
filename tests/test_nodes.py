"""Functions of ours as nodes of the graph that `torch.compile` traces (`_torch/nodes.py`)."""

import copy
import dataclasses
from typing import NamedTuple

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import GroupQuant, _torch
from packlight._checks import is_frozen
from packlight._seeds import Drawn, as_given, operands
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


# ---- layers --------------------------------------------------------------------------------------


def kept_and_gradients(run, layers, x):
    """The bytes that a training pass keeps for its backward pass, and its gradients."""
    kept = packlight.profile(run, x).activation_bytes
    return kept, gradients_of(run, layers, x)


def gradients_of(run, layers, x):
    layers.zero_grad()
    packlight.manual_seed(0)
    run(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in layers.parameters()]


def test_a_pack_goes_from_node_to_node_by_a_note(fresh_compiler):
    """The Linear reads the pack of the norm, whose node gives the tracer nothing but its output."""
    layers = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256))
    packlight.convert(layers, NEAREST)
    x = torch.randn(64, 256)
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    (kept, found), (kept_uncompiled, expected) = (
        kept_and_gradients(run, layers, x) for run in (compiled, layers)
    )
    one_pack = 64 * 256 + 4 * 64 * 2  # 8 bits an element and a word a group
    assert one_pack <= kept <= kept_uncompiled < 2 * one_pack
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("inside", ["reads", "writes"])
def test_notes_of_a_checkpoint_stay_in_it_and_those_around_it_are_read(inside, fresh_compiler):
    norm, linear = nn.LayerNorm(256), nn.Linear(256, 256)
    layers = nn.Sequential(norm, linear)
    packlight.convert(layers, dataclasses.replace(NEAREST, rounding="stochastic"))

    def run(x):
        if inside == "reads":
            return checkpoint(linear, norm(x), use_reentrant=False)
        return linear(checkpoint(norm, x, use_reentrant=False))

    plain = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256))
    plain.load_state_dict(layers.state_dict())
    x = torch.randn(64, 256)
    found = gradients_of(torch.compile(run, backend="aot_eager", fullgraph=True), layers, x)
    for a, b in zip(found, gradients_of(plain, plain, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * float(b.abs().max()))


def test_layers_of_equal_methods_share_compiled_code(fresh_compiler):
    counter = CompileCounter()
    blocks = [model(), model()]
    for block in blocks:
        packlight.convert(block, GroupQuant(bits=8, group_size=64))
        torch.compile(block, backend=counter)(torch.randn(32, 64))
    assert counter.frame_count == 1
    copied = copy.deepcopy(blocks[0])
    torch.compile(copied, backend=counter)(torch.randn(32, 64))
    assert counter.frame_count == 1


def test_a_layer_that_keeps_by_another_setting_is_another_graph(fresh_compiler):
    counter = CompileCounter()
    converted = model()
    packlight.convert(converted, NEAREST)
    compiled = torch.compile(converted, backend=counter, fullgraph=True)
    x = torch.randn(32, 64)
    compiled(x)
    converted[0].eps = 0.5
    torch.testing.assert_close(compiled(x), converted(x))
    converted[2].approximate = "tanh"
    torch.testing.assert_close(compiled(x), converted(x))
    converted.eval()
    torch.testing.assert_close(compiled(x), converted(x))
    assert counter.frame_count == 4


def test_a_frozen_layer_is_one_behind_the_tracer_too(fresh_compiler):
    @_torch.one_node
    def keeps(weight):
        return weight * (0.0 if is_frozen(weight) else 1.0)

    weight = nn.Parameter(torch.ones(3), requires_grad=False)
    compiled = torch.compile(keeps, backend="aot_eager", fullgraph=True)
    assert not compiled(weight).any()
    assert compiled(torch.ones(3)).all()


@pytest.mark.parametrize("known", [True, False])  # that a Linear asks for seeds
def test_a_graph_draws_its_seeds_at_once(fresh_compiler, monkeypatch, known):
    if known:
        test_a_graph_draws_its_seeds_at_once(fresh_compiler, monkeypatch, False)
        torch._dynamo.reset()
    else:
        monkeypatch.setattr(_torch.nodes, "_wanting", set())
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    packlight.convert(layers, GroupQuant(bits=4))
    places = []

    def backend(graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes]
        places.append(sum("seed" in target for target in targets))
        return aot_autograd(fw_compiler=forward)(graph, inputs)

    def forward(graph, _):
        nodes = [node for node in graph.graph.nodes if "group_quantize" in str(node.target)]
        places.extend((node.args[-2].name, node.args[-1]) for node in nodes)
        return make_boxed_func(graph)

    torch.compile(layers, backend=backend, fullgraph=True)(torch.randn(32, 64))
    assert places == [1, ("rounding_seeds", 0), ("rounding_seeds", 2), ("rounding_seeds", 4)]


def test_elements_of_a_graphs_seeds_are_seeds():
    seeds = torch.ops.packlight.rounding_seeds(torch.device("cpu"), 0)
    assert seeds.unique().numel() == seeds.numel() == 2 * _torch.SEEDS_AT_ONCE
    x = torch.randn(64, 128)
    given = (list(x.stride()), list(GroupQuant(bits=4).groups))
    drawn = operands(Drawn(seeds, 6))
    for a, b in zip(
        torch.ops.packlight.group_quantize(x, *given, *drawn),
        torch.ops.packlight.group_quantize(x, *given, *operands(seeds[6:7])),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert torch.equal(as_given(Drawn(seeds, 6)), seeds[6:7])
