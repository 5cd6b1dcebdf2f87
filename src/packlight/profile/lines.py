"""Lines of source, as a report names them."""

import functools
import os
import sys
from pathlib import Path

import torch

import packlight

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PACKLIGHT = os.path.dirname(packlight.__file__) + os.sep


def is_internal(filename: str) -> bool:
    return filename.startswith((_TORCH, _PACKLIGHT))


def _cell(filename: str) -> str | None:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    named = None if shell is None else shell.compile.format_code_name(filename)
    return None if named is None else str(named[1])


@functools.cache
def short_path(filename: str) -> str:
    """A file's path below the working directory or below the import path that it comes from.

    A cell of a notebook has a file of a made-up name, and is called "In[5]", as it is there.
    """
    if cell := _cell(filename):
        return cell
    roots = [Path.cwd(), *(Path(entry) for entry in sys.path if entry)]
    inside = [root for root in roots if Path(filename).is_relative_to(root)]
    if not inside:
        return filename
    return Path(filename).relative_to(max(inside, key=lambda root: len(root.parts))).as_posix()
