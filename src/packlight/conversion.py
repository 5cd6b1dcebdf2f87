"""`Conversion`: what `packlight.convert` did to a model, and what it left alone and why."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text
from torch import nn

from packlight.method import Method
from packlight.predict import predict_change
from packlight.quantiser import Quantiser
from packlight.remedies import remedy_of, what_is_left
from packlight.report import MemoryDifference
from packlight.report.left import Left
from packlight.report.names import beginning, condensed, together
from packlight.report.printing import Broken, helping, new_table, render


@dataclasses.dataclass(frozen=True, slots=True)
class Replaced:
    """A layer that was converted: all its names, its class before and after, the method.

    The method is the one that the layer keeps by: attention takes 8 bits at least.
    """

    names: tuple[str, ...]
    kind: str
    becomes: str
    method: Method


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """A layer that was left as it is."""

    names: tuple[str, ...]
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True, repr=False)
class Conversion:
    """What `packlight.convert` did: prints as a table, goes to plain data by `to_dict`.

    - `replaced`: the layers that keep by another method now, in the order of the model.
    - `skipped`: the layers that this call leaves alone, each with the reason. Containers, which
      have neither parameters nor work of their own, are in neither.
    - `unmatched`: selectors that matched no module.
    - `functional`: the modules in whose own code calls of torch functions are covered.
    - `heads`: the heads whose losses are computed by chunks of logits.
    - `functional_bits`: those of these functions that keep other bits than the methods say.
    - `rest`: by which method forward passes keep what no rule is for; None for what torch keeps.
    """

    model: str
    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...]
    unmatched: tuple[str, ...] = ()
    functional: tuple[str, ...] = ()
    functional_bits: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)
    heads: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    rest: Quantiser | None = dataclasses.field(default=None, kw_only=True)
    converted: nn.Module = dataclasses.field(kw_only=True, compare=False)

    def bytes(self, *inputs: Any, loss: Any = None, **kwargs: Any) -> MemoryDifference:
        """Bytes kept for the backward pass before and after, for a batch like this one.

        Takes what the model takes, or one mapping of keywords. Runs nothing and allocates
        nothing: see `packlight.predict`.

        >>> import torch, packlight
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU())
        >>> conversion = packlight.convert(model, packlight.FewBit(bits=2))
        >>> change = conversion.bytes(torch.randn(8, 64))
        >>> change.before.activation_bytes, change.after.activation_bytes
        (8192, 513)
        """
        return predict_change(self.converted, *inputs, loss=loss, **kwargs)

    def left(self, *inputs: Any, loss: Any = None, **kwargs: Any) -> Left:
        """What is still kept for a batch like this one, largest first, and what would help.

        Takes what the model takes, or one mapping of keywords. Runs nothing and allocates
        nothing: see `packlight.predict`.

        >>> import torch, packlight
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LogSoftmax(-1))
        >>> conversion = packlight.convert(model, packlight.GroupQuant(bits=4))
        >>> row = conversion.left(torch.randn(64, 64)).rows[0]
        >>> row.bytes, row.operation, row.why
        (16384, 'LogSoftmax', 'the gradient begins at a loss')
        """
        return self.left_of(self.bytes(*inputs, loss=loss, **kwargs))

    def left_of(self, change: MemoryDifference) -> Left:
        """The same from a measurement, as `bytes` returns one, or two profiles make one."""
        skipped = {name: row.reason for row in self.skipped for name in row.names}
        covers = bool(self.functional), self.rest is not None
        return what_is_left(change.before, change.after, skipped, *covers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as for JSON: lists, texts and numbers."""
        return {
            "model": self.model,
            "replaced": [
                {
                    "names": list(row.names),
                    "kind": row.kind,
                    "becomes": row.becomes,
                    "method": row.method.to_dict(),
                }
                for row in self.replaced
            ],
            "skipped": [
                {"names": list(row.names), "kind": row.kind, "reason": row.reason}
                for row in self.skipped
            ],
            "unmatched": list(self.unmatched),
            "functional": list(self.functional),
            "functional_bits": dict(self.functional_bits),
            "heads": list(self.heads),
            "rest": None if self.rest is None else self.rest.to_dict(),
        }

    def __repr__(self) -> str:
        return (
            f"Conversion(model={self.model!r}, replaced=<{len(self.replaced)}>, "
            f"skipped=<{len(self.skipped)}>)"
        )

    def __str__(self) -> str:
        return render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        total = len(self.replaced) + len(self.skipped)
        count = f"{len(self.replaced)} of {total} layers converted" if total else "it has no layers"
        yield Text(f"{self.model}: {count}")
        first = [row.names[0] for row in self.replaced] + [row.names[0] for row in self.skipped]
        begin = _common(first)
        if begin:
            yield Text(f"names are those within {begin}")
        if self.replaced:
            table = new_table()
            for column in ("converted", "to, and where"):
                table.add_column(column)
            for (kind, becomes, method), names in _grouped(
                ((row.kind, row.becomes, brief(row.method)), row.names[0]) for row in self.replaced
            ):
                to = Text(f"{_short(becomes)} by {method}")
                table.add_row(f"{len(names)} x {kind}", Group(to, _names(names, begin)))
            yield table
        if self.skipped:
            table = new_table()
            for column in ("left as it is", "why, and where"):
                table.add_column(column)
            for (kind, reason), names in _grouped(
                ((row.kind, row.reason), row.names[0]) for row in self.skipped
            ):
                why = [Text(reason), *helping(remedy_of(reason))]
                table.add_row(f"{len(names)} x {kind}", Group(*why, _names(names, begin)))
            yield table
        if self.functional:
            covered = len(self.functional)
            modules = "1 module" if covered == 1 else f"{covered} modules"
            bits = "".join(
                f"; {' and '.join(names)} at {bits} bits"
                for bits, names in _grouped((b, name) for name, b in self.functional_bits.items())
            )
            yield Text(f"calls of torch functions are covered in {modules}{bits}")
        if self.rest is not None:
            yield Text(
                f"the rest is packed by {brief(self.rest)}, as packlight.saving does; a model that"
                " is compiled as a whole needs that around it"
            )
        if self.heads:
            heads = ", ".join(condensed(self.heads))
            yield Text(f"losses of {heads} are computed by chunks, without all logits")
        if self.unmatched:
            yield Text(f"selectors that matched nothing: {', '.join(self.unmatched)}")


