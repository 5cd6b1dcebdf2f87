"""What `packlight.profile` found: plain numbers and names that print, plot, subtract and save."""

import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from rich.console import Console, ConsoleOptions, Group, RenderResult

from packlight._version import __version__
from packlight.errors import InputError
from packlight.report.page import write_page
from packlight.report.plotting import draw
from packlight.report.printing import difference_parts, render, report_parts
from packlight.report.words import add_up, cut_path, human_bytes

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
        return add_up((cut_path(row.module, depth), row.bytes) for row in self.rows)

    def by_module_type(self) -> dict[str, int]:
        """Bytes by the class name of the module that keeps them, largest first."""
        return add_up((row.module_type, row.bytes) for row in self.rows)

    def by_operation(self) -> dict[str, int]:
        """Bytes by the name of the autograd node that keeps them, largest first."""
        return add_up((row.operation, row.bytes) for row in self.rows)

    def by_dtype(self) -> dict[str, int]:
        """Bytes by dtype, largest first."""
        return add_up((row.dtype, row.bytes) for row in self.rows)

    def by_device(self) -> dict[str, int]:
        """Bytes by the device they lie on, largest first."""
        return add_up((row.device, row.bytes) for row in self.rows)

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
        draw(self, Path(path), depth, by, limit)

    def __repr__(self) -> str:
        return (
            f"MemoryReport(model={self.model!r}, activation_bytes={self.activation_bytes}, "
            f"rows=<{len(self.rows)}>)"
        )

    def to_text(self, depth: int | None = None) -> str:
        """The printed report; with a `depth`, of modules down to so many levels only."""
        return render(Group(*report_parts(self, depth)))

    def to_html(
        self,
        path: str | os.PathLike[str],
        about: Mapping[str, str] | None = None,
        *,
        further: str = "",
    ) -> None:
        """Write a page to look at in a browser: a zoomable map of the bytes, and a table.

        `about` is what the page says of the measurement by names of yours, {"batch": "8 x 4096"},
        beside dtypes, devices, versions and the date. `further` is HTML to follow; what
        `packlight profile` writes has memory over a step there.
        """
        reports = {"before": asdict(self), "after": None}
        write_page(path, self.model, reports, {**(about or {}), **_facts(self)}, further)

    def __str__(self) -> str:
        return render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from report_parts(self, None)


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
        return render(Group(*difference_parts(self, depth)))

    def to_html(
        self,
        path: str | os.PathLike[str],
        about: Mapping[str, str] | None = None,
        *,
        further: str = "",
    ) -> None:
        """Write a page to look at in a browser: zoomable maps of both reports, and a table.

        `about` and `further` are as in `MemoryReport.to_html`.
        """
        reports = {"before": asdict(self.before), "after": asdict(self.after)}
        facts = {**(about or {}), **_facts(self.before)}
        write_page(path, self.before.model, reports, facts, further)

    def __str__(self) -> str:
        return render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from difference_parts(self, None)


def _facts(report: MemoryReport) -> dict[str, str]:
    """What a page says of every report."""
    sizes = report.by_dtype()
    return {
        "kept in": ", ".join(f"{name} {human_bytes(size)}" for name, size in sizes.items()),
        "device": ", ".join(report.by_device()),
        "versions": f"packlight {__version__}, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
    }


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
