"""Private attributes of tensors, graph nodes and modules; each has an answer without them."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from packlight._torch.capabilities import STORAGE_USES, TREES, look_up

# ---- tensors -------------------------------------------------------------------------------------

_is_wrapper = look_up("torch.utils._python_dispatch:is_traceable_wrapper_subclass")
_tree_leaves = look_up("torch.utils._pytree:tree_leaves")


def version(tensor: Tensor) -> int:
    """How often the tensor was written to; always -1 where torch does not count."""
    return -1 if tensor.is_inference() else int(getattr(tensor, "_version", -1))


_keeps_version = look_up("torch.autograd:_unsafe_preserve_version_counter")


def unwritten(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which no value of the tensor changes, whatever torch counts.

    Where torch cannot be told, what was saved of the tensor before counts as written to.
    """
    context: Any = contextlib.nullcontext if _keeps_version is None else _keeps_version
    return context(tensor)  # type: ignore[no-any-return]


def base(tensor: Tensor) -> Tensor | None:
    """What the tensor is a view of; None where it is none, or torch does not say."""
    found: Tensor | None = getattr(tensor, "_base", None)
    return found


# What torch's `TensorWeakRef` calls on a tensor that a weak reference gave: Python may have let its
# object go, and torch kept it. A release without the name has no such objects.
revive: Callable[[Tensor], None] = look_up("torch:Tensor._fix_weakref") or (lambda tensor: None)


def storage_key(tensor: Tensor) -> object:
    """What tells the storage of a tensor from others, while both are alive.

    Where torch does not say, two views of one storage without memory (on "meta") have two keys.
    """
    storage = tensor.untyped_storage()
    key: object = getattr(storage, "_cdata", None)
    return key if key is not None else storage.data_ptr() or ("tensor", id(tensor))


def is_wrapper(tensor: Any) -> bool:
    """Whether a subclass is made of the tensors that its `__tensor_flatten__` names."""
    if _is_wrapper is None:
        return hasattr(tensor, "__tensor_flatten__")
    return bool(_is_wrapper(tensor))


def sparse_parts(tensor: Tensor) -> list[Tensor]:
    """Indices and values of a COO tensor, as they are; none where torch does not hand them out."""
    parts = (getattr(tensor, name, None) for name in ("_indices", "_values"))
    return [part() for part in parts if part is not None]


def operands(*values: object) -> list[Tensor]:
    """The tensors among arguments or results of an operator, which has no containers but these."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += operands(*value)
        elif isinstance(value, dict):
            found += operands(*value.values())
    return found


def tree_leaves(value: object) -> list[object]:
    """What is in a container that torch knows; the value itself where torch does not say."""
    return [value] if _tree_leaves is None else list(_tree_leaves(value))


def flatten(value: object) -> tuple[list[Any], Any]:
    """What is in a container that torch knows, and its structure; needs `TREES`."""
    assert TREES.values is not None
    leaves, structure = TREES.values[0](value)
    return leaves, structure


def unflatten(leaves: list[Any], structure: Any) -> Any:
    """The inverse of `flatten`."""
    assert TREES.values is not None
    return TREES.values[1](leaves, structure)


def storage_uses(tensor: Tensor) -> int:
    """How many tensors, and others, refer to the tensor's storage; needs `STORAGE_USES`."""
    if STORAGE_USES.values is None:
        return 0
    uses: int = STORAGE_USES.values[0](tensor.untyped_storage()._cdata)
    return uses


# ---- recurrent layers ----------------------------------------------------------------------------


def flat_weights(module: nn.Module) -> list[Tensor] | None:
    """The weights of a recurrent layer in the order of its kernel; None where torch hides them."""
    update = getattr(module, "_update_flat_weights", None)
    if update is None:
        return None
    update()
    found: list[Tensor] | None = getattr(module, "_flat_weights", None)
    return None if found is None or any(each is None for each in found) else list(found)


def apart(module: nn.Module) -> Callable[[list[Tensor]], nn.Module]:
    """A recurrent layer as it is now, with whatever weights it is given in the place of its own.

    What is put into the layer itself later, or was put there for one call, is not read.
    """
    state = {**vars(module), "_parameters": dict(module._parameters)}

    def with_weights(weights: list[Tensor]) -> nn.Module:
        other: nn.Module = object.__new__(type(module))
        other.__dict__.update(state, _flat_weights=weights)
        return other

    return with_weights


# ---- graph nodes ---------------------------------------------------------------------------------


def node_number(node: Node) -> int:
    """The number of a graph node; needs `NODES`."""
    return node._sequence_nr()


# ---- modules -------------------------------------------------------------------------------------

# The code in which torch calls a module's hooks and forward; None where it has another name.
CALL_MODULE = getattr(getattr(nn.Module, "_call_impl", None), "__code__", None)

# What nn.Module keeps in registries of its own; all else in its `__dict__` is a plain attribute.
_REGISTRIES = ("_parameters", "_buffers", "_modules")


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _REGISTRIES}


def parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own registry of parameters, to be written to."""
    return module._parameters


def slots(item: object) -> Iterator[tuple[types.MemberDescriptorType, Any]]:
    """What an object holds in `__slots__`, which no `__dict__` has and torch's copies lack."""
    for kind in type(item).__mro__:
        for slot in vars(kind).values() if "__slots__" in vars(kind) else ():
            if isinstance(slot, types.MemberDescriptorType):
                with contextlib.suppress(AttributeError):  # it has no value yet
                    yield slot, slot.__get__(item)


def buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own registry of buffers, to be written to; an empty one where it has another."""
    found: dict[str, Tensor | None] = getattr(module, "_buffers", {})
    return found


def inside_compiled(module: nn.Module) -> Iterator[nn.Module]:
    """What `torch.compile` compiled with this module; nothing where torch does not say."""
    if "_orig_mod" in getattr(module, "_modules", ()):  # the wrapper itself is not compiled
        yield from (inner for inner in module.modules() if inner is not module)
    elif getattr(module, "_compiled_call_impl", None) is not None:
        yield from module.modules()


# ---- logs ----------------------------------------------------------------------------------------

# Where tensors without values log; under another name their lines are printed.
FAKES_LOGGER = "torch._subclasses.fake_tensor"
