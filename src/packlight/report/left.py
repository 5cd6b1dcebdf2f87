"""`Left`: what a converted model still keeps, largest first, and what would help."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text

from packlight.report.names import condensed, together
from packlight.report.printing import Broken, helping, new_table, render
from packlight.report.words import human_bytes, percent, times_less

# Shares below this are summed up where the report prints.
_SHOWN = 0.01


@dataclass(frozen=True, slots=True)
class LeftRow:
    """What operations of one kind keep in modules of one class, in all.

    - `operation`: the autograd node, without "Backward"; `module_type`, `modules`: where it runs.
    - `source`: the line of the call that keeps most of it, in someone's own `forward`; or None.
    - `is_packed`: whether these are packs, codes or bits that packlight made.
    - `why`: why it is kept so; `remedy`: what would help, empty where nothing does.
    """

    bytes: int
    operation: str
    module_type: str
    modules: tuple[str, ...]
    source: str | None
    is_packed: bool
    why: str
    remedy: str


@dataclass(frozen=True, repr=False)
class Left:
    """What `Conversion.left` found: prints as a table, goes to plain data by `to_dict`.

    `rows` are the largest first. `before_bytes` and `after_bytes` are kept for the backward pass by
    the model as it was and as it is converted.
    """

    model: str
    before_bytes: int
    after_bytes: int
    rows: tuple[LeftRow, ...]

    def share(self, row: LeftRow) -> float:
        """The part of all that is kept after the conversion."""
        return row.bytes / self.after_bytes if self.after_bytes else 0.0

    @property
    def covered(self) -> float:
        """The share of bytes before that packs stand for, or that nothing keeps any more."""
        as_before = sum(row.bytes for row in self.rows if not row.is_packed)
        return max(1 - as_before / self.before_bytes, 0.0) if self.before_bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as for JSON: lists, texts and numbers."""
        data = asdict(self)
        data["rows"] = [{**row, "modules": list(row["modules"])} for row in data["rows"]]
        return data

    def __repr__(self) -> str:
        return (
            f"Left(model={self.model!r}, after_bytes={self.after_bytes}, rows=<{len(self.rows)}>)"
        )

    def __str__(self) -> str:
        return render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        before, after = self.before_bytes, self.after_bytes
        yield Text(
            f"{self.model} keeps {human_bytes(before)} before and {human_bytes(after)} after"
            f"{times_less(before, after)}; {percent(self.covered)} of the bytes are covered"
        )
        if not self.rows:
            return
        table = new_table()
        for column in ("still kept", "share", "by, where, and why"):
            table.add_column(column)
        packed = [row for row in self.rows if row.is_packed]
        others = [row for row in self.rows if not row.is_packed and self.share(row) < _SHOWN]
        lines = [(row.bytes, _said_of(row)) for row in self.rows if row not in (*packed, *others)]
        if packed:
            size = sum(row.bytes for row in packed)
            lines.append((size, Group(Text(packed[0].why), *helping(packed[0].remedy))))
        for size, said in sorted(lines, key=lambda line: line[0], reverse=True):
            table.add_row(human_bytes(size), percent(size / after), said)
        if others:
            size = sum(row.bytes for row in others)
            table.add_row(human_bytes(size), percent(size / after), "others")
        yield table


def _said_of(row: LeftRow) -> Group:
    place = row.source or together(condensed(row.modules))
    where = Broken(f"{row.operation} in {row.module_type}: {place}")
    return Group(where, Text(row.why), *helping(row.remedy))
