"""`calibrate`: codebooks fitted to what the activations of a model read."""

import contextlib
import dataclasses
import functools
import glob
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from scipy.special import ndtr
from torch import Tensor, nn

from packlight import _swap, graphs, integrations
from packlight.batches import call
from packlight.errors import InputError
from packlight.fewbit.codebook import Codebook, check_bits, fit_codebook
from packlight.fewbit.codebook.curves import Array, by_autograd
from packlight.fewbit.codebook.defaults import DEFAULT_RULE
from packlight.fewbit.codebook.table import DEFAULT_DOMAIN
from packlight.fewbit.method import FewBit
from packlight.fewbit.modules import Coded
from packlight.fewbit.rules import function_of
from packlight.method import NotConverted, find_rule
from packlight.profile.restoring import left_as_found
from packlight.profile.scene import scene_of
from packlight.report.printing import cell, new_table, render
from packlight.selectors import Layer, layers_of

# Bins of a layer's histogram, of about equally many values: a codebook has far fewer intervals.
_BINS = 256


@dataclasses.dataclass(frozen=True)
class CalibratedLayer:
    """What an activation layer read, and what two codebooks make of its gradient.

    `counts` and `edges` are the histogram, as `numpy.histogram` returns one. An error is the root
    of E[(f' - q)^2] / E[f'^2] over the values read: the relative error of the layer's input
    gradient, where the output gradient does not depend on the value. `default_error` is that of the
    codebook that packlight ships.
    """

    name: str
    kind: str
    counts: tuple[float, ...] = dataclasses.field(repr=False)
    edges: tuple[float, ...] = dataclasses.field(repr=False)
    codebook: Codebook
    error: float
    default_error: float


class Calibration(Mapping[str, FewBit]):
    """A method for each activation layer by its name, as `convert` and `save_methods` take them.

    Prints as a table of errors; `layers` has what was measured. With methods for other layers:
    `convert(model, {**calibration, "*": GroupQuant(4)})`.
    """

    def __init__(self, layers: Iterable[CalibratedLayer]) -> None:
        self.layers = tuple(layers)
        # A name may hold what a pattern of names takes for a sign.
        self._methods = {
            glob.escape(one.name): FewBit(codebook=one.codebook) for one in self.layers
        }

    def __getitem__(self, name: str) -> FewBit:
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    def __repr__(self) -> str:
        return f"Calibration(<{len(self)}>)"

    def __str__(self) -> str:
        return render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("Relative error of the gradient, by layer and codebook")
        table = new_table()
        for title in ("layer", "inputs, 1% to 99%", "default", "calibrated", ""):
            table.add_column(title, justify="left" if title == "layer" else "right", no_wrap=True)
        for one in self.layers:
            low, high = _quantiles(one, 0.01, 0.99)
            table.add_row(
                cell(f"{one.name} ({one.kind})"),
                f"{low:.2f} to {high:.2f}",
                f"{one.default_error:.4f}",
                f"{one.error:.4f}",
                f"{one.default_error / one.error:.2f}x less" if one.error else "",
            )
        yield table


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    bits: int = 3,
    *,
    default_share: float = 0.1,
    run: Callable[[Any], Any] | None = None,
) -> Calibration:
    """A codebook for each activation layer, fitted to the values that it reads in these batches.

        calibration = packlight.fewbit.calibrate(model, batches)
        print(calibration)  # the gradient's error by layer, beside that of the default codebook
        packlight.convert(model, calibration)

    The weight of a layer's codebook is the histogram of what it read, mixed with the weight of the
    default codebooks, N(0, 3^2): w = (1 - share) histogram + share N(0, 3^2). Training moves the
    inputs of activations, and where no value was read a codebook knows of no error: so calibrate a
    model that has been trained a little, and again if it goes on for long. Some batches suffice:
    every value counts, rounded to bfloat16, and 64 Ki counters a layer are kept.

    The layers are those that `FewBit` takes and whose derivative is no step function; calls of
    functions in a model's own code are none (`FewBit(bits, weight=...)` serves these). Layers that
    no batch reaches are not in the answer. A layer used in several places has one codebook.

    The model runs without gradients, in the mode it is in, converted or not, and compiled parts run
    uncompiled. Buffers and random number generators are left as they were, as `profile` has it.

    Args:
        batches: what the model is called with: a tensor, a sequence of arguments, or a mapping of
            keywords.
        bits: code length, 1 to 8.
        default_share: from 0 to 1.
        run: what to do with a batch in place of calling the model with it, for instance
            `lambda batch: model(batch[0])` where labels come with it.

    Raises `InputError` where the model has no such layer, no batch reaches one, or a layer read
    nothing finite.
    """
    check_bits(bits)
    if not 0 <= default_share <= 1:
        raise InputError(f"default_share={default_share!r} is no share, from 0 to 1")
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected an nn.Module")
    integrations.load()
    layers = [layer for layer in layers_of(model) if _is_coded(layer)]
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no activation layer with a codebook; of calls of functions"
            " in its own code FewBit(bits, weight=samples) takes the weight of all"
        )
    counts = _counted(model, layers, batches, run or functools.partial(call, model))
    found = [(layer, counts[layer.module]) for layer in layers if layer.module in counts]
    if not found:
        raise InputError("no batch reached an activation layer; give at least one batch")
    defaults: dict[tuple[type[nn.Module], str], Codebook] = {}
    return Calibration([_fitted(layer, of, bits, default_share, defaults) for layer, of in found])


