"""Which option each block takes: the fastest that fits.

Blocks are alike but for a few, so the question is how many of them take which option. The lower
hull of (bytes at the peak, milliseconds) over the options says which are worth taking; between two
neighbours on it, blocks go over one by one, those first that save most bytes a millisecond, and of
alike ones the early: the backward pass comes to them last, when most of what others keep is freed.
All mixes so made are weighed, and each by its peak, transients included. So the time never grows
with the budget, and no mix is taken whose peak is above it.
"""

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from packlight.planner.menu import EXACT, Option
from packlight.planner.study import Mix, Study
from packlight.planner.timeline import FORWARD
from packlight.planner.walked import Part, Walked


class Candidate(NamedTuple):
    """Options by the names of blocks, and what a step with them takes."""

    options: dict[str, Option]
    outside: Option
    mix: Mix
    peak: int
    kept: int
    ms: float


def candidates(
    study: Study, options: Sequence[Option], outsides: Sequence[Option]
) -> list[Candidate]:
    """Mixes worth weighing, the fastest first.

    What is outside of blocks becomes the first of `outsides`; each is weighed where all is outside.
    """
    if not study.blocks:
        alone = [_candidate({}, outside, study.walked(EXACT, outside), {}) for outside in outsides]
        return sorted(alone, key=_by_time)
    outside = outsides[0]
    options = [option for option in options if study.runs(option, outside)]
    walks = {option: study.walked(option, outside) for option in options}
    blocks = study.blocks

    def of(chosen: dict[str, Option]) -> Candidate:
        # What follows the last block packs its input, or has that block's pack.
        return _candidate(chosen, outside, walks[chosen[blocks[-1]]], walks)

    alike = [of(dict.fromkeys(blocks, option)) for option in options]
    found = {tuple(one.options.values()): one for one in alike}
    steps = _hull(alike)
    for fast, small in itertools.pairwise(steps):
        chosen = dict(fast.options)
        for name in _in_turn(fast, small):
            chosen = {**chosen, name: small.options[name]}
            found.setdefault(tuple(chosen.values()), of(chosen))
    return sorted(found.values(), key=_by_time)


def fastest(found: Sequence[Candidate], fits: Callable[[Candidate], bool]) -> Candidate | None:
    return next((one for one in found if fits(one)), None)


def _candidate(
    options: dict[str, Option], outside: Option, base: Walked, walks: dict[Option, Walked]
) -> Candidate:
    mix = Mix(base, {name: walks[option] for name, option in options.items()})
    return Candidate(options, outside, mix, *mix.sums())


def _by_time(one: Candidate) -> tuple[float, int]:
    return one.ms, one.peak


def _hull(found: Sequence[Candidate]) -> list[Candidate]:
    """The lower hull of peak over time, from the fastest to the smallest."""
    hull: list[Candidate] = []
    for one in sorted(found, key=_by_time):
        if hull and one.peak >= hull[-1].peak:
            continue  # slower, and no smaller
        while len(hull) > 1 and _saves(hull[-2], hull[-1]) <= _saves(hull[-2], one):
            hull.pop()
        hull.append(one)
    return hull


def _saves(one: Candidate, other: Candidate) -> float:
    """Bytes a millisecond."""
    return (one.peak - other.peak) / max(other.ms - one.ms, 1e-9)


def _in_turn(fast: Candidate, small: Candidate) -> list[str]:
    """Blocks in the order in which they go over from one option to the other."""
    before, after = fast.mix.by_block(), small.mix.by_block()

    def kept_and_ms(parts: dict[str, list[Part]], name: str) -> tuple[int, float]:
        kept = sum(part.grows for part in parts[name] if part.phase == FORWARD)
        return kept, sum(part.ms for part in parts[name])

    def slope(name: str) -> float:
        (kept, ms), (less, more) = kept_and_ms(before, name), kept_and_ms(after, name)
        return float(f"{(kept - less) / max(more - ms, 1e-6):.1e}")

    names = [name for name in fast.options if name in before and name in after]
    slopes = {name: slope(name) for name in names}
    for run in fast.mix.base.runs:
        # The first and the last of a run differ by what is around them, which stays.
        alike = [slopes[name] for name in run.names if name in slopes]
        slopes |= {name: statistics.median(alike) for name in run.names if name in slopes}
    return sorted(names, key=lambda name: -slopes[name])  # stable: the early ones first
