"""Saved-tensor hooks of ours around all others, and none."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from packlight._torch.autograd import Hooks, saved_tensor_hooks
from packlight._torch.capabilities import HOOK_STACK
from packlight._torch.tracer import untraced


def unseen_by_hooks() -> saved_tensors_hooks:
    """What autograd saves within is none of the business of hooks around it.

    For first derivatives: what an operation saves of its own output has no graph.
    """
    return saved_tensors_hooks(_without_graph, _unchanged)


def _without_graph(tensor: Tensor) -> Tensor:
    # An operation's own output would hold the graph that holds it, and neither were ever freed.
    return tensor if tensor.grad_fn is None else tensor.detach()


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def hooks_looked_through() -> Hooks | None:
    """The hooks that are active; if they are of `around_hooks`, those for which they stand."""
    hooks = saved_tensor_hooks()
    while hooks is not None and hasattr(hooks[0], _STANDS_FOR):
        hooks = getattr(hooks[0], _STANDS_FOR)
    return hooks


_STANDS_FOR = "_packlight_stands_for"


def _standing_for(
    hooks: Hooks | None, pack: Callable[[Tensor, Hooks | None], Any]
) -> Callable[[Tensor], Any]:
    hook = untraced(lambda tensor: pack(tensor, hooks))
    setattr(hook, _STANDS_FOR, hooks)
    return hook


@contextmanager
def around_hooks(
    pack: Callable[[Tensor, Hooks | None], Any], unpack: Callable[[Any], Tensor]
) -> Iterator[None]:
    """Saved-tensor hooks of ours, around those of the caller and each pair that is entered within.

    Hooks do not nest in torch: the innermost pair wins. So ours get the pair that they stand for,
    and what is entered later has to be caught as it is entered, which nothing but this does: the
    graph shows what hooks packed only where it can be reached, and checkpoints keep their inputs
    out of its reach.
    """
    if not HOOK_STACK:
        with saved_tensors_hooks(_standing_for(saved_tensor_hooks(), pack), unpack):
            yield
        return
    torch_hooks: Any = torch._C._autograd
    push = torch_hooks._push_saved_tensors_default_hooks
    pop = torch_hooks._pop_saved_tensors_default_hooks
    thread = threading.get_ident()
    within = 0
    is_open = True

    def push_ours(hooks: Hooks | None) -> None:
        push(_standing_for(hooks, pack), unpack)

    def enter(pack_hook: Callable[[Tensor], Any], unpack_hook: Callable[[Any], Tensor]) -> None:
        nonlocal within
        if threading.get_ident() != thread:
            push(pack_hook, unpack_hook)
            return
        within += 1
        push_ours((pack_hook, unpack_hook))

    def leave() -> None:
        nonlocal within
        if threading.get_ident() == thread:
            if within == 0:
                close()  # after an exception: the caller's are left while ours are still there
            else:
                within -= 1
        pop()

    def close() -> None:
        nonlocal is_open
        if is_open:
            is_open = False
            torch_hooks._push_saved_tensors_default_hooks = push
            torch_hooks._pop_saved_tensors_default_hooks = pop
            pop()

    push_ours(saved_tensor_hooks())
    torch_hooks._push_saved_tensors_default_hooks = enter
    torch_hooks._pop_saved_tensors_default_hooks = leave
    try:
        yield
    finally:
        close()
