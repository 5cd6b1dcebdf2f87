"""Notes about tensors (`sharing.py`): what they hold for, what they keep alive, where they go."""

import copy
import gc
import io
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import GroupQuant, Inverted, sharing
from packlight import groupquant as gq
from packlight.pack import EXACT, Grade, Pack
from packlight.sharing import note_pack, pack_of
from tests.helpers import kept_bytes, relative_error

NEAREST = {"bits": 8, "rounding": "nearest"}


def weight_gradient(layer, x):
    return torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]


def exact_gradient(layer, x):
    y = F.linear(x, layer.weight, layer.bias)
    return torch.autograd.grad(y.square().sum(), layer.weight)[0]


# ---- one tensor object, its version and its storage ----------------------------------------------


class Reader(nn.Module):
    """A layer that has read a tensor, and kept the pack of it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = gq.Linear(64, 16, **NEAREST), gq.Linear(64, 16, **NEAREST)

    def read(self, x):
        self.output = self.first(x)
        assert pack_of(x) is not None


CHANGES = {
    "in place": lambda x: x.copy_(torch.randn(64, 64)),
    "other memory": lambda x: setattr(x, "data", torch.randn(64, 64)),
    "other memory twice": lambda x: [setattr(x, "data", torch.randn(64, 64)) for _ in range(9)],
    "a view is written": lambda x: x[3:5].zero_(),
    "resized and filled": lambda x: x.resize_(64, 64).normal_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_tensor_that_has_changed_is_packed_afresh(change):
    reader, x = Reader(), torch.randn(64, 64)
    reader.read(x)
    change(x)
    assert pack_of(x) is None or change is CHANGES["other memory"]
    expected = exact_gradient(reader.second, x)
    assert relative_error(weight_gradient(reader.second, x), expected) < 0.02


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "clone": torch.clone,
    "detached": lambda x: x.detach(),
    "file": lambda x: loaded(x),
}


def loaded(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_has_no_note_and_no_attribute(make):
    reader, x = Reader(), torch.randn(64, 64)
    reader.read(x)
    made = make(x)
    assert not vars(made)
    assert not vars(x)
    if not made._is_view() and made.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        assert pack_of(made) is None


class Everything(nn.Module):
    """Layers that read a parameter, a buffer, an input and what other layers made."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(64, 64))
        self.register_buffer("places", torch.randn(64, 64))
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.norm, self.act, self.drop = nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.1)

    def forward(self, x):
        h = self.a(self.norm(x)) + self.a(self.query) + self.b(self.places)
        return self.b(self.drop(self.act(h)))


@pytest.mark.parametrize("methods", [GroupQuant(), Inverted(), packlight.DEFAULT_METHODS])
def test_models_inputs_and_outputs_go_into_files_of_weights_alone(methods, fresh_compiler):
    model, x = Everything(), torch.randn(64, 64)
    packlight.convert(model, methods)
    compiled = torch.compile(model, backend="aot_eager")
    outputs = [model(x), compiled(x)]
    outputs[0].sum().backward()
    for value in (x, model.state_dict(keep_vars=True), *(y.detach() for y in outputs)):
        loaded(value, weights_only=True)
    assert not vars(x)
    assert not any(vars(y) for y in outputs)
    assert type(loaded(model, weights_only=False)) is type(model)


# ---- lifetime ------------------------------------------------------------------------------------


def bytes_alive():
    gc.collect()
    gc.collect()  # what the first has finalised may hold more
    alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype == torch.uint8]
    state = torch.get_rng_state().nbytes  # which a checkpoint keeps
    return sum(tensor.nbytes for tensor in alive if tensor.nbytes != state)


def held_by(make):
    """Bytes of packs that are alive after a backward pass, with what the user holds."""
    before = bytes_alive()
    held = make()
    return bytes_alive() - before, held


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.act, self.down = (
            nn.LayerNorm(64),
            nn.Linear(64, 128),
            nn.GELU(),
            nn.Linear(128, 64),
        )
        self.seen = []

    def forward(self, x):
        h = self.norm(x)
        u = self.up(h)
        a = self.act(u)
        self.seen = [x, h, u, a]
        return self.down(a)


