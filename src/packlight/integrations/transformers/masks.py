"""Attention masks of transformers while a pass is recorded as a CUDA graph.

A launched pass looks at the values of its mask and its positions, and leaves out a mask that masks
nothing: the kernels without one are faster. A pass that is captured may not look, and makes a mask
always. Where the caller gives neither, there is nothing to look at: all is as it is launched.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel, masking_utils

from packlight.graphs.recording import while_recording

_LOOKED_AT = ("attention_mask", "position_ids")
_FUNCTIONS = ("is_tracing", "find_packed_sequence_indices")


@while_recording
@contextlib.contextmanager
def _as_launched(module: Any, args: Any, kwargs: Any) -> Iterator[None]:
    parts = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    # A model that wraps one, as PEFT's do, has the arguments of the outermost.
    given = set(kwargs)
    if parts and args:
        given |= set(inspect.signature(parts[0].forward).bind_partial(*args).arguments)
    values = {name for name in _LOOKED_AT if name in given and kwargs.get(name, 0) is not None}
    present = {name: getattr(masking_utils, name, None) for name in _FUNCTIONS}
    if not parts or values or None in present.values():
        yield
        return
    is_tracing: Any = present["is_tracing"]

    def of_a_tensor(tensor: Any = None) -> bool:
        return tensor is not None and bool(is_tracing(tensor))

    # Without a mask the first is asked of None; positions that the model makes itself are one row.
    there: Any = masking_utils
    try:
        there.is_tracing = of_a_tensor
        there.find_packed_sequence_indices = _one_sequence
        yield
    finally:
        for name, function in present.items():
            setattr(there, name, function)


def _one_sequence(position_ids: Any) -> None:
    """That no sequences are packed into one row."""
