"""Reports as tables."""

import io
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import Box
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from packlight.report.tree import Node, condense, join_chains, largest_lines, tree_of
from packlight.report.words import check_depth, human_bytes, times_less

if TYPE_CHECKING:
    from packlight.report.memory import KeptTensor, MemoryDifference, MemoryReport


# Long enough for the blocks of a usual model (blocks that are alike share a line), short enough
# for one screen.
LINES = 40

# Nothing but ASCII: a report also goes to logs and to consoles that know no box characters.
_RULES = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)


def render(report: ConsoleRenderable) -> str:
    width = shutil.get_terminal_size(fallback=(100, 24)).columns
    # Below 60 columns there is no room for a name; above 160 the eye loses the line.
    console = Console(file=io.StringIO(), width=min(max(width, 60), 160), color_system=None)
    with console.capture() as capture:
        console.print(report)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def new_table() -> Table:
    return Table(box=_RULES, pad_edge=False, show_edge=False, header_style="bold")


class Broken:
    """A text whose lines end behind a comma or a dot, as names of modules are read."""

    def __init__(self, text: str) -> None:
        self.pieces = re.findall(r"[^., ]*(?:[., ]+|$)", text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [""]
        for piece in self.pieces:
            if lines[-1] and len(lines[-1] + piece.rstrip()) > options.max_width:
                lines.append("")
            lines[-1] += piece
        yield Text("\n".join(line.rstrip() for line in lines), overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max((len(piece.rstrip()) for piece in self.pieces), default=0)
        return Measurement(longest, len("".join(self.pieces)))


def helping(remedy: str) -> list[Text]:
    """The line that says what would help, where something does."""
    return [Text(f"what would help: {remedy}")] if remedy else []


def cell(text: str) -> Text:
    # Text, since a module's name may hold what rich takes for markup.
    return Text(text, no_wrap=True, overflow="ellipsis")


def _name(depth: int, node: Node) -> Text:
    kind = f" ({node.kind})" if node.kind else ""
    return cell("  " * depth + node.label + kind)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else ""


def report_parts(report: "MemoryReport", depth: int | None) -> Iterator[ConsoleRenderable]:
    check_depth(depth)
    if not report.rows:
        yield Text(f"{report.model}: nothing is kept for the backward pass.")
    else:
        tensors = "1 tensor" if len(report.rows) == 1 else f"{len(report.rows)} tensors"
        total = human_bytes(report.activation_bytes)
        yield Text(f"{report.model} keeps {total} for the backward pass, in {tensors}")
        yield _report_table(report, depth)
        yield _listing("by dtype", report.by_dtype())
        if len(report.by_device()) > 1:
            yield _listing("by device", report.by_device())
        if unshared := report.unshared_outputs():
            yield Text(_unshared_note(report, unshared))
    yield _apart(report)
    if report.allocated_bytes is not None:
        peak = "not measured" if report.peak_bytes is None else human_bytes(report.peak_bytes)
        yield Text(
            f"CUDA allocator: forward {human_bytes(report.allocated_bytes)}, "
            f"peak of forward and backward {peak}"
        )


def _apart(report: "MemoryReport") -> Text:
    """What is there whatever is kept."""
    return Text(
        f"apart: parameters {human_bytes(report.parameter_bytes)}, buffers "
        f"{human_bytes(report.buffer_bytes)}, inputs kept {human_bytes(report.input_bytes)}"
    )


def difference_parts(
    difference: "MemoryDifference", depth: int | None
) -> Iterator[ConsoleRenderable]:
    check_depth(depth)
    before, after = difference.before, difference.after
    sizes = before.activation_bytes, after.activation_bytes
    yield Text(
        f"{before.model} keeps {human_bytes(sizes[0])} before and {human_bytes(sizes[1])} "
        f"after{times_less(*sizes)}"
    )
    yield _difference_table(difference, depth)
    yield _apart(before)
    if before.peak_bytes is not None and after.peak_bytes is not None:
        yield Text(
            f"CUDA allocator: peak {human_bytes(before.peak_bytes)} before, "
            f"{human_bytes(after.peak_bytes)} after"
        )


def _report_table(report: "MemoryReport", depth: int | None) -> Table:
    # Levels are asked for to see modules; which operation keeps what is below them.
    with_operations = depth is None
    root = tree_of([report], with_operations, depth)
    condense(root)
    join_chains(root)
    table = new_table()
    table.add_column("module or source line" if with_operations else "module")
    table.add_column("kept", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    if with_operations:
        table.add_column("kept by operation")
    for level, node in largest_lines(root, LINES):
        (size,) = node.sizes
        share = _percent(size, report.activation_bytes)
        operation = [cell(node.operation)] if with_operations else []
        table.add_row(_name(level, node), human_bytes(size), share, *operation)
    return table


def _difference_table(difference: "MemoryDifference", depth: int | None) -> Table:
    root = tree_of([difference.before, difference.after], with_operations=False, depth=depth)
    condense(root)
    join_chains(root)
    table = new_table()
    table.add_column("module")
    for title in ("before", "after", "saved", ""):
        table.add_column(title, justify="right", no_wrap=True)
    for level, node in largest_lines(root, LINES):
        before, after = node.sizes
        saved = before - after
        table.add_row(
            _name(level, node),
            human_bytes(before),
            human_bytes(after),
            human_bytes(saved),
            _percent(saved, before),
        )
    return table


# Layers that the note names, before it says how many more there are.
_NAMED = 4


def _unshared_note(report: "MemoryReport", rows: "Sequence[KeptTensor]") -> str:
    """What to know about Inverted layers whose output nobody else keeps, by kind of layer."""
    paths = list(dict.fromkeys(row.module for row in rows))
    kinds = {row.module: row.module_type for row in rows}
    named = [f"{path or report.model} ({kinds[path]})" for path in paths[:_NAMED]]
    if len(paths) > _NAMED:
        named.append(f"{len(paths) - _NAMED} more")
    size = human_bytes(sum(row.bytes for row in rows))
    return (
        f"Inverted saves nothing here: no other operation keeps the output of {', '.join(named)}"
        f" ({size})"
    )


def _listing(title: str, totals: dict[str, int]) -> Text:
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in totals.items())
    return Text(f"{title}: {parts}")
