"""Feed-forward layers of transformers as one function, known by their code.

`last(act(first(x)))`, in a hundred classes by a handful of names, with a dropout behind it in some.
Where their parts are converted as by default, without hooks, first, act and last run as one
function (`layers/mlp.py`); elsewhere one by one. Those of GPT-2 hold their weights transposed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from packlight._classes import joined
from packlight.calls import uncovered
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations._parts import function_of_part, parameters_of, takes
from packlight.layers.mlp import mlp
from packlight.method import Method, Rule, Swap, rule_finder
from packlight.quantiser import Quantiser

# --- The code that is known, as transformers has it. Never run: `is_copy` compares with it.


def _clip(self: Any, hidden_states: Any) -> Any:
    hidden_states = self.fc1(hidden_states)
    hidden_states = self.activation_fn(hidden_states)
    hidden_states = self.fc2(hidden_states)
    return hidden_states  # noqa: RET504  as it is there


def _neox(self: Any, hidden_states: Any) -> Any:
    hidden_states = self.dense_h_to_4h(hidden_states)
    hidden_states = self.act(hidden_states)
    hidden_states = self.dense_4h_to_h(hidden_states)
    return hidden_states  # noqa: RET504  as it is there


def _gpt2(self: Any, hidden_states: Any) -> Any:
    hidden_states = self.c_fc(hidden_states)
    hidden_states = self.act(hidden_states)
    hidden_states = self.c_proj(hidden_states)
    hidden_states = self.dropout(hidden_states)
    return hidden_states  # noqa: RET504  as it is there


def _gptj(self: Any, hidden_states: Any) -> Any:
    hidden_states = self.fc_in(hidden_states)
    hidden_states = self.act(hidden_states)
    hidden_states = self.fc_out(hidden_states)
    hidden_states = self.dropout(hidden_states)
    return hidden_states  # noqa: RET504  as it is there


class _Names(NamedTuple):
    """Of the parts: of the first projection, the activation, the last projection and a dropout."""

    first: str
    act: str
    last: str
    dropout: str | None = None


_KNOWN: dict[Callable[..., Any], _Names] = {
    _clip: _Names("fc1", "activation_fn", "fc2"),
    _neox: _Names("dense_h_to_4h", "act", "dense_4h_to_h"),
    _gpt2: _Names("c_fc", "act", "c_proj", "dropout"),
    _gptj: _Names("fc_in", "act", "fc_out", "dropout"),
}

# --- The layer.


class GroupQuantMLP(nn.Module):
    """dropout(last(act(first(x)))); keeps packs of x and of what `first` gives, as its parts do."""

    may_run_plain_code = True
    method: Quantiser
    part_names: _Names

    def forward(self, hidden_states: Tensor) -> Tensor:
        y: Tensor | None = None
        if self.training:
            y = uncovered(self._at_once, hidden_states)
        if y is None:
            plain: Tensor = super().forward(hidden_states)
            return plain
        name = self.part_names.dropout
        dropout = None if name is None else self._modules[name]
        return y if dropout is None else dropout(y)

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The result but for the dropout; None where the parts are to run one by one."""
        parts, names = self._modules, self.part_names
        first, act, last = parts.get(names[0]), parts.get(names[1]), parts.get(names[2])
        if first is None or act is None or last is None or not takes(x, self.method):
            return None
        parameters = parameters_of((first, last), self.method)
        function = function_of_part(act, self.method)
        if parameters is None or function is None:
            return None
        return mlp(x, parameters, function, self.method)


# --- The rule.


@once_a_class
def _names_of(kind: type[nn.Module]) -> _Names | None:
    forward = vars(kind).get("forward")
    return next((names for code, names in _KNOWN.items() if is_copy(forward, code)), None)


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    return _parts if issubclass(method, Quantiser) and _names_of(kind) is not None else None


def _parts(method: Quantiser, module: nn.Module) -> Swap:
    kind = type(module)
    names = _names_of(kind)
    assert names is not None
    attributes = {"method": method, "part_names": names}
    return Swap(joined(GroupQuantMLP, kind), attributes, parts=(names.first, names.last))
