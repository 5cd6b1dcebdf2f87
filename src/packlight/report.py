"""What `packlight.profile` found: plain numbers and names that print, plot, subtract and save."""

import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from rich.box import Box
from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderResult
from rich.table import Table
from rich.text import Text

from packlight._files import replaced
from packlight._page import write_page
from packlight.errors import InputError, MissingDependencyError

# Raised when a field changes its meaning, so that an old file is refused instead of misread.
_FORMAT = 1


# How the autograd nodes of Inverted layers are called.
_INVERTED = "_Inverted"


@dataclass(frozen=True, slots=True)
class Holding:
    """One operation that keeps a storage: its module's path, its autograd name, its source line."""

    module: str
    operation: str
    source: str | None


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """One storage that is kept for the backward pass, counted where it was kept first.

    `bytes` is the whole storage, also where only a view of it is kept; `dtype` and `shape` are
    those of the first tensor kept. `module` is the path that `named_modules` gives ("" is the model
    itself, "(loss)" the loss), `operation` the name of the autograd node. `source` is the line
    ("file.py:12") of an operation that stands in someone's own `forward`; it is None where a module
    of torch or packlight calls the operation. `holders` lists all operations that keep the
    storage, this row's own first.
    """

    bytes: int
    dtype: str
    shape: tuple[int, ...]
    device: str
    module: str
    module_type: str
    operation: str
    source: str | None
    holders: tuple[Holding, ...]