RUNS = {
    "plain": lambda model, x: model(x),
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "re-entrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_what_a_user_holds_holds_no_packs_after_the_backward_pass(run):
    model = Mlp()
    packlight.convert(model, GroupQuant())
    others = list(sharing._notes.values())  # of what other tests have left alive

    def make():
        x = torch.randn(256, 64, requires_grad=True) * 1.0
        y = run(model, x)
        y.sum().backward()
        return x, y, model.seen

    held, _ = held_by(make)
    notes = [note for note in sharing._notes.values() if all(note is not one for one in others)]
    assert not any(isinstance(note.facts.pack, Pack) for note in notes)
    if run is not RUNS["checkpoint"]:  # torch's graph of the second pass holds what it saved
        assert held == 0


def test_nor_under_hooks_that_take_packs_away():
    model = Mlp()
    packlight.convert(model, GroupQuant())

    def make():
        x = torch.randn(256, 64, requires_grad=True) * 1.0
        with torch.autograd.graph.save_on_cpu():
            y = model(x)
        y.sum().backward()
        return x, y, model.seen

    held, _ = held_by(make)
    assert held == 0


def test_the_table_of_notes_does_not_grow():
    model = Mlp()
    packlight.convert(model, GroupQuant())
    sizes = []
    for _ in range(4):
        model(torch.randn(64, 64)).sum().backward()
        model.seen = []
        gc.collect()
        sizes.append(len(sharing._notes))
    assert sizes[1] == sizes[3]


def test_a_note_keeps_its_tensor_s_object_no_longer_than_others_do():
    x = torch.randn(64, 64)
    gq.Linear(64, 8)(x).sum().backward()
    reference = weakref.ref(x)
    del x
    assert reference() is None


# ---- kinds of facts ------------------------------------------------------------------------------


class Holder:
    """What an operation holds that keeps a tensor."""


def noted(tensor):
    """Which kinds of facts are known of the tensor."""
    found = {
        "cast": sharing.cast_of(tensor, torch.bfloat16) is not None,
        "pack": pack_of(tensor) is not None,
        "sketch": sharing.sketch_of(tensor) is not None,
        "exact": sharing.is_kept_exactly(tensor),
        "filled": sharing.is_filled(tensor),
    }
    return {kind for kind, known in found.items() if known}


@pytest.mark.parametrize("order", [*itertools.permutations(["cast", "pack", "sketch", "exact"])])
def test_each_fact_about_a_tensor_adds_to_the_others(order):
    x, held = torch.randn(64, 64), {"holder": Holder()}
    held["pack"] = Pack(lambda dtype, kept: kept, (64, 64), (torch.ones(8), None))
    write = {
        "cast": lambda: sharing.note_cast(x, x.bfloat16()),
        "pack": lambda: note_pack(x, held["pack"]),
        "sketch": lambda: sharing.note_sketch(x, held["pack"]),
        "exact": lambda: sharing.note_exact(x, held["holder"]),
    }
    known = set()
    for kind in order:
        write[kind]()
        known.add(kind)
        assert noted(x) == known
    sharing.note_filled(x)
    assert noted(x) == known | {"filled"}
    # A cast has a gradient of its own; a sketch is of rows.
    assert noted(x.view(8, 8, 64)) == known - {"cast"} | {"filled"}
    assert noted(x.view(-1)) == noted(x.t()) == {"pack", "exact", "filled"}
    assert noted(x[:32]) == set()
    assert noted(x.bfloat16()) == set()
    assert sharing.cast_of(x, torch.float16) is None
    del held["holder"]
    assert noted(x) == known - {"exact"} | {"filled"}
    del held["pack"]
    assert noted(x) == {"cast", "filled"}
    x.add_(1)
    assert noted(x) == set()


def test_a_tensor_with_a_hook_has_no_cast():
    """The hook would not see a gradient that goes to the cast instead."""
    x = torch.randn(3, requires_grad=True) * 1
    sharing.note_cast(x, x.bfloat16())
    assert noted(x) == {"cast"}
    x.register_hook(lambda grad: grad)
    assert noted(x) == set()


def test_what_is_held_is_held_until_the_backward_pass_where_hooks_take_packs_away():
    def note(write):
        x = torch.randn(64, requires_grad=True) * 1
        write(x, Pack(lambda dtype, kept: kept, (64,), (torch.ones(8),)))
        return x

    assert noted(note(note_pack)) == noted(note(sharing.note_kept)) == set()
    assert noted(note(sharing.note_held)) == {"pack"}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert noted(note(sharing.note_kept)) == set()
        for write in (note_pack, sharing.note_held):
            x = note(write)
            assert noted(x) == {"pack"}
            x.sum().backward()
            assert noted(x) == set()


# ---- hooks ---------------------------------------------------------------------------------------

HOOKS = {
    "function": lambda x: x,
    "built-in": torch.Tensor.clone,
    "copying": lambda x: x.clone(),
}


@pytest.mark.parametrize("pack", HOOKS.values(), ids=HOOKS)
def test_any_hook_serves(pack):
    model = Mlp()
    packlight.convert(model, GroupQuant(**NEAREST))
    x = torch.randn(64, 64)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        loss = model(x).square().sum()
    loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_note_holds_under_the_hooks_under_which_it_was_written():
    x = torch.randn(64, 64)
    reader = Reader()
    reader.read(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert pack_of(x) is None
    assert pack_of(x) is not None


# ---- grades --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offered", "asked", "serves"),
    [
        (Grade(4, 128, True), Grade(4, 128, True), True),
        (Grade(8, 128, True), Grade(4, 128, True), True),
        (Grade(2, 128, True), Grade(4, 128, True), False),
        (Grade(4, 128, False), Grade(4, 128, True), False),
        (Grade(4, 128, True), Grade(4, 128, False), True),
        (Grade(4, 256, True), Grade(4, 128, True), False),
        (Grade(4, 64, True), Grade(4, 128, True), True),
        (Grade(8, 1024, True), Grade(4, 32, True), True),
        (Grade(8, 128, False), Grade(4, 128, True), False),
        (EXACT, Grade(8, 32, True), True),
    ],
)
def test_a_pack_serves_those_that_ask_for_no_better(offered, asked, serves):
    assert offered.serves(asked) is serves


def test_the_grade_of_two_packs_is_that_of_the_worse():
    a, b = Grade(8, 256, False), Grade(4, 128, True)
    assert a.and_of(b) == b.and_of(a) == Grade(4, 256, False)


PRODUCERS = {
    "norm": lambda bits: gq.LayerNorm(64, bits=bits),
    "activation": lambda bits: gq.GELU(bits=bits),
    "view": lambda bits: lambda x: gq.LayerNorm(64, bits=bits)(x).view(4, 16, 64),
    "dropout": lambda bits: nn.Sequential(gq.LayerNorm(64, bits=bits), packlight.fewbit.Dropout()),
    "relu": lambda bits: nn.Sequential(gq.LayerNorm(64, bits=bits), gq.fixed_point.ReLU()),
}


@pytest.mark.parametrize(
    "name", [name for name in PRODUCERS if hasattr(gq, "ReLU") or name != "relu"]
)
def test_a_finer_reader_behind_a_coarse_producer_keeps_a_pack_of_its_own(name):
    x = torch.randn(64, 64)
    packlight.manual_seed(0)
    fine = gq.Linear(64, 64, bits=8)
    coarse = gq.Linear(64, 8, bits=2)
    h = PRODUCERS[name](2)(x)
    coarse_output = coarse(h)
    error = relative_error(weight_gradient(fine, h), exact_gradient(fine, h))
    assert error < 0.02
    assert coarse_output.requires_grad


def test_later_readers_find_the_finer_pack():
    x = torch.randn(64, 64)
    outputs = [gq.Linear(64, 8, bits=bits)(x) for bits in (2, 8)]
    pack = pack_of(x)
    assert pack is not None
    assert pack.grade.bits == 8
    fine = gq.Linear(64, 8, bits=8)
    assert kept_bytes(lambda: None) == 0
    outputs.append(fine(x))
    assert pack_of(x).tensors[0] is pack.tensors[0]


def test_a_fixed_point_code_serves_readers_of_as_many_bits():
    norm = packlight.groupquant.fixed_point.BatchNorm2d(8, bits=4)
    y = norm(torch.randn(4, 8, 8, 8, requires_grad=True) * 1.0)
    assert pack_of(y, GroupQuant(bits=4).grade) is not None
    assert pack_of(y, GroupQuant(bits=8).grade) is None


def test_the_product_of_factors_that_share_their_rounding_is_rounded_by_itself():
    from packlight.layers.product import mul

    packlight.manual_seed(0)
    x = torch.randn(64, 64)
    reader = gq.Linear(64, 64, bits=2)
    mean, truth = 0.0, None
    for _ in range(300):
        h = x.clone().requires_grad_() * 1.0
        _ = reader(h)  # packs h
        y = mul(h, h, method=packlight.GroupQuant(bits=2))
        gradient = weight_gradient(reader, y)
        truth = exact_gradient(reader, y) if truth is None else truth
        mean = mean + gradient / 300
    assert relative_error(mean, truth) < 0.03


# ---- parameters of others ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: gq.LayerNorm(64), lambda: gq.RMSNorm(64)])
def test_a_pack_reads_no_parameter_that_another_module_owns(make):
    """As ZeRO-3 and FSDP do it: a norm's parameters are gone when its reader's backward runs."""
    packlight.manual_seed(0)
    norm, linear = make(), gq.Linear(64, 64, **NEAREST)
    nn.init.normal_(norm.weight)
    x = torch.randn(32, 64)
    linear(norm(x)).square().sum().backward()
    expected = linear.weight.grad.clone(), norm.weight.grad.clone()
    norm.zero_grad(), linear.zero_grad()

    packlight.manual_seed(1)
    kept = [p.data for p in norm.parameters()]
    y = linear(norm(x))
    for parameter in norm.parameters():
        parameter.data = torch.empty(0)
    gathered = []

    def gather(_):
        for parameter, data in zip(norm.parameters(), kept, strict=True):
            parameter.data = data
        gathered.append(True)

    norm_output_gradient_hook = y.grad_fn.next_functions[0][0]
    norm_output_gradient_hook.register_prehook(lambda grads: gather(grads))
    y.square().sum().backward()
    assert gathered
    torch.testing.assert_close(linear.weight.grad, expected[0], rtol=0.05, atol=1.0)


def test_a_norm_s_weights_may_change_before_its_reader_goes_back():
    packlight.manual_seed(0)
    norm, linear = gq.LayerNorm(64, **NEAREST), gq.Linear(64, 64, **NEAREST)
    x = torch.randn(32, 64)
    expected = weight_gradient(linear, norm(x))
    y = linear(norm(x))
    with torch.no_grad():
        norm.weight.zero_()
    (gradient,) = torch.autograd.grad(y.square().sum(), linear.weight)
    torch.testing.assert_close(gradient, expected)


# ---- without capabilities ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HOOKS", "STORAGES"])
def test_without_a_capability_layers_share_nothing_and_gradients_are_right(name, monkeypatch):
    from packlight import _torch

    model, plain = Mlp(), Mlp()
    plain.load_state_dict(model.state_dict())
    packlight.convert(model, GroupQuant(bits=8))
    monkeypatch.setattr(getattr(_torch, name), "values", None, raising=False)
    x = torch.randn(64, 64)
    h = torch.randn(64, 64, requires_grad=True) * 1.0
    note_pack(h, Pack(lambda *_: h, (64, 64), ()))
    assert pack_of(h) is None
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 0.05


def test_inference_tensors_carry_no_notes():
    with torch.inference_mode():
        x = torch.randn(64, 64)
    note_pack(x, Pack(lambda *_: x, (64, 64), ()))
    assert pack_of(x) is None
