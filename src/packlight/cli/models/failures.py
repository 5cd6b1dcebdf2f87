"""Errors of other people's models, in one line."""

import importlib
import os
import traceback

import torch

import packlight


def brief(error: BaseException) -> str:
    """An error in one line: its type, its first words, and the last line outside of torch."""
    words = " ".join(str(error).split())
    shown = words if len(words) <= _WORDS else words[: _WORDS - 3] + "..."
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith(_OWN)]
    where = f" ({os.path.basename(outside[-1].filename)}:{outside[-1].lineno})" if outside else ""
    return f"{type(error).__name__}: {shown}{where}"


_WORDS = 300
_OWN = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(packlight.__file__) + os.sep,
    os.path.dirname(importlib.__file__) + os.sep,
    "<frozen importlib",
)
