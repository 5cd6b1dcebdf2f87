"""What a block can become, and which selectors say so."""

import dataclasses
import glob
from collections.abc import Iterable, Mapping

from packlight.conversion import brief
from packlight.fewbit.method import FewBit
from packlight.groupquant.fixed_point.method import FixedPoint
from packlight.groupquant.method import GroupQuant
from packlight.method import Method
from packlight.recompute.method import Checkpoint, Offload, Recompute, Tiles
from packlight.report.gradients import GradientReport, LayerGradients
from packlight.selectors import Choice, Selector


@dataclasses.dataclass(frozen=True)
class Option:
    """What blocks become: `block` is the method of a block itself, `inside` those of its layers.

    `error` is that of all gradients, |g~ - g| / |g|, of a Llama of 8 blocks of width 128 as it
    starts, with what is outside of blocks packed by as many bits (`tests/planner/test_errors.py`).
    """

    name: str
    inside: tuple[Method, ...] = ()
    block: Recompute | None = None
    error: float = 0.0

    def of_block(self) -> Choice:
        return _choice((*([] if self.block is None else [self.block]), *self._without_tiles()))

    def of_layers(self) -> Choice:
        return _choice(self.inside)

    def measured_as(self) -> str:
        """What `gradient_error` calls the packs that its error is of; nothing for what is exact.

        Of a checkpoint in 8 bits alone they are those of 8 bits, which err more.
        """
        packs = self._without_tiles() or (_BITS_8 if self.error else ())
        return ", ".join(map(brief, packs))

    def _without_tiles(self) -> tuple[Method, ...]:
        return tuple(method for method in self.inside if not isinstance(method, Tiles))


def _choice(methods: tuple[Method, ...]) -> Choice:
    return methods[0] if len(methods) == 1 else methods or None


_BITS_4 = (FixedPoint(bits=4), GroupQuant(bits=4), FewBit(bits=3))  # `DEFAULT_METHODS`
_BITS_8 = (GroupQuant(bits=8), FewBit(bits=8))

EXACT = Option("torch")
PACKED_8 = Option("packs of 8 bits", _BITS_8, error=0.0065)
PACKED_4 = Option("packs of 4 bits", _BITS_4, error=0.08)
PACKED_3 = Option("packs of 3 bits", (GroupQuant(bits=3), FewBit(bits=3)), error=0.145)
PACKED_2 = Option("packs of 2 bits", (GroupQuant(bits=2), FewBit(bits=2)), error=0.28)
CHECKPOINTED = Option("checkpoint", block=Checkpoint(keep=None))
CHECKPOINTED_8 = Option("checkpoint of 8 bits", block=Checkpoint(GroupQuant(bits=8)), error=0.0055)
CHECKPOINTED_PACKED = Option(
    "checkpoint of 8 bits, packs of 4", _BITS_4, Checkpoint(GroupQuant(bits=8)), error=0.08
)
TILED = Option(
    "checkpoint of 8 bits, tiles, packs of 4",
    (Tiles(), *_BITS_4),
    Checkpoint(GroupQuant(bits=8)),
    error=0.08,
)
OFFLOADED = Option("offload", block=Offload(packed=None))
OFFLOADED_PACKED = Option(
    "offload of 8 bits, packs of 4", _BITS_4, Offload(GroupQuant(bits=8)), error=0.08
)
OFFLOADED_TILED = Option(
    "offload of 8 bits, tiles, packs of 4",
    (Tiles(), *_BITS_4),
    Offload(GroupQuant(bits=8)),
    error=0.08,
)
MENU = (
    EXACT, PACKED_8, PACKED_4, PACKED_3, PACKED_2,
    CHECKPOINTED, CHECKPOINTED_8, CHECKPOINTED_PACKED, TILED,
    OFFLOADED, OFFLOADED_PACKED, OFFLOADED_TILED,
)  # fmt: skip
OUTSIDE = (PACKED_2, PACKED_3, PACKED_4, PACKED_8, EXACT)  # the smallest first


def selectors(blocks: Mapping[str, Option], outside: Option) -> dict[Selector, Choice]:
    """A mapping for `packlight.convert`: blocks by their names, and the rest of the model."""
    found: dict[Selector, Choice] = {}
    for name, option in blocks.items():
        pattern = glob.escape(name)
        found[pattern] = option.of_block()
        found[f"{pattern}.*"] = option.of_layers()
    found["*"] = outside.of_layers()
    return found


def measured(
    options: Iterable[Option], report: GradientReport, rows: Iterable[LayerGradients]
) -> list[Option]:
    """Options with the largest of the errors that a report has of them in these rows.

    What is exact stays, and what the report has not measured is left out.
    """
    rows = [row for row in rows if row.weights]
    found = []
    for option in options:
        name = option.measured_as()
        if not name:
            found.append(option)
        elif name in report.methods:
            place = report.methods.index(name)
            errors = (row.weights[place].error for row in rows)
            found.append(dataclasses.replace(option, error=max(errors, default=0.0)))
    return found


def allowed(options: Iterable[Option], max_error: float | None) -> list[Option]:
    """Those whose gradients err by no more."""
    return [option for option in options if max_error is None or option.error <= max_error]
