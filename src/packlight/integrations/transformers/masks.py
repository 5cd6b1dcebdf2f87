"""Attention masks of transformers while a pass is recorded as a CUDA graph.

A launched pass looks at the values of its mask and its positions, and leaves out a mask that masks
nothing: the kernels without one are faster. A pass that is captured may not look, and makes a mask
always. Where the caller of a model of transformers gives neither, there is nothing to look at: all
is as it is launched. Code of the user's around such a model may give it either, which nobody sees.
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
    present = {name: getattr(masking_utils, name, None) for name in _FUNCTIONS}
    if None in present.values() or not _gives_neither(module, args, kwargs):
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


def _gives_neither(module: Any, args: Any, kwargs: Any) -> bool:
    """Whether a model of transformers, alone or within PEFT's, is called without what it looks at.

    A model of PEFT has the arguments of the one within.
    """
    code = inspect.unwrap(type(module).forward).__module__
    parts = (part for part in module.modules() if isinstance(part, PreTrainedModel))
    model = next(parts, None)
    if model is None or not code.startswith(("transformers.", "peft.")):
        return False
    given = set(inspect.signature(model.forward).bind_partial(*args).arguments)
    given |= {name for name, value in kwargs.items() if value is not None}
    return given.isdisjoint(_LOOKED_AT)


def _one_sequence(position_ids: Any) -> None:
    """That no sequences are packed into one row."""