@dataclass(frozen=True, repr=False)
class MemoryReport:
    """Who keeps how many bytes for the backward pass. Holds no tensor; prints as a table.

    - `rows`: one `KeptTensor` a kept storage, in the order in which they were kept.
    - `parameter_bytes`, `buffer_bytes`: all parameters and buffers of the model, kept or not;
      buffers include the tensors that modules hold as plain attributes.
    - `input_bytes`: those arguments of the call (and tensors that a function brings along) that
      are kept for the backward pass.
    - `allocated_bytes`: what CUDA's allocator holds more after the forward pass than before it;
      above `activation_bytes` by the outputs and workspaces. None without a CUDA device.
    - `peak_bytes`: the allocator's highest point over forward and backward, above what was
      allocated before. None without a CUDA device, and where no backward could be run (see
      `packlight.profile`).
    """

    model: str
    rows: tuple[KeptTensor, ...]
    parameter_bytes: int
    buffer_bytes: int
    input_bytes: int
    allocated_bytes: int | None = None
    peak_bytes: int | None = None
    # Types of the modules above the rows, for the printed tree.
    module_types: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def activation_bytes(self) -> int:
        """Bytes kept for the backward pass that are no parameter, buffer or input."""
        return sum(row.bytes for row in self.rows)

    def by_module(self, depth: int | None = None) -> dict[str, int]:
        """Bytes by module path, largest first. `depth` cuts paths to so many components."""
        return _totals((cut_path(row.module, depth), row.bytes) for row in self.rows)

    def by_module_type(self) -> dict[str, int]:
        """Bytes by the class name of the module that keeps them, largest first."""
        return _totals((row.module_type, row.bytes) for row in self.rows)

    def by_operation(self) -> dict[str, int]:
        """Bytes by the name of the autograd node that keeps them, largest first."""
        return _totals((row.operation, row.bytes) for row in self.rows)

    def by_dtype(self) -> dict[str, int]:
        """Bytes by dtype, largest first."""
        return _totals((row.dtype, row.bytes) for row in self.rows)

    def by_device(self) -> dict[str, int]:
        """Bytes by the device they lie on, largest first."""
        return _totals((row.device, row.bytes) for row in self.rows)

    def unshared_outputs(self) -> tuple[KeptTensor, ...]:
        """Outputs that an Inverted layer keeps and no other operation does.

        Inverted saves memory where the next layer keeps the output anyway. Where nothing does (the
        output only goes into a residual sum, say), it keeps one tensor in place of another.
        """
        inverted = [row for row in self.rows if row.operation.startswith(_INVERTED)]
        # A layer's output is the largest that it keeps; statistics, branch bits and exact channels
        # are not half of it.
        largest: dict[str, int] = {}
        for row in inverted:
            largest[row.module] = max(row.bytes, largest.get(row.module, 0))
        return tuple(
            row for row in inverted if len(row.holders) == 1 and 2 * row.bytes > largest[row.module]
        )

    def __sub__(self, after: object) -> "MemoryDifference":
        if not isinstance(after, MemoryReport):
            return NotImplemented
        return MemoryDifference(before=self, after=after)

    def to_json(self) -> str:
        """The report as JSON text, for `from_json`."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. Raises `InputError` for anything else."""
        try:
            data = json.loads(text)
            _check_numbers(data)
            if data.pop("format") != _FORMAT:
                raise InputError(
                    f"this report is not of format {_FORMAT}, the one that this version of "
                    "packlight reads; profile the model again"
                )
            rows = tuple(_row_from(row) for row in data.pop("rows"))
            return cls(rows=rows, **data)
        except InputError:
            raise
        except (TypeError, AttributeError, KeyError, ValueError, RecursionError) as error:
            # ValueError: no JSON, or an integer of thousands of digits.
            raise InputError(
                f"not the text of a MemoryReport ({str(error)[:200]}); pass what its to_json()"
                " returned"
            ) from error

    def plot(
        self,
        path: str | os.PathLike[str],
        *,
        depth: int | None = None,
        by: Literal["operation", "dtype"] = "operation",
        limit: int = 24,
    ) -> None:
        """Draw the bytes of each module as a bar, stacked by `by`, in the order of the forward.

        `depth` cuts module paths to so many components; None takes the most that gives no more
        than `limit` bars. The `limit` largest modules are drawn and the others summed in one bar.
        The suffix of `path` picks the format (.png, .svg, .pdf).
        Needs matplotlib.
        """
        _draw(self, Path(path), depth, by, limit)

    def __repr__(self) -> str:
        return (
            f"MemoryReport(model={self.model!r}, activation_bytes={self.activation_bytes}, "
            f"rows=<{len(self.rows)}>)"
        )

    def to_text(self, depth: int | None = None) -> str:
        """The printed report; with a `depth`, of modules down to so many levels only."""
        return _render(Group(*_report_parts(self, depth)))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page to look at in a browser: a zoomable map of the bytes, and a table."""
        write_page(path, self.model, {"before": asdict(self), "after": None})

    def __str__(self) -> str:
        return _render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _report_parts(self, None)


@dataclass(frozen=True, repr=False)
class MemoryDifference:
    """Two reports side by side, as `before - after` gives them. Prints as a table."""

    before: MemoryReport
    after: MemoryReport

    @property
    def saved_bytes(self) -> int:
        """Activation bytes that `after` keeps less than `before`; negative if it keeps more."""
        return self.before.activation_bytes - self.after.activation_bytes

    def by_module(self, depth: int | None = None) -> dict[str, tuple[int, int]]:
        """(before, after) bytes by module path, the largest saving first."""
        before, after = self.before.by_module(depth), self.after.by_module(depth)
        pairs = {path: (before.get(path, 0), after.get(path, 0)) for path in {**before, **after}}
        return dict(sorted(pairs.items(), key=lambda item: item[1][1] - item[1][0]))

    def __repr__(self) -> str:
        return f"MemoryDifference(before={self.before!r}, after={self.after!r})"

    def to_text(self, depth: int | None = None) -> str:
        """The printed table; with a `depth`, of modules down to so many levels only."""
        return _render(Group(*_difference_parts(self, depth)))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page to look at in a browser: zoomable maps of both reports, and a table."""
        reports = {"before": asdict(self.before), "after": asdict(self.after)}
        write_page(path, self.before.model, reports)

    def __str__(self) -> str:
        return _render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _difference_parts(self, None)


def human_bytes(count: int) -> str:
    """A number of bytes for reading: 1536 -> "1.50 KiB"."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    # 999.5 rounds to a fourth digit, which the next unit shows better.
    while abs(size) >= 999.5 and len(units) > 1:
        size, units = size / 1024, units[1:]
    unit = units[0]
    if unit == "B":
        return f"{count} B"
    decimals = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{decimals}f} {unit}"


def short_operation(name: str) -> str:
    """An autograd node's name for reading: "AddmmBackward0" -> "Addmm"."""
    return re.sub(r"Backward\d*$", "", name) or name


def cut_path(path: str, depth: int | None) -> str:
    """The first `depth` components of a module path, or all of them."""
    if depth is None:
        return path
    check_depth(depth)
    return ".".join(path.split(".")[:depth])


def check_depth(depth: int | None) -> None:
    if depth is not None and depth < 1:
        raise InputError(f"depth is {depth}; expected at least 1, or None for whole paths")


