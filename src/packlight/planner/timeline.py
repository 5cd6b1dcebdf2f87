"""`Timeline`: a training step in its order, with the bytes that are allocated."""

import dataclasses
from typing import NamedTuple

FORWARD, BACKWARD, STEP = "forward", "backward", "optimizer"


class Segment(NamedTuple):
    """What runs in one place of the model in a row.

    Bytes are those allocated above what is static: `before` and `after`, and `peak` within.
    """

    phase: str
    place: str  # the path of a module
    operator: str  # that during which the peak was
    before: int
    peak: int
    after: int
    device_ms: float
    host_ms: float


@dataclasses.dataclass(frozen=True)
class Static:
    """Bytes that are there at all times."""

    parameters: int
    buffers: int
    optimizer: int
    inputs: int
    workspace: int  # of cuBLAS
    trained: int  # of the parameters, and so of their gradients, which are not among these

    @property
    def total(self) -> int:
        return self.parameters + self.buffers + self.optimizer + self.inputs + self.workspace


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A training step: what is there all the time, and segments in their order."""

    parts: Static
    segments: tuple[Segment, ...]

    @property
    def static(self) -> int:
        return self.parts.total

    @property
    def peak(self) -> int:
        return self.static + max((segment.peak for segment in self.segments), default=0)

    @property
    def highest(self) -> Segment:
        """The segment in which the peak is."""
        return max(self.segments, key=lambda segment: segment.peak)

    @property
    def kept(self) -> int:
        """Bytes that are allocated as the backward pass begins."""
        backward = (segment.before for segment in self.segments if segment.phase == BACKWARD)
        return next(backward, 0)

    @property
    def device_ms(self) -> float:
        return sum(segment.device_ms for segment in self.segments)

    @property
    def host_ms(self) -> float:
        return sum(segment.host_ms for segment in self.segments)

    @property
    def ms(self) -> float:
        """The device waits for the host, or the host for the device, over a whole step."""
        return max(self.device_ms, self.host_ms)
