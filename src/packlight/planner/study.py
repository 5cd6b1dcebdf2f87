"""`Study`: one model and batch on one device, walked once for each option of its blocks."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

from packlight.convert import convert, revert
from packlight.errors import InputError, NothingMatchedError
from packlight.head.modules import heads_of
from packlight.parallel import ONE_RANK, Parallel
from packlight.planner.devices import Device
from packlight.planner.menu import EXACT, Option, selectors
from packlight.planner.parts import batch_and_length, part_of_a_rank
from packlight.planner.planner import Loss, OptimizerOf
from packlight.planner.ranks import Rank, stages
from packlight.planner.timeline import FORWARD, Clock, Timeline
from packlight.planner.walk import Walker
from packlight.planner.walked import Part, Walked, joined, strung


class Study:
    """`head` is whether losses are computed by chunks of logits where packlight is used.

    Of a parallel run the walks are those of a rank, and what is asked about is one of its stages.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        device: Device,
        loss: Loss | None = None,
        optimizer: OptimizerOf | None = None,
        head: bool | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        self.parallel = parallel or ONE_RANK
        self.microbatches = self.parallel.count_of_microbatches(batch_and_length(inputs, kwargs)[0])
        inputs, kwargs = part_of_a_rank((inputs, kwargs), self.parallel, self.microbatches)
        self.device, self.inputs, self.kwargs = device, inputs, kwargs
        self.walker = Walker(model, inputs, kwargs, loss, optimizer, parallel=self.parallel)
        self.stage = 0
        self.head = any(True for _ in heads_of(model)) if head is None else head
        self._walked: dict[tuple[Option, Option, bool], Walked] = {}
        self._refused: set[tuple[Option, Option]] = set()

    @property
    def blocks(self) -> list[str]:
        names = [name for run in self.walker.runs for name in run.names]
        return stages(names, self.parallel)[self.stage]

    @property
    def stages(self) -> "list[Study]":
        """The same walks, of each stage of a pipeline."""
        return [self._of_stage(stage) for stage in range(self.parallel.pipeline)]

    def _of_stage(self, stage: int) -> "Study":
        other = copy.copy(self)  # which has the walks in common
        other.stage = stage
        return other

    def walk(self) -> Walked:
        """A step with the copy as it is now."""
        return self._of_rank(self._whole())

    def _whole(self) -> Walked:
        if self.parallel.pipeline > 1 and any(map(torch.is_autocast_enabled, ("cuda", "cpu"))):
            raise InputError(
                "stages of a pipeline are foretold without autocast: load the model in 16 bits, and"
                " say the dtype of shards, Parallel(shard=2, shard_dtype=torch.float32)"
            )
        return self.walker.walk(self.device, again=self.microbatches > 1)

    def _of_rank(self, walked: Walked) -> Walked:
        if self.parallel.ranks == self.microbatches == 1:
            return walked
        rank = Rank.of(walked, self.parallel, self.stage, self.microbatches)
        return dataclasses.replace(walked, static=rank.static(walked), rank=rank)

    def plain(self) -> Walked:
        """As PyTorch trains it."""
        return self.walked(EXACT, EXACT, head=False)

    def walked(self, option: Option, outside: Option, head: bool | None = None) -> Walked:
        """With all blocks alike."""
        head = self.head if head is None else head
        key = (option, outside, head)
        if key not in self._walked:
            with self.converted(option, outside, head):
                self._walked[key] = self._whole()
        return self._of_rank(self._walked[key])

    def runs(self, option: Option, outside: Option) -> bool:
        """Whether a step can be taken with it: torch refuses blocks that run otherwise again."""
        if (option, outside) not in self._refused:
            try:
                self.walked(option, outside)
                return True
            except CheckpointError:
                self._refused.add((option, outside))
        return False

    @contextlib.contextmanager
    def converted(self, option: Option, outside: Option, head: bool) -> Iterator[None]:
        """Within, the copy has all its blocks alike."""
        model, walker = self.walker.model, self.walker
        methods = selectors(dict.fromkeys(walker.walked_blocks(), option), outside)
        with walker.imagined():
            if head or any(choice is not None for choice in methods.values()):
                # Where an option has no rule for anything here the model stays as it is.
                with contextlib.suppress(NothingMatchedError):
                    convert(model, methods, functional=True, head=head, strict=False)
        try:
            yield
        finally:
            with walker.imagined():
                revert(model)


@dataclasses.dataclass(frozen=True)
class Mix:
    """Blocks by several options: what the whole step takes, from the walks of each option."""

    base: Walked
    others: Mapping[str, Walked]

    def sums(self) -> tuple[int, int, float]:
        """Bytes at the peak, bytes kept, and milliseconds."""
        now = peak = kept = 0
        clock = Clock()
        for part, _ in strung(self.base, self.others):
            peak = max(peak, now + part.peak)
            for segment in part.segments:
                clock.run(segment)
            now += part.grows
            if part.phase == FORWARD:
                kept = now
        static = self.base.static.total
        return static + peak, kept, clock.device

    def timeline(self) -> Timeline:
        return Timeline(self.base.static, tuple(joined(self.base, self.others)))

    def by_block(self) -> dict[str, list[Part]]:
        found: dict[str, list[Part]] = {}
        for part, name in strung(self.base, self.others):
            if name:
                found.setdefault(name, []).append(part)
        return found