def _totals(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for name, size in pairs:
        totals[name] += size
    return dict(totals.most_common())


def _check_numbers(data: Any) -> None:
    """Raise `ValueError` for a number that no count of bytes is, wherever it stands."""
    pending = [data]
    while pending:
        item = pending.pop()
        if isinstance(item, dict | list):
            pending.extend(item.values() if isinstance(item, dict) else item)
        elif isinstance(item, float) or (isinstance(item, int) and not 0 <= item < 2**63):
            raise ValueError("a number in it is no count of bytes")


def _row_from(data: dict[str, Any]) -> KeptTensor:
    holders = tuple(Holding(**holder) for holder in data["holders"])
    return KeptTensor(**{**data, "shape": tuple(data["shape"]), "holders": holders})


# ---- the tree of modules -------------------------------------------------------------------------


@dataclass
class _Node:
    """A module, or one kind of operation in it, with its bytes in each of the reports compared."""

    label: str
    sizes: list[int]
    kind: str = ""
    operation: str = ""
    children: list["_Node"] = field(default_factory=list)

    def child(self, label: str, kind: str = "", operation: str = "") -> "_Node":
        for node in self.children:
            if (node.label, node.operation) == (label, operation):
                return node
        node = _Node(label, [0] * len(self.sizes), kind, operation)
        self.children.append(node)
        return node

    def shape(self) -> tuple[object, ...]:
        """What two blocks of a model must have in common to be shown as one line."""
        inner = tuple((child.label, child.shape()) for child in self.children)
        return (self.kind, self.operation, tuple(self.sizes), inner)


def _tree(reports: Sequence[MemoryReport], with_operations: bool, depth: int | None) -> _Node:
    root = _Node(reports[0].model, [0] * len(reports))
    for column, report in enumerate(reports):
        for row in report.rows:
            node = root
            node.sizes[column] += row.bytes
            parts = row.module.split(".")[:depth] if row.module else []
            for level, part in enumerate(parts, start=1):
                path = ".".join(parts[:level])
                node = node.child(part, kind=report.module_types.get(path, ""))
                node.sizes[column] += row.bytes
            # Without operations one leaf stands for all that the module keeps itself.
            source = _short_source(row.source) if with_operations else ""
            operation = _operations(row) if with_operations else "all"
            node.child(source, operation=operation).sizes[column] += row.bytes
    return root


def _operations(row: KeptTensor) -> str:
    """All operations that keep the row's storage: "Relu + Addmm x3"."""
    names = Counter(short_operation(holder.operation) for holder in row.holders)
    return " + ".join(name if count == 1 else f"{name} x{count}" for name, count in names.items())


def _short_source(source: str | None) -> str:
    return "" if source is None else re.split(r"[/\\]", source)[-1]


def _condense(node: _Node) -> None:
    """Put a lone operation on its module's line, and blocks that are alike on one line."""
    for child in node.children:
        _condense(child)
    if len(node.children) == 1 and node.children[0].operation and not node.children[0].label:
        node.operation = node.children.pop().operation
    for child in node.children:
        if child.operation and not child.label:
            child.label = "(itself)"
    alike: dict[object, list[_Node]] = {}
    for child in node.children:
        # Only numbered modules are merged: names such as q_proj and k_proj are worth reading.
        key = child.shape() if child.label.isdigit() else id(child)
        alike.setdefault(key, []).append(child)
    node.children = [_merged(group) for group in alike.values()]


def _merged(group: list[_Node]) -> _Node:
    if len(group) == 1:
        return group[0]
    first = group[0]
    numbers = _ranges(sorted(int(node.label) for node in group))
    merged = _summed(group)
    merged.label = numbers
    merged.kind = f"{len(group)} x {first.kind}" if first.kind else f"{len(group)} alike"
    return merged


def _summed(group: list[_Node]) -> _Node:
    first = group[0]
    sizes = [sum(column) for column in zip(*(node.sizes for node in group), strict=True)]
    inner = zip(*(node.children for node in group), strict=True)
    children = [_summed(list(nodes)) for nodes in inner]
    return _Node(first.label, sizes, first.kind, first.operation, children)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _join_chains(node: _Node, root: bool = True) -> None:
    """Show `a` that holds nothing but `b` as `a.b`."""
    while not root and len(node.children) == 1 and not node.operation:
        only = node.children[0]
        if only.operation and (not only.kind or only.children):
            break
        node.label = f"{node.label}.{only.label}"
        node.kind, node.operation, node.children = only.kind, only.operation, only.children
    for child in node.children:
        _join_chains(child, root=False)


def _flat(node: _Node, depth: int = 0) -> Iterator[tuple[int, _Node]]:
    yield depth, node
    for child in sorted(node.children, key=lambda child: -max(child.sizes)):
        yield from _flat(child, depth + 1)


def _lines(root: _Node, limit: int) -> list[tuple[int, _Node]]:
    """(depth, node) of the `limit` largest nodes, with an "n more" node for what is left out."""
    nodes = list(_flat(root))
    # A parent is at least as large as its child and stands before it, so no child loses its parent.
    order = sorted(range(len(nodes)), key=lambda index: -max(nodes[index][1].sizes))
    shown = {id(nodes[index][1]) for index in order[:limit]}

    def visible(node: _Node, depth: int) -> Iterator[tuple[int, _Node]]:
        yield depth, node
        children = sorted(node.children, key=lambda child: -max(child.sizes))
        hidden = [child for child in children if id(child) not in shown]
        if len(hidden) == 1 and not hidden[0].children:
            hidden = []
        left_out = {id(child) for child in hidden}
        for child in children:
            if id(child) not in left_out:
                yield from visible(child, depth + 1)
        if hidden:
            columns = zip(*(child.sizes for child in hidden), strict=True)
            yield depth + 1, _Node(f"... {len(hidden)} more", [sum(column) for column in columns])

    return list(visible(root, 0))


# ---- printing ------------------------------------------------------------------------------------

# Long enough for the blocks of a usual model (blocks that are alike share a line), short enough
# for one screen.
_LINES = 40

# Nothing but ASCII: a report also goes to logs and to consoles that know no box characters.
_RULES = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)


