"""What an operator does when it is called."""

from collections.abc import Callable
from typing import Any


def call_by(operator: Any, call: Callable[..., Any], dispatch: Callable[..., Any]) -> None:
    """Has `operator(...)` run `call`, as code of torch.compile calls it by its name.

    It stays the object that torch knows it by, of a class of its own. `dispatch(operator, ...)`,
    which is what its class does, takes keywords. Where torch's class takes no such change, calls
    go by the dispatcher as before.
    """

    def __call__(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return dispatch(self, *args, **kwargs) if kwargs else call(*args)

    kind = type(operator)
    try:
        operator.__class__ = type(kind.__name__, (kind,), {"__call__": __call__})
    except TypeError:
        return
