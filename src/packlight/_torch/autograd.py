"""Saved-tensor hooks, numbers of graph nodes, backward passes that run, and storages."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from packlight._torch.capabilities import BACKWARD, HOOKS, NODES, STORAGES

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def saved_tensor_hooks() -> Hooks | None:
    """The pack and unpack hook that are active, None where there are none; needs `HOOKS`."""
    if HOOKS.values is None:
        return None
    hooks: Any = HOOKS.values[0](True)
    return None if hooks is None else tuple(hooks)


def next_node_number() -> int:
    """The number that the next graph node of this thread gets; needs `NODES`."""
    assert NODES.values is not None
    number: int = NODES.values[0]()
    return number


def at_end_of_backward(function: Callable[[], Any]) -> bool:
    """Calls the function when the backward pass that runs has ended, and whether it will.

    It is not called where none runs.
    """
    if BACKWARD.values is None:
        return False
    running, engine = BACKWARD.values
    if running() == -1:
        return False
    engine.queue_callback(function)
    return True


def share_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that are alive lie in one memory."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def storage_reference(tensor: Tensor) -> Any:
    """A weak reference to the storage that the tensor has now; needs `STORAGES`."""
    assert STORAGES.values is not None
    return STORAGES.values[0](tensor.untyped_storage())


def has_storage(tensor: Tensor, reference: Any) -> bool:
    """Whether the tensor still has the storage that `storage_reference` was made of.

    A weak reference keeps the storage's address from being used again.
    """
    return bool(tensor.untyped_storage()._cdata == reference.cdata)
