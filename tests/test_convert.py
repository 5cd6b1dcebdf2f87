"""`convert` and `revert` on whole models: what stays, what is left alone, what is refused."""

import collections
import contextlib
import copy
import doctest
import io
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import FewBit, FixedPoint, GroupQuant, Inverted, convert, fewbit, groupquant, revert
from packlight.calls import _ATTRIBUTE
from packlight.conversion import brief
from packlight.errors import CannotConvertError, InputError, NothingMatchedError
from packlight.method import Method, Swap, rule
from packlight.sketch import Sketch
from tests.helpers import gradients

NEAREST = GroupQuant(bits=8, group_size=32, rounding="nearest")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return x + self.drop(self.fc2(self.act(self.fc1(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.blocks(x))


class Twice(nn.Linear):
    """A subclass whose forward is another."""

    def forward(self, input):
        return 2 * super().forward(input)


def names(conversion):
    return {name: str(row.becomes) for row in conversion.replaced for name in row.names}


def reasons(conversion):
    return {name: row.reason for row in conversion.skipped for name in row.names}


def state(model):
    """All that a model is made of: classes, attributes, and the very objects in the registries."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        registries = {
            key: [(inner, id(value)) for inner, value in vars(module)[key].items()]
            for key in ("_parameters", "_buffers", "_modules", "_forward_hooks")
        }
        plain = {key: value for key, value in vars(module).items() if key not in registries}
        found[name] = (id(module), type(module), registries, plain)
    return found


# --- Which layers.


@pytest.mark.parametrize(
    "methods", [NEAREST, [FewBit(), NEAREST], {"head": NEAREST, nn.Linear: NEAREST}], ids=str
)
def test_the_first_and_the_last_layer_exact(methods):
    model = Net()
    conversion = convert(model, methods, exact_ends=True)
    linears = {name for name, kind in names(conversion).items() if kind.endswith(".Linear")}
    assert linears == {"blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"}
    assert reasons(conversion)["head"] == "left alone, as asked"
    assert type(model.blocks[0].fc1) is type(model.head) is nn.Linear
    convert(model, methods)
    assert convert(model, methods, exact_ends=True)  # what was converted is torch's again
    assert type(model.head) is nn.Linear


def test_exact_ends_of_layers_with_odd_names():
    """A name stands for itself, be it a pattern or the name of a type."""
    layers = {"Linear": nn.Linear(4, 4), "[a]*": nn.Conv1d(4, 4, 1), "a": nn.Linear(4, 4)}
    model = nn.ModuleDict({**layers, "b?": nn.Linear(4, 4), "bc": nn.LayerNorm(4)})
    assert set(names(convert(model, NEAREST, exact_ends=True))) == {"[a]*", "a", "bc"}
    one = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert set(names(convert(one, NEAREST, exact_ends=True))) == {"1"}


def test_one_method_converts_every_layer_that_it_has_a_rule_for():
    model = Net()
    conversion = convert(model, FewBit(bits=3))
    assert names(conversion) == {
        f"blocks.{index}.{name}": f"packlight.fewbit.{kind}"
        for index in (0, 1)
        for name, kind in (("act", "GELU"), ("drop", "Dropout"))
    }
    assert type(model.blocks[0].act) is fewbit.GELU
    assert model.blocks[0].act.bits == 3
    assert reasons(conversion)["head"] == "no rule of FewBit"
    assert "blocks" not in reasons(conversion)  # a container


def test_of_several_methods_the_first_that_can_counts():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.MaxPool2d(2))
    conversion = convert(model, [Sketch(), GroupQuant(), FewBit()])
    assert list(names(conversion).values()) == [
        "packlight.groupquant.Conv2d",  # Sketch takes kernels of size 1 only
        "packlight.sketch.Conv2d",
        "packlight.groupquant.fixed_point.ReLU",
        "packlight.fewbit.MaxPool2d",
    ]


def test_the_first_selector_that_matches_counts():
    model = Net()
    conversion = convert(
        model,
        {
            "head": None,
            lambda name, module: name.startswith("blocks.1."): Inverted(),
            "blocks.*.fc2": Sketch(rows=0.5),
            nn.Linear: GroupQuant(bits=2),
            nn.GELU: FewBit(bits=2),
        },
        strict=False,  # Inverted has no rule for Dropout, and that is all right here
    )
    assert names(conversion) == {
        "blocks.0.fc1": "packlight.groupquant.Linear",
        "blocks.0.act": "packlight.fewbit.GELU",
        "blocks.0.fc2": "packlight.sketch.Linear",
        "blocks.1.norm": "packlight.inverted.LayerNorm",
        "blocks.1.fc1": "packlight.inverted.Linear",
        "blocks.1.act": "packlight.inverted.GELU",
        "blocks.1.fc2": "packlight.inverted.Linear",
    }
    why = reasons(conversion)
    assert why["head"] == "left alone, as asked"
    assert why["blocks.0.norm"] == "no selector picks it"
    assert why["blocks.1.drop"] == "no rule of Inverted"
    assert model.blocks[0].fc1.method == GroupQuant(bits=2)


def test_a_name_alone_and_the_model_itself_can_be_picked():
    model = Net()
    assert list(names(convert(model, {"blocks.1.act": Inverted()}))) == ["blocks.1.act"]
    layer = nn.GELU()
    conversion = convert(layer, FewBit())
    assert type(layer) is fewbit.GELU
    assert conversion.replaced[0].names == ("",)
    assert "(the model itself)" in str(conversion)
    assert revert(layer) == 1
    assert type(layer) is nn.GELU


def test_the_default_methods_take_all_kinds_of_layers():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1),
        nn.Flatten(), nn.Linear(8 * 3 * 3, 64), nn.LayerNorm(64), nn.SiLU(), nn.ReLU6(),
        nn.Linear(64, 4),
    )  # fmt: skip
    conversion = convert(model)
    assert not conversion.skipped  # `Flatten` keeps nothing
    change = conversion.bytes(torch.randn(16, 3, 8, 8))
    assert change.before.activation_bytes > 5 * change.after.activation_bytes


# --- What is wrong is said, and changes nothing.


def test_nothing_matched_says_what_there_is():
    model = Net()
    before = state(model)
    with pytest.raises(NothingMatchedError, match="5 Linear, 2 LayerNorm, 2 GELU"):
        convert(model, {nn.ReLU: FewBit()}, functional=False)
    with pytest.raises(
        NothingMatchedError, match=r"'blocks\.\*\.fc3' matches no module \(near: block"
    ):
        convert(model, {"blocks.*.fc3": GroupQuant(), nn.GELU: FewBit()})
    with pytest.raises(NothingMatchedError, match="matches no module"):
        convert(model, {lambda name, module: False: GroupQuant(), nn.GELU: FewBit()})
    with pytest.raises(NothingMatchedError, match="LayerNorm: no rule of Sketch"):
        convert(nn.LayerNorm(8), Sketch())
    with pytest.raises(NothingMatchedError, match="no layer would be converted"):
        convert(model, {nn.Linear: None})
    with pytest.raises(NothingMatchedError):
        convert(model, {})
    assert state(model) == before


def test_types_match_exactly_and_near_types_are_named():
    model = nn.Sequential(Twice(8, 8), nn.GELU())
    with pytest.raises(NothingMatchedError, match=r"Linear matches no module \(near: Twice\)"):
        convert(model, {nn.Linear: GroupQuant()}, functional=False)


def test_a_selector_that_matches_nothing_is_reported_where_it_is_no_error():
    model = Net()
    assert convert(model, {nn.ReLU: FewBit(), nn.GELU: FewBit()}).unmatched == ("ReLU",)
    conversion = convert(model, {"*.fc3": FewBit(), nn.GELU: FewBit()}, strict=False)
    assert conversion.unmatched == ("'*.fc3'",)
    assert "matched nothing: '*.fc3'" in str(conversion)


def test_a_selector_that_picks_only_layers_without_a_rule_raises():
    model = Net()
    before = state(model)
    for selector in ("head", "*.fc2", nn.Linear, lambda name, module: name == "head"):
        with pytest.raises(CannotConvertError, match="no rule of FewBit"):
            convert(model, {selector: FewBit(), nn.GELU: FewBit()})
        assert state(model) == before
        conversion = convert(model, {selector: FewBit(), nn.GELU: FewBit()}, strict=False)
        assert reasons(conversion)["head"] in ("no rule of FewBit", "no selector picks it")
        revert(model)
    # A pattern that picks some layers with a rule is as meant.
    assert len(convert(model, {"blocks.*": FewBit()}).replaced) == 4


def test_a_layer_that_cannot_be_converted_raises_with_its_name_and_reason():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Linear(4, 4))
    before = state(model)
    with pytest.raises(CannotConvertError, match=r"layer '0' \(Conv2d\).*strict=False"):
        convert(model, Sketch())
    assert state(model) == before
    conversion = convert(model, Sketch(), strict=False)
    assert list(names(conversion)) == ["1"]
    assert "Conv2d" in str(conversion)
    assert len(convert(model, {"0": None, "1": Sketch()}).replaced) == 1


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (FewBit, "neither a method"),
        ("gelu", "neither a method"),
        ([FewBit], "neither a method"),
        ({nn.GELU: FewBit}, r"did you mean FewBit\(\)\?"),
        ({nn.GELU: 3}, "neither a method nor None"),
        ({3: FewBit()}, "neither a module type"),
        ({int: FewBit()}, "neither a module type"),
    ],
)
def test_wrong_arguments(methods, message):
    with pytest.raises(InputError, match=message):
        convert(Net(), methods)
    with pytest.raises(InputError, match="expected an nn"):
        convert(F.gelu, FewBit())
    with pytest.raises(InputError, match="expected an nn"):
        revert(F.gelu)


def test_a_rule_that_fails_leaves_the_model_as_it_was():
    class Odd(nn.Linear):
        pass

    @rule(Inverted, Odd)
    def _odd(method, module):
        raise ZeroDivisionError

    model = nn.Sequential(nn.GELU(), Odd(4, 4))
    before = state(model)
    try:
        with pytest.raises(ZeroDivisionError):
            convert(model, Inverted())
    finally:
        del packlight.method._rules[Inverted, Odd]
    assert state(model) == before


# --- What stays.


def test_everything_is_the_same_object():
    model = Net().to(torch.bfloat16).eval()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].train()
    before = state(model)
    parameters = {name: id(value) for name, value in model.named_parameters()}
    keys = list(model.state_dict())
    convert(model, functional=False, rest=None)
    after = state(model)
    assert parameters == {name: id(value) for name, value in model.named_parameters()}
    assert keys == list(model.state_dict())
    assert [(name, row[0]) for name, row in before.items()] == [
        (name, row[0]) for name, row in after.items()
    ]
    for name, (_, _, registries, plain) in before.items():
        assert after[name][2] == registries
        assert {key: after[name][3][key] for key in plain} == plain
    assert revert(model) == 11
    assert state(model) == before


def test_hyperparameters_stay():
    model = nn.Sequential(
        nn.LayerNorm(8, eps=0.1), nn.BatchNorm1d(8, momentum=None, eps=0.2), nn.GELU("tanh"),
        nn.ELU(0.3, inplace=True), nn.LeakyReLU(0.4, inplace=True),
    )  # fmt: skip
    texts = [layer.extra_repr() for layer in model]
    convert(model)
    for layer, text in zip(model, texts, strict=True):
        assert layer.extra_repr().startswith(text)


def test_checkpoints_go_both_ways():
    plain, converted = Net(), Net()
    convert(converted, [GroupQuant(), FewBit()])
    converted.load_state_dict(plain.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(plain(x), converted(x))
    fresh = Net()
    fresh.load_state_dict(converted.state_dict())
    assert torch.equal(fresh(x), plain(x))


def test_inplace_activations_write_to_their_input():
    for kind in (nn.ReLU, nn.SiLU, nn.ELU, nn.Hardswish):
        for method in (FewBit(bits=8), NEAREST, Inverted()):
            layer = kind(inplace=True)
            try:
                convert(layer, method)
            except NothingMatchedError:
                continue
            x = torch.randn(4, 64)
            leaf = x.clone().requires_grad_()
            written = leaf * 1.0
            assert layer(written) is written
            assert torch.equal(written, kind()(x))
            written.sum().backward()
            expected = torch.func.grad(lambda x, kind=kind: kind()(x).sum())(x)
            assert (leaf.grad - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_goes_on_through_a_conversion(optimizer):
    """Inverted gradients are torch's, so a conversion in the middle changes nothing."""
    packlight.manual_seed(0)
    plain = Net().double()
    converted = copy.deepcopy(plain)
    data = [torch.randn(8, 32).double() for _ in range(6)]

    def train(model, events):
        trainer = optimizer(model.parameters(), lr=1e-2)
        for index, x in enumerate(data):
            if index in events:
                events[index](model)
            trainer.zero_grad()
            model(x).square().mean().backward()
            trainer.step()
        assert len(trainer.state) in (0, len(list(model.parameters())))

    train(plain, {})
    train(converted, {2: lambda model: convert(model, Inverted()), 4: revert})
    for ours, theirs in zip(converted.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_copies_pickles_and_saved_models_are_converted_and_revert():
    model = Net()
    convert(model, [NEAREST, FewBit()], functional=False)
    x = torch.randn(8, 32)
    expected = gradients(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for clone in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert type(clone.head) is groupquant.Linear
        assert all(map(torch.equal, gradients(clone, x), expected))
        assert revert(clone) == 11
        assert type(clone.head) is nn.Linear
        assert not vars(clone.head).keys() - vars(nn.Linear(1, 1)).keys()
    assert type(model.head) is groupquant.Linear


def test_hooks_stay_and_run():
    model, seen = Net(), []
    model.head.register_forward_hook(lambda *_: seen.append("forward"))
    model.head.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.head.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.head.weight.register_hook(lambda _: seen.append("weight"))
    convert(model)
    gradients(model, torch.randn(8, 32))
    assert sorted(seen) == ["backward", "before", "forward", "weight"]
    revert(model)
    gradients(model, torch.randn(8, 32))
    assert len(seen) == 8


def test_modules_shared_within_a_parent_and_across_parents_stay_shared():
    act, fc = nn.GELU(), nn.Linear(8, 8)
    model = nn.Sequential(fc, act, fc, act, nn.Sequential(act, fc))
    conversion = convert(model, {"4.0": FewBit(), nn.Linear: GroupQuant()})
    assert {row.names for row in conversion.replaced} == {("0", "2", "4.1"), ("1", "3", "4.0")}
    assert model[1] is model[3] is model[4][0] is act
    assert type(act) is fewbit.GELU
    assert model[0] is model[2] is model[4][1] is fc
    assert revert(model) == 2
    assert type(act) is nn.GELU


def test_of_two_selectors_for_a_shared_module_the_first_counts():
    act = nn.GELU()
    model = nn.Sequential(act, act)
    convert(model, {"1": FewBit(bits=1), "0": FewBit(bits=2)})
    assert act.bits == 1


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(16, 32)
            self.head = nn.Linear(32, 16, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    model = Tied()
    convert(model, NEAREST)
    assert model.head.weight is model.embed.weight
    assert copy.deepcopy(model).head.weight.shape == (16, 32)
    x = torch.arange(16)
    (ours,) = gradients(model, x)
    revert(model)
    (theirs,) = gradients(model, x)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


# --- What is left alone.


def test_subclasses_are_left_alone_and_reported():
    model = nn.Sequential(Twice(4, 4), nn.Linear(4, 4))
    conversion = convert(model, GroupQuant(), functional=False)
    assert type(model[0]) is Twice
    assert reasons(conversion)["0"] == (
        "a subclass of Linear, whose forward may differ; rules match exactly"
    )


def test_layers_that_run_no_forward_of_their_own():
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    model = nn.ModuleDict({"attention": attention, "lstm": nn.LSTM(4, 4), "fc": nn.Linear(16, 16)})
    conversion = convert(model, GroupQuant())
    assert list(names(conversion)) == ["lstm", "fc"]
    assert reasons(conversion) == {}
    assert "attention" in conversion.functional
    conversion = convert(model, GroupQuant(), functional=False)
    assert reasons(conversion) == {"attention": "no rule of GroupQuant"}


@pytest.mark.parametrize("activation", [F.gelu, nn.GELU()], ids=["function", "module"])
def test_transformer_encoder_layers_train_converted_and_infer_by_their_fast_path(activation):
    packlight.manual_seed(0)
    plain = nn.TransformerEncoderLayer(32, 2, 64, 0.0, activation, batch_first=True)
    model = copy.deepcopy(plain)
    conversion = convert(model, [NEAREST, FewBit()])
    assert {"linear1", "linear2", "norm1", "norm2", "dropout"} <= names(conversion).keys()
    assert ("activation" in names(conversion)) == isinstance(activation, nn.Module)
    x = torch.randn(2, 16, 32)
    assert torch.equal(model(x), plain(x))
    for ours, theirs in zip(gradients(model, x), gradients(plain, x), strict=True):
        assert (ours - theirs).norm() <= 0.05 * theirs.norm() + 1e-6
    plain.eval(), model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_lazy_modules_are_reported_until_they_are_initialised():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    conversion = convert(model, GroupQuant())
    assert reasons(conversion)["0"].startswith("not initialised yet")
    model(torch.randn(2, 8))
    assert len(convert(model, GroupQuant()).replaced) == 2
    assert type(model[0]) is groupquant.Linear


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_layers_are_refused_and_converted_layers_can_be_parametrized(norm):
    model = nn.Sequential(norm(nn.Linear(32, 32)), nn.GELU())
    conversion = convert(model, [NEAREST])
    assert reasons(conversion)["0"].startswith("parametrized")
    assert parametrize.is_parametrized(model[0])

    layer = nn.Linear(32, 32)
    plain = norm(copy.deepcopy(layer))
    convert(layer, NEAREST)
    norm(layer)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(16, 32)
    assert torch.equal(layer(x), plain(x))
    for ours, theirs in zip(gradients(layer, x), gradients(plain, x), strict=True):
        assert (ours - theirs).norm() <= 0.03 * theirs.norm()
    before = state(layer)
    with pytest.raises(CannotConvertError, match="its class has become ParametrizedLinear"):
        revert(layer)
    with pytest.raises(CannotConvertError, match="its class has become ParametrizedLinear"):
        convert(layer, GroupQuant())
    assert state(layer) == before
    parametrize.remove_parametrizations(layer, "weight")
    assert revert(layer) == 1
    assert type(layer) is nn.Linear


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
    ],
    ids=["prune", "weight_norm", "spectral_norm"],
)
def test_weights_that_hooks_compute_stay_computed(change):
    plain = nn.Linear(32, 32)
    change(plain)
    converted = nn.Linear(32, 32)
    change(converted)
    convert(converted, NEAREST)
    converted.load_state_dict(plain.state_dict())
    x = torch.randn(16, 32)
    assert torch.equal(converted(x), plain(x))
    for ours, theirs in zip(gradients(converted, x), gradients(plain, x), strict=True):
        assert (ours - theirs).norm() <= 0.03 * theirs.norm()


def test_a_forward_of_the_instance_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    forward = model[0].forward
    model[0].forward = lambda x: forward(x)
    before = state(model)
    with pytest.raises(CannotConvertError, match="its forward was replaced on the instance"):
        convert(model, GroupQuant())
    assert state(model) == before
    assert names(convert(model, GroupQuant(), strict=False)) == {"1": "packlight.groupquant.GELU"}
    # The other way round it works: what is patched is the converted forward.
    del model[0].forward
    convert(model, GroupQuant())
    ours = model[0].forward
    assert ours.__func__ is groupquant.Linear.forward


def test_layers_of_packlight_are_left_alone():
    model = nn.Sequential(fewbit.GELU(bits=2), nn.GELU())
    conversion = convert(model, FewBit(bits=4))
    assert reasons(conversion)["0"] == "a layer of packlight already"
    assert [layer.bits for layer in model] == [2, 4]
    assert revert(model) == 1
    assert type(model[0]) is fewbit.GELU


# --- Converting again, and back.


def test_converting_again_starts_from_the_plain_layer():
    model = Net()
    before = state(model)
    first = convert(model, [GroupQuant(bits=2), FewBit()])
    once = state(model)
    assert convert(model, [GroupQuant(bits=2), FewBit()]).to_dict() == first.to_dict()
    assert state(model) == once
    again = convert(model, {nn.GELU: FewBit(bits=4), nn.Linear: Sketch()})
    assert names(again)["blocks.0.act"] == "packlight.fewbit.GELU"
    assert type(model.blocks[0].act) is fewbit.GELU
    assert not hasattr(model.blocks[0].act, "method")  # GroupQuant's
    assert type(model.blocks[0].norm) is groupquant.LayerNorm  # was not picked, and stays
    assert revert(model) == 14  # three of them have code of their own, and no more
    assert state(model) == before
    assert revert(model) == 0


class Two(nn.Module):
    """Two parts whose calls show in what they keep."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Part(), Part()

    def forward(self, x):
        return self.two(F.softsign(self.one(x)))


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(64, 64), nn.GELU()

    def forward(self, x):
        return F.silu(self.act(self.fc(x)))


CODES = GroupQuant(bits=4)
AGAIN = {
    "without calls": (CODES, False),
    "with calls": (CODES, True),
    "another method": (FewBit(bits=2), False),
    "calls of another method": (FewBit(bits=2), True),
    "a method without calls": (Sketch(rows=8, min_rows=1), True),
    "a part left out": ({"one*": None, "*": CODES}, True),
    "a layer left out": ({"one.act": None, "*": CODES}, False),
    "a part alone": ({"two*": FewBit(bits=2)}, False),
    "a layer of a part": ({"two.act": FewBit(bits=2)}, True),
    "all left out": ({"*": None}, False),
}


@pytest.mark.parametrize("second", AGAIN)
@pytest.mark.parametrize("first", AGAIN)
def test_of_two_conversions_the_last_decides(first, second):
    model, x = Two(), torch.randn(32, 64, requires_grad=True)
    plain = {name: type(module) for name, module in model.named_modules()}
    before = packlight.profile(model, x).activation_bytes
    for key in (first, second):
        alone, (methods, functional) = Two(), AGAIN[key]
        earlier = {name: type(module) for name, module in model.named_modules()}
        try:
            conversion = convert(model, methods, functional=functional)
        except NothingMatchedError:
            assert key == "all left out"
            assert earlier == plain
            continue
        with contextlib.suppress(NothingMatchedError):
            convert(alone, methods, functional=functional)
        replaced = {row.names[0] for row in conversion.replaced}
        skipped = {row.names[0]: row.reason for row in conversion.skipped}
        for name, module in model.named_modules():
            same = alone.get_submodule(name)
            covered = vars(module).get(_ATTRIBUTE)
            assert covered is vars(same).get(_ATTRIBUTE)
            assert (name in conversion.functional) == (
                covered is not None and covered.methods != ()
            )
            if next(module.children(), None) is not None:
                continue
            if name in replaced:
                assert type(module) is type(same) is not plain[name]
            elif skipped[name] == "left alone, as asked":
                assert type(module) is plain[name]
            else:
                assert type(module) is earlier[name]
                is_converted = earlier[name] is not plain[name]
                assert ("an earlier conversion" in skipped[name]) == is_converted
        change = conversion.bytes(x)
        assert change.after.activation_bytes == packlight.profile(model, x).activation_bytes
        assert change.before.activation_bytes == before
    revert(model)
    assert {name: type(module) for name, module in model.named_modules()} == plain
    assert packlight.profile(model, x).activation_bytes == before


def test_a_covered_class_that_was_changed_since_is_not_undone_behind_its_back():
    model = nn.Sequential(Two(), nn.Linear(64, 64))
    convert(model, CODES, functional=True)
    model[0].register_parameter("scale", nn.Parameter(torch.ones(1)))
    parametrize.register_parametrization(model[0], "scale", nn.Identity())
    with pytest.raises(CannotConvertError, match=r"layer '0'.* its class has become"):
        convert(model, FewBit(), functional=False)
    conversion = convert(model, FewBit(), functional=False, strict=False)
    (reason,) = (row.reason for row in conversion.skipped if row.names == ("0",))
    assert "its class has become" in reason
    assert vars(model[0].one).get(_ATTRIBUTE) is None


def test_what_an_inverted_norm_learnt_survives_an_equal_conversion_and_goes_with_revert():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    convert(model, Inverted())
    model(torch.randn(4, 8))
    seen = model[0]._seen
    assert seen is not None
    convert(model, Inverted())
    assert model[0]._seen is seen
    revert(model)
    assert vars(model[0]).keys() == vars(nn.LayerNorm(8)).keys()


def test_a_rule_sees_the_plain_module_and_its_attributes_come_back():
    class Scaled(nn.Linear):
        scale = 1.0

    class Ours(Scaled):
        def forward(self, input):
            return self.scale * super().forward(input)

    @rule(Sketch, Scaled)
    def _scaled(method, module):
        assert type(module) is Scaled
        return Swap(Ours, {"scale": module.scale * 2, "extra": 1})

    layer = Scaled(2, 2)
    layer.scale = 3.0
    try:
        convert(layer, Sketch())
        convert(layer, Sketch(rows=0.3))
        assert (layer.scale, layer.extra) == (6.0, 1)
        revert(layer)
    finally:
        del packlight.method._rules[Sketch, Scaled]
    assert (layer.scale, hasattr(layer, "extra")) == (3.0, False)


_LAYERS = st.sampled_from(
    [
        lambda: nn.Linear(8, 8), nn.GELU, nn.ReLU, lambda: nn.LayerNorm(8), lambda: nn.Dropout(0.5),
        lambda: nn.BatchNorm1d(8), lambda: nn.SiLU(inplace=True), lambda: Twice(8, 8),
        nn.Identity, nn.Tanh, lambda: nn.RMSNorm(8),
    ]
)  # fmt: skip
_METHODS = st.sampled_from(
    [
        FewBit(),
        Inverted(),
        GroupQuant(bits=2),
        GroupQuant(),
        FixedPoint(),
        Sketch(2, min_rows=1),
        None,
    ]
)
_SELECTORS = st.sampled_from(
    [nn.Linear, nn.GELU, nn.ReLU, nn.LayerNorm, nn.BatchNorm1d, "*", "0", "*1", "1.*"]
)


@settings(max_examples=30)
@given(
    st.lists(_LAYERS, min_size=1, max_size=6),
    st.lists(_LAYERS, max_size=4),
    st.lists(st.dictionaries(_SELECTORS, _METHODS, max_size=4), min_size=1, max_size=3),
)
def test_whatever_is_converted_reverts_to_the_very_model(first, second, conversions):
    packlight.manual_seed(0)
    model = nn.Sequential(*(make() for make in first))
    model.append(nn.Sequential(model[0], *(make() for make in second)))  # a shared module
    before, x = state(model), torch.randn(4, 8)
    plain = copy.deepcopy(model).eval()
    expected = plain(x.clone())  # layers may write to it
    for methods in conversions:
        try:
            convert(model, methods, strict=False)
        except NothingMatchedError:
            continue
        probe = copy.deepcopy(model)
        probe(x.clone())
        assert list(probe.state_dict()) == list(plain.state_dict())
        probe.load_state_dict(plain.state_dict())
        assert torch.equal(probe.eval()(x.clone()), expected)
    revert(model)
    assert state(model) == before
    assert torch.equal(copy.deepcopy(model).eval()(x.clone()), expected)


# --- Where gradients and bytes come from.


@pytest.mark.parametrize("frozen", [True, False])
def test_a_linear_with_a_frozen_weight_keeps_nothing_as_in_torch(frozen):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].requires_grad_(not frozen)
    x = torch.randn(32, 64)
    before = packlight.profile(model, x)
    convert(model, GroupQuant())
    after = packlight.profile(model, x)
    assert ("1" in before.by_module()) == (not frozen)
    assert ("1" in after.by_module()) == (not frozen)
    assert after.activation_bytes < before.activation_bytes / 2


@pytest.mark.parametrize("method", [FixedPoint(), GroupQuant()])
def test_batch_norm_relu_and_convolution_share_a_code(method):
    model = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3))
    conversion = convert(model, [method, GroupQuant()])
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    kept = packlight.profile(model, x)
    count = x.numel()
    # A code an element, for GroupQuant a bit more for the mask; and a table of the channels.
    assert kept.activation_bytes <= count * (4 + (method == GroupQuant()) * 1.25) / 8 + 24 * 16
    assert conversion.bytes(x).after.activation_bytes == kept.activation_bytes


def test_exact_methods_give_the_very_gradients():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        nn.Hardtanh(),
    )
    x = torch.randn(4, 3, 10, 10)
    expected = gradients(model, x)
    convert(model, FewBit())
    assert all(map(torch.equal, gradients(model, x), expected))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_block_gives_the_same_gradients(reentrant):
    model = Net()
    convert(model, [NEAREST, FewBit()])
    x = torch.randn(8, 32, requires_grad=True)
    expected = gradients(model, x)

    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            for block in self.model.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.model.head(x)

    assert all(map(torch.equal, gradients(Checkpointed(model), x), expected))


@pytest.mark.parametrize("methods", [[NEAREST, FewBit()], FewBit(), Inverted()], ids=str)
def test_a_converted_model_compiles_without_a_break(methods, fresh_compiler):
    model = nn.Sequential(Block(32), Block(32))
    convert(model, methods)
    x = torch.randn(8, 32)
    expected = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", [nn.LeakyReLU, nn.ReLU, nn.ELU, nn.Dropout])
@pytest.mark.parametrize("first", [NEAREST, FewBit()], ids=["packs first", "codes first"])
def test_packs_behind_codes_compile(kind, first, fresh_compiler):
    """The tracer does not let every output carry a note of who packed it."""
    model = nn.Sequential(nn.Linear(32, 32), kind(), nn.Linear(32, 32))
    convert(model, [first, NEAREST, FewBit()])
    x = torch.randn(16, 32)
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    if kind is not nn.Dropout:  # whose seed is drawn elsewhere in a compiled region
        for ours, theirs in zip(compiled, gradients(model, x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_compiled_model_can_be_converted(fresh_compiler):
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(16, 64)
    plain = gradients(compiled, x)
    assert list(names(convert(compiled, GroupQuant(bits=2)))) == [
        f"_orig_mod.{i}" for i in range(3)
    ]
    converted = gradients(compiled, x)
    assert not torch.equal(plain[2], converted[2])  # compiled anew, for another class
    revert(compiled)
    assert all(map(torch.equal, gradients(compiled, x), plain))


# --- The report.


def test_the_conversion_prints_counts_names_and_reasons():
    model = nn.Sequential(*(Block(32) for _ in range(12)))
    text = str(convert(model, {"*.fc2": Sketch(), nn.GELU: FewBit(bits=2)}))
    assert text.splitlines()[0] == "Sequential: 24 of 60 layers converted"
    assert "12 x Linear" in text
    assert "0-11.fc2" in text
    assert "FewBit(bits=2)" in text
    assert "fewbit.GELU" in text
    assert "no selector picks it" in text


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (GroupQuant(4), "GroupQuant(bits=4)"),
        (GroupQuant(2, group_size=64), "GroupQuant(bits=2, group_size=64)"),
        (
            GroupQuant(8, group_size=32, rounding="nearest"),
            "GroupQuant(bits=8, group_size=32, rounding='nearest')",
        ),
        (Sketch(0.5, kind="srht", max_rows=99), "Sketch(rows=0.5, kind='srht', max_rows=99)"),
        (Inverted(), "Inverted()"),
    ],
)
def test_a_method_is_printed_with_its_first_field_and_those_not_as_usual(method, text):
    assert brief(method) == text


def test_the_conversion_is_plain_data():
    model = Net()
    conversion = convert(model, {nn.GELU: FewBit(bits=2), "head": None})
    data = conversion.to_dict()
    assert data["model"] == "Net"
    assert data["replaced"][0] == {
        "names": ["blocks.0.act"],
        "kind": "GELU",
        "becomes": "packlight.fewbit.GELU",
        "method": {"method": "FewBit", "bits": 2},
    }
    assert {"names": ["head"], "kind": "Linear", "reason": "left alone, as asked"} in data[
        "skipped"
    ]
    assert repr(conversion) == "Conversion(model='Net', replaced=<2>, skipped=<9>)"


def test_the_conversion_says_which_calls_keep_other_bits():
    def bits(*methods):
        conversion = convert(Net(), methods, functional=True)
        data = conversion.to_dict()
        assert data["functional_bits"] == conversion.functional_bits
        said = " ".join(str(conversion).split()).partition("are covered in ")[2]
        assert all(name in said for name in conversion.functional_bits)
        assert (" at " in said) == bool(conversion.functional_bits)
        return conversion.functional_bits

    methods = GroupQuant(bits=4, code="minmax"), FewBit(bits=3)
    of_attention = "scaled_dot_product_attention", "multi_head_attention_forward"
    assert bits(*methods) == dict.fromkeys(of_attention, 8)
    assert bits(GroupQuant(bits=2, code="rotated")) == dict.fromkeys(of_attention, 4)
    assert bits(GroupQuant(bits=8)) == {}
    assert bits(FewBit(bits=3)) == {"prelu": 4}  # a pack for its slopes


def test_the_conversion_knows_the_bytes():
    model = Net()
    x = torch.randn(64, 32)
    before = packlight.profile(model, x).activation_bytes
    conversion = convert(model, [GroupQuant(), FewBit()])
    change = conversion.bytes(x)
    assert change.before.activation_bytes == before
    assert change.after.activation_bytes == packlight.profile(model, x).activation_bytes
    assert type(model.head) is groupquant.Linear


def test_rules_of_other_packages_are_loaded_when_those_are_there(monkeypatch, tmp_path):
    (tmp_path / "strange_nets.py").write_text(
        "import sys\nsys.modules['strange_nets'].seen = True\n"
    )
    monkeypatch.setattr(packlight.integrations, "__path__", [str(tmp_path)])
    convert(nn.GELU(), FewBit())
    assert "packlight.integrations.strange_nets" not in sys.modules
    package = types.ModuleType("strange_nets")
    monkeypatch.setitem(sys.modules, "strange_nets", package)
    convert(nn.GELU(), FewBit())
    monkeypatch.delitem(sys.modules, "packlight.integrations.strange_nets")
    assert package.seen


@pytest.mark.parametrize("name", ["convert", "conversion", "predict"])
def test_examples_in_docstrings_run(name):
    results = doctest.testmod(sys.modules[f"packlight.{name}"])
    assert results.attempted > 0
    assert results.failed == 0


# --- What is said at once.


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([], "has no method; give one"),
        ((), "has no method; give one"),
        ({nn.GELU: []}, r"methods\[GELU\]=\[\] has no method"),
        (GroupQuant, r"did you mean GroupQuant\(\)\?"),
        ([FewBit(), GroupQuant], r"did you mean GroupQuant\(\)\?"),
        ({nn.GELU(): FewBit()}, "is a module; give its type, GELU, or its name"),
        ("FewBit", "neither a method"),
    ],
)
def test_a_mistake_is_named(methods, message):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    with pytest.raises(InputError, match=message):
        convert(model, methods)


@pytest.mark.parametrize(
    ("selector", "near"), [("gelu", "GELU"), ("Gelu", "GELU"), ("linear", "Linear"), ("ACT", "act")]
)
def test_a_name_in_another_case_is_near(selector, near):
    model = nn.Sequential(collections.OrderedDict(fc=nn.Linear(8, 8), act=nn.GELU()))
    with pytest.raises(NothingMatchedError, match=rf"matches no module \(near: {near}"):
        convert(model, {selector: FewBit()})


@pytest.mark.parametrize(
    "make",
    [
        lambda: GroupQuant(4.0),
        lambda: GroupQuant(bits=True),
        lambda: GroupQuant("4"),
        lambda: GroupQuant([4]),
        lambda: GroupQuant(group_size=128.0),
        lambda: GroupQuant(rounding=None),
        lambda: FixedPoint(4.0),
        lambda: FewBit(3.0),
        lambda: Sketch(rows="0.1"),
        lambda: Sketch(rows=float("nan")),
        lambda: Sketch(kind=["rows"]),
        lambda: Sketch(min_rows=16.0),
        lambda: Method.from_dict({"method": "GroupQuant", "bits": 4.0}),
    ],
)
def test_a_method_of_the_wrong_kind_is_refused(make):
    with pytest.raises(InputError):
        make()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e5m2])
def test_a_layer_with_weights_of_another_dtype_is_left_to_torch(dtype):
    weight = torch.zeros(8, 8, dtype=dtype)
    other = nn.Linear(8, 8, bias=False)
    other.weight = nn.Parameter(weight, requires_grad=dtype.is_complex)
    model = nn.Sequential(other, nn.Linear(8, 8))
    for methods in (GroupQuant(), Sketch(), [FixedPoint(), GroupQuant()]):
        conversion = convert(model, methods)
        assert [row.names for row in conversion.replaced] == [("1",)]
        assert [(row.names, row.reason) for row in conversion.skipped] == [
            (("0",), f"its weight is {dtype}; layers of packlight take dense floating tensors")
        ]
    with pytest.raises(CannotConvertError, match="its weight is"):
        convert(nn.Sequential(other, nn.GELU()), {"0": GroupQuant()})


def test_a_plan_that_leaves_everything_to_torch_is_no_mistake():
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    plan = packlight.plan(model, torch.randn(8, 32), memory="1GiB", device="H200")
    assert set(plan.values()) == {None}
    conversion = convert(model, plan)
    assert not conversion.replaced
    assert type(model[1]) is nn.GELU