def _render(report: ConsoleRenderable) -> str:
    width = shutil.get_terminal_size(fallback=(100, 24)).columns
    # Below 60 columns there is no room for a name; above 160 the eye loses the line.
    console = Console(file=io.StringIO(), width=min(max(width, 60), 160), color_system=None)
    with console.capture() as capture:
        console.print(report)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _table() -> Table:
    return Table(box=_RULES, pad_edge=False, show_edge=False, header_style="bold")


def _cell(text: str) -> Text:
    # Text, since a module's name may hold what rich takes for markup.
    return Text(text, no_wrap=True, overflow="ellipsis")


def _name(depth: int, node: _Node) -> Text:
    kind = f" ({node.kind})" if node.kind else ""
    return _cell("  " * depth + node.label + kind)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else ""


def _report_parts(report: MemoryReport, depth: int | None) -> Iterator[ConsoleRenderable]:
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
    yield Text(
        f"apart: parameters {human_bytes(report.parameter_bytes)}, buffers "
        f"{human_bytes(report.buffer_bytes)}, inputs kept {human_bytes(report.input_bytes)}"
    )
    if report.allocated_bytes is not None:
        peak = "not measured" if report.peak_bytes is None else human_bytes(report.peak_bytes)
        yield Text(
            f"CUDA allocator: forward {human_bytes(report.allocated_bytes)}, "
            f"peak of forward and backward {peak}"
        )


def _difference_parts(
    difference: MemoryDifference, depth: int | None
) -> Iterator[ConsoleRenderable]:
    check_depth(depth)
    before, after = difference.before, difference.after
    sizes = before.activation_bytes, after.activation_bytes
    times = f", {sizes[0] / sizes[1]:.2f} times less" if sizes[0] > sizes[1] > 0 else ""
    yield Text(
        f"{before.model} keeps {human_bytes(sizes[0])} before and {human_bytes(sizes[1])} "
        f"after{times}"
    )
    yield _difference_table(difference, depth)
    if before.peak_bytes is not None and after.peak_bytes is not None:
        yield Text(
            f"CUDA allocator: peak {human_bytes(before.peak_bytes)} before, "
            f"{human_bytes(after.peak_bytes)} after"
        )


