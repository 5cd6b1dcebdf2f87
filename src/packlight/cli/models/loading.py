"""Models by a text: `load_model`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from packlight.cli.models.inputs import Inputs
from packlight.cli.models.loaded import LoadedModel
from packlight.cli.models.python import from_python
from packlight.cli.models.transformers import from_transformers
from packlight.errors import InputError
from packlight.method_files import shortened


def load_model(
    text: str,
    inputs: Inputs | None = None,
    *,
    task: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: str = "meta",
) -> LoadedModel:
    """The model that a text stands for, with the inputs to call it with.

    On another device than "meta" it has values, and so must have what a text stands for: it is
    MODULE:NAME then, since configurations have none.

    `task` picks the head of a model of transformers (None: the one it is usually trained with);
    labels are among its inputs, so the loss is part of the forward pass. `config` changes its
    configuration, or is passed to a function by name. `dtype` is that of the parameters.

    Raises `InputError` for what is not there or cannot be made, `MissingDependencyError` where
    transformers is needed and not installed.
    """
    inputs = inputs or Inputs()
    if text.startswith("hf:") or (text and Path(text).is_dir()):
        if device != "meta":
            raise InputError(
                f"{shortened(text)} is a configuration without weights and without a batch; write a"
                " function that returns a model, its batch and a loss, and give it as MODULE:NAME"
            )
        return from_transformers(text, inputs, task, config or {}, dtype)
    module, colon, name = text.partition(":")
    if not (colon and re.fullmatch(r"[\w.]+", module) and re.fullmatch(r"[\w.]+", name)):
        raise InputError(
            f"unknown model {shortened(text)}{_near(text)}; expected hf:TYPE (such as hf:roberta),"
            " a directory with a config.json, hf:OWNER/NAME, or MODULE:NAME in Python"
        )
    if task is not None:
        raise InputError(f"a task is for models of transformers, and {text} makes its own model")
    return from_python(text, module, name, inputs, config or {}, dtype, device)


def _near(text: str) -> str:
    """How the name of a model, or of a file of Python, is written here."""
    if text.endswith(".py"):
        return f" (near: {shortened(Path(text).stem, '')}:NAME)"
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", text):
        return f" (near: hf:{shortened(text, '')})"
    return ""
