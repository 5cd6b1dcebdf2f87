"""`Rank`: what one rank of a parallel run does of a walked step.

Tensor and context parallel and experts are in the walk itself (`cutting.py`). What follows from the
order of the step alone is strung together here, from the parts that were walked:

- **FSDP2.** While a block runs, its weights are gathered, and those of the next lie in the buffer
  of their all-gather; in the backward pass that buffer is the one of the block before. A block's
  gradients are whole until its backward pass is over, and are then copied into the buffer of a
  reduce-scatter, which is let go of after the next block. What is outside of blocks is gathered
  from its first use to the end of the backward pass, as `fully_shard` of a whole model has it.
- **DDP.** Gradients lie in buckets too.
- **Pipeline, 1F1B.** A stage begins with the forward passes of as many micro-batches as there are
  stages from it to the last, and goes on with a backward and a forward pass by turns. Weights stay
  gathered and gradients whole until the last micro-batch. A stage has buffers for what it receives
  of each micro-batch, and holds its results until their backward pass is over, as
  `torch.distributed.pipelining` does.

Sources: FSDP2, `torch.distributed.fsdp.fully_shard`; 1F1B, PipeDream-Flush, arXiv 2006.09503, and
arXiv 2104.04473, whose bubble is (stages - 1) / (micro-batches + stages - 1) of a step.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from packlight.errors import InputError
from packlight.parallel import Parallel, divided
from packlight.planner.timeline import (
    BACKWARD,
    BACKWARD_2,
    BACKWARDS,
    FORWARD,
    FORWARD_2,
    LOSS,
    PASSES,
    STEP,
    Segment,
    Static,
    added,
)
from packlight.planner.walked import Part, Walked, Weight, is_in, shifted
from packlight.planner.wires import all_gathered, all_reduced

Named = tuple[Part, str]  # of no block by an empty name


@dataclasses.dataclass(frozen=True)
class Held:
    """Weights of a block, or around blocks, on one rank, in bytes.

    `gathered` and `gradients` are whole but for what tensor and expert parallel divide, `reduced`
    are such gradients in the dtype in which they are reduced; `shards`, `trained` and `optimizer`
    are this rank's shards. `gathering` and `reducing` are what it sends for all to have the whole,
    and for each to have the sum of its shard.
    """

    gathered: int = 0
    gradients: int = 0
    reduced: int = 0
    shards: int = 0
    trained: int = 0
    optimizer: int = 0
    gathering: int = 0
    reducing: int = 0

    def __add__(self, other: "Held") -> "Held":
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Held(*(one + two for one, two in zip(mine, others, strict=True)))


def held(weights: Iterable[Weight], parallel: Parallel) -> Held:
    found = Held()
    for weight in weights:
        over = parallel.shards
        if weight.is_expert:
            over = parallel.within // parallel.expert
        wider = 1.0
        if parallel.shard_dtype is not None and weight.element:
            wider = parallel.shard_dtype.itemsize / weight.element
        found += Held(
            weight.size,
            weight.trained,
            int(wider * weight.trained),
            int(wider * weight.size / over),
            int(wider * weight.trained / over),
            int(weight.optimizer / over),
            int(all_gathered(weight.size, over)),
            int(all_gathered(wider * weight.trained, over)),
        )
    return found


@dataclasses.dataclass(frozen=True)
class Rank:
    """Of a stage. `passed` are the bytes that it receives and sends for a micro-batch, `returned`
    those of the last one's result.
    """

    parallel: Parallel
    stage: int
    microbatches: int
    of_block: dict[str, Held]
    around: Held
    passed: int
    returned: int

    @classmethod
    def of(cls, walked: Walked, parallel: Parallel, stage: int, microbatches: int) -> "Rank":
        names = [name for run in walked.runs for name in run.names]
        own = set(stages(names, parallel)[stage])
        of_block: dict[str, Held] = {}
        blocks = []
        for run in walked.runs:
            for place in range(run.places):
                block = run.walked(place)
                blocks.append(block)
                inside = held([w for w in walked.weights if _lies_in(w, block)], parallel)
                of_block |= {name: inside for name in run.stands_for(place) if name in own}
        outside = [w for w in walked.weights if not any(_lies_in(w, block) for block in blocks)]
        before = _before_blocks(walked, blocks)
        first, last = stage == 0, stage == parallel.pipeline - 1
        around = held(
            (
                weight
                for weight in outside
                if (first and any(place in before for place in weight.places))
                or (last and any(place not in before for place in weight.places))
            ),
            parallel,
        )
        return cls(parallel, stage, microbatches, of_block, around, walked.passed, walked.returned)

    @property
    def all(self) -> Held:
        return sum(self.of_block.values(), start=self.around)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.parallel.pipeline - 1

    def static(self, walked: Walked) -> Static:
        everything, parallel = self.all, self.parallel
        wires = 0
        if parallel.shards > 1:
            wires += self.around.gathered if parallel.reshards else everything.gathered
        elif parallel.replicate > 1:
            wires += everything.gradients
        if not self.is_first:
            wires += self.microbatches * self.passed
        if not self.is_last:
            wires += self.microbatches * self.passed
        return dataclasses.replace(
            walked.static,
            parameters=everything.shards,
            optimizer=everything.optimizer,
            trained=everything.trained,
            wires=wires,
        )

    @property
    def accumulates_wide(self) -> bool:
        """Whether whole gradients are added up in the dtype in which they are reduced."""
        everything = self.all
        return not self.parallel.reshards and everything.reduced != everything.gradients

    # ---- the order of a step -----------------------------------------------------------------

    def strung(self, whole: Sequence[Named], lets_go: Callable[[str], bool]) -> Iterator[Named]:
        """The parts of this rank's step; `lets_go` says of a block whether its input is freed in
        the forward pass.
        """
        passes = {phase: self._of_stage(whole, phase) for phase in PASSES}
        first = next((name for _, name in passes[FORWARD] if name), "")
        # A stage holds what it received.
        held_input = 0 if self.is_first or not lets_go(first) else self.passed
        alive = self.parallel.alive(self.stage, self.microbatches)
        order = [FORWARD] * alive + [BACKWARD]
        order += [FORWARD_2, BACKWARD_2] * (self.microbatches - alive) + [BACKWARD_2] * (alive - 1)
        fresh = self.reduces_by_block or self.accumulates_wide
        kept = 0
        for phase in order:
            if phase in (FORWARD, FORWARD_2):
                one = list(self._forward(passes[FORWARD], phase, held_input))
                kept = _grown(one)
            else:
                one = list(self._backward(passes[BACKWARD if fresh else phase], phase))
                if len(order) > 2:
                    # A pass frees what its micro-batch kept. The last of what it frees may be at
                    # the border of another stage, or with the graph.
                    after = self._gradients_after(phase) - kept
                    one.append((_of_no_operator(phase, "free", after - _grown(one)), ""))
            yield from one
        yield from self._ended(order[-1])
        yield from (one for one in whole if one[0].phase == STEP)

    def _gradients_after(self, phase: str) -> int:
        """Bytes of gradients that there are more after a backward pass."""
        everything = self.all
        if phase != BACKWARD:
            return 0
        if self.reduces_by_block:
            return everything.trained
        return everything.reduced if self.accumulates_wide else everything.gradients

    def _of_stage(self, whole: Sequence[Named], phase: str) -> list[Named]:
        """Those of the stage's blocks, and of what is before all blocks or after them."""
        parts = [one for one in whole if one[0].phase == phase]
        inside = [place for place, (_, name) in enumerate(parts) if name]
        if not inside:
            return parts
        backward = phase in BACKWARDS
        start, end = (self.is_last, self.is_first) if backward else (self.is_first, self.is_last)
        found, own = [], False
        for place, (part, name) in enumerate(parts):
            own = name in self.of_block if name else own
            takes = start if place < inside[0] else end if place > inside[-1] else own
            if takes:
                found.append((part, name))
        return found

    def _forward(self, parts: Sequence[Named], phase: str, held_input: int) -> Iterator[Named]:
        if held_input:
            yield _of_no_operator(phase, "receive", held_input), ""
        sends = {"shard": self.around.gathering}
        yield _of_no_operator(phase, "gather", 0, sends), ""
        last = ""
        for part, name in parts:
            last = name or last
            # Until the next is gathered, or the pass of the model is over, the buffer stays.
            weights = self._while_running(name) + self._while_running(last)
            yield self._with_weights(part, name, phase, weights), name
        if not self.is_last:
            yield _of_no_operator(phase, "send", 0, {"pipeline": self.passed}), ""
        elif not self.is_first:
            yield _of_no_operator(phase, "return", self.returned), ""

    def _backward(self, parts: Sequence[Named], phase: str) -> Iterator[Named]:
        # Its output is the root of the pass, and is there until that ends.
        root = 0 if self.is_last else self.passed
        if root:
            yield _of_no_operator(phase, "receive", root), ""
        reducing = 0  # bytes in the buffer of the reduce-scatter that is under way
        names = [name for _, name in parts if name]
        following = dict(itertools.pairwise(["", *names, ""]))
        begun = False
        for part, name in parts:
            begun |= bool(name)
            weights = self._while_running(name)
            if name or not begun:
                weights += self._while_running(following[name])
            yield self._with_weights(part, name, phase, weights + reducing), name
            if name and self.reduces_by_block:
                yield self._reduced(self.of_block[name], phase), name
                reducing = self.of_block[name].reduced
            elif name and self.accumulates_wide:
                yield self._widened(self.of_block[name], phase), name
        if self.reduces_by_block:
            yield self._reduced(self.around, phase), ""
        elif self.accumulates_wide:
            yield self._widened(self.around, phase), ""
        if not self.is_first:
            yield _of_no_operator(phase, "send", 0, {"pipeline": self.passed}), ""

    def _ended(self, phase: str) -> Iterator[Named]:
        """What happens to gradients once the last micro-batch is done."""
        parallel, everything = self.parallel, self.all
        if parallel.shards > 1 and not self.reduces_by_block:
            for of_it in (*self.of_block.values(), self.around):
                yield self._reduced(of_it, phase, of_it.reduced), ""
        if parallel.replicate > 1:
            size = all_reduced(everything.trained, parallel.replicate)
            yield _of_no_operator(phase, "all_reduce", 0, {"replicate": size}), ""

    # ---- weights and gradients ---------------------------------------------------------------

    @property
    def reduces_by_block(self) -> bool:
        return self.parallel.shards > 1 and self.parallel.pipeline == 1

    def _while_running(self, name: str) -> int:
        """Bytes of a block's weights that are gathered while it runs, and not at all times."""
        gathers = self.parallel.shards > 1 and self.parallel.reshards
        return self.of_block[name].gathered if name and gathers else 0

    def _with_weights(self, part: Part, name: str, phase: str, more: int) -> Part:
        segments = [
            (segment if segment.place == LOSS else shifted(segment, more))._replace(phase=phase)
            for segment in part.segments
        ]
        gathers = self.parallel.reshards or phase in (FORWARD, FORWARD_2)
        if name and segments and gathers and self.parallel.shards > 1:
            gathering = {"shard": self.of_block[name].gathering}
            segments[0] = segments[0]._replace(sent=added(segments[0].sent, gathering))
        return part._replace(phase=phase, segments=tuple(segments))

    def _reduced(self, of_it: Held, phase: str, now: int | None = None) -> Part:
        """Whole gradients, of so many bytes now, go through a buffer and become shards."""
        whole = of_it.gradients if now is None else now
        shards = of_it.trained if phase == BACKWARD or now is not None else 0
        sends = {"shard": of_it.reducing}
        after = shards - whole
        part = _of_no_operator(phase, "reduce_scatter", after, sends)
        (segment,) = part.segments
        return part._replace(segments=(segment._replace(peak=of_it.reduced + shards),))

    def _widened(self, of_it: Held, phase: str) -> Part:
        """Gradients are added up in the dtype in which they are reduced."""
        kept = of_it.reduced if phase == BACKWARD else 0
        return _of_no_operator(phase, "accumulate", kept - of_it.gradients)


