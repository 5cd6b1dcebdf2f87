"""What `packlight codebook` does: a few-bit codebook of a function, as text, JSON and a picture."""

import argparse
import difflib
import inspect
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from packlight.cli.models import brief
from packlight.cli.models.python import imported
from packlight.errors import InputError, PacklightError
from packlight.fewbit.activations import CONTINUOUS, EXACT
from packlight.fewbit.codebook import Codebook, Weight, fit_codebook
from packlight.fewbit.codebook.curves import Array
from packlight.fewbit.method import FewBit
from packlight.method_files import format_methods, shortened


def codebook(arguments: argparse.Namespace) -> None:
    """`packlight codebook`: fits, prints and draws."""
    f = _function(arguments.function)
    domain = None if arguments.domain is None else tuple(arguments.domain)
    try:
        book = fit_codebook(
            f,
            arguments.bits,
            domain=domain,
            weight=_weight(arguments.weight),
            objective=arguments.objective,
            pin_tails=arguments.pin_tails and "where_bounded",
        )
    except PacklightError:
        raise
    except Exception as error:  # someone's function: anything can happen
        raise InputError(
            f"{arguments.function} failed on a float64 tensor of one dimension: {brief(error)}"
        ) from error
    if arguments.plot is not None:
        book.plot(arguments.plot, f)
    method = format_methods(FewBit(codebook=book))
    if arguments.json:
        data = {"function": arguments.function, "weight": arguments.weight, **book.to_dict()}
        print(json.dumps({**data, "method": method}, indent=1))
        return
    print(_text(book, arguments))
    if arguments.plot is not None:
        print(f"{arguments.plot} written")
    print(f"as a method, for --method, methods files and Python:\n{method}")


def _function(text: str) -> Callable[[Tensor], Tensor]:
    """A function of packlight's by its name, or one of the user's by `MODULE:NAME`."""
    if text in CONTINUOUS:
        row = CONTINUOUS[text]
        return lambda x: row.function(x, *row.parameters.values())
    if text in EXACT:
        raise InputError(
            f"the derivative of {text} is a step function: it is kept exactly in "
            f"{EXACT[text].bits} bit, and needs no codebook"
        )
    module, colon, name = text.partition(":")
    if not (colon and re.fullmatch(r"[\w.]+", module) and re.fullmatch(r"[\w.]+", name)):
        near = difflib.get_close_matches(text, CONTINUOUS, n=1)
        hint = f" (near: {near[0]})" if near else ""
        raise InputError(
            f"unknown function {shortened(text)}{hint}; expected one of "
            f"{', '.join(sorted(CONTINUOUS))}, or MODULE:NAME in Python"
        )
    found: Any = imported(module, name)
    if inspect.isclass(found) and issubclass(found, nn.Module):
        try:
            found = found()
        except TypeError as error:
            raise InputError(f"{text} cannot be made without arguments: {brief(error)}") from error
    if not callable(found):
        raise InputError(f"{text} is a {type(found).__name__}; expected a function of a tensor")
    function: Callable[[Tensor], Tensor] = found
    return function


def _weight(text: str) -> Weight:
    """`uniform`, `normal:SIGMA`, or a file of samples that NumPy wrote."""
    name, _, number = text.partition(":")
    if text == "uniform":
        return text
    if name == "normal":
        try:
            return name, float(number)
        except ValueError:
            raise InputError(f"--weight {shortened(text)} has no number: normal:3") from None
    if Path(text).suffix != ".npy":
        raise InputError(
            f"--weight {shortened(text)}: expected uniform, normal:SIGMA, or a .npy file of samples"
        )
    try:
        samples: Array = np.load(text, allow_pickle=False).reshape(-1)
        return samples
    except (OSError, ValueError) as error:
        raise InputError(f"{text} cannot be read as samples: {error}") from error


def _text(book: Codebook, arguments: argparse.Namespace) -> str:
    where = f" about {book.center:g}" if book.center else ""
    kind = "" if book.parity == "none" else f"; f' is {book.parity}{where}"
    low, high = book.domain
    lines = [
        f"{arguments.function}, {book.bits} bits: the integral of w (f' - q)^2 over ({low:g},"
        f" {high:g}) is {book.error:g}{kind}",
        f"{'from':>10} {'to':>10} {'level':>10}",
    ]
    t = [*book.borders]
    if book.parity != "none":
        t = sorted({-border for border in t} | {*t} | ({0.0} if book.parity == "odd" else set()))
    ends = [low, *(book.center + border for border in t), high]
    for left, right in itertools.pairwise(ends):
        level = float(book.derivative((left + right) / 2))
        lines.append(f"{left:10.4f} {right:10.4f} {level:10.4f}")
    return "\n".join(lines)
