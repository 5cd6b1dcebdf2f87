"""Casts share the packs of their sources: in eager and compiled code, and never a stale pack."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import GroupQuant, Sketch, sharing
from packlight import groupquant as gq
from packlight.layers.casts import CASTS
from tests.helpers import crossing, kept_bytes, pack_bytes, relative_error

WIDTH, TOKENS = 128, 64
NEAREST = GroupQuant(bits=8, group_size=32, rounding="nearest")
PACK = pack_bytes(WIDTH * TOKENS, 8, 32)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

WAYS = {
    "to": lambda x, dtype: x.to(dtype),
    "to, by keyword": lambda x, dtype: x.to(dtype=dtype),
    "to a tensor's": lambda x, dtype: x.to(torch.empty(1, dtype=dtype)),
    "type": lambda x, dtype: x.type(dtype),
    "type_as": lambda x, dtype: x.type_as(torch.empty(1, dtype=dtype)),
    "by name": lambda x, dtype: getattr(x, {BF16: "bfloat16", FP32: "float"}[dtype])(),
}


class Adapters(nn.Module):
    """Three small layers that cast one tensor for themselves, as adapters do."""

    def __init__(self, dtype, way=WAYS["to"]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 8, dtype=dtype) for _ in range(3))
        self.way = way

    def forward(self, x):
        return sum(layer(self.way(x, layer.weight.dtype)).float() for layer in self.layers)


def adapters(dtype, way=WAYS["to"], method=NEAREST):
    torch.manual_seed(0)
    model = Adapters(dtype, way)
    packlight.convert(model, method, functional=True)
    return model


def input_of(dtype):
    """No leaf, as what a layer gives."""
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_() * 1.0


def weight_gradients(model, x, run=None):
    y = model(x) if run is None else run(x)
    return torch.autograd.grad(y.square().sum(), list(model.parameters()))


def exact_gradients(model, x):
    packlight.revert(model)
    return weight_gradients(model, x)


def packs_kept(model, x):
    """Bytes of packs; weights and what a cast needs not are no packs."""
    return kept_bytes(lambda: model(x)) - sum(p.nbytes for p in model.parameters() if p.dim() > 1)


# ---- one pack ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("source", "cast"), [(BF16, FP32), (FP32, BF16)])
def test_casts_of_one_tensor_share_a_pack(source, cast, way):
    model, x = adapters(cast, way), input_of(source)
    assert packs_kept(model, x) == PACK
    gradients = weight_gradients(model, x)
    for ours, exact in zip(gradients, exact_gradients(model, x), strict=True):
        assert relative_error(ours, exact) < 0.02


def test_every_cast_of_torch_is_covered():
    names = {"bfloat16", "double", "float", "half", "to", "type", "type_as"}
    assert {getattr(torch.Tensor, name) for name in names} == set(CASTS)


@pytest.mark.parametrize("name", ["float", "half", "double", "bfloat16"])
def test_what_casts_give_is_torchs(name):
    class Casting(nn.Module):
        def forward(self, x):
            return getattr(x, name)(), x.type(), x.to("cpu"), x.to(x.dtype)

    x, model = torch.randn(3, 4), Casting()
    packlight.convert(model, NEAREST, functional=True)
    cast, text, moved, same = model(x)
    assert torch.equal(cast, getattr(x, name)())
    assert cast.dtype == getattr(x, name)().dtype
    assert text == x.type()
    assert moved is x
    assert same is x


def test_a_pack_that_its_maker_noted_serves_the_casts():
    """Also once the tensor itself is gone."""
    norm, linear = gq.LayerNorm(WIDTH, bits=8, dtype=BF16), gq.Linear(WIDTH, 8, bits=8)
    for keeps_source in (True, False):
        y = norm(input_of(BF16))
        pack = sharing.pack_of(y)
        wide = y.float()
        sharing.note_copy(wide, y)
        if not keeps_source:
            del y
            gc.collect()
        z = linear(wide)
        assert z.grad_fn.saved_tensors[1] is pack.tensors[0]


def test_a_pack_of_a_cast_serves_its_source_and_casts_of_a_cast():
    x = input_of(BF16)
    wide = x.float()
    sharing.note_copy(wide, x)
    wider = wide.double()
    sharing.note_copy(wider, wide)
    y = gq.linear(wider, torch.randn(8, WIDTH, dtype=FP64, requires_grad=True))
    codes = sharing.pack_of(x).tensors[0]
    assert y.grad_fn.saved_tensors[1] is codes
    assert sharing.pack_of(wide).tensors[0] is codes
    assert sharing.pack_of(wide.view(2, -1, WIDTH)).tensors[0] is codes


def test_sharing_changes_no_gradient():
    """A wider dtype has the same numbers, so the same codes."""
    model, x = adapters(FP32), input_of(BF16)
    shared = weight_gradients(model, x)
    model.way = lambda x, dtype: x.to(dtype) * 1.0  # a tensor of its own for each
    assert packs_kept(model, x) == 3 * PACK
    for ours, alone in zip(shared, weight_gradients(model, x), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "cast"), [(FP32, FP16), (BF16, FP16), (FP64, FP32), (FP64, BF16)]
)
def test_a_cast_that_may_overflow_is_packed_by_itself(source, cast):
    x = input_of(source)
    y = x.to(cast)
    sharing.note_copy(y, x)
    assert sharing.source_of(y) is y
    kept = gq.linear(x, torch.randn(8, WIDTH, dtype=source, requires_grad=True))
    assert sharing.pack_of(x).tensors[0] is kept.grad_fn.saved_tensors[1]
    assert sharing.pack_of(y) is None


def test_a_cast_in_another_layout_is_packed_by_itself():
    x = input_of(BF16)
    for source, cast in [
        (x[:, ::2], x[:, ::2].float()),
        (x.expand(2, TOKENS, WIDTH), x.expand(2, TOKENS, WIDTH).float()),
        (x.t(), x.t().to(FP32, memory_format=torch.contiguous_format)),
    ]:
        sharing.note_copy(cast, source)
        assert sharing.source_of(cast) is cast


def test_adapters_share_a_sketch():
    method = Sketch(rows=8, min_rows=1)
    model, x = adapters(FP32, method=method), input_of(BF16)
    alone = nn.Linear(WIDTH, 8)
    packlight.convert(alone, method)
    assert packs_kept(model, x) == packs_kept(alone, x.float())
    # One that computes in another dtype has its own.
    model.layers[1].bfloat16()
    assert packs_kept(model, x) > packs_kept(alone, x.float())


# ---- where else casts come from ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_under_autocast(dtype):
    model, x = adapters(FP32), input_of(dtype)
    with torch.autocast("cpu", BF16):
        assert packs_kept(model, x) == PACK
        ours = weight_gradients(model, x)
        exact = exact_gradients(model, x)
    for a, b in zip(ours, exact, strict=True):
        assert relative_error(a, b) < 0.03


@pytest.mark.parametrize(("source", "cast"), [(BF16, FP32), (FP32, BF16)])
def test_compiled(source, cast, fresh_compiler):
    """One pack crosses to the backward pass.

    With seeds, as the compiler itself makes one of packs that are rounded alike.
    """
    method = GroupQuant(bits=8, group_size=32)
    model, x = adapters(cast, method=method), input_of(source).detach().requires_grad_()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = weight_gradients(model, x)
    for ours, eager in zip(weight_gradients(model, x, run), expected, strict=True):
        assert relative_error(ours, eager) < 0.03
    codes = [fake for fake in crossing(model, x) if fake.dtype == torch.uint8]
    assert len(codes) == 1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_in_a_checkpoint(reentrant, rounding):
    method = GroupQuant(bits=8, group_size=32, rounding=rounding)
    model, x = adapters(FP32, method=method), input_of(BF16)
    expected = weight_gradients(model, x)

    def run(x):
        return checkpoint(model, x * 1.0, use_reentrant=reentrant)

    model.zero_grad()
    run(x).square().sum().backward()
    for parameter, other in zip(model.parameters(), expected, strict=True):
        assert relative_error(parameter.grad, other) < (1e-6 if rounding == "nearest" else 0.02)


def test_under_hooks_that_take_packs_away():
    model, x = adapters(FP32), input_of(BF16)
    expected = weight_gradients(model, x)
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    actual = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    torch.testing.assert_close(actual, expected)


def test_under_saving():
    torch.manual_seed(0)
    model, x = Adapters(FP32), input_of(BF16)
    exact = weight_gradients(model, x)

    def run():
        with packlight.saving(NEAREST, min_bytes=0):
            return model(x)

    y = run()
    holders = {id(holder) for holder in _holders(y)}
    assert len(holders) == 1
    ours = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    for a, b in zip(ours, exact, strict=True):
        assert relative_error(a, b) < 0.02


def _holders(y):
    """The codes of the packs that a graph keeps for products with weights."""
    found, nodes = [], [y.grad_fn]
    while nodes:
        node = nodes.pop()
        data = getattr(node, "_raw_saved_mat1", None)
        if data is not None:
            found.append(data.data.kept.pack.tensors[0] if hasattr(data, "data") else data)
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return found


# ---- no stale pack -------------------------------------------------------------------------------


def noted(x, dtype=FP32):
    y = x.to(dtype)
    sharing.note_copy(y, x)
    return y


def gradient_of(x):
    weight = torch.zeros(8, WIDTH, dtype=x.dtype, requires_grad=True)
    options = {"bits": 8, "group_size": 32, "rounding": "nearest"}
    return torch.autograd.grad(gq.linear(x, weight, **options).sum(), weight)[0]


def test_a_cast_that_was_written_to_is_packed_by_itself():
    x = input_of(BF16)
    y = noted(x)
    gradient_of(x)
    y.mul_(100.0)
    assert sharing.source_of(y) is y
    assert relative_error(gradient_of(y), y.detach().sum(0).expand(8, WIDTH)) < 0.01


@pytest.mark.parametrize("read_before", [True, False])
def test_a_source_that_was_written_to_has_nothing_to_do_with_the_cast(read_before):
    x = input_of(BF16)
    expected = x.detach().float().sum(0).expand(8, WIDTH)
    if read_before:
        kept = gq.linear(x, torch.zeros(8, WIDTH, dtype=BF16, requires_grad=True))  # its graph
    y = noted(x)
    x.mul_(100.0)
    assert sharing.source_of(y) is y
    assert relative_error(gradient_of(x), x.detach().sum(0).expand(8, WIDTH)) < 0.02
    assert relative_error(gradient_of(y), expected) < 0.1
    if read_before:
        assert kept.grad_fn is not None


def test_a_source_that_was_given_other_memory():
    x = torch.randn(TOKENS, WIDTH, dtype=BF16)
    y = noted(x)
    expected = y.sum(0).expand(8, WIDTH)
    for _ in range(9):
        x.data = torch.randn(TOKENS, WIDTH, dtype=BF16)
    gradient_of(x)
    assert sharing.source_of(y) is y
    assert relative_error(gradient_of(y), expected) < 0.01


@pytest.mark.parametrize("which", ["source", "cast"])
def test_compiled_writes_in_place(which, fresh_compiler):
    first, second = (gq.Linear(WIDTH, 8, bits=8, dtype=dtype) for dtype in (BF16, FP32))

    class Writing(nn.Module):
        def forward(self, x):
            x = x * 1.0
            y = x.float()
            if which == "source":
                x.mul_(50.0)
            else:
                y.mul_(50.0)
            return first(x).float() + second(y)

    model, x = Writing(), input_of(BF16).detach().requires_grad_()
    model.first, model.second = first, second
    packlight.convert(model, NEAREST, functional=True)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    ours = weight_gradients(model, x, run)
    for a, b in zip(ours, exact_gradients(model.eval(), x), strict=True):
        assert relative_error(a, b) < 0.05


def test_neither_cast_nor_source_is_kept_alive():
    x = input_of(BF16)
    before = len(sharing._notes)
    y = noted(x)
    gradient_of(y)
    source, cast = weakref.ref(x), weakref.ref(y)
    del x
    gc.collect()
    assert source() is None
    assert sharing.source_of(y) is y
    del y
    gc.collect()
    assert cast() is None
    assert len(sharing._notes) <= before
