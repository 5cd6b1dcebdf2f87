"""A head that hands out lazy logits in training, and which modules of a model are heads."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from packlight import _torch
from packlight._checks import autocasts, is_plain, is_taken
from packlight._classes import joined, origin
from packlight.head.lazy import lazy_logits
from packlight.layers.twin import Twin
from packlight.method import Swap
from packlight.quantiser import Quantiser
from packlight.selectors import kind_of


class Head(Twin):
    """A `torch.nn.Linear` whose output in training is `LazyLogits`."""

    weight: Tensor
    bias: Tensor | None

    def training_forward(self, input: Tensor) -> Tensor:
        if not _may_wait(self, input):
            return self._logits(input)
        method = getattr(self, "method", None)
        method = method if isinstance(method, Quantiser) else None
        return lazy_logits(input, self.weight, self.bias, method)

    def _logits(self, input: Tensor) -> Tensor:
        y: Tensor = super(Twin, self).forward(input)
        return y


class ConvertedHead(Head):
    """The same of a Linear that keeps its input by a method.

    `row_losses` says what a loss keeps of it. Logits that are asked for keep it as the Linear does.
    """

    def _logits(self, input: Tensor) -> Tensor:
        converted: Any = super(Head, self)
        y: Tensor = converted.training_forward(input)
        return y


def head_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a head whose class was this one."""
    return joined(ConvertedHead if issubclass(kind, Twin) else Head, kind)


def without_head(swap: Swap) -> Swap:
    """What a conversion makes of a module beside a head."""
    made = origin(swap.kind) if issubclass(swap.kind, Head) else None
    return swap if made is None else swap._replace(kind=made[1][-1])


def _may_wait(head: Head, x: Tensor) -> bool:
    """Whether the logits can be computed later: nothing takes away, or traces, what they are of."""
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if torch.compiler.is_compiling() or traced or not _torch.HOLLOW:
        return False
    weight, bias = head.weight, head.bias
    if not all(is_plain(one) and is_taken(one) for one in (x, weight, bias) if one is not None):
        return False
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    # A head that is a unit of FSDP2, or of DeepSpeed's stage 3, has its weight while it runs.
    if hasattr(weight, "ds_id") or isinstance(head, getattr(fsdp, "FSDPModule", ())):
        return False
    dtypes = {one.dtype for one in (x, weight, bias) if one is not None}
    casts = autocasts(x.device.type) and torch.float64 not in dtypes
    same = casts or len(dtypes) == 1
    fits = x.dim() > 0 and x.shape[-1] == weight.shape[-1] and x.device == weight.device
    return same and fits


def heads_of(model: nn.Module) -> Iterator[nn.Module]:
    """The output embeddings of the models of transformers within this one, and of wrapped ones."""
    for head, _ in _heads_and_models(model):
        yield head


def passed_by(model: nn.Module) -> dict[nn.Module, str]:
    """Heads that are never called, since a model's forward reads their weights: why, by head."""
    return {head: _LIGER for head, owner in _heads_and_models(model) if _is_liger_s(owner)}


_LIGER = (
    "the forward of its model is Liger-Kernel's, which computes the loss from its weight;"
    " apply Liger-Kernel with fused_linear_cross_entropy=False"
)


def _is_liger_s(model: nn.Module) -> bool:
    module: str = getattr(model.forward, "__module__", None) or ""
    return module.startswith("liger_kernel.")


def _heads_and_models(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for module in model.modules():
        find = getattr(type(module), "get_output_embeddings", None)
        if find is None:
            continue
        try:
            head = find(module)
        except (AttributeError, NotImplementedError):  # a model without a head
            continue
        if isinstance(head, nn.Module):
            # PEFT trains a copy of a head beside the original.
            copies = getattr(head, "modules_to_save", None)
            found = [head] if copies is None else [head.original_module, *copies.values()]
            yield from ((one, module) for one in found)


def why_no_head(module: nn.Module) -> str | None:
    """Why a module cannot hand out lazy logits; None if it can."""
    kind = kind_of(module)
    if kind is not nn.Linear:
        return f"it is a {kind.__module__}.{kind.__qualname__} and no torch.nn.Linear"
    if "forward" in vars(module):
        return "its forward was replaced on the instance; convert before that"
    return None