_K = TypeVar("_K")


def _grouped(pairs: Iterable[tuple[_K, str]]) -> Iterable[tuple[_K, list[str]]]:
    groups: dict[_K, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return groups.items()


def _names(names: list[str], begin: str) -> Broken:
    """Not cut: what differs may be at the end of a name."""
    within = [name.removeprefix(begin).removeprefix(".") for name in names]
    return Broken(together(condensed(within)))


def _common(names: list[str]) -> str:
    """The innermost module that holds all of these, but for those that it is in and itself."""
    parts = [name.split(".") for name in names if name]
    deepest = max(parts, key=len, default=[])
    common = beginning([each for each in parts if each != deepest[: len(each)]])
    return ".".join(common)


def _short(becomes: str) -> str:
    """Package and class: where in the package is not for a reader."""
    parts = becomes.removeprefix("packlight.").removeprefix("integrations.").split(".")
    return f"{parts[0].strip('_')}.{parts[-1]}"


# Characters of a field of a method. A codebook has hundreds, and is another for each layer.
_LONGEST = 40


def brief(method: Method) -> str:
    """The method with its first field, and those that are not as usual."""
    shown = []
    for index, field in enumerate(dataclasses.fields(method)):
        value = getattr(method, field.name)
        if index == 0 or value != field.default:
            text = repr(value)
            text = text if len(text) <= _LONGEST else f"{type(value).__name__}(...)"
            shown.append(f"{field.name}={text}")
    return f"{type(method).__name__}({', '.join(shown)})"