def _is_coded(layer: Layer) -> bool:
    rule = find_rule(FewBit(), layer.kind)
    if rule is None:
        return False
    try:
        return issubclass(rule(FewBit(), _swap.plain(layer.module)).kind, Coded)
    except NotConverted:
        return False


# ---- what layers read ----------------------------------------------------------------------------

_PATTERNS = 2**16  # of a bfloat16


def _counted(
    model: nn.Module, layers: list[Layer], batches: Iterable[Any], run: Callable[[Any], Any]
) -> dict[nn.Module, Tensor]:
    """By layer, how often each bfloat16 was read, in the order of their bits as int16."""
    counts: dict[nn.Module, Tensor] = {}

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        bits = x.detach().to(torch.bfloat16).reshape(-1).view(torch.int16).int() + _PATTERNS // 2
        found = torch.bincount(bits, minlength=_PATTERNS)
        counts[module] = counts[module] + found if module in counts else found

    with contextlib.ExitStack() as stack:
        stack.enter_context(graphs.set_aside(model))
        if "torch._dynamo" in sys.modules:  # compiled code would not run the hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(left_as_found(scene_of(model, None, (), {})))
        stack.enter_context(torch.no_grad())
        for layer in layers:
            handle = layer.module.register_forward_pre_hook(count, with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            run(batch)
    return counts


def _shares(layer: Layer, counts: Tensor) -> tuple[Array, Array]:
    """The distinct finite values that a layer read, in order, and their shares of all."""
    patterns = torch.arange(-_PATTERNS // 2, _PATTERNS // 2, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.bfloat16).double().numpy()
    number = counts.cpu().double().numpy()
    read = (number > 0) & np.isfinite(values)
    if not read.any():
        raise InputError(f"{layer} read no finite value, so no codebook can be fitted to them")
    values, place = np.unique(values[read], return_inverse=True)  # the two zeros are one
    number = np.bincount(place, number[read])
    return values, number / number.sum()


# ---- the codebooks -------------------------------------------------------------------------------


def _fitted(
    layer: Layer,
    counts: Tensor,
    bits: int,
    default_share: float,
    defaults: dict[tuple[type[nn.Module], str], Codebook],
) -> CalibratedLayer:
    plain = _swap.plain(layer.module)
    f, key = function_of(plain), (layer.kind, plain.extra_repr())
    if key not in defaults:
        defaults[key] = fit_codebook(f, bits, weight=DEFAULT_RULE["weight"])
    values, share = _shares(layer, counts)
    histogram = _histogram(values, share)
    book = fit_codebook(f, bits, weight=_mixed(*histogram, default_share))
    slope = by_autograd(f)(values)

    def error(of: Codebook) -> float:
        whole = float(share @ slope**2)
        return math.sqrt(share @ (slope - of.derivative(values)) ** 2 / whole) if whole else 0.0

    found, edges = (tuple(part.tolist()) for part in histogram)
    name, kind = layer.names[0], layer.kind.__name__
    return CalibratedLayer(name, kind, found, edges, book, error(book), error(defaults[key]))


def _histogram(values: Array, share: Array) -> tuple[Array, Array]:
    """Shares of bins of about equally many values, and their edges.

    The few values beyond four times what holds all but a thousandth, and beyond the default domain,
    count as at its end: an outlier would leave the fit no resolution.
    """
    size, order = abs(values), np.argsort(abs(values))
    most = size[order][np.searchsorted(np.cumsum(share[order]), 0.999).clip(max=len(size) - 1)]
    limit = max(DEFAULT_DOMAIN[1], 4 * most)
    below = np.cumsum(share)
    cuts = np.unique(np.searchsorted(below, np.linspace(0, 1, _BINS + 1)[1:-1]))
    cuts = cuts[cuts < len(values) - 1]
    step = max(abs(values[0]), abs(values[-1]), 1e-30) * 2**-9  # half a bfloat16's
    ends = values[0] - step, values[-1] + step
    edges = np.array([ends[0], *(values[cuts] + values[cuts + 1]) / 2, ends[1]])
    edges = np.unique(np.clip(edges, -limit, limit))
    counts, _ = np.histogram(values.clip(*edges[[0, -1]]), edges, weights=share)
    return counts, edges


def _mixed(counts: Array, edges: Array, default_share: float) -> tuple[Array, Array]:
    """The histogram of a mixture with the default weight."""
    _, sigma = DEFAULT_RULE["weight"]
    cells = np.union1d(edges, np.linspace(*DEFAULT_DOMAIN, 129))
    below = np.interp(cells, edges, np.concatenate(([0.0], np.cumsum(counts))))
    normal = ndtr(cells / sigma)
    return (1 - default_share) * np.diff(below) + default_share * np.diff(normal), cells


def _quantiles(one: CalibratedLayer, *shares: float) -> list[float]:
    below = np.concatenate(([0.0], np.cumsum(one.counts)))
    return [float(value) for value in np.interp(shares, below / below[-1], one.edges)]
