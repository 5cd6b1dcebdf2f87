import builtins
import contextlib
import dataclasses
import errno
import functools
import gc
import inspect
import itertools
import json
import math
import os
import random
import sys
import time
import weakref
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from packlight import GroupQuant, _torch, predict, saving
from packlight.errors import InputError, MissingDependencyError
from packlight.profile import Holding, MemoryDifference, MemoryReport, profile, restoring
from packlight.profile.lines import short_path
from packlight.report import human_bytes


def here(offset: int = 0) -> str:
    """This file's line, as a report names it."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return f"test_profile.py:{frame.f_back.f_lineno + offset}"


def line_of(function: object, text: str) -> str:
    """The line of `function` that contains `text`."""
    lines, first = inspect.getsourcelines(function)
    (found,) = [number for number, line in enumerate(lines) if text in line]
    return f"test_profile.py:{first + found}"


def on(report: MemoryReport, module: str, operation: str) -> list[int]:
    return [row.bytes for row in report.rows if (row.module, row.operation) == (module, operation)]


class Lines(nn.Module):
    """A module that runs a function, so that each test can write its model in one line."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class Gated(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate(x))
        return self.down(gate * self.up(x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.drop = nn.Dropout(0.1)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.drop(self.proj(mixed))
        return x + self.drop(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    def __init__(self, blocks: int = 4, width: int = 16, words: int = 50):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def counted_by_hooks(model, *inputs) -> int:
    """The same count by another way: hold all that is saved, and drop what is not the graph's."""
    packed = weakref.WeakValueDictionary()

    class Box:
        def __init__(self, tensor):
            self.tensor = tensor.detach()

    def pack(tensor):
        box = Box(tensor)
        packed[id(box)] = box
        return box

    with saved_tensors_hooks(pack, lambda box: box.tensor):
        output = model(*inputs)
    own = [*model.parameters(), *model.buffers(), *inputs]
    apart = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages = [box.tensor.untyped_storage() for box in packed.values()]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del output
    return sum(size for pointer, size in sizes.items() if pointer not in apart)


# ---- bytes, counted by hand ----------------------------------------------------------------------


def test_mlp():
    model = nn.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4, bias=False)
    )
    x = torch.randn(5, 8)
    report = profile(model, x)
    elements = 5 * 16 * 4
    # The norm keeps its input, a mean and a deviation a row; each other layer its input.
    assert on(report, "1", "NativeLayerNormBackward0") == [elements, 5 * 4, 5 * 4]
    assert on(report, "2", "GeluBackward0") == [elements]
    assert on(report, "3", "MmBackward0") == [elements]
    assert report.activation_bytes == 3 * elements + 2 * 5 * 4
    assert report.by_module() == {"1": elements + 40, "2": elements, "3": elements}
    assert report.by_module_type() == {"LayerNorm": 360, "GELU": 320, "Linear": 320}
    assert report.by_dtype() == {"float32": report.activation_bytes}
    assert report.by_device() == {"cpu": report.activation_bytes}
    assert report.parameter_bytes == 4 * (8 * 16 + 16 + 16 + 16 + 16 * 4)
    assert report.buffer_bytes == 0
    assert report.input_bytes == 5 * 8 * 4
    assert report.peak_bytes is None
    assert report.allocated_bytes is None
    assert all(row.source is None for row in report.rows)


def test_conv_norm_relu():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    report = profile(model, torch.randn(2, 3, 10, 10))
    out = 2 * 8 * 8 * 8 * 4
    assert on(report, "1", "NativeBatchNormBackward0")[:1] == [out]
    assert on(report, "2", "ReluBackward0") == [out]
    # BatchNorm also keeps a batch mean and a deviation for each channel.
    assert report.activation_bytes == 2 * out + 2 * 8 * 4
    assert report.input_bytes == 2 * 3 * 10 * 10 * 4
    assert report.buffer_bytes == 8 * 4 + 8 * 4 + 8


def test_inplace_relu_shares_with_its_neighbour():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    report = profile(model, torch.randn(3, 4))
    (row,) = report.rows
    assert row.bytes == 3 * 8 * 4
    assert [(held.module, held.operation) for held in row.holders] == [
        ("1", "ReluBackward0"),
        ("2", "AddmmBackward0"),
    ]


def test_attention():
    batch, heads, time, width = 2, 2, 8, 4
    qkv = nn.Linear(6, 3 * heads * width)

    def forward(self, x):
        q, k, v = self.qkv(x).view(batch, time, 3, heads, width).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)

    report = profile(Lines(forward, qkv=qkv), torch.randn(batch, time, 6))
    part = batch * heads * time * width * 4
    # q, k and v are views of one storage; the output and a logsumexp for each row are kept with it.
    assert sorted(row.bytes for row in report.rows)[-2:] == [part, 3 * part]
    assert report.activation_bytes == 4 * part + batch * heads * time * 4
    assert {row.source for row in report.rows} == {
        "tests/" + line_of(forward, "scaled_dot_product_attention")
    }


def test_dropout_keeps_a_mask():
    report = profile(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.randn(6, 4))
    # On the CPU the mask is stored in the dtype of the input.
    assert report.by_module() == {"1": 6 * 4 * 4}


def test_eval_mode_keeps_no_mask():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    assert profile(model, torch.randn(6, 4)).rows == ()
    assert not model.training


def test_embedding_keeps_its_indices_which_are_an_input():
    report = profile(nn.Embedding(10, 4), torch.randint(0, 10, (3, 5)))
    assert report.rows == ()
    assert report.input_bytes == 3 * 5 * 8


