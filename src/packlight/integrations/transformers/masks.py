"""Attention masks of transformers in compiled code, and while a pass is recorded as a CUDA graph.

A launched pass looks at the values of its mask and its positions, and leaves out a mask that masks
nothing: the kernels without one are faster. A pass that is compiled or captured may not look, and
makes a mask always.

**Compiled**: a mask that depends on no input, as where the caller gives neither mask nor positions,
has values that can be had while the region is traced. If it is that of causal attention, or masks
nothing, attention does without, and the compiled code does not make it. Of sizes that vary nothing
is known, and the mask stays.

**Captured**: where the caller gives neither, there is nothing to look at: all is as it is launched.
Code of the user's around such a model may give it either, which nobody sees.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils

from packlight import _torch, _tracer
from packlight.graphs.recording import while_recording

# ---- compiled ------------------------------------------------------------------------------------


def kind_of_traced(mask: Tensor | None) -> str | None:
    """What a traced mask of booleans is known to be: "causal", "nothing" masked, else None."""
    if mask is None or not torch.compiler.is_dynamo_compiling():
        return None
    kind: str | None = _torch.ask("kind_of_mask", None, mask)
    return kind


@_torch.question
def kind_of_mask(tracer: Any, mask: Any) -> str | None:
    node = _tracer.node_of(mask)
    kinds = _torch.graph_facts(tracer, "_packlight_masks")  # every layer asks
    if node not in kinds:
        values = _tracer.constant_of(node)
        kinds[node] = None if values is None else _kind(values)
    found: str | None = kinds[node]
    return found


def _kind(mask: Tensor) -> str | None:
    if mask.dtype != torch.bool or mask.dim() != 4 or not mask.numel():
        return None
    if mask.all():
        return "nothing"
    queries, keys = mask.shape[-2:]
    causal = torch.ones(queries, keys, dtype=torch.bool).tril()
    return "causal" if queries == keys and (mask == causal).all() else None


# ---- captured ------------------------------------------------------------------------------------

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
