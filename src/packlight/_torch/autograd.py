"""Saved-tensor hooks, numbers of graph nodes, backward passes that run, and storages."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight._torch.capabilities import (
    BACKWARD,
    FREEING,
    HOOKS,
    NEEDED,
    NODES,
    RUNNING_NODE,
    STORAGES,
)
from packlight._torch.tracer import is_traced

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


def running_node_number() -> int | None:
    """The number of the graph node that runs; None where none does, or torch does not say.

    One that adds a gradient to a leaf has none: it is made when the leaf is first read.
    """
    if RUNNING_NODE.values is None:
        return None
    node = RUNNING_NODE.values[0]()
    if node is None or node.name() == "torch::autograd::AccumulateGrad":
        return None
    number: int = node._sequence_nr()
    return number


def needed_gradients(ctx: Any) -> Any:
    """`ctx.needs_input_grad` of a Function, less what the backward pass that runs is not for.

    torch says what the forward pass knew. A backward pass by `torch.autograd.grad`, as zero-bubble
    schedules of a pipeline make one for the input of a stage and another for its weights, asks for
    less, and what nobody asked for is computed and dropped.
    """
    known = ctx.needs_input_grad
    if NEEDED.values is None or is_traced():
        return known
    (runs,) = NEEDED.values
    found = [node for node, _ in ctx.next_functions if node is not None]
    nodes = iter(found)
    try:
        return tuple([needs and runs(next(nodes)) for needs in known])
    except RuntimeError:  # torch's answer for a leaf whose gradient `grad` hands out
        nodes = iter(found)
        return tuple([needs and _will_run(runs, next(nodes)) for needs in known])


def _will_run(runs: Callable[[Any], bool], node: Any) -> bool:
    try:
        return runs(node)
    except RuntimeError:
        return True


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


def let_go_of_saved(ctx: Any) -> None:
    """Has a node of the graph hold no more of what it saved, which its backward pass has read.

    Nothing happens where the graph is retained, no backward pass runs, or a compiler traces it.
    """
    if FREEING.values is not None and not is_traced():
        FREEING.values[0](ctx)


def run_backward(loss: Tensor) -> None:
    """`loss.backward()` with the function modes that are on, which torch takes off for it.

    Checkpoints run code of the model within. Modes stay off where torch has no engine to ask.
    """
    if BACKWARD.values is None:
        loss.backward()
        return
    one = torch.ones_like(loss)
    BACKWARD.values[1].run_backward(
        (loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


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
