"""Parts of sub-layers of BERT and its kin as one function each, known by their code.

`LayerNorm(dropout(dense(x)) + residual)`, in eighty classes of transformers, and `act(dense(x))`
before it. Where their parts are converted as by default, without hooks, they run as one function
(`layers/post_norm.py`, `layers/mlp.py`); elsewhere one by one.
"""

from typing import Any

import torch
from torch import Tensor, nn

from packlight import fewbit
from packlight._checks import is_taken, needs_gradient
from packlight._classes import joined
from packlight.calls import is_bare, uncovered
from packlight.groupquant import modules
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations._parts import function_of_part, parameters_of, takes
from packlight.layers.mlp import activated
from packlight.layers.post_norm import post_norm
from packlight.method import Method, Rule, Swap, rule_finder
from packlight.quantiser import Quantiser, worth_packing

# --- The code that is known, as transformers has it. Never run: `is_copy` compares with it.


def _bert(self: Any, hidden_states: Any, input_tensor: Any) -> Any:
    hidden_states = self.dense(hidden_states)
    hidden_states = self.dropout(hidden_states)
    hidden_states = self.LayerNorm(hidden_states + input_tensor)
    return hidden_states  # noqa: RET504  as it is there


def _intermediate(self: Any, hidden_states: Any) -> Any:
    hidden_states = self.dense(hidden_states)
    hidden_states = self.intermediate_act_fn(hidden_states)
    return hidden_states  # noqa: RET504  as it is there


class GroupQuantIntermediate(nn.Module):
    """act(dense(x)); keeps a pack of x and one of what dense gives."""

    method: Quantiser
    dense: nn.Module
    intermediate_act_fn: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        y: Tensor | None = None
        if self.training and not torch.compiler.is_compiling():
            y = uncovered(self._at_once, hidden_states)
        if y is None:
            y = super().forward(hidden_states)
        return y

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The result by one function; None where the parts are to run one by one."""
        parameters = parameters_of((self.dense,), self.method)
        function = function_of_part(self.intermediate_act_fn, self.method)
        if parameters is None or function is None or not takes(x, self.method):
            return None
        return activated(x, parameters[0], function, self.method)


class GroupQuantOutput(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual); keeps what the three keep."""

    method: Quantiser
    dense: nn.Module
    dropout: nn.Module
    LayerNorm: nn.Module

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        y: Tensor | None = None
        if self.training and not torch.compiler.is_compiling():
            y = uncovered(self._at_once, hidden_states, input_tensor)
        if y is None:
            y = super().forward(hidden_states, input_tensor)
        return y

    def _at_once(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """The result by one function; None where the parts are to run one by one."""
        dense, dropout, norm = self.dense, self.dropout, self.LayerNorm
        if not (isinstance(dense, modules.Linear) and isinstance(norm, modules.LayerNorm)):
            return None
        if not isinstance(dropout, fewbit.Dropout) or not 0.0 <= dropout.p < 1.0:
            return None
        for part in (dense, dropout, norm):
            if not part.training or not is_bare(part):
                return None
        weight, method = dense.weight, norm.method
        gamma: Tensor | None = norm.weight
        if gamma is None:
            return None
        fits = (
            gamma.dim() == 1
            and weight.dim() == 2
            and needs_gradient(weight)
            and x.dim() > 1
            and x.shape[:-1] == residual.shape[:-1]
            and weight.shape[0] == gamma.shape[0] == residual.shape[-1]
            and is_taken(x)
            and is_taken(residual)
            and worth_packing(x, dense.method)
            and method.keeps_rows(gamma.shape[0])
        )
        if not fits:
            return None
        parameters = (gamma, norm.bias, norm.eps)
        p = dropout.p
        return post_norm(x, weight, dense.bias, residual, parameters, p, dense.method, method)


# --- The rule.


@once_a_class
def _form(kind: type[nn.Module]) -> type[nn.Module] | None:
    forward = vars(kind).get("forward")
    if is_copy(forward, _bert):
        return GroupQuantOutput
    return GroupQuantIntermediate if is_copy(forward, _intermediate) else None


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    return _parts if issubclass(method, Quantiser) and _form(kind) is not None else None


def _parts(method: Quantiser, module: nn.Module) -> Swap:
    kind = type(module)
    mixin = _form(kind)
    assert mixin is not None
    return Swap(joined(mixin, kind), {"method": method})
