"""`torch.nn.functional.multi_head_attention_forward`, which runs once more on a pack of its input.

Its projections are part of it: what is kept is a pack of query, key and value as they come, one
where they are one tensor.
"""

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import is_plain, is_taken, needs_gradient
from packlight._seeds import can_draw_again
from packlight.layers.replayed import replayed
from packlight.quantiser import Quantiser

_NAMES = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
_BIASES = ("attn_mask", "key_padding_mask")


def multi_head_attention_forward(*args: Any, method: Quantiser, **kwargs: Any) -> Any:
    """torch's function, with its arguments and results; the gradient is of the packed inputs.

    It is torch's own in a compiled region, and with dropout that cannot be drawn again.
    """
    given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
    names = [name for name, value in given.items() if isinstance(value, Tensor)]
    operands = [given[name] for name in names]
    others = {name: value for name, value in given.items() if name not in names}
    draws = bool(given.get("training", True) and given["dropout_p"])

    def call(*found: Tensor) -> Any:
        given: dict[str, Any] = {**dict(zip(names, found, strict=True)), **others}
        return F.multi_head_attention_forward(**given)

    if (
        _torch.is_traced()
        or not all(map(is_plain, operands))
        or not is_taken(operands[0])
        or not any(map(needs_gradient, operands))
        or (draws and not can_draw_again(operands[0]))
    ):
        return call(*operands)
    biases = [place for place, name in enumerate(names) if name in _BIASES]
    return replayed(call, operands, method, draws, biases)


multi_head_attention_forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *inspect.signature(F.multi_head_attention_forward).parameters.values(),
        inspect.Parameter("method", inspect.Parameter.KEYWORD_ONLY),
    ]
)
