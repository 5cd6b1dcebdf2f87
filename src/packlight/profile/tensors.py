"""Tensors inside other things, and the storages behind them."""

import dataclasses
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from packlight import _torch
from packlight._torch.attributes import (
    is_wrapper,
    slots,
    sparse_parts,
    storage_key,
    tree_leaves,
)


def tensors_in(value: object, objects: bool = True) -> Iterator[Tensor]:
    """All tensors in nested containers, dataclasses and, if `objects`, attributes of objects."""
    seen: dict[int, object] = {}  # with the objects, since a freed one's id is used again
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            yield item
            continue
        if id(item) in seen:
            continue
        seen[id(item)] = item
        # Reversed, since the last one pushed is looked at first.
        pending.extend(reversed(_parts(item, objects)))


_OPAQUE = (str, bytes, int, float, complex, type, nn.Module, types.ModuleType)


def _parts(item: object, objects: bool) -> list[object]:
    if item is None or isinstance(item, _OPAQUE):
        return []
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, list | tuple | set | frozenset):
        return list(item)
    if dataclasses.is_dataclass(item):
        return _attributes(item)
    leaves = tree_leaves(item)
    if len(leaves) != 1 or leaves[0] is not item:
        return list(leaves)
    if not objects or callable(item):
        return []
    return _attributes(item)


def _attributes(item: object) -> list[object]:
    """What an object holds, past its own `__getattr__`, which may compute, or raise anything."""
    return [*dictionary(item).values(), *(value for _, value in slots(item))]


def dictionary(item: object) -> dict[str, Any]:
    try:
        attributes: dict[str, Any] = object.__getattribute__(item, "__dict__")
    except AttributeError:  # it has slots only
        return {}
    return attributes


class Storage(NamedTuple):
    key: object
    bytes: int
    tensor: Tensor


def storages(tensor: Tensor) -> Iterator[Storage]:
    """The storages behind a tensor: its own, or those of the tensors a wrapper is made of.

    Keys are addresses of storage objects, so they tell storages apart only while both are alive.
    """
    inner = inner_tensors(tensor)
    if inner:
        for part in inner:
            yield from storages(part)
        return
    try:
        yield Storage(storage_key(tensor), tensor.untyped_storage().nbytes(), tensor)
    except (NotImplementedError, RuntimeError):
        # No storage to ask (oneDNN's own layouts): the elements are what can be counted.
        yield Storage(("tensor", id(tensor)), tensor.numel() * tensor.element_size(), tensor)


def inner_tensors(tensor: Any) -> list[Tensor]:
    if is_wrapper(tensor):
        names, _ = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
        return [part for part in parts if isinstance(part, Tensor)]  # a DTensor names its mesh too
    if tensor.layout == torch.sparse_coo:
        return sparse_parts(tensor)
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if type(tensor) in (Tensor, nn.Parameter) or _torch.is_fake(tensor):
        return []
    if _is_hollow(tensor):
        return [part for part in tensors_in(vars(tensor)) if part is not tensor]
    return []


def _is_hollow(tensor: Tensor) -> bool:
    """Whether a subclass has no memory of its own, so that its attributes have to hold it."""
    try:
        return tensor.untyped_storage().data_ptr() == 0 and tensor.device.type != "meta"
    except (NotImplementedError, RuntimeError):
        return True  # asked for its storage, torch raises for a tensor that has none


def has_values(tensor: Any) -> bool:
    if is_wrapper(tensor):
        return all(map(has_values, inner_tensors(tensor)))
    is_meta: bool = tensor.device.type == "meta"
    return not is_meta and not _torch.is_fake(tensor)
