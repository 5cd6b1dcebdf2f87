"""The codebooks that layers take where none is given: shipped in codebooks.json, or solved."""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any, TypedDict

from packlight import _torch
from packlight.errors import InputError
from packlight.fewbit.activations import CONTINUOUS
from packlight.fewbit.codebook.fitting import fit_codebook
from packlight.fewbit.codebook.symmetry import PinTails
from packlight.fewbit.codebook.table import Codebook, check_bits


class Rule(TypedDict):
    """How default codebooks weigh inputs and treat tails; the arguments of `fit_codebook`."""

    weight: tuple[str, float]
    pin_tails: PinTails


# The rule of `default_codebook`, by experiment (benchmarks/codebook_choice.py, NOTES.md 4): no rule
# trains better than another by more than the noise, not even at 2 bits; this one has the best mean
# loss on the CPU, is in the middle on the GPU, and its gradient error is a fifth below uniform's at
# 2 bits and level with it at 1 and 3. The shipped file is built with it: after a change run
# `python tools/build_codebooks.py`. Where it pins tails, a side on which f' has no finite limit
# (the right of relu_squared) keeps a free level: no constant is right there, and the mean of the
# domain's end errs least.
DEFAULT_RULE: Rule = {"weight": ("normal", 3.0), "pin_tails": False}


@dataclasses.dataclass(frozen=True)
class Weighted:
    """In place of a codebook: the one of whatever function it is for, fitted under this weight."""

    weight: Any


def default_codebook(
    name: str, bits: int, parameters: tuple[float, ...] = (), weighted: Weighted | None = None
) -> Codebook:
    """The codebook of a function of `activations.CONTINUOUS` under `DEFAULT_RULE`.

    `weighted` has another weight than the rule. `parameters` are the function's, in order; empty
    means its defaults. Default books come from the shipped file; others, say of ELU(alpha=0.3), are
    solved when first asked for (a fraction of a second) and kept in memory. Raises `InputError` for
    an unknown name or number of parameters.
    """
    check_bits(bits)
    if name not in CONTINUOUS:
        raise InputError(
            f"no codebook for {name!r}; functions with one: {', '.join(sorted(CONTINUOUS))}. "
            "For another, call fit_codebook"
        )
    defaults = tuple(CONTINUOUS[name].parameters.values())
    parameters = tuple(float(parameter) for parameter in parameters) or defaults
    if len(parameters) != len(defaults):
        raise InputError(
            f"{name} with parameters {parameters}; it takes {len(defaults)} "
            f"({', '.join(CONTINUOUS[name].parameters) or 'none'}): pass all of them, or none"
        )
    if parameters == defaults and weighted is None:
        return _shipped_codebooks()[name, bits]
    with _torch.with_values():  # a model may be built and traced without data
        return _solved_codebook(name, bits, parameters, weighted)


def solve_default(
    name: str, bits: int, parameters: tuple[float, ...], weighted: Weighted | None = None
) -> Codebook:
    """Solves what `default_codebook` looks up."""
    function = CONTINUOUS[name].function
    return fit_codebook(
        lambda x: function(x, *parameters),
        bits,
        weight=DEFAULT_RULE["weight"] if weighted is None else weighted.weight,
        pin_tails="where_bounded" if DEFAULT_RULE["pin_tails"] else False,
    )


_solved_codebook = functools.lru_cache(maxsize=256)(solve_default)


@functools.cache
def _shipped_codebooks() -> dict[tuple[str, int], Codebook]:
    text = (importlib.resources.files(__package__) / "codebooks.json").read_text("utf-8")
    return {
        (name, book["bits"]): Codebook.from_dict(book)
        for name, books in json.loads(text).items()
        for book in books
    }