def _report_table(report: MemoryReport, depth: int | None) -> Table:
    # Levels are asked for to see modules; which operation keeps what is below them.
    with_operations = depth is None
    root = _tree([report], with_operations, depth)
    _condense(root)
    _join_chains(root)
    table = _table()
    table.add_column("module or source line" if with_operations else "module")
    table.add_column("kept", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    if with_operations:
        table.add_column("kept by operation")
    for level, node in _lines(root, _LINES):
        (size,) = node.sizes
        share = _percent(size, report.activation_bytes)
        operation = [_cell(node.operation)] if with_operations else []
        table.add_row(_name(level, node), human_bytes(size), share, *operation)
    return table


def _difference_table(difference: MemoryDifference, depth: int | None) -> Table:
    root = _tree([difference.before, difference.after], with_operations=False, depth=depth)
    _condense(root)
    _join_chains(root)
    table = _table()
    table.add_column("module")
    for title in ("before", "after", "saved", ""):
        table.add_column(title, justify="right", no_wrap=True)
    for level, node in _lines(root, _LINES):
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


def _unshared_note(report: MemoryReport, rows: Sequence[KeptTensor]) -> str:
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


# ---- plotting ------------------------------------------------------------------------------------

# Tableau's ten colours without the grey, which stands for "other".
_COLOURS = (
    "#4e79a7",
    "#f28e2b",
    "#59a14f",
    "#e15759",
    "#76b7b2",
    "#edc948",
    "#b07aa1",
    "#ff9da7",
    "#9c755f",
)
_OTHER = "#bab0ac"


def _draw(report: MemoryReport, path: Path, depth: int | None, by: str, limit: int) -> None:
    keys: dict[str, Callable[[KeptTensor], str]] = {
        "operation": lambda row: short_operation(row.operation),
        "dtype": lambda row: row.dtype,
    }
    if by not in keys:
        raise InputError(f"by is {by!r}; expected 'operation' or 'dtype'")
    if limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 bar")
    if not report.rows:
        raise InputError("nothing is kept for the backward pass, so there is nothing to plot")
    depth = _fitting_depth(report, limit) if depth is None else depth
    bars = _bars(report, depth, limit, keys[by])
    try:
        # The figure alone, without pyplot: no global state, no window, nothing to close.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plotting a report needs matplotlib; install it with: pip install 'packlight[plot]'"
        ) from error

    series = _series(bars)
    unit, scale = _axis_unit(max(sum(bar.values()) for bar in bars.values()))
    height = 1.6 + 0.28 * max(len(bars), 1) + 0.22 * ((len(series) + 3) // 4)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    names = [_bar_name(report, name) for name in bars]
    places = range(len(bars))
    left = [0.0] * len(bars)
    for name, colour in series.items():
        widths = [_size_in(bar, name, series) / scale for bar in bars.values()]
        axes.barh(places, widths, left=left, color=colour, label=name, height=0.8)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, end, bar in zip(places, left, bars.values(), strict=True):
        axes.annotate(
            human_bytes(sum(bar.values())),
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="#444444",
        )
    axes.set_yticks(places, names, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"kept for the backward pass ({unit})")
    axes.set_title(f"{report.model}: {human_bytes(report.activation_bytes)}", loc="left")
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    with replaced(path) as beside:
        figure.savefig(beside, dpi=150)


def _fitting_depth(report: MemoryReport, limit: int) -> int:
    deepest = max(len(row.module.split(".")) for row in report.rows)
    fitting = (n for n in range(deepest, 1, -1) if len(report.by_module(n)) <= limit)
    return next(fitting, 1)


def _bars(
    report: MemoryReport, depth: int | None, limit: int, key: Callable[[KeptTensor], str]
) -> dict[str, dict[str, int]]:
    """Bytes by module and by series, in the order of the forward pass; the smallest are summed."""
    totals = report.by_module(depth)
    largest = set(list(totals)[:limit])
    rest = f"{len(totals) - len(largest)} more"
    bars: dict[str, dict[str, int]] = {}
    others: dict[str, int] = {}
    for row in report.rows:
        name = cut_path(row.module, depth)
        bar = bars.setdefault(name, {}) if name in largest else others
        bar[key(row)] = bar.get(key(row), 0) + row.bytes
    return {**bars, rest: others} if others else bars


# A series below this share of the whole is not seen in any bar.
_VISIBLE = 0.003


def _series(bars: dict[str, dict[str, int]]) -> dict[str, str]:
    """Colour by series, the largest first; what exceeds the palette or is tiny is "other"."""
    totals = _totals(pair for bar in bars.values() for pair in bar.items())
    least = _VISIBLE * sum(totals.values())
    seen = [name for name, size in totals.items() if size >= least][: len(_COLOURS)]
    colours = dict(zip(seen, _COLOURS, strict=False))
    return {**colours, "other": _OTHER} if len(seen) < len(totals) else colours


def _size_in(bar: dict[str, int], name: str, series: dict[str, str]) -> int:
    if name != "other":
        return bar.get(name, 0)
    return sum(size for key, size in bar.items() if key not in series)


def _axis_unit(largest: int) -> tuple[str, int]:
    unit, scale = "B", 1
    for name in ("KiB", "MiB", "GiB", "TiB"):
        if largest < 1024 * scale:
            break
        unit, scale = name, 1024 * scale
    return unit, scale


def _bar_name(report: MemoryReport, path: str, length: int = 40) -> str:
    """The end of a long module path, which says more than its beginning, and the module's type."""
    name = path or report.model
    name = name if len(name) <= length else "..." + name[3 - length :]
    kind = report.module_types.get(path, "")
    return f"{name} ({kind})" if kind else name