def test_softmax_and_loss():
    x, target = torch.randn(6, 4), torch.randint(0, 5, (6,))
    model = nn.Linear(4, 5)
    report = profile(model, x, loss=lambda out: F.cross_entropy(out, target))
    assert on(report, "(loss)", "LogSoftmaxBackward0") == [6 * 5 * 4]
    assert on(report, "(loss)", "NllLossBackward0") == [4]
    assert report.by_module() == {"(loss)": 6 * 5 * 4 + 4}
    # The labels came with the loss, so they are inputs as well.
    assert report.input_bytes == 6 * 4 * 4 + 6 * 8
    assert profile(nn.Sequential(model, nn.Softmax(-1)), x).by_module() == {"1": 6 * 5 * 4}


@pytest.mark.parametrize("with_lambda", [False, True])
def test_loss_modules_have_their_own_paths(with_lambda):
    criterion = nn.Sequential(nn.Flatten(0), nn.MSELoss())
    criterion[1].forward = lambda x: x.square().mean()
    loss = (lambda out: criterion(out)) if with_lambda else criterion
    report = profile(nn.Linear(4, 5), torch.randn(6, 4), loss=loss)
    name = "(loss).criterion.1" if with_lambda else "(loss).1"
    assert report.by_module() == {name: 6 * 5 * 4}


def test_tied_weights_are_one_parameter():
    model = Transformer(blocks=1)
    expected = sum(p.numel() * 4 for p in model.parameters())
    assert profile(model, torch.randint(0, 50, (2, 6))).parameter_bytes == expected


def test_module_used_twice():
    shared = nn.Linear(4, 4)
    model = Lines(lambda self, x: self.one(F.gelu(self.two(x))), one=shared, two=shared)
    report = profile(model, torch.randn(3, 4))
    assert report.by_module() == {"": 48, "one": 48}
    assert report.input_bytes == 48


def test_lstm():
    # In float64, which oneDNN does not take, each time step is made of plain operations.
    model, x = nn.LSTM(4, 8, num_layers=2).double(), torch.randn(5, 3, 4).double()
    report = profile(model, x)
    assert report.activation_bytes == counted_by_hooks(model, x) > 0
    assert report.by_module() == {"": report.activation_bytes}
    assert report.input_bytes == x.numel() * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_whole_transformer_agrees_with_an_independent_count(dtype):
    model, tokens = Transformer().to(dtype), torch.randint(0, 50, (2, 6))
    report = profile(model, tokens)
    assert report.activation_bytes == counted_by_hooks(model, tokens)
    assert str(dtype).removeprefix("torch.") in report.by_dtype()


@settings(max_examples=25)
@given(
    layers=st.lists(st.sampled_from(["linear", "gelu", "relu", "norm", "tanh"]), max_size=6),
    batch=st.integers(1, 4),
    width=st.integers(1, 5),
)
def test_any_stack_agrees_with_an_independent_count(layers, batch, width):
    makers = {
        "linear": lambda: nn.Linear(width, width),
        "gelu": nn.GELU,
        "relu": lambda: nn.ReLU(inplace=True),
        "norm": lambda: nn.LayerNorm(width),
        "tanh": nn.Tanh,
    }
    first = nn.Linear(width, width)
    model, x = nn.Sequential(first, *(makers[name]() for name in layers)), torch.randn(batch, width)
    report = profile(model, x)
    assert report.activation_bytes == counted_by_hooks(model, x)
    for totals in (report.by_module(), report.by_operation(), report.by_module_type()):
        assert sum(totals.values()) == report.activation_bytes
        assert list(totals.values()) == sorted(totals.values(), reverse=True)


# ---- storages, views, sharing --------------------------------------------------------------------


def test_one_tensor_kept_by_three_operations():
    def forward(self, x):
        h = self.fc(x)
        return h.sin() + h.cos() + self.out(h)

    report = profile(Lines(forward, fc=nn.Linear(4, 8), out=nn.Linear(8, 8)), torch.randn(3, 4))
    (row,) = report.rows
    source = "tests/" + line_of(forward, "h.sin()")
    assert row.bytes == 3 * 8 * 4
    assert row.holders == (
        Holding("", "SinBackward0", source),
        Holding("", "CosBackward0", source),
        Holding("out", "AddmmBackward0", None),
    )
    assert (row.module, row.operation, row.source) == ("", "SinBackward0", source)


def test_views_and_expands_count_their_storage():
    def forward(self, x):
        h = self.fc(x)
        return h[:1].exp().expand(100, 8) * h[0, :2].square().sum() * h[2:].expand(100, 8)

    report = profile(Lines(forward, fc=nn.Linear(4, 8)), torch.randn(3, 4))
    row = next(row for row in report.rows if row.bytes == 3 * 8 * 4)
    assert {held.operation for held in row.holders} == {"PowBackward0", "MulBackward0"}
    # exp's eight elements, whole h, the square's sum, and the first product of 100 x 8.
    assert sorted(row.bytes for row in report.rows) == [4, 32, 96, 3200]


def test_operation_that_saves_one_tensor_twice_is_one_holder():
    report = profile(Lines(lambda self, x: self.fc(x) @ self.fc(x)[0], fc=nn.Linear(4, 4)), ones())
    assert all(len(row.holders) == 1 for row in report.rows)

    def square(self, x):
        h = self.fc(x)
        return h * h

    (row,) = profile(Lines(square, fc=nn.Linear(4, 4)), ones()).rows
    assert len(row.holders) == 1


