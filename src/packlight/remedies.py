"""Why a converted model keeps what it still keeps, and what would help."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from packlight.report import KeptTensor, MemoryReport
from packlight.report.left import Left, LeftRow
from packlight.report.names import condensed
from packlight.report.words import short_operation
from packlight.saving.rules import WORKSPACES, why_exact

if TYPE_CHECKING:
    from packlight.conversion import Conversion

# What helps where a layer was left alone, by the beginning of the reason that a conversion gives.
_OF_LAYERS = {
    "a subclass of": "build with torch's own class, or register a rule for this one",
    "parametrized": "convert first, parametrize afterwards",
    "its forward was replaced": "convert before that",
    "not initialised yet": "run one forward pass first",
    "no selector picks it": "a selector for it, or '*'",
    "it keeps nothing itself": (
        "selectors for its parts, or '*'; Checkpoint() and Offload() are methods of a whole block"
    ),
}
_OF_REASONS = {
    "the gradient begins at a loss": "head=True, for the logits of a language model",
    "a softmax is small where its error is largest": (
        'attention by F.scaled_dot_product_attention: attn_implementation="sdpa"'
    ),
    "attention that no kernel took keeps its probabilities": (
        "a GPU, or a dropout of 0 in attention, which a CPU has no kernel for"
    ),
    "a recomputation sees what the forward pass saw": (
        "Checkpoint() of packlight in place of the model's own checkpoints"
    ),
}
_OF_PACKS = "fewer bits, or Checkpoint() and Tiles()"


def remedy_of(reason: str) -> str:
    """What helps a layer that a conversion left alone for `reason`; empty where nothing does."""
    return next((help for start, help in _OF_LAYERS.items() if reason.startswith(start)), "")


def _is_checkpointed_by_transformers(module: nn.Module) -> bool:
    """By `gradient_checkpointing_enable`, and not by a method of ours, which sets the same."""
    if not getattr(module, "gradient_checkpointing", False):
        return False
    function = getattr(module, "_gradient_checkpointing_func", None)
    return function is not None and not type(function).__module__.startswith("packlight.")


def advice(model: nn.Module, conversion: "Conversion") -> list[str]:
    """What would help, by what is there, without a batch: `Conversion.left` weighs it."""
    found: dict[str, list[str]] = {}
    for row in conversion.skipped:
        if remedy := remedy_of(row.reason):
            found.setdefault(f"{remedy} ({row.reason})", []).extend(row.names[:1])
    lines = [f"{', '.join(condensed(names))}: {why}" for why, names in found.items()]
    embeddings = getattr(model, "get_output_embeddings", None)
    if not conversion.heads and callable(embeddings) and isinstance(embeddings(), nn.Linear):
        lines.append("head=True: the loss by chunks, without all logits")
    if any(map(_is_checkpointed_by_transformers, model.modules())):
        lines.append("no gradient_checkpointing: blocks that run again keep inputs alone")
    return lines


def what_is_left(
    before: MemoryReport,
    after: MemoryReport,
    skipped: Mapping[str, str],
    functional: bool,
    rest: bool,
) -> Left:
    """What is left after a conversion.

    `skipped` has reasons by the names of layers that were left alone; `functional` and `rest` say
    whether calls were covered, and whether what has no rule is packed.
    """
    groups: dict[tuple[str, str, bool, str], list[KeptTensor]] = {}
    for row in after.rows:
        reason = skipped.get(row.module, "")
        key = short_operation(row.operation), row.module_type, _is_packed(row), reason
        groups.setdefault(key, []).append(row)
    rows = []
    for (operation, kind, is_packed, reason), kept in groups.items():
        why, remedy = _explained(operation, is_packed, reason, kept, functional, rest)
        largest = max(kept, key=lambda row: row.bytes)
        modules = tuple(dict.fromkeys(row.module for row in kept))
        size = sum(row.bytes for row in kept)
        rows.append(LeftRow(size, operation, kind, modules, largest.source, is_packed, why, remedy))
    rows.sort(key=lambda row: row.bytes, reverse=True)
    return Left(after.model, before.activation_bytes, after.activation_bytes, tuple(rows))


def _is_packed(row: KeptTensor) -> bool:
    """Whether packlight made the tensor: codes and words lie flat, whatever the tensor's shape."""
    ours = row.operation.startswith("_") and row.dtype != "int64"
    flat = len(row.shape) == 1 and row.dtype in ("uint8", "int32")
    return (ours or flat) and not row.operation.startswith(WORKSPACES)


def _explained(
    operation: str,
    is_packed: bool,
    reason: str,
    kept: Iterable[KeptTensor],
    functional: bool,
    rest: bool,
) -> tuple[str, str]:
    if is_packed:
        return "packs, codes and statistics", _OF_PACKS
    if operation.startswith(WORKSPACES):
        return "a workspace of torch's kernel", ""
    if why := why_exact(operation):
        return why, _OF_REASONS.get(why, "")
    if reason and not (rest and reason.startswith("no rule")):
        asked = "no None for it" if reason == "left alone, as asked" else ""
        return reason, asked or remedy_of(reason) or ("" if rest else _REST)
    if all(not row.dtype.startswith(("float", "bfloat")) for row in kept):
        return "indices, masks and data", ""
    if rest:
        return "made without gradients, small, or with infinities", ""
    why = "no rule is for it" if functional else "calls are not covered"
    return why, _REST if functional else "functional=True"


_REST = "rest=GroupQuant(bits=4)"
