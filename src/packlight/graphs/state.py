"""What a recording holds for: the kind of its inputs, and the state of the module."""

import enum
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from packlight import _torch
from packlight.calls import HOOKS, all_may_have_hooks
from packlight.errors import CannotGraphError

# Attributes of modules, arguments and results that are values.
PLAIN = (bool, int, float, str, type(None))
_PLAIN = frozenset(PLAIN)  # each pass looks thousands of attributes up
_CONSTANTS = (*PLAIN, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)


class Key(NamedTuple):
    """Two passes of one key run the same kernels on the same parameters."""

    structure: Any
    leaves: tuple[Any, ...]
    autocast: tuple[Any, ...]
    state: list[Any]


def key_of(modules: Sequence[nn.Module], args: Any, kwargs: Any) -> Key:
    """The key of a call. Raises `CannotGraphError` for an argument that no graph takes."""
    leaves, structure = _torch.flatten((args, kwargs))
    return Key(structure, tuple(map(_kind_of, leaves)), autocast(), state_of(modules))


def autocast() -> tuple[Any, ...]:
    """Whether autocast is on for CUDA and for the CPU, and its dtypes."""
    return tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        for kind in ("cuda", "cpu")
    )


def _kind_of(leaf: Any) -> tuple[Any, ...]:
    if type(leaf) in (Tensor, nn.Parameter):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    if isinstance(leaf, (*_CONSTANTS, enum.Enum)):
        return type(leaf), leaf
    raise CannotGraphError(
        f"an argument is a {type(leaf).__name__}; a graph takes tensors and plain values"
    )


def state_of(modules: Sequence[nn.Module]) -> list[Any]:
    """What modules are and have: plain attributes, `training` among them, and where tensors are.

    Hooks of the first, the model itself, are its own: they run around its forward, as ever.
    """
    found: list[Any] = [all_may_have_hooks()]
    for module in modules:
        own = vars(module)
        found += (type(module), id(own.get("forward")))
        found += map(id, own["_modules"].values())
        found.append(_hooks(module) if module is not modules[0] else 0)
        tensors = [*own["_parameters"].values(), *own["_buffers"].values()]
        for value in own.values():
            kind = type(value)
            if kind in _PLAIN:
                found.append(value)
            elif kind is not dict and issubclass(kind, Tensor):
                tensors.append(value)
        for tensor in tensors:
            if tensor is not None:
                found.append((id(tensor), tensor.data_ptr(), tensor.requires_grad))
    return found


def _hooks(module: nn.Module) -> int:
    own = vars(module)
    return sum([len(own[name]) for name in HOOKS])


class Attributes:
    """What the attributes of a module are at a time, for what a pass of it may change."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.state = module, state_of([module])
        self.held: list[Any] = []  # so that nothing else gets the address of one meanwhile
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                self._add(value)
                if not value.is_inference():
                    self.state.append(value._version)
            elif name != "_buffers" and isinstance(value, (dict, list, set, tuple)):
                self._add(*(value.values() if isinstance(value, dict) else value))

    def _add(self, *values: Any) -> None:
        self.held += values
        self.state.append([*map(id, values)])

    def changed(self) -> bool:
        return Attributes(self.module).state != self.state


# ---- what a graph would leave out ----------------------------------------------------------------


def refuse_hooks(module: nn.Module) -> None:
    """Raises `CannotGraphError` for hooks, which would run at the recording and never again.

    Those of the module itself run around its forward, as ever.
    """
    if all_may_have_hooks():
        raise CannotGraphError(
            "torch has hooks for all modules, which a graph would not call for parts; remove them"
        )
    for name, part in module.named_modules():
        if part is not module and _hooks(part):
            raise CannotGraphError(f"{name} has hooks, which a graph would not call; remove them")


def draws_on_cpu() -> list[Any]:
    """The states of the generators whose numbers a graph would freeze."""
    states = [random.getstate(), torch.get_rng_state().numpy().tobytes()]
    if "numpy" in sys.modules:
        states.append(repr(sys.modules["numpy"].random.get_state()))
    return states


def refuse_foreign_leaves(outputs: Iterable[Tensor], known: Iterable[Tensor]) -> None:
    """Raises `CannotGraphError` for a tensor whose gradient the graph would lose."""
    mine = {id(tensor) for tensor in known}
    for leaf in _leaves(outputs):
        if id(leaf) not in mine:
            raise CannotGraphError(
                f"a tensor of shape {tuple(leaf.shape)} requires a gradient and is neither an"
                " argument nor a parameter of the module"
            )


def _leaves(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    nodes: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