def ones() -> Tensor:
    return torch.ones(3, 4)


def test_views_of_parameters_are_parameters():
    weight = nn.Parameter(torch.randn(4, 4))
    model = Lines(lambda self, x: x.exp() @ weight.t() @ weight[:, :2])
    report = profile(model, torch.randn(3, 4, requires_grad=True))
    assert report.parameter_bytes == 64
    assert [row.bytes for row in report.rows] == [48, 48]


def test_buffers_and_attributes_are_apart():
    model = Lines(lambda self, x: self.fc(x) * self.scale * self.table[0], fc=nn.Linear(4, 4))
    model.register_buffer("scale", torch.randn(4))
    model.table = [torch.randn(4)]
    report = profile(model, torch.randn(3, 4))
    assert report.buffer_bytes == 32
    assert report.activation_bytes == 0


@dataclasses.dataclass
class Batch:
    x: Tensor
    more: dict


def test_inputs_are_found_in_structures():
    a, b, c, d = (torch.randn(3, 4) for _ in range(4))
    model = Lines(
        lambda self, batch, pair, *, keyword: (
            self.fc(batch.x) * batch.more["y"] * pair[0] * keyword.z
        ),
        fc=nn.Linear(4, 4),
    )
    report = profile(model, Batch(a, {"y": b}), (c, "text"), keyword=SimpleNamespace(z=d))
    assert report.input_bytes == 4 * 48
    # The first two products; the third is saved by nobody's input.
    assert report.activation_bytes == 0


def test_unused_inputs_are_not_kept():
    model = Lines(lambda self, x, y: self.fc(x), fc=nn.Linear(4, 4))
    assert profile(model, ones(), ones()).input_bytes == 48


class Wrapper(torch.Tensor):
    """A wrapper subclass without storage of its own, and without `__tensor_flatten__`."""

    @staticmethod
    def __new__(cls, inner):
        shape = inner.shape
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        def plain(value):
            return value.inner if isinstance(value, Wrapper) else value

        result = function(*map(plain, args), **(kwargs or {}))
        return cls(result) if isinstance(result, Tensor) else result


def test_wrapper_subclass():
    def forward(self, x):
        return Wrapper(self.fc(x).detach()).requires_grad_().exp()

    report = profile(Lines(forward, fc=nn.Linear(4, 4)), ones())
    assert report.activation_bytes == 48


def test_sparse_and_nested_tensors():
    model = Lines(lambda self, x: torch.sparse.mm((x * 2).to_sparse(), self.fc.weight))
    model.fc = nn.Linear(4, 4)
    # Twelve non-zeros: two int64 indices and a value each.
    assert profile(model, ones()).activation_bytes == 12 * (2 * 8 + 4)
    nested = torch.nested.nested_tensor([ones(), ones()[:2]], layout=torch.jagged)
    report = profile(nn.Sequential(nn.Linear(4, 4), nn.GELU()), nested)
    assert report.activation_bytes == 5 * 4 * 4


# ---- what is kept, and what is not ---------------------------------------------------------------


def test_dead_branches_are_not_kept():
    def forward(self, x):
        with torch.no_grad():
            a = self.fc(x).exp()
        b = self.fc(x).exp().sigmoid().detach()
        return self.fc(x) + a + b

    assert profile(Lines(forward, fc=nn.Linear(4, 4)), ones()).rows == ()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_keeps_its_inputs(reentrant):
    def forward(self, x):
        h = self.fc(x)
        return checkpoint(self.inner, h, use_reentrant=reentrant)

    runs = []
    inner = nn.Sequential(nn.Linear(4, 40), nn.BatchNorm1d(40), nn.GELU(), nn.Linear(40, 4))
    inner.register_forward_hook(lambda *_: runs.append(1))
    model = Lines(forward, fc=nn.Linear(4, 4), inner=inner)
    report = profile(model, ones())
    (row,) = report.rows
    assert row.bytes == 48
    assert row.operation == ("CheckpointFunctionBackward" if reentrant else "checkpoint")
    assert row.source == "tests/" + line_of(forward, "checkpoint(")
    assert len(runs) == 1, "reading the graph must not recompute"
    assert inner[1].num_batches_tracked == 0


def test_graph_that_only_an_attribute_holds():
    def forward(self, x):
        self.auxiliary = self.fc(x).exp().sum()
        return self.fc(x)

    report = profile(Lines(forward, fc=nn.Linear(4, 4)), ones())
    assert report.by_operation() == {"ExpBackward0": 48}


def test_kept_but_out_of_reach_is_unknown():
    kept = []

    def forward(self, x):
        kept.append(self.fc(x).exp())
        return self.fc(x)

    report = profile(Lines(forward, fc=nn.Linear(4, 4)), ones())
    assert report.by_operation() == {"unknown": 48}


def test_graph_of_the_inputs_is_not_counted():
    outside = nn.Linear(4, 4)
    x = outside(ones()).exp().exp()
    report = profile(nn.Linear(4, 4), x)
    assert report.rows == ()
    assert report.input_bytes == 48


