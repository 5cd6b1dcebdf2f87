"""Parts of sub-layers of BERT and its kin as one function each, known by their code.

`LayerNorm(dropout(dense(x)) + residual)`, in eighty classes of transformers, and `act(dense(x))`
before it; in a block the two as one. Where their parts are converted as by default, without hooks,
they run as one function (`layers/post_norm.py`, `layers/mlp.py`); elsewhere one by one.
"""

import inspect
from typing import Any

from torch import Tensor, nn

from packlight import fewbit
from packlight._checks import is_taken, needs_gradient
from packlight._classes import joined
from packlight.calls import is_bare, uncovered
from packlight.groupquant import modules
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations._parts import (
    function_of_part,
    parameter_of,
    parameters_of,
    takes,
)
from packlight.layers.linear import Parameters
from packlight.layers.mlp import activated
from packlight.layers.post_norm import mlp, post_norm
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


def _feed_forward(self: Any, attention_output: Any) -> Any:
    intermediate_output = self.intermediate(attention_output)
    layer_output = self.output(intermediate_output, attention_output)
    return layer_output  # noqa: RET504  as it is there


class GroupQuantIntermediate(nn.Module):
    """act(dense(x)); keeps a pack of x and one of what dense gives."""

    method: Quantiser
    dense: nn.Module
    intermediate_act_fn: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        y: Tensor | None = None
        if self.training:
            y = uncovered(self._at_once, hidden_states)
        if y is None:
            y = super().forward(hidden_states)
        return y

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The result by one function; None where the parts are to run one by one."""
        given = self.given(x)
        return None if given is None else activated(x, *given, self.method)

    def given(self, x: Tensor) -> tuple[Parameters, str] | None:
        """The projection and the function; None where the parts are to run one by one."""
        parts = self._modules
        dense, act = parts["dense"], parts["intermediate_act_fn"]
        if dense is None or act is None or not takes(x, self.method):
            return None
        parameters = parameters_of((dense,), self.method)
        function = function_of_part(act, self.method)
        return None if parameters is None or function is None else (parameters[0], function)


class GroupQuantOutput(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual); keeps what the three keep."""

    method: Quantiser
    dense: nn.Module
    dropout: nn.Module
    LayerNorm: nn.Module

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        y: Tensor | None = None
        if self.training:
            y = uncovered(self._at_once, hidden_states, input_tensor)
        if y is None:
            y = super().forward(hidden_states, input_tensor)
        return y

    def _at_once(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """The result by one function; None where the parts are to run one by one."""
        if x.dim() < 2 or x.shape[:-1] != residual.shape[:-1]:
            return None
        given = self.given(residual) if is_taken(x) and is_taken(residual) else None
        if given is None:
            return None
        (weight, bias), norm, p, method, of_norm = given
        if not worth_packing(x, method):
            return None
        return post_norm(x, weight, bias, residual, norm, p, method, of_norm)

    def given(
        self, residual: Tensor
    ) -> tuple[Parameters, tuple[Tensor, Tensor | None, float], float, Quantiser, Quantiser] | None:
        """The projection, the norm, the probability of the dropout, and the methods of both.

        Of a tensor that layers take; None where the parts are to run one by one.
        """
        parts = self._modules
        dense, dropout, norm = parts["dense"], parts["dropout"], parts["LayerNorm"]
        if not (isinstance(dense, modules.Linear) and isinstance(norm, modules.LayerNorm)):
            return None
        if not isinstance(dropout, fewbit.Dropout) or not 0.0 <= dropout.p < 1.0:
            return None
        if not (dense.training and dropout.training and norm.training):
            return None
        if not is_bare(dense, dropout, norm):
            return None
        weight, method = parameter_of(dense, "weight"), norm.method
        gamma: Tensor | None = parameter_of(norm, "weight")
        if gamma is None or gamma.dim() != 1 or weight.dim() != 2 or not needs_gradient(weight):
            return None
        if not weight.shape[0] == gamma.shape[0] == residual.shape[-1]:
            return None
        if not method.keeps_rows(gamma.shape[0]):
            return None
        affine, of_norm = (weight, parameter_of(dense, "bias")), parameter_of(norm, "bias")
        return affine, (gamma, of_norm, norm.eps), dropout.p, dense.method, method


class GroupQuantFeedForward(nn.Module):
    """A block whose feed-forward layer and the norm behind it are one function."""

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        y: Tensor | None = None
        if self.training:
            y = uncovered(self._at_once, attention_output)
        if y is None:
            y = super().feed_forward_chunk(attention_output)  # type: ignore[misc]
        assert y is not None
        return y

    # transformers looks at the signature of what it calls at every call.
    feed_forward_chunk.__signature__ = inspect.signature(feed_forward_chunk)  # type: ignore[attr-defined]

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The result by one function; None where the parts are to run one by one."""
        first, last = self._modules["intermediate"], self._modules["output"]
        if not isinstance(first, GroupQuantIntermediate) or not isinstance(last, GroupQuantOutput):
            return None
        if not (first.training and last.training and is_bare(first, last)):
            return None
        start, end = first.given(x), last.given(x)
        if start is None or end is None or end[3] != first.method:
            return None
        projection, name = start
        last_projection, norm, p, method, of_norm = end
        return mlp(x, (projection, last_projection), name, norm, p, method, of_norm)


# --- The rule.


@once_a_class
def _form(kind: type[nn.Module]) -> type[nn.Module] | None:
    if is_copy(vars(kind).get("feed_forward_chunk"), _feed_forward):
        return GroupQuantFeedForward
    forward = vars(kind).get("forward")
    if is_copy(forward, _bert):
        return GroupQuantOutput
    return GroupQuantIntermediate if is_copy(forward, _intermediate) else None


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    return _parts if issubclass(method, Quantiser) and _form(kind) is not None else None


_NEEDED: dict[type[nn.Module], tuple[str, ...]] = {
    GroupQuantIntermediate: ("dense",),
    GroupQuantOutput: ("dense", "dropout", "LayerNorm"),
    GroupQuantFeedForward: ("intermediate", "output"),
}


def _parts(method: Quantiser, module: nn.Module) -> Swap:
    kind = type(module)
    mixin = _form(kind)
    assert mixin is not None
    attributes = {} if mixin is GroupQuantFeedForward else {"method": method}
    return Swap(joined(mixin, kind), attributes, parts=_NEEDED[mixin])
