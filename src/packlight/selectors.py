"""Selectors: how a type, a text or a predicate picks layers, and the message if none matches."""

import difflib
import glob
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeAlias

from torch import nn

from packlight import _swap
from packlight.method import Method
from packlight.report.names import without_numbers

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Selector: TypeAlias = type[nn.Module] | str | Predicate
Choice: TypeAlias = Method | Sequence[Method] | None
EVERYTHING = "*"  # the pattern of all names
Methods: TypeAlias = Method | Sequence[Method] | Mapping[Selector, Choice]


class Layer(NamedTuple):
    """A module with all its names, and its type before any conversion."""

    module: nn.Module
    names: tuple[str, ...]
    kind: type[nn.Module]

    def __str__(self) -> str:
        name = self.names[0]
        return f"layer {name!r} ({self.kind.__name__})" if name else f"the {self.kind.__name__}"

    def matches(self, selector: Selector) -> bool:
        if isinstance(selector, str):
            is_named = any(fnmatchcase(name, selector) for name in self.names)
            return is_named or _is_called(self.kind, selector)
        if isinstance(selector, type):
            return self.kind is selector
        return any(selector(name, self.module) for name in self.names)

    @property
    def is_container(self) -> bool:
        """Whether it keeps nothing: a module of views, or one that seems to have only others."""
        if self.kind in _KEEP_NOTHING:
            return True
        parameters = any(True for _ in self.module.parameters(recurse=False))
        return not parameters and any(True for _ in self.module.children())


_KEEP_NOTHING = (
    *(nn.Identity, nn.Flatten, nn.Unflatten),
    # The projection of `nn.MultiheadAttention`, whose own forward never runs.
    nn.modules.linear.NonDynamicallyQuantizableLinear,
    *(nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict),
)


def layers_of(model: nn.Module) -> list[Layer]:
    """Each module once, in the order of the model, with all its names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return [Layer(module, tuple(found), kind_of(module)) for module, found in names.items()]


def _is_called(kind: type[nn.Module], text: str) -> bool:
    """Whether a type has this name: bare, or behind its module or a module that exports it."""
    place, _, name = text.rpartition(".")
    return (
        text in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")
        or getattr(sys.modules.get(place), name, None) is kind
    )


def name_selector(name: str) -> str:
    """The pattern that matches a module of this name and nothing else, no type of that name too."""
    pattern = glob.escape(name)
    return f"[{name[0]}]{name[1:]}" if name.isidentifier() and name[0].isupper() else pattern


# Layers that multiply what they read by their weight, and need both for their gradients.
_WEIGHTED = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)


def with_exact_ends(methods: Methods, layers: Sequence[Layer]) -> Methods:
    """These methods, with None for the first and the last Linear or convolution before them."""
    weighted = [layer for layer in layers if isinstance(layer.module, _WEIGHTED)]
    found: dict[Selector, Choice] = {
        name_selector(layer.names[0]): None for layer in (*weighted[:1], *weighted[-1:])
    }
    others = methods if isinstance(methods, Mapping) else {"*": methods}
    for selector, choice in others.items():
        found.setdefault(selector, choice)
    return found


def kind_of(module: nn.Module) -> type[nn.Module]:
    was = _swap.former(module)
    return type(module) if was is None else was.kind


def text_of(selector: Selector) -> str:
    if isinstance(selector, str):
        return repr(selector)
    return getattr(selector, "__name__", repr(selector))


def inventory(layers: Iterable[Layer]) -> str:
    counts = Counter(layer.kind.__name__ for layer in layers if not layer.is_container)
    kinds = [f"{count} {kind}" for kind, count in counts.most_common()]
    return f"The model has {', '.join(kinds) or 'no layers'}"


def near_misses(selectors: Iterable[Selector], layers: list[Layer]) -> str:
    names = [name for layer in layers for name in layer.names if name]
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    kind_names = [kind.__name__ for kind in kinds]
    candidates = dict.fromkeys([*(without_numbers(name) for name in names), *kind_names, *names])
    # Case does not matter: "gelu" is near "GELU".
    alike: dict[str, list[str]] = {}
    for candidate in candidates:
        alike.setdefault(candidate.lower(), []).append(candidate)
    parts = []
    for selector in selectors:
        near: list[str] = []
        if isinstance(selector, str):
            close = difflib.get_close_matches(selector.lower(), alike, n=3)
            near = [candidate for text in close for candidate in alike[text]][:3]
        elif isinstance(selector, type):
            near = [kind.__name__ for kind in kinds if issubclass(kind, selector)]
        hint = f" (near: {', '.join(near)})" if near else ""
        parts.append(f"{text_of(selector)} matches no module{hint}")
    return "; ".join(parts)
