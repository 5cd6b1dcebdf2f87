"""Results are data: one JSON object a line, with what is needed to read it years later."""

import json
import pathlib
import platform
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

RESULTS = pathlib.Path(__file__).parent / "results"


class Case(NamedTuple):
    """Something to measure, and the fields by which its row is found again."""

    name: str  # what --filter is matched with
    out: str  # the file among the results
    key: dict[str, Any]
    measure: Callable[[], dict[str, Any]]
    seconds: float  # a guess, until a row says how long it took
    hidden: bool = False  # run only where --filter asks for it


def same_case(row: dict[str, Any], case: Case) -> bool:
    """Whether a row is of this case, whenever and wherever it was measured."""
    return all(row.get(name) == value for name, value in case.key.items())


def commit() -> str:
    """The commit that is checked out, with "+" if the tree differs from it."""
    git = ["git", "-C", str(RESULTS.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def settings(device: str, at: str | None = None) -> dict[str, Any]:
    """Device, versions and commit of a run; `at` names the commit where git cannot."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": at or commit(),
    }


def append(path: pathlib.Path, row: dict[str, Any]) -> None:
    """Writes a row at once, so that a run cut short keeps what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """All rows of a file, none if it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
