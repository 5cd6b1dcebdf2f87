"""Batches: a tensor, several, or one mapping of keywords, as a model is called with them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from packlight.errors import InputError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def several(batch: Any) -> tuple[Any, ...]:
    """What one object stands for: a tuple or a list for several arguments, all else for one."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def arguments_of(model: Callable[..., Any], *batch: Any, **kwargs: Any) -> Arguments:
    """Arguments and keywords of the call of `model` with this batch.

    One mapping is the keywords, as of transformers' tokenizers and collators, where the forward
    pass takes its keys; where it takes none of them and one argument, it is that argument.

    Raises `InputError` for keys of which it takes some and not others.
    """
    if len(batch) != 1 or not isinstance(batch[0], Mapping):
        return batch, kwargs
    (mapping,) = batch
    is_named = all(isinstance(key, str) for key in mapping)
    if is_named and takes(model, **mapping, **kwargs):
        return (), {**mapping, **kwargs}
    signature = _signature(model)
    parameters = () if signature is None else signature.parameters
    if takes(model, mapping, **kwargs) and not set(parameters) & set(mapping):
        return batch, kwargs
    name = type(model).__name__ if isinstance(model, nn.Module) else "the function"
    raise InputError(
        f"the batch has {', '.join(map(str, mapping))}, and {name} takes {signature}; pass a"
        " mapping of these alone, or tensors in this order"
    )


def call(model: Callable[..., Any], batch: Any) -> Any:
    """The model's output for a batch that is one object."""
    args, kwargs = arguments_of(model, *several(batch))
    return model(*args, **kwargs)


def _signature(model: Callable[..., Any]) -> inspect.Signature | None:
    """None where Python cannot tell, as of TorchScript."""
    try:
        return inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (ValueError, TypeError):
        return None


def takes(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> bool:
    """Whether a function or a model can be called so, as far as Python can tell."""
    signature = _signature(function)
    try:
        if signature is not None:
            signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