def test_deep_graph():
    def forward(self, x):
        x = self.fc(x)
        for _ in range(3000):
            x = x + 1
        return x.exp()

    assert profile(Lines(forward, fc=nn.Linear(4, 4)), ones()).activation_bytes == 48


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        codes = torch.zeros(x.numel(), dtype=torch.uint8)
        ctx.save_for_backward(codes, x)
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_python_function():
    def forward(self, x):
        return Double.apply(self.fc(x))

    report = profile(Lines(forward, fc=nn.Linear(4, 4)), ones())
    assert report.by_operation() == {"DoubleBackward": 60}
    assert report.by_dtype() == {"float32": 48, "uint8": 12}
    assert {row.source for row in report.rows} == {"tests/" + line_of(forward, "apply")}


def halves(tensor):
    return ("half", tensor.half()) if tensor.dtype == torch.float32 else tensor


def whole(packed):
    return packed[1].float() if isinstance(packed, tuple) else packed


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_what_other_hooks_keep(where):
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def step(x):
        with saved_tensors_hooks(halves, whole):
            return net(x)

    with saved_tensors_hooks(halves, whole):
        report = profile(net if where == "outside" else step, ones())
    prefix = "" if where == "outside" else "net."
    path = {f"{prefix}1"}
    gelu = [row for row in report.rows if row.operation == "GeluBackward0"]
    assert {row.module for row in gelu} == path
    assert [(row.bytes, row.dtype) for row in gelu] == [(24, "float16")]
    # The hook copies the input and the weight too; the copies are activations.
    assert set(report.by_dtype()) == {"float16"}


EIGHT = GroupQuant(8)


def entered_inside(hooks, run):
    def inside(x):
        with hooks():
            return run(x)

    return inside


@pytest.mark.parametrize(
    "hooks",
    [
        lambda: saving(EIGHT, overrides={"checkpoint": None}),
        lambda: saving(EIGHT, overrides={"checkpoint": EIGHT}),
        lambda: saved_tensors_hooks(halves, whole),
        save_on_cpu,
    ],
    ids=["saving", "saving packed", "halves", "save_on_cpu"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_hooks_inside_keep_what_they_keep_outside(hooks, nested):
    net, last = nn.Linear(64, 64), nn.Linear(64, 64)
    x = torch.randn(256, 64, requires_grad=True)

    def run(x):
        y = checkpoint(net, x * 1, use_reentrant=False).sin()
        return last(checkpoint(net, y, use_reentrant=False).tanh()).square()

    if nested:
        run = entered_inside(hooks, run)
    with hooks():
        outside = profile(run, x)
    inside = profile(entered_inside(hooks, run), x)
    assert inside.activation_bytes == outside.activation_bytes > 0
    assert inside.by_dtype() == outside.by_dtype()
    assert inside.by_operation() == outside.by_operation()
    assert {row.source for row in inside.rows} == {row.source for row in outside.rows}


def test_hooks_that_the_model_enters_work_as_without_a_profile():
    push = torch._C._autograd._push_saved_tensors_default_hooks
    net, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)

    def forward(x):
        with save_on_cpu():
            y = net(x).sin()
        return checkpoint(net, y, use_reentrant=False).sum()

    found = []
    profile(lambda: found.append(forward(x)))
    (slope,) = torch.autograd.grad(found[0], x)
    torch.testing.assert_close(slope, torch.autograd.grad(forward(x), x)[0])
    with pytest.raises(ZeroDivisionError):
        profile(lambda: 1 / 0)
    assert torch._C._autograd._push_saved_tensors_default_hooks is push


class Fused(torch.autograd.Function):
    """A loss that keeps its finished gradient where hooks do not see it."""

    @staticmethod
    def forward(ctx, x, weight, as_list):
        ctx.gradients = [2 * x, None] if as_list else {"x": 2 * x}
        ctx.weight, ctx.size = weight, x.shape
        ctx.again = ctx.gradients  # one storage
        return x.square().sum()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("count", [profile, predict])
def test_what_a_context_keeps_as_attributes(as_list, count):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return Fused.apply(self.fc(x), self.fc.weight, as_list)

    report = count(Model(), ones())
    assert report.by_operation() == {"FusedBackward": 48}
    assert report.by_module() == {"": 48}


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="since torch 2.13")
@pytest.mark.parametrize("count", [profile, predict])
def test_finished_gradients_of_linear_cross_entropy(count):
    loss = nn.LinearCrossEntropyLoss(64, 500, bias=False, options=nn.LinearCrossEntropyOptions())
    model = nn.Sequential(nn.Linear(32, 64), nn.Identity())
    target = torch.randint(500, (128,))
    report = count(model, torch.randn(128, 32), loss=lambda y: loss(y, target))
    # The gradients of its input and of its weight.
    assert report.by_module() == {"(loss).loss": 4 * (128 * 64 + 500 * 64)}


def test_save_on_cpu_and_autograd_inside_the_model():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        x = x.clone().requires_grad_()
        with save_on_cpu():
            out = self.net(x).square().sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        return slope.square().sum() + out

    model = Lines(forward, net=net)
    report = profile(model, ones())
    assert report.activation_bytes > 0
    # The hooks give back the right tensors: a gradient taken under them is the plain one.
    found = []
    profile(lambda: found.append(forward(model, ones()).detach()))
    torch.testing.assert_close(found[0], forward(model, ones()).detach())


def test_backward_inside_the_model():
    def forward(self, x):
        out = self.fc(x).exp()
        out.sum().backward()
        return out

    model = Lines(forward, fc=nn.Linear(4, 4))
    assert profile(model, ones()).rows == ()
    assert model.fc.weight.grad is None


class ModelOutput(OrderedDict):
    """As in transformers: a mapping whose entries are attributes."""

    __getattr__ = OrderedDict.__getitem__


