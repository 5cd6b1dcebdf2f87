"""The method object of few-bit layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from packlight.errors import InputError
from packlight.fewbit.codebook import (
    Codebook,
    Weight,
    Weighted,
    check_bits,
    check_codebook,
    plain_weight,
)
from packlight.method import Method

__all__ = ["FewBit", "check_bits"]


@dataclasses.dataclass(frozen=True)
class FewBit(Method):
    """Keep k-bit codes of an activation's derivative in place of its input.

    Keeps `bits` bits an element (1 or 2 for the activations whose derivative is a step function,
    whatever `bits` says: those are exact). The gradient is dy * level[code]: biased, its error
    bounded by the distance of f' to its nearest level. Source: Novikov et al., ICML 2023,
    arXiv 2202.00441.

    Args:
        bits: code length, 1 to 8.
        weight: where the derivative is to be near, as `fit_codebook` takes it, but for functions:
            "uniform", ("normal", sigma), a histogram (counts, edges) or samples, which become a
            histogram. Each activation function has a codebook fitted under it, when it first runs
            (a fraction of a second). None: the codebooks that packlight ships.
        codebook: the codebook of one activation function, as `fit_codebook` makes it; it sets the
            bits. Layers of other functions refuse it, as far as it shows: a level that no mean of
            their derivative can be.
    """

    bits: int = 3
    weight: Weight | None = None
    codebook: Codebook | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        book: object = self.codebook
        if isinstance(book, Mapping):  # as `to_dict` has it
            object.__setattr__(self, "codebook", Codebook.from_dict(book))
        if self.codebook is not None:
            object.__setattr__(self, "bits", check_codebook(self.codebook).bits)
            if self.weight is not None:
                raise InputError("FewBit takes a weight or a codebook, which was fitted under one")
        elif self.weight is not None:
            weight = tuple(self.weight) if isinstance(self.weight, list) else self.weight
            object.__setattr__(self, "weight", plain_weight(weight))

    def __repr__(self) -> str:
        shown = [f"{name}={value!r}" for name, value in self._given().items()]
        return f"FewBit({', '.join(shown)})"

    def to_dict(self) -> dict[str, Any]:
        given = self._given()
        if self.codebook is not None:
            given["codebook"] = self.codebook.to_dict()
        return {"method": "FewBit", **given}

    def _given(self) -> dict[str, Any]:
        """The fields but for a weight or a codebook that is not there."""
        values = {"bits": self.bits, "weight": self.weight, "codebook": self.codebook}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def options(self) -> dict[str, Any]:
        """What the layers and functions with a codebook take."""
        book = self.codebook if self.weight is None else Weighted(self.weight)
        return {"bits": self.bits, "codebook": book}
