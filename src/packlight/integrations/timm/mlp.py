"""Feed-forward layers of timm as one function, where their parts may be."""

from typing import Any

from torch import Tensor, nn

from packlight._classes import joined
from packlight.calls import uncovered
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations._parts import are_idle, function_of_part, parameters_of, takes
from packlight.layers.linear import Parameters
from packlight.layers.mlp import mlp
from packlight.method import Method, Rule, Swap, rule_finder
from packlight.quantiser import Quantiser


def _mlp(self: Any, x: Any) -> Any:
    """As timm has it. Never run: `is_copy` compares with it."""
    x = self.fc1(x)
    x = self.act(x)
    x = self.drop1(x)
    x = self.norm(x)
    x = self.fc2(x)
    x = self.drop2(x)
    return x  # noqa: RET504  as it is there


class GroupQuantMlp(nn.Module):
    """fc2(act(fc1(x))); keeps packs of x and of what fc1 gives, as its parts do one by one."""

    method: Quantiser

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor | None = None
        if self.training:
            y = uncovered(self._at_once, x)
        if y is None:
            y = super().forward(x)
        return y

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The result by one function; None where the parts are to run one by one."""
        given = self.given(x)
        return None if given is None else mlp(x, *given, self.method)

    def given(self, x: Tensor) -> tuple[list[Parameters], str] | None:
        """The projections and the function between; None where the parts are to run one by one."""
        parts = self._modules
        first, act, last = parts["fc1"], parts["act"], parts["fc2"]
        if first is None or act is None or last is None or not takes(x, self.method):
            return None
        if not are_idle(parts["drop1"], parts["norm"], parts["drop2"]):
            return None
        parameters = parameters_of((first, last), self.method)
        function = function_of_part(act, self.method)
        return None if parameters is None or function is None else (parameters, function)


@once_a_class
def _is_known(kind: type[nn.Module]) -> bool:
    return is_copy(vars(kind).get("forward"), _mlp)


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    return _parts if issubclass(method, Quantiser) and _is_known(kind) else None


def _parts(method: Quantiser, module: nn.Module) -> Swap:
    return Swap(joined(GroupQuantMlp, type(module)), {"method": method}, parts=("fc1", "fc2"))
