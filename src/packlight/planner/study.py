"""`Study`: one model and batch on one device, walked once for each option of its blocks."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointError

from packlight.convert import convert, revert
from packlight.errors import NothingMatchedError
from packlight.head.modules import heads_of
from packlight.planner.devices import Device
from packlight.planner.menu import EXACT, Option, selectors
from packlight.planner.planner import Loss, OptimizerOf
from packlight.planner.timeline import FORWARD, Clock, Timeline
from packlight.planner.walk import Walker
from packlight.planner.walked import Part, Walked, joined, strung


class Study:
    """`head` is whether losses are computed by chunks of logits where packlight is used."""

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        device: Device,
        loss: Loss | None = None,
        optimizer: OptimizerOf | None = None,
        head: bool | None = None,
    ) -> None:
        self.device, self.inputs, self.kwargs = device, inputs, kwargs
        self.walker = Walker(model, inputs, kwargs, loss, optimizer)
        self.head = any(True for _ in heads_of(model)) if head is None else head
        self._walked: dict[tuple[Option, Option, bool], Walked] = {}
        self._refused: set[tuple[Option, Option]] = set()

    @property
    def blocks(self) -> list[str]:
        return [name for run in self.walker.runs for name in run.names]

    def plain(self) -> Walked:
        """As PyTorch trains it."""
        return self.walked(EXACT, EXACT, head=False)

    def walked(self, option: Option, outside: Option, head: bool | None = None) -> Walked:
        """With all blocks alike."""
        head = self.head if head is None else head
        key = (option, outside, head)
        if key not in self._walked:
            with self.converted(option, outside, head):
                self._walked[key] = self.walker.walk(self.device)
        return self._walked[key]

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
        copy, walker = self.walker.model, self.walker
        names = [run.walked(place) for run in walker.runs for place in range(run.places)]
        methods = selectors(dict.fromkeys(names, option), outside)
        with walker.imagined():
            if head or any(choice is not None for choice in methods.values()):
                # Where an option has no rule for anything here the model stays as it is.
                with contextlib.suppress(NothingMatchedError):
                    convert(copy, methods, functional=True, head=head, strict=False)
        try:
            yield
        finally:
            with walker.imagined():
                revert(copy)


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
