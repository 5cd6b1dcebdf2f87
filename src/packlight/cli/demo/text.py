"""The demo's text, the source of Python's standard library, and the batches made of it."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from packlight.cli.demo.settings import Settings
from packlight.errors import InputError

# Other people's packages, tests, and tables of data.
SKIPPED = {
    *("__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data"),
    *("site-packages", "test", "tests", "turtledemo"),
}


class Text(NamedTuple):
    """Training and validation text as uint8 tensors; no file is in both."""

    training: Tensor
    validation: Tensor


def load_text(root: Path | None = None) -> Text:
    """All Python files under `root` (default: the standard library), every 20th for validation."""
    root = root or Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    files = [path.read_bytes().replace(b"\r\n", b"\n") for path in paths]
    validation = bytearray().join(files[::20])
    training = bytearray().join(data for index, data in enumerate(files) if index % 20)
    if not training:
        raise InputError(
            f"there are {len(files)} Python files under {root}, too few to train on; "
            "this demo reads the source files of Python's standard library: install them"
        )
    return Text(
        torch.frombuffer(training, dtype=torch.uint8),
        torch.frombuffer(validation, dtype=torch.uint8),
    )


def windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [len(starts), length]: the target of a byte is the byte after it."""
    found = text[starts[:, None] + torch.arange(length + 1)].long()
    return found[:, :-1], found[:, 1:]


def training_batches(text: Text, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` random batches, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    last = len(text.training) - settings.context
    for _ in range(settings.steps):
        starts = torch.randint(last, (settings.batch,), generator=generator)
        yield windows(text.training, starts, settings.context)


def validation_batches(text: Text, settings: Settings) -> list[tuple[Tensor, Tensor]]:
    """8 batches evenly spread over the validation text, the same ones for every seed."""
    count = 8 * settings.batch
    last = len(text.validation) - settings.context - 1
    starts = torch.arange(count) * last // count
    return [windows(text.validation, part, settings.context) for part in starts.chunk(8)]
