"""Layers under torch.nn's names: their constructors and forwards, which `Twin` makes for each."""

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from packlight import FewBit, FixedPoint, GroupQuant, convert, fewbit, groupquant, inverted, sketch
from packlight.errors import InputError
from packlight.groupquant import fixed_point
from packlight.layers import plain
from packlight.layers.twin import Twin
from packlight.sketch import Sketch

MODULES = (fewbit, groupquant, fixed_point, inverted, sketch)
PUBLIC = dict.fromkeys(vars(module)[name] for module in MODULES for name in module.__all__)
TWINS = [
    kind
    for kind in PUBLIC
    if isinstance(kind, type) and issubclass(kind, Twin) and hasattr(kind, "training_forward")
]
every_twin = pytest.mark.parametrize(
    "kind", TWINS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}"
)


def plain_kind(kind):
    """The class of the same name: torch's, or the plain one that torch lacks."""
    return getattr(nn, kind.__name__, None) or getattr(plain, kind.__name__)


def method_arguments(kind):
    """Names and defaults of a method's arguments, as the method has them."""
    if kind.__module__.startswith("packlight.sketch"):
        return dataclasses.asdict(Sketch())
    if kind.__module__.startswith("packlight.groupquant.fixed_point") and "Norm" in kind.__name__:
        return dataclasses.asdict(FixedPoint())
    if kind.__module__.startswith(("packlight.groupquant.modules", "packlight.groupquant.conv")):
        return dataclasses.asdict(GroupQuant())
    if kind.__module__.startswith("packlight.fewbit") and issubclass(kind, fewbit.modules.Coded):
        return dataclasses.asdict(FewBit())
    if kind is fewbit.RReLU:
        return {"bits": FewBit().bits}
    return {}


@every_twin
def test_the_constructor_takes_the_plain_layers_arguments_and_then_the_methods(kind):
    own, found = method_arguments(kind), inspect.signature(kind)
    theirs = inspect.signature(plain_kind(kind))
    if not own:
        assert found == theirs
        return
    defaults = {p.name: p.default for p in found.parameters.values()}
    assert list(defaults.items())[-len(own) :] == list(own.items())
    assert all(found.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in own)
    expected = [
        # A sketch is of kernels of size 1 alone.
        p.replace(default=1, annotation=Any) if "rows" in own and p.name == "kernel_size" else p
        for p in theirs.parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    assert list(found.parameters.values())[: -len(own)] == expected
    with_self = list(inspect.signature(kind.__init__).parameters.values())
    assert with_self[1:] == list(found.parameters.values())


@every_twin
def test_the_forward_has_torchs_arguments(kind):
    ours, theirs = (inspect.signature(k.forward).parameters for k in (kind, plain_kind(kind)))
    assert list(ours) == list(theirs)


def test_every_twin_has_a_forward_of_its_own():
    """The compiler counts recompilations by code object, and by its name the sizes that vary."""
    codes = [vars(kind)["forward"].__code__ for kind in TWINS]
    assert len(TWINS) > 80
    assert len({id(code) for code in codes}) == len(TWINS)
    assert len({code.co_name for code in codes}) == len(TWINS)


@pytest.mark.parametrize("training", [False, True])
def test_as_many_twins_compile_as_there_are(training, fresh_compiler):
    named = ("CELU", "ELU", "GELU", "Mish", "QuickGELU", "SELU", "SiLU", "Softplus", "Tanh")
    kinds = [getattr(module, name) for name in named for module in (fewbit, groupquant)]
    kinds += [groupquant.Hardswish, fewbit.ReLU, inverted.GELU, fixed_point.ReLU]
    assert len(kinds) > 2 * torch._dynamo.config.recompile_limit
    for kind in kinds:
        module, x = kind().train(training), torch.randn(8, 64, requires_grad=True)
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), plain_kind(kind)()(x))


def test_arguments_are_checked_as_torch_and_the_method_check_them():
    assert groupquant.Linear(8, 4, False, None, torch.float64, bits=8).method.bits == 8
    assert groupquant.ELU(0.5, True, group_size=64).method.group_size == 64
    assert fewbit.Softplus(2.0, threshold=3.0, bits=5).bits == 5
    for kind, given in (
        (groupquant.Linear, {}),
        (groupquant.GELU, {"inplace": True}),
        (groupquant.SwiGLU, {"approximate": "none"}),
        (fewbit.Tanh, {"group_size": 32}),
        (fewbit.RReLU, {"codebook": None}),
        (sketch.Conv1d, {"kernel_size": 1}),
    ):
        with pytest.raises(TypeError):
            kind(**given)
    for kind, given in (
        (groupquant.Linear, (8, 4, True, None, None, 4)),
        (groupquant.Tanh, (4,)),
        (fewbit.QuickGELU, (4,)),
    ):
        with pytest.raises(TypeError, match="positional"):
            kind(*given)
    with pytest.raises(InputError, match="bits=5"):
        groupquant.Tanh(bits=5)
    with pytest.raises(InputError, match="bits=9"):
        fewbit.Tanh(bits=9)
    with pytest.raises(InputError, match="bits=2"):
        fixed_point.BatchNorm1d(4, bits=2)
    with pytest.raises(InputError, match="Conv2d: kernel_size"):
        sketch.Conv2d(4, 4, 3)


def test_a_forward_takes_its_arguments_by_name_and_no_others():
    gate, up = torch.randn(4, 64, requires_grad=True), torch.randn(4, 64)
    module = groupquant.SwiGLU(rounding="nearest")
    assert torch.equal(module(up=up, gate=gate), module(gate, up))
    assert torch.equal(groupquant.RMSNorm(64)(x=gate), nn.RMSNorm(64)(gate))
    for training in (True, False):
        with pytest.raises(TypeError):
            fewbit.Tanh().train(training)(x=gate)


def test_subclasses_of_twins_keep_what_they_write_themselves():
    class Wide(groupquant.Linear):
        def __init__(self, width: int) -> None:
            super().__init__(width, width, bits=8)

    class Doubled(groupquant.GELU):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Negated:
        def forward(self, input: Tensor) -> Tensor:
            return -super().forward(input)

    class NegatedGELU(Negated, groupquant.GELU):
        pass

    x = torch.randn(4, 64, requires_grad=True)
    assert str(inspect.signature(Wide)) == "(width: int) -> None"
    assert Wide(64).method == GroupQuant(8)
    assert Wide(64)(x).shape == (4, 64)
    for training in (True, False):
        y = groupquant.GELU().train(training)(x)
        assert torch.equal(Doubled(bits=2).train(training)(x), 2 * y)
        assert torch.equal(NegatedGELU(bits=2).train(training)(x), -y)
        assert "bits=2" in repr(NegatedGELU(bits=2))


def test_a_converted_module_of_a_dtype_that_is_not_taken_is_torchs():
    """The layers of one method share what they do in training, not the forward."""
    module, exact = nn.Conv1d(4, 8, 3), nn.Conv1d(4, 8, 3, dtype=torch.complex64)
    x = torch.randn(2, 4, 16, dtype=torch.complex64)
    convert(module, GroupQuant())
    assert isinstance(module, groupquant.Conv1d)
    with pytest.warns(UserWarning, match="Complex modules"):
        module.to(torch.complex64).load_state_dict(exact.state_dict())
    assert torch.equal(module(x), exact(x))