@pytest.mark.parametrize(
    "wrap",
    [
        lambda h: (h, None),
        lambda h: {"a": [h, {"b": 1}]},
        lambda h: Batch(h, {}),
        lambda h: ModelOutput(logits=h),
        lambda h: torch.distributions.Normal(h, 1.0, validate_args=False),
    ],
    ids=["tuple", "nested", "dataclass", "mapping", "object"],
)
def test_nested_outputs(wrap):
    model = Lines(lambda self, x: wrap(self.fc(x).exp()), fc=nn.Linear(4, 4))
    assert profile(model, ones()).by_operation() == {"ExpBackward0": 48}


@pytest.mark.parametrize("result", [None, 3, ()])
def test_outputs_without_a_gradient(result):
    model = Lines(lambda self, x: result)
    assert profile(model, ones()).rows == ()
    frozen = nn.Sequential(nn.Linear(4, 4), nn.GELU()).requires_grad_(False)
    report = profile(frozen, ones())
    assert report.rows == ()
    assert "nothing is kept" in str(report)


def test_inside_no_grad_and_inference_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    x = ones()
    with torch.no_grad():
        assert profile(model, x).activation_bytes == 48
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert profile(model, x).activation_bytes == 48
        assert torch.is_inference_mode_enabled()


def test_meta_device_counts_the_same():
    model, tokens = Transformer(), torch.randint(0, 50, (2, 6))
    # On the meta device attention takes its plain form, so leave it out of the comparison.
    plain = nn.Sequential(model.embed, model.blocks[0].mlp, model.norm, model.head)
    real = profile(plain, tokens)
    abstract = profile(plain.to("meta"), tokens.to("meta"))
    assert abstract.activation_bytes == real.activation_bytes
    assert set(abstract.by_device()) == {"meta"}


def test_autocast_copies_are_activations():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.autocast("cpu", torch.bfloat16):
        report = profile(model, ones())
    # Half-precision copies of the input, of the second weight, and the first layer's output.
    assert report.by_dtype() == {"bfloat16": 24 + 32 + 24}


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_module_is_one_line(how):
    inner = Gated(4, 8)
    if how == "wrapped":
        model = nn.Sequential(torch.compile(inner, backend="aot_eager", fullgraph=True))
    else:
        inner.compile(backend="aot_eager", fullgraph=True)
        model = nn.Sequential(inner)
    report = profile(model, ones())
    assert set(report.by_operation()) == {"CompiledFunctionBackward"}
    assert set(report.by_module()) == {"0" if how == "wrapped" else ""}


def test_operations_without_the_view_into_saved_tensors(monkeypatch):
    """Older torch does not show what a node saved; the order of the nodes tells it then."""
    model, tokens = Transformer(), torch.randint(0, 50, (2, 6))
    check = functools.partial(profile, model, tokens, loss=lambda out: out.square().mean())
    report = check()
    monkeypatch.setattr(_torch.SAVED, "values", None, raising=False)
    assert check() == report


# ---- names ---------------------------------------------------------------------------------------


def test_functional_calls_are_named_by_their_line():
    model = nn.Sequential(Gated(4, 8))
    report = profile(model, ones())
    silu = "tests/" + line_of(Gated.forward, "F.silu")
    product = "tests/" + line_of(Gated.forward, "gate * self.up(x)")
    found = {(row.module, row.operation, row.source) for row in report.rows}
    assert found == {
        ("0", "SiluBackward0", silu),
        ("0", "MulBackward0", product),
        ("0.down", "AddmmBackward0", None),
    }
    assert report.module_types == {"0": "Gated", "0.down": "Linear"}
    assert {row.module_type for row in report.rows} == {"Gated", "Linear"}


CELL = """
def forward(x, weight):
    y = x @ weight
    return y.sin()
"""


@pytest.mark.parametrize(
    ("filename", "shell", "place"),
    [
        ("/tmp/ipykernel_815/1234567.py", True, "In[5]"),
        ("<ipython-input-5-0123456789ab>", True, "In[5]"),
        ("/tmp/ipykernel_815/7654321.py", False, "/tmp/ipykernel_815/7654321.py"),
        ("<ipython-input-6-0123456789ab>", False, "<ipython-input-6-0123456789ab>"),
        ("<stdin>", False, "<stdin>"),
        ("<string>", True, "<string>"),
    ],
)
def test_cells_of_notebooks_are_named_as_there(monkeypatch, filename, shell, place):
    """A shell knows its cells by the files that it made up for them."""

    def format_code_name(name):
        return ("Cell", "In[5]") if "ipy" in name else None

    running = SimpleNamespace(compile=SimpleNamespace(format_code_name=format_code_name))
    ipython = SimpleNamespace(get_ipython=lambda: running if shell else None)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    short_path.cache_clear()
    names = {}
    exec(compile(CELL, filename, "exec"), names)
    weight = torch.randn(4, 4, requires_grad=True)
    report = profile(names["forward"], torch.randn(3, 4, requires_grad=True) * 1, weight)
    assert [row.source for row in report.rows] == [f"{place}:4"]
    assert f"{place.split('/')[-1]}:4" in str(report)
    short_path.cache_clear()


def test_plain_functions():
    weight = torch.randn(4, 4, requires_grad=True)
    report = profile(lambda x: F.gelu(x @ weight), ones())
    (row,) = report.rows
    assert row.source == "tests/" + here(-2)
    assert (row.module, row.module_type) == ("", "")
    assert report.input_bytes == 48
    assert report.model == "<lambda>"


