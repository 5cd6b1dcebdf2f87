"""What is there before the forward pass: modules by name, tensors that are no activations."""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from packlight import _torch
from packlight._torch.attributes import plain_attributes
from packlight.errors import InputError
from packlight.profile.lines import is_internal
from packlight.profile.tensors import dictionary, has_values, tensors_in
from packlight.report import KeptTensor

_T = TypeVar("_T")


class Place(NamedTuple):
    """Where in the model the forward pass stands."""

    path: str
    kind: str


@dataclasses.dataclass
class Scene:
    """The modules with their names, and the tensors that are no activations."""

    places: dict[nn.Module, Place]
    root: Place
    loss_place: Place
    # References, not lists made when needed: while these live, no activation can take the address
    # of one of their storages.
    arguments: list[Tensor]
    parameters: list[nn.Parameter]
    buffers: list[Tensor]

    def modules(self) -> Iterable[nn.Module]:
        return self.places.keys()

    def cuda_devices(self) -> list[torch.device]:
        return [device for device in self.devices() if device.type == "cuda"]

    def devices(self) -> list[torch.device]:
        tensors = (*self.parameters, *self.buffers, *self.arguments)
        return sorted({tensor.device for tensor in tensors if has_values(tensor)}, key=str)

    def types_above(self, rows: Iterable[KeptTensor]) -> dict[str, str]:
        """Class names of the modules on the way to each row."""
        kinds = {place.path: place.kind for place in self.places.values()}
        found: dict[str, str] = {}
        for row in rows:
            parts = row.module.split(".")
            for depth in range(1, len(parts) + 1):
                path = ".".join(parts[:depth])
                if path and path in kinds:
                    found[path] = kinds[path]
        return found


def scene_of(
    model: Callable[..., Any],
    loss: Callable[..., Tensor] | None,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Scene:
    places: dict[nn.Module, Place] = {}
    arguments = list(tensors_in((inputs, kwargs)))
    _discover(model, "", places, arguments)
    loss_kind = "" if loss is None else name_of(loss)
    if loss is not None:
        _discover(loss, "(loss)", places, arguments)
    for module, place in places.items():
        for name, parameter in module.named_parameters(recurse=False):
            if nn.parameter.is_lazy(parameter):
                raise InputError(
                    f"parameter {name} of module {place.path!r} is not initialised yet, and "
                    "profile leaves a model as it is; run one forward pass first"
                )
    root = Place("", type(model).__name__ if isinstance(model, nn.Module) else "")
    return Scene(
        places,
        root,
        Place("(loss)", loss_kind),
        arguments,
        _unique(p for module in places for p in module.parameters(recurse=False)),
        _unique(t for module in places for t in buffers_of(module)),
    )


def _unique(values: Iterable[_T]) -> list[_T]:
    return list({id(value): value for value in values}.values())


def buffers_of(module: nn.Module) -> Iterator[Tensor]:
    """Registered buffers, and tensors that the module holds as plain attributes."""
    yield from module.buffers(recurse=False)
    yield from tensors_in(plain_attributes(module), objects=False)


def _discover(
    function: object, prefix: str, places: dict[nn.Module, Place], arguments: list[Tensor]
) -> None:
    """Name the modules of a model or loss, and find the tensors a function brings along."""
    for name, value in _reachable(function).items():
        path = ".".join(part for part in (prefix, name) if part)
        if isinstance(value, nn.Module):
            for inner, module in value.named_modules(prefix=path):
                places.setdefault(module, Place(inner, type(module).__name__))
        else:
            arguments.extend(tensors_in(value, objects=False))


def _reachable(function: object) -> dict[str, object]:
    """What a callable refers to: itself if it is a module, else its variables by their names."""
    found: dict[str, object] = {}
    pending, seen = [function], set[int]()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[""] = item
        elif isinstance(item, functools.partial):
            found.update({str(index): value for index, value in enumerate(item.args)})
            found.update(item.keywords)
            pending.append(item.func)
        elif inspect.ismethod(item):
            pending.append(item.__self__)
        elif inspect.isfunction(item):
            variables = _variables(item)
            found.update(variables)
            # A function that it calls may be the one that names the model.
            pending.extend(value for value in variables.values() if inspect.isfunction(value))
            for name, value in variables.items():
                found.update(_attributes_of(value, f"{name}."))
        else:
            found.update(_attributes_of(item, ""))
    return found


def _variables(function: types.FunctionType) -> dict[str, object]:
    """Closure cells and the globals that the code names; none of torch's own functions."""
    code = _torch.code_of(function)
    if code is None or is_internal(code.co_filename):
        return {}
    found = {name: function.__globals__.get(name) for name in code.co_names}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # the variable has no value yet
            continue
    return found


def _attributes_of(value: object, prefix: str) -> dict[str, object]:
    """One level into an object, such as a trainer that holds the model."""
    if isinstance(value, nn.Module | Tensor | type | types.ModuleType) or inspect.isroutine(value):
        return {}
    return {f"{prefix}{name}": part for name, part in dictionary(value).items()}


def name_of(function: Callable[..., Any]) -> str:
    kind = type(function).__name__
    return kind if isinstance(function, nn.Module) else getattr(function, "__name__", kind)