def _grown(parts: Sequence[Named]) -> int:
    return sum(part.grows for part, _ in parts)


def _of_no_operator(
    phase: str, name: str, grows: int, sent: Mapping[str, float] | None = None
) -> Part:
    """A part in which nothing is computed."""
    segment = Segment(phase, "", name, 0, max(grows, 0), grows, 0.0, 0.0, sent=sent or {})
    return Part(None, 0, phase, (segment,), grows)


# ---- stages --------------------------------------------------------------------------------------


def stages(names: Sequence[str], parallel: Parallel) -> list[list[str]]:
    """The blocks of each stage."""
    if parallel.pipeline == 1:
        return [list(names)]
    if not names:
        raise InputError(
            f"pipeline={parallel.pipeline} has stages of blocks, and the model has no list of alike"
            " blocks"
        )
    count = divided("blocks", len(names), "pipeline", parallel.pipeline)
    return [list(names[place : place + count]) for place in range(0, len(names), count)]


def _lies_in(weight: Weight, block: str) -> bool:
    return any(is_in(place, block) for place in weight.places)


def _before_blocks(walked: Walked, blocks: Sequence[str]) -> set[str]:
    """The modules around blocks that run before them."""
    found = set()
    for segment in walked.segments:
        if any(is_in(segment.place, block) for block in blocks):
            break
        found.add(segment.place)
    return found