@pytest.mark.parametrize(
    ("filename", "shown"),
    [
        ("<ipython-input-3-0f1e2d>", "<ipython-input-3-0f1e2d>"),  # a cell, in older notebooks
        ("/elsewhere/ipykernel_77/1234.py", "/elsewhere/ipykernel_77/1234.py"),
        ("relative.py", "relative.py"),
        (str(Path.cwd() / "models" / "mine.py"), "models/mine.py"),
        (str(Path(np.__file__).parent / "made_up.py"), "numpy/made_up.py"),
    ],
)
def test_a_source_is_named_by_the_file_that_its_code_was_compiled_for(filename, shown):
    names = {}
    exec(compile("\n\ndef wave(x):\n    return (x + 2).sin()\n", filename, "exec"), names)
    x = torch.randn(8, requires_grad=True)
    assert {row.source for row in profile(names["wave"], x).rows} == {f"{shown}:4"}


def helper(net, x):
    return net(x)


def test_modules_behind_functions_are_named():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.GELU()), ones()
    trainer = SimpleNamespace(net=net)

    def inner(x):
        return net(x)

    expected = {
        "net.1": [lambda: net(x), lambda: inner(x)],
        "trainer.net.1": [lambda: trainer.net(x)],
        "0.1": [functools.partial(helper, net, x)],
        "1": [functools.partial(net, x), functools.partial(net.forward, x)],
    }
    for path, functions in expected.items():
        for function in functions:
            report = profile(function)
            assert list(report.by_module()) == [path]
            assert report.parameter_bytes == 80


def test_exception_caught_inside_the_model():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("expected")

    def forward(self, x):
        try:
            self.fails(x)
        except KeyError:
            x = self.fc(x)
        return x.exp()

    report = profile(Lines(forward, fails=Fails(), fc=nn.Linear(4, 4)), ones())
    assert report.by_module() == {"": 48}


# ---- everything is left as it was ----------------------------------------------------------------


class Messy(nn.Module):
    """Draws random numbers, counts its calls, swaps and adds buffers; may raise at the end."""

    def __init__(self, raises: bool):
        super().__init__()
        self.raises = raises
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("table", torch.ones(4))
        self.register_buffer("nothing", None)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.eval()
        self.table = self.table + random.random() + float(np.random.rand())  # noqa: NPY002
        self.register_buffer("late", torch.ones(2))
        self.memory = self.norm(self.fc(x))
        out = F.dropout(self.memory * self.table, 0.5)
        if self.raises:
            raise KeyError("expected")
        return out


