"""Private names of torch: each may go, which costs memory or a feature, and no gradient."""

import subprocess
import sys
import warnings
import weakref
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

import packlight
from packlight import GroupQuant, InputError, _torch, env
from packlight._torch import attributes
from packlight._torch.capabilities import Capability, warn_if_untested
from packlight.profile import recording
from tests.helpers import relative_error

CUDA_HAS = (_torch.CURRENT_DEVICE, _torch.CURRENT_STREAM, _torch.WORKSPACES)
CPU_HAS = [cap for cap in _torch.CAPABILITIES if cap not in CUDA_HAS]


def model_and_twin():
    def make():
        return nn.Sequential(
            nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.0), nn.Linear(256, 64)
        )

    model, twin = make(), make()
    twin.load_state_dict(model.state_dict())
    packlight.convert(model, packlight.DEFAULT_METHODS, functional=True)
    packlight.convert(model, GroupQuant(bits=8), functional=True)
    return model, twin


@pytest.mark.parametrize("capability", _torch.CAPABILITIES, ids=lambda cap: cap.name)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_trains_without_it(capability, compiled, monkeypatch, fresh_compiler):
    monkeypatch.setattr(capability, "values", None, raising=False)
    assert not capability
    model, twin = model_and_twin()
    x = torch.randn(32, 64)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    run(x).square().mean().backward()
    twin(x).square().mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 0.1


@pytest.mark.parametrize("capability", _torch.CAPABILITIES, ids=lambda cap: cap.name)
def test_saving_and_profile_are_right_without_it_or_refuse(capability, monkeypatch):
    monkeypatch.setattr(capability, "values", None, raising=False)
    model, twin = model_and_twin()
    packlight.revert(model)
    x = torch.randn(32, 64, requires_grad=True) * 1.0
    if capability in (_torch.NODES, _torch.SAVED):
        with pytest.raises(InputError, match="torch"), packlight.saving(GroupQuant(bits=8)):
            pass
    else:
        with packlight.saving(GroupQuant(bits=8), min_bytes=0):
            loss = model(x).square().mean()
        loss.backward()
        twin(x.detach()).square().mean().backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert relative_error(a.grad, b.grad) < 0.1
    if capability is _torch.NODES:
        with pytest.raises(InputError, match="torch"):
            packlight.profile(model, x.detach())
    else:
        assert packlight.profile(model, x.detach()).activation_bytes > 0


def test_private_attributes_have_an_answer_without_them(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU())
    x = torch.randn(4, 8)
    rows = packlight.profile(model, x).rows
    strange = SimpleNamespace(
        is_inference=lambda: False,
        untyped_storage=lambda: SimpleNamespace(data_ptr=lambda: 0),
    )
    assert attributes.version(strange) == -1
    assert attributes.base(strange) is None
    assert attributes.storage_key(strange) == ("tensor", id(strange))
    assert attributes.sparse_parts(strange) == []
    assert attributes.buffers(strange) == {}
    assert list(attributes.inside_compiled(strange)) == []
    monkeypatch.setattr(attributes, "_is_wrapper", None)
    monkeypatch.setattr(attributes, "_tree_leaves", None)
    monkeypatch.setattr(recording, "CALL_MODULE", None)
    assert attributes.tree_leaves(strange) == [strange]
    found = packlight.profile(model, x).rows
    assert [(row.bytes, row.module) for row in found] == [(row.bytes, row.module) for row in rows]


ALL_GONE = """
import sys, warnings
warnings.simplefilter("ignore")
import importlib, torch, torch.nn as nn
import torch.multiprocessing.reductions, torch.overrides, torch._subclasses.fake_tensor as fakes
for path in {paths!r}:
    module, _, name = path.partition(":")
    *owners, last = name.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part, None)
    try:
        delattr(owner, last)
    except (AttributeError, TypeError):
        pass  # of a class that is written in C
import packlight
model, twin = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)), nn.Sequential(
    nn.LayerNorm(64), nn.Linear(64, 64))
twin.load_state_dict(model.state_dict())
packlight.convert(model, packlight.GroupQuant(8), functional=True)
x = torch.randn(32, 64)
model(x).square().mean().backward(), twin(x).square().mean().backward()
for a, b in zip(model.parameters(), twin.parameters()):
    assert float((a.grad - b.grad).norm() / b.grad.norm()) < 0.1
try:
    packlight.predict(model, x)
except packlight.InputError as error:
    print(error)
"""


def test_without_any_of_them_the_package_is_imported_and_trains():
    # Those that torch itself needs for a plain step stay.
    needed = ("_push_mode", "_pop_mode", "_cuda_getDevice", "_get_current_function_mode")
    needed += ("_execution_engine", "StorageWeakRef", "VariableTracker", "FakeTensorMode")
    needed += ("_are_functorch_transforms_active", "register_lowering", "lowerings")
    needed += _torch.MODULE_HOOKS.paths
    paths = [p for cap in _torch.CAPABILITIES for p in cap.paths if not p.endswith(needed)]
    assert len(paths) > 12
    done = subprocess.run(
        [sys.executable, "-c", ALL_GONE.format(paths=paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_missing_name_is_a_no():
    assert Capability("a", "b", "torch:nn.Linear")
    assert not Capability("a", "b", "torch:nn.Linear", "torch:nn.NoSuchLayer")
    assert not Capability("a", "b", "no_such_module:name")


@pytest.mark.parametrize("capability", CPU_HAS, ids=lambda cap: cap.name)
def test_this_torch_has_it(capability):
    assert capability


def test_the_environment_lists_capabilities():
    listed = env.collect()["capabilities"]
    assert listed.keys() == {capability.name for capability in _torch.CAPABILITIES}
    assert listed[_torch.HOOKS.name] == "yes"
    assert _torch.HOOKS.name in env.as_text()


def test_what_is_missing_is_listed_with_its_cost(monkeypatch):
    monkeypatch.setattr(_torch.HOOKS, "values", None, raising=False)
    assert env.collect()["capabilities"][_torch.HOOKS.name] == f"no: {_torch.HOOKS.without}"


@pytest.mark.parametrize("version", ["2.10.1", "2.15.0", "3.0.0.dev2026+cpu"])
def test_an_untested_release_is_named(version):
    with pytest.warns(
        UserWarning, match=f"tested with torch 2.11 to 2.14, and this is {version[:4]}"
    ):
        warn_if_untested("torch", version, ("2.11", "2.14"))


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.1+cu130", "2.14.0a0+git123"])
def test_a_tested_release_is_not(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested("torch", version, ("2.11", "2.14"))


class _Keeps(torch.autograd.Function):
    """Twice x; says in its backward pass whether what it kept lives on once it was let go of."""

    lives: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x * 3)
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        (kept,) = ctx.saved_tensors
        alive = weakref.ref(kept)
        _torch.let_go_of_saved(ctx)
        del kept
        _Keeps.lives.append(alive() is not None)
        return dy * 2


def test_what_a_node_saved_is_let_go_of_unless_the_graph_is_retained(monkeypatch):
    x = torch.ones(4, requires_grad=True)
    for last in (False, True):
        if last:
            monkeypatch.setattr(_torch.FREEING, "values", None, raising=False)
        y = _Keeps.apply(x).sum()
        y.backward(retain_graph=True)
        y.backward()
        assert _Keeps.lives == [True, last]
        assert torch.equal(x.grad, torch.full((4,), 4.0))
        x.grad = None
        _Keeps.lives.clear()
