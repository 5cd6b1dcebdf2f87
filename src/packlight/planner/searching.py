"""Which option each block takes: the fastest that fits.

Blocks are alike but for a few, so the question is how many of them take which option. The lower
hull of (bytes at the peak, milliseconds) over the options says which are worth taking; between two
neighbours on it, blocks go over one by one, those first that save most bytes a millisecond, and of
alike ones the early: the backward pass comes to them last, when most of what others keep is freed.
All mixes so made are weighed, and each by its peak, transients included. So the time never grows
with the budget, and no mix is taken whose peak is above it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from packlight.planner.menu import Option
from packlight.planner.study import Mix, Study
from packlight.planner.timeline import FORWARD
from packlight.planner.walked import Walked


class Candidate(NamedTuple):
    """Options by the names of blocks, and what a step with them takes."""

    options: dict[str, Option]
    mix: Mix
    peak: int
    kept: int
    ms: float


def candidates(study: Study, options: Sequence[Option], outside: Option) -> list[Candidate]:
    """Mixes worth weighing, the fastest first."""
    walks = {option: study.walked(option, outside) for option in options}
    blocks = study.blocks
    base = walks[options[0]]
    if not blocks:
        return [_candidate({}, base, walks)]
    alike = [_candidate(dict.fromkeys(blocks, option), base, walks) for option in options]
    found = {tuple(one.options.values()): one for one in alike}
    steps = _hull(alike)
    for fast, small in zip(steps, steps[1:], strict=False):
        chosen = dict(fast.options)
        for name in _in_turn(fast, small):
            chosen = {**chosen, name: small.options[name]}
            found.setdefault(tuple(chosen.values()), _candidate(chosen, base, walks))
    return sorted(found.values(), key=lambda one: (one.ms, one.peak))


def fastest(found: Sequence[Candidate], fits: Callable[[Candidate], bool]) -> Candidate | None:
    return next((one for one in found if fits(one)), None)


def _candidate(
    options: dict[str, Option], base: Walked, walks: dict[Option, Walked]
) -> Candidate:
    mix = Mix(base, {name: walks[option] for name, option in options.items()})
    return Candidate(options, mix, *mix.sums())


def _hull(found: Sequence[Candidate]) -> list[Candidate]:
    """The lower hull of peak over time, from the fastest to the smallest."""
    hull: list[Candidate] = []
    for one in sorted(found, key=lambda one: (one.ms, one.peak)):
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

    def kept_and_ms(parts: dict[str, list[object]], name: str) -> tuple[int, float]:
        kept = sum(part.grows for part in parts[name] if part.phase == FORWARD)
        return kept, sum(max(part.device_ms, part.host_ms) for part in parts[name])

    def slope(name: str) -> float:
        (kept, ms), (less, more) = kept_and_ms(before, name), kept_and_ms(after, name)
        return float(f"{(kept - less) / max(more - ms, 1e-6):.1e}")

    names = [name for name in fast.options if name in before and name in after]
    return sorted(names, key=lambda name: -slope(name))  # stable: the early ones first
