"""Gated feed-forward layers of transformers, known by their code.

`down(act(gate(x)) * up(x))`: plain PyTorch keeps the gate, its activation, the up projection and
the product. Here gate and up are packed once, and the product is rebuilt for the weight gradient of
the projection behind it. The projections themselves are layers of their own and converted as such.

Known are the codes of LlamaMLP, of Phi3MLP (gate and up in one projection), and of
T5DenseGatedActDense, with `gelu`, `gelu_tanh`, `silu` or `relu` as the activation.
"""

from typing import Any

import torch
from torch import Tensor, nn

from packlight._classes import joined
from packlight.calls import is_bare, uncovered
from packlight.groupquant.modules import Quantised
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations._parts import parameters_of, takes
from packlight.integrations.transformers.activations import function_of
from packlight.layers import functional
from packlight.layers.mlp import gated_mlp
from packlight.method import Method, NotConverted, Rule, Swap, rule_finder
from packlight.quantiser import Quantiser
from packlight.selectors import kind_of

_GATES = ("gelu", "gelu_tanh", "relu", "silu")


# --- The code that is known, as transformers has it. Never run: `is_copy` compares with it.


def _llama(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # noqa: RET504  as it is there


def _qwen2(self: Any, x: Any) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _phi3(self: Any, hidden_states: Any) -> Any:
    up_states = self.gate_up_proj(hidden_states)
    gate, up_states = up_states.chunk(2, dim=-1)
    up_states = up_states * self.activation_fn(gate)
    return self.down_proj(up_states)


# fmt: off
def _t5(self: Any, hidden_states: Any) -> Any:
    hidden_gelu = self.act(self.wi_0(hidden_states))
    hidden_linear = self.wi_1(hidden_states)
    hidden_states = hidden_gelu * hidden_linear
    hidden_states = self.dropout(hidden_states)
    if (isinstance(self.wo.weight, torch.Tensor) and hidden_states.dtype != self.wo.weight.dtype
            and self.wo.weight.dtype != torch.int8):
        hidden_states = hidden_states.to(self.wo.weight.dtype)
    hidden_states = self.wo(hidden_states)
    return hidden_states  # noqa: RET504  as it is there
# fmt: on


# --- The layers.


class _Gated(Quantised):
    packed_function: str
    # Where the activation is, and of which class; nowhere if the layer has its own.
    place_of_activation: str | None = None
    kind_of_activation: type[nn.Module]

    def _is_known(self) -> bool:
        """Whether the activation is still the one that is known, and nothing looks at its call."""
        if self.place_of_activation is None or torch.compiler.is_dynamo_compiling():
            return True
        activation = self._modules.get(self.place_of_activation)
        if activation is None or kind_of(activation) is not self.kind_of_activation:
            return False
        return is_bare(activation)

    def _gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) up; keeps packs of gate and up, which `linear` rebuilds it from; biased."""
        product: Tensor = uncovered(self._product, gate, up)
        return product

    def _product(self, gate: Tensor, up: Tensor) -> Tensor:
        function = self.packed_function
        if function == "silu":
            return functional.swiglu(gate, up, method=self.method)
        if function == "relu":
            return functional.reglu(gate, up, method=self.method)
        approximate = "none" if function == "gelu" else "tanh"
        return functional.geglu(gate, up, approximate, method=self.method)


class GroupQuantGatedMLP(_Gated):
    """down(act(gate(x)) up(x)); keeps packs of gate and up."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self._is_known()):
            plain: Tensor = super().forward(x)
            return plain
        y: Tensor | None = uncovered(self._at_once, x)
        if y is None:
            y = self.down_proj(self._gate(self.gate_proj(x), self.up_proj(x)))
        return y

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The result by one function; None where the projections are to run one by one."""
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        parameters = parameters_of(projections, self.method)
        if parameters is None or not takes(x, self.method):
            return None
        return gated_mlp(x, parameters, self.packed_function, self.method)


class GroupQuantFusedGatedMLP(_Gated):
    """down(act(gate) up) with gate and up from one projection; keeps packs of both."""

    gate_up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not (self.training and self._is_known()):
            plain: Tensor = super().forward(hidden_states)
            return plain
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        y: Tensor = self.down_proj(self._gate(gate, up))
        return y


class GroupQuantDenseGatedActDense(_Gated):
    """wo(dropout(act(wi_0(x)) wi_1(x))); keeps packs of what wi_0 and wi_1 give."""

    wi_0: nn.Module
    wi_1: nn.Module
    wo: nn.Module
    dropout: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not (self.training and self._is_known()):
            plain: Tensor = super().forward(hidden_states)
            return plain
        product = self._gate(self.wi_0(hidden_states), self.wi_1(hidden_states))
        product = self.dropout(product)
        weight = self.wo.weight
        if isinstance(weight, Tensor) and weight.dtype not in (product.dtype, torch.int8):
            product = product.to(weight.dtype)
        y: Tensor = self.wo(product)
        return y


# --- The rules.


@once_a_class
def _form(kind: type[nn.Module]) -> tuple[type[nn.Module], str] | None:
    """What the class becomes, and where its activation is."""
    forward = vars(kind).get("forward")
    if is_copy(forward, _llama) or is_copy(forward, _qwen2):
        return GroupQuantGatedMLP, "act_fn"
    if is_copy(forward, _phi3):
        return GroupQuantFusedGatedMLP, "activation_fn"
    if is_copy(forward, _t5):
        return GroupQuantDenseGatedActDense, "act"
    return None


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    return _gated if issubclass(method, Quantiser) and _form(kind) is not None else None


def _gated(method: Quantiser, module: nn.Module) -> Swap:
    kind = type(module)
    form = _form(kind)
    assert form is not None
    mixin, place = form
    activation = getattr(module, place)
    function = function_of(activation) if isinstance(activation, nn.Module) else None
    if function not in _GATES:
        name = getattr(activation, "__name__", type(activation).__name__)
        raise NotConverted(f"its activation, {name}, has no gated form; its parts are converted")
    attributes: dict[str, Any] = {"method": method, "packed_function": function}
    attributes["place_of_activation"] = place
    attributes["kind_of_activation"] = kind_of(activation)
    return Swap(joined(mixin, kind), attributes)
