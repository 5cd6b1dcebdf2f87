"""`Walked`: the segments of a shortened model, and the timelines that are made of them.

The segments come apart into parts: what one of the three walked blocks of a run does in a pass, and
what is around blocks. A timeline of the whole model strings parts together, each begun where the
one before it ended; blocks in it may be those of several walks, each by another method.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from packlight.planner.runs import Run
from packlight.planner.timeline import (
    BACKWARD,
    BACKWARDS,
    PASSES,
    STEP,
    Segment,
    Static,
    Timeline,
)

if TYPE_CHECKING:
    from packlight.planner.ranks import Rank


class Part(NamedTuple):
    """Segments of a block of a run, or of no block; bytes are above those where the part begins.

    `place` says which of the three blocks, `grows` the bytes that are allocated more where the next
    part begins.
    """

    run: Run | None
    place: int
    phase: str
    segments: tuple[Segment, ...]
    grows: int

    @property
    def peak(self) -> int:
        return max((segment.peak for segment in self.segments), default=0)

    @property
    def ms(self) -> float:
        """By itself: of the device, the host or the link, whichever takes longest."""
        device = sum(segment.device_ms for segment in self.segments)
        host = sum(segment.host_ms for segment in self.segments)
        return max(device, host, sum(segment.copy_ms for segment in self.segments))


class Weight(NamedTuple):
    """A parameter of the copy: modules that have it, and bytes on this rank."""

    places: tuple[str, ...]
    size: int
    trained: int
    optimizer: int
    element: int  # bytes of a floating number; 0 where it has none
    is_expert: bool


@dataclasses.dataclass(frozen=True)
class Walked:
    """A walk of a shortened model. `copies` has the bytes that are freed between the passes, by the
    module that allocated them: autocast's copies of weights.
    """

    static: Static
    runs: tuple[Run, ...]
    segments: tuple[Segment, ...]
    copies: Mapping[str, int]
    weights: tuple[Weight, ...]
    trained_here: int  # bytes of the copy that are trained
    passed: int  # bytes from one block to the next
    returned: int  # bytes of what the model returns for the loss
    lets_go: bool  # whether these are freed in the forward pass
    rank: "Rank | None" = None  # of a parallel run

    @property
    def more_trained(self) -> float:
        """How many times as many trained bytes the model, or its part on a rank, has."""
        return self.static.trained / max(self.trained_here, 1)

    @property
    def timeline(self) -> Timeline:
        return Timeline(self.static, tuple(joined(self, {})))

    def parts(self) -> list[Part]:
        """In the order of the step."""
        marks = dict(self._marks())
        found: list[Part] = []
        starts = sorted({0, *marks})
        for start, end in zip(starts, [*starts[1:], len(self.segments)], strict=True):
            segments = self.segments[start:end]
            if not segments:
                continue
            run, place = marks.get(start, (None, 0))
            begin = segments[0].before
            after = self.segments[end].before if end < len(self.segments) else segments[-1].after
            own = tuple(shifted(segment, -begin) for segment in segments)
            found.append(Part(run, place, segments[0].phase, own, after - begin))
        return found

    def _marks(self) -> Iterator[tuple[int, tuple[Run | None, int]]]:
        """Where parts begin: of blocks, of what follows the last block of a pass, and of phases."""
        for index in range(1, len(self.segments)):
            if self.segments[index].phase != self.segments[index - 1].phase:
                yield index, (None, 0)
        for run in self.runs:
            for phase in PASSES:
                inside = [
                    (index, place)
                    for index, segment in enumerate(self.segments)
                    if segment.phase == phase
                    for place in range(run.places)
                    if is_in(segment.place, run.walked(place))
                ]
                for place in range(run.places):
                    first = next((index for index, other in inside if other == place), None)
                    if first is not None:
                        yield first, (run, place)
                if inside:
                    yield inside[-1][0] + 1, (None, 0)

    def copies_of(self, run: Run, place: int) -> int:
        return sum(size for path, size in self.copies.items() if is_in(path, run.walked(place)))


def is_in(path: str, block: str) -> bool:
    return (path + ".").startswith(block + ".")


def shifted(segment: Segment, by: int) -> Segment:
    return segment._replace(
        before=segment.before + by, peak=segment.peak + by, after=segment.after + by
    )


def strung(base: Walked, others: Mapping[str, Walked]) -> Iterator[tuple[Part, str]]:
    """The parts of a rank's step in their order, with the names of their blocks.

    Blocks are those of `base`, but for those that `others` names by their own names.
    """
    whole = _whole(base, others)
    if base.rank is None:
        return whole
    return base.rank.strung(list(whole), lambda name: others.get(name, base).lets_go)


def _whole(base: Walked, others: Mapping[str, Walked]) -> Iterator[tuple[Part, str]]:
    """Of one rank that has the whole model."""
    parts: dict[int, dict[tuple[Run, int, str], Part]] = {}

    def part_of(walked: Walked, part: Part) -> Part:
        assert part.run is not None
        known = parts.get(id(walked))
        if known is None:
            known = parts[id(walked)] = {
                (p.run, p.place, p.phase): p for p in walked.parts() if p.run is not None
            }
        return known.get((part.run, part.place, part.phase), part._replace(segments=(), grows=0))

    begun = set()
    for part in base.parts():
        if part.phase in BACKWARDS and part.phase not in begun:
            begun.add(part.phase)
            yield _freed(base, others)._replace(phase=part.phase), ""
        if part.run is None:
            scales = part.phase == STEP and base.more_trained != 1
            yield (scaled(part, base.more_trained) if scales else part), ""
            continue
        for name in _names(part):
            yield part_of(others.get(name, base), part), name


def _names(part: Part) -> Sequence[str]:
    """The blocks for which a part stands, in the order of its pass."""
    assert part.run is not None
    names = part.run.stands_for(part.place)
    return names[::-1] if part.phase in BACKWARDS else names


def _freed(base: Walked, others: Mapping[str, Walked]) -> Part:
    """What is freed between the passes beyond what the shortened walk shows."""
    by = 0
    for run in base.runs:
        for place in range(run.places):
            for name in run.stands_for(place):
                by -= others.get(name, base).copies_of(run, place)
        by += sum(base.copies_of(run, place) for place in range(run.places))
    return Part(None, 0, BACKWARD, (), by)


def scaled(part: Part, times: float) -> Part:
    """An optimiser's step on so many times as many parameters."""
    return part._replace(
        segments=tuple(
            segment._replace(
                before=int(times * segment.before),
                peak=int(times * segment.peak),
                after=int(times * segment.after),
                device_ms=times * segment.device_ms,
                host_ms=times * segment.host_ms,
                copy_ms=times * segment.copy_ms,
            )
            for segment in part.segments
        )
    )


def joined(base: Walked, others: Mapping[str, Walked]) -> Iterator[Segment]:
    """The segments of the whole model, under the names of its modules."""
    now = 0
    for part, name in strung(base, others):
        walked = "" if part.run is None else part.run.walked(part.place)
        for segment in part.segments:
            if part.run is not None and is_in(segment.place, walked):
                segment = segment._replace(place=name + segment.place[len(walked) :])
            yield shifted(segment, now)
        now += part.grows