def everything(model):
    """Identities and values of all that a forward pass may change."""
    generators = torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    return (
        generators,
        {name: (id(tensor), tensor.tolist()) for name, tensor in tensors.items()},
        [(id(p.grad), None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        [sorted(vars(module)) for module in model.modules()],
        [module.training for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        [len(module._forward_pre_hooks) for module in model.modules()],
        [len(module._forward_hooks_always_called) for module in model.modules()],
        [list(module._buffers) for module in model.modules()],
        torch.is_grad_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_left_as_it_was(raises):
    model = Messy(raises)
    model.fc.weight.grad = torch.randn(4, 4)
    x = torch.randn(3, 4, requires_grad=True)
    before = everything(model)
    if raises:
        with pytest.raises(KeyError, match="expected"):
            profile(model, x)
    else:
        profile(model, x, loss=lambda out: out.mean())
    assert everything(model) == before
    assert model.calls == 0
    assert x.grad is None


def test_untouched_buffers_are_not_written():
    """A graph of the caller's that saved a buffer can still run backward."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    out = model(ones()).sum()
    profile(model, ones())
    out.backward()


def test_autocast_leaves_no_copies_behind():
    model = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        first = profile(model, ones(), loss=lambda out: out.float().square().sum())
        again = profile(model, ones(), loss=lambda out: out.float().square().sum())
    assert first.by_operation() == again.by_operation()


def test_nothing_leaks():
    refs = []

    def forward(self, x):
        h = self.fc(x).exp()
        refs.append(weakref.ref(h))
        out = h.sigmoid()
        refs.append(weakref.ref(out))
        return out

    model = Lines(forward, fc=nn.Linear(4, 4))
    gc.collect()
    gc.disable()
    try:
        report = profile(model, ones(), loss=lambda out: out.sum())
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()
    assert report.activation_bytes == 96
    assert not any(isinstance(item, Tensor) for item in reachable(report))


def reachable(value):
    """All objects inside a report."""
    found, pending = [], [value]
    while pending:
        item = pending.pop()
        found.append(item)
        if dataclasses.is_dataclass(item):
            pending += [getattr(item, field.name) for field in dataclasses.fields(item)]
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, tuple | list):
            pending += item
    return found


def test_graph_that_outlives_the_profile_still_runs_backward():
    kept = []
    fc = nn.Linear(4, 4)

    def forward(x):
        kept.append(fc(x).exp())
        return kept[0]

    with saved_tensors_hooks(halves, whole):
        profile(forward, ones())
    kept.pop().sum().backward()
    assert fc.weight.grad is not None


# ---- wrong arguments -----------------------------------------------------------------------------


def test_wrong_arguments():
    with pytest.raises(InputError, match="model is a int"):
        profile(3)
    with pytest.raises(InputError, match="loss is a str"):
        profile(nn.Linear(4, 4), ones(), loss="mse")
    with pytest.raises(InputError, match=r"shape \(3, 4\).*reduce it"):
        profile(nn.Linear(4, 4), ones(), loss=lambda out: out)
    with pytest.raises(InputError, match="NoneType"):
        profile(nn.Linear(4, 4), ones(), loss=lambda out: None)
    with pytest.raises(InputError, match="weight of module '0' is not initialised"):
        profile(nn.Sequential(nn.LazyLinear(4)), ones())


# ---- the report ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> MemoryReport:
    labels = torch.randint(0, 50, (2, 6))
    return profile(
        Transformer(),
        torch.randint(0, 50, (2, 6)),
        loss=lambda out: F.cross_entropy(out.flatten(0, 1), labels.flatten()),
    )


def test_json_round_trip(report):
    text = report.to_json()
    assert MemoryReport.from_json(text) == report
    assert json.loads(text)["rows"][0]["bytes"] == report.rows[0].bytes
    cuda = dataclasses.replace(report, allocated_bytes=5, peak_bytes=7)
    assert MemoryReport.from_json(cuda.to_json()) == cuda
    assert hash(report) == hash(MemoryReport.from_json(text))
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.model = "other"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "rows": [{}]}'])
def test_json_that_is_no_report(text):
    with pytest.raises(InputError, match="not the text of a MemoryReport"):
        MemoryReport.from_json(text)


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 400, "1e999", "-1", "[" * 5000])
def test_json_with_numbers_that_are_no_bytes(report, number):
    text = report.to_json().replace('"buffer_bytes": 0', f'"buffer_bytes": {number}')
    assert text != report.to_json()
    with pytest.raises(InputError, match="not the text of a MemoryReport") as caught:
        MemoryReport.from_json(text)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_drawn_leaves_the_one_that_was_there(report, tmp_path, monkeypatch):
    path = tmp_path / "kept.html"
    report.to_html(path)
    before = path.read_text()

    def full_disk(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        report.to_html(path)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        report.plot(tmp_path / "kept.png")
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["kept.html"]


def test_json_of_another_format(report):
    text = report.to_json().replace('"format": 1', '"format": 99')
    with pytest.raises(InputError, match="profile the model again"):
        MemoryReport.from_json(text)


def test_by_module_depth(report):
    assert set(report.by_module(1)) == {"blocks", "norm", "head", "(loss)"}
    assert sum(report.by_module(2).values()) == report.activation_bytes
    with pytest.raises(InputError, match="depth is 0"):
        report.by_module(0)


@pytest.mark.parametrize("width", [80, 120])
def test_print(report, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = str(report)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "\x1b" not in text
    assert lines[0] == (
        f"Transformer keeps {human_bytes(report.activation_bytes)} for the backward pass, "
        f"in {len(report.rows)} tensors"
    )
    # Four blocks that are alike share a line, as do the operations of a module that has one.
    (blocks,) = [line for line in lines if "blocks.0-3 (4 x Block)" in line]
    share = 100 * report.by_module(1)["blocks"] / report.activation_bytes
    assert human_bytes(report.by_module(1)["blocks"]) in blocks
    assert f"{share:.1f}%" in blocks
    (gelu,) = [line for line in lines if "1 (GELU)" in line]
    assert gelu.split()[-1] == "Gelu"
    attention = line_of(Block.forward, "scaled_dot_product_attention")
    assert any(attention in line and "ScaledDotProduct" in line for line in lines)
    assert lines[-1].startswith("apart: parameters ")
    assert repr(report).startswith("MemoryReport(model='Transformer', activation_bytes=")


def test_print_sorts_by_bytes_and_cuts(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model = Lines(lambda self, x: functools.reduce(lambda h, fc: fc(h), self.children(), x))
    for index in range(60):
        model.add_module(f"layer{index}", nn.Linear(4 + index, 5 + index))
    lines = str(profile(model, ones())).splitlines()
    assert len(lines) < 50
    named = [line for line in lines if "layer" in line]
    assert named[0].split()[0] == "layer59"
    (more,) = [line for line in lines if "more" in line]
    assert more.split()[:2] == ["...", str(59 - len(named))]


def test_print_of_odd_names(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model = Lines(lambda self, x: self.get_submodule("[red]x" + "y" * 90)(self.fc(x)))
    model.fc = nn.Linear(4, 4)
    model.add_module("[red]x" + "y" * 90, nn.GELU())
    lines = str(profile(model, ones())).splitlines()
    assert any(line.strip().startswith("[red]xyyy") for line in lines)
    assert max(map(len, lines)) <= 80


def test_print_of_cuda_numbers(report):
    cuda = dataclasses.replace(report, allocated_bytes=5 * 2**20, peak_bytes=None)
    assert "forward 5.00 MiB, peak of forward and backward not measured" in str(cuda)
    both = dataclasses.replace(cuda, peak_bytes=7 * 2**20)
    assert "peak 7.00 MiB before, 7.00 MiB after" in str(both - both)


@given(st.integers(0, 2**60))
def test_human_bytes(count):
    number, unit = human_bytes(count).split()
    scale = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert math.isclose(float(number) * scale, count, rel_tol=5.1e-3)
    assert len(number) <= 4 or unit == "TiB"


def test_difference(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model, tokens = Transformer(), torch.randint(0, 50, (2, 6))
    before = profile(model, tokens)
    for block in model.blocks:
        block.mlp[1] = nn.ReLU()
    after = profile(model, tokens)
    difference = before - after
    assert isinstance(difference, MemoryDifference)
    # ReLU keeps its output, which the next layer keeps anyway.
    gelu = 2 * 6 * 64 * 4
    assert difference.saved_bytes == 4 * gelu
    assert (after - before).saved_bytes == -4 * gelu
    assert difference.by_module()["blocks.2.mlp.1"] == (gelu, gelu)
    assert difference.by_module()["blocks.2.mlp.2"] == (gelu, 0)
    assert difference.by_module(1)["blocks"][0] - difference.by_module(1)["blocks"][1] == 4 * gelu
    lines = str(difference).splitlines()
    assert max(map(len, lines)) <= 80
    assert " before and " in lines[0]
    assert lines[1].split() == ["module", "before", "after", "saved"]
    (row,) = [line for line in lines if line.strip().startswith("mlp (Sequential)")]
    assert row.split()[2:] == ["27.0", "KiB", "15.0", "KiB", "12.0", "KiB", "44.4%"]
    with pytest.raises(TypeError):
        before - 3


@pytest.mark.parametrize("by", ["operation", "dtype"])
@pytest.mark.parametrize("depth", [None, 1])
def test_plot(report, tmp_path, by, depth):
    pytest.importorskip("matplotlib")
    path = tmp_path / "kept.png"
    report.plot(path, depth=depth, by=by)
    assert path.read_bytes()[:4] == b"\x89PNG"
    report.plot(tmp_path / "kept.svg", limit=2)
    assert "more" in (tmp_path / "kept.svg").read_text() or depth is None


def test_plot_of_wrong_arguments(report, tmp_path):
    with pytest.raises(InputError, match="by is 'module'"):
        report.plot(tmp_path / "a.png", by="module")
    with pytest.raises(InputError, match="limit is 0"):
        report.plot(tmp_path / "a.png", limit=0)
    with pytest.raises(InputError, match="nothing to plot"):
        dataclasses.replace(report, rows=()).plot(tmp_path / "a.png")


def test_plot_without_matplotlib(report, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'packlight\[plot\]'"):
        report.plot(tmp_path / "a.png")


# ---- CUDA ----------------------------------------------------------------------------------------


def cuda_case(name: str):
    if name == "transformer":
        model = Transformer(blocks=3, width=256, words=1000).cuda()
        return model, torch.randint(0, 1000, (16, 128), device="cuda")
    channels = [3, 64, 128]
    layers = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
        for a, b in itertools.pairwise(channels)
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return model.cuda(), torch.randn(16, 3, 64, 64, device="cuda")


def test_generators_of_each_device_are_put_back(monkeypatch):
    forked = []

    @contextlib.contextmanager
    def fork_rng(devices, device_type="cuda"):
        forked.append((device_type if devices else "cpu", devices))
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    names = ("cpu", "cuda:0", "cuda:2", "xpu", "cuda")
    with restoring._generators([torch.device(name) for name in names]):
        assert sorted(forked) == [("cpu", []), ("cuda", [0, 2, 0]), ("xpu", [0])]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["transformer", "convolutions"])
@pytest.mark.parametrize("autocast", [False, True])
def test_cuda_agrees_with_the_allocator(name, autocast):
    model, x = cuda_case(name)
    check = functools.partial(profile, model, x, loss=lambda out: out.float().square().mean())
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        check()  # once before, so that libraries have their workspaces
        report = check()
        output = model(x)
    assert report.allocated_bytes is not None
    assert report.peak_bytes is not None
    # In bfloat16 the loss saves a copy of the output, which is alive beside it.
    unsaved = output.numel() * output.element_size() if autocast else 0
    # The allocator rounds each tensor up to 512 bytes; the loss itself is one more.
    rounding = 512 * (len(report.rows) + 2)
    difference = report.allocated_bytes - unsaved - report.activation_bytes
    assert abs(difference) <= 0.02 * report.activation_bytes + rounding
    assert report.peak_bytes >= report.allocated_bytes
    assert all(parameter.grad is None for parameter in model.parameters())
    # Attention keeps its seed on the CPU.
    devices = report.by_device()
    assert devices["cuda:0"] >= report.activation_bytes - 1000


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_cuda_generator_and_memory_are_left_as_they_were(autocast):
    model, x = cuda_case("transformer")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        profile(model, x)
        gc.collect()  # what the first call left in cycles
        state, allocated = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
        profile(model, x)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        # The thread of the backward pass lets go of the gradients a moment after the pass.
        until = time.monotonic() + 5
        while torch.cuda.memory_allocated() != allocated and time.monotonic() < until:
            time.sleep(0.01)
        assert torch.cuda.memory_allocated() == allocated


@pytest.mark.gpu
def test_cuda_offloaded_tensors_are_on_the_cpu():
    model, x = cuda_case("convolutions")
    with save_on_cpu():
        report = profile(model, x)
    assert set(report.by_device()) == {"cpu"}
    assert "by device: cpu" not in str(report)


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", [False, True])
def test_cuda_checkpoint(reentrant):
    model, x = cuda_case("transformer")

    def forward(tokens):
        h = model.embed(tokens)
        for block in model.blocks:
            h = checkpoint(block, h, use_reentrant=reentrant)
        return model.head(h)

    plain = profile(model, x)
    plain = profile(model, x)  # the first one also allocates the libraries' workspaces
    report = profile(forward, x)
    assert report.activation_bytes < plain.activation_bytes / 3
    assert (report.peak_bytes is None) == reentrant
    if not reentrant:
        assert report.peak_bytes < plain.peak_bytes
