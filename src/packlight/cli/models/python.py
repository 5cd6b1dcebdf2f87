"""Models that a Python function returns, alone or with their inputs."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from packlight.cli.models.failures import brief
from packlight.cli.models.inputs import Inputs, input_of
from packlight.cli.models.loaded import LoadedModel
from packlight.cli.models.transformers import sized_inputs
from packlight.errors import InputError


def from_python(
    text: str,
    module: str,
    name: str,
    inputs: Inputs,
    config: Mapping[str, Any],
    dtype: torch.dtype | None,
    device: str = "meta",
) -> LoadedModel:
    with _current_directory_importable():
        made = _called(text, _attribute(module, name), config, device)
    parts = made if isinstance(made, tuple) else (made,)
    model, given, loss = (*parts, None, None, None)[:3] if len(parts) < 4 else (made, None, None)
    if not isinstance(model, nn.Module) or not (loss is None or callable(loss)):
        raise InputError(
            f"{text} returned a {type(made).__name__}; expected an nn.Module, or a pair of a module"
            " and its inputs, with a loss of both behind them if there is one"
        )
    if loss is not None and device == "meta":
        raise InputError(
            f"{text} brings a loss of model and batch, which gradient-error takes; here a function"
            " returns the module and its inputs alone"
        )
    if device != "meta":
        model = model.to(device)  # what was made before the call, or inside a context of its own
    if dtype is not None:
        model = model.to(dtype)
    if given is None:
        arguments, keywords = _made_inputs(text, model, inputs)
    elif inputs.sizes or inputs.shapes:
        raise InputError(f"{text} brings its own inputs, whose sizes no option changes")
    else:
        arguments, keywords = _given_inputs(given, dtype)
    single = given is not None and not isinstance(given, Mapping | tuple | list)
    batch = keywords or (arguments[0] if single else arguments)
    return LoadedModel(text, model, arguments, keywords, batch=batch, loss=loss)


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    """As `python -m` has it; a script such as `packlight` only sees what is installed."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)


def imported(module: str, name: str) -> Any:
    """What a module calls so. Raises `InputError` where there is none, or its import fails."""
    with _current_directory_importable():
        return _attribute(module, name)


def _attribute(module: str, name: str) -> Any:
    try:
        value: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise InputError(f"importing {module} failed: {brief(error)}") from error
        raise InputError(
            f"no module {error.name!r}, neither in this directory nor installed"
        ) from error
    except Exception as error:  # someone's module: anything can happen
        raise InputError(f"importing {module} failed: {brief(error)}") from error
    for part in name.split("."):
        if not hasattr(value, part):
            near = difflib.get_close_matches(part, dir(value), n=3)
            hint = f" (near: {', '.join(near)})" if near else ""
            raise InputError(f"{module} has no {part!r}{hint}")
        value = getattr(value, part)
    return value


def _called(text: str, value: Any, config: Mapping[str, Any], device: str) -> Any:
    if isinstance(value, nn.Module):
        if config:
            raise InputError(f"{text} is a module already, so there is nothing to configure")
        return value
    if not callable(value):
        raise InputError(f"{text} is a {type(value).__name__}; expected a function or a module")
    try:
        inspect.signature(value).bind(**config)
    except (TypeError, ValueError) as error:
        # ValueError: a type of Python's own that tells nothing of its arguments.
        raise InputError(f"{text} cannot be called so: {error}") from error
    try:
        with torch.device(device):
            return value(**config)
    except Exception as error:  # someone's function: anything can happen
        if device != "meta":
            raise InputError(f"{text} cannot be made on {device}: {brief(error)}") from error
        raise InputError(
            f"{text} cannot be made on the meta device: {brief(error)}; what needs values can stand"
            ' inside `with torch.device("cpu"):`'
        ) from error


def _given_inputs(given: Any, dtype: torch.dtype | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as a function returned them: keywords, positional ones, or one alone."""

    def cast(value: Any) -> Any:
        is_cast = dtype is not None and isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_cast else value

    if isinstance(given, Mapping):
        return (), {name: cast(value) for name, value in given.items()}
    values = given if isinstance(given, tuple | list) else (given,)
    return tuple(cast(value) for value in values), {}


def _made_inputs(
    text: str, model: nn.Module, inputs: Inputs
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs.shapes:
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        shapes = [(shape.sizes, shape.dtype or own) for shape in inputs.shapes]
        return tuple(input_of(sizes, dtype) for sizes, dtype in shapes), {}
    if _is_pretrained(model):
        return (), sized_inputs(model, None, inputs.sizes)
    raise InputError(
        f"{text} has no inputs; give their shapes, --input 8x3x224x224 or --input 8x128:int64, or"
        " return a pair of the module and its inputs"
    )


def _is_pretrained(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)
