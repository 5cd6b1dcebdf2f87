"""`Timeline`: a training step in its order, with the bytes that are allocated."""

import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping
from typing import NamedTuple

FORWARD, BACKWARD, STEP = "forward", "backward", "optimizer"
# Of the micro-batches after the first, which find gradients there: the passes of a second one.
FORWARD_2, BACKWARD_2 = "second forward", "second backward"
LOSS = "(loss)"  # the place of a loss that is computed outside of the model
BACKWARDS = (BACKWARD, BACKWARD_2)
PASSES = (FORWARD, BACKWARD, FORWARD_2, BACKWARD_2)

# What CUDA's allocator has to reserve beside the peak, for pages of 20 MiB that tensors fill in
# part: of the lowest limits in which plans and choices ran on an H200, and of limits in which they
# did not, this covers all but checkpoints of GPT-2 medium (.5% short). Half of it is enough for
# many, and no plan should run out of memory. Of peaks below 1.9 GiB nothing was measured.
_BETWEEN, _OF_SMALL, _SHARE = 208 * 2**20, 0.1, 0.015


def reserved(peak: int) -> int:
    """The bytes that the allocator has to reserve where so many are allocated at the peak."""
    return int((1 + _SHARE) * peak + min(_BETWEEN, _OF_SMALL * peak))


def allocatable(size: int) -> int:
    """The highest peak where the allocator may reserve so many bytes."""
    return int(max((size - _BETWEEN) / (1 + _SHARE), size / (1 + _SHARE + _OF_SMALL)))


Sent = Mapping[str, float]  # bytes to other ranks, by the degree of parallelism that asks for them


def added(one: Sent, other: Sent) -> Sent:
    if not (one and other):
        return one or other
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


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
    copy_ms: float = 0.0  # of copies to and from the memory of the host
    waits: bool = False  # for all copies before it
    sent: Sent = types.MappingProxyType({})


class Clock:
    """Milliseconds since the step began, on each of the three.

    The host launches ahead of the device, which waits where it has nothing to do. Copies to and
    from the memory of the host go over a stream of their own, one after the other, each when what
    it copies is there (`recompute/offloading.py`).
    """

    def __init__(self) -> None:
        self.host = self.device = self.link = 0.0

    def run(self, segment: Segment) -> None:
        if segment.waits:
            self.device = max(self.device, self.link)
        if segment.copy_ms:
            self.link = max(self.link, self.device) + segment.copy_ms
        self.host += segment.host_ms
        self.device = max(self.device + segment.device_ms, self.host)


@dataclasses.dataclass(frozen=True)
class Static:
    """Bytes that are there at all times."""

    parameters: int
    buffers: int
    optimizer: int
    inputs: int
    workspace: int  # of cuBLAS
    trained: int  # of the parameters, and so of their gradients, which are not among these
    wires: int = 0  # weights that stay gathered, and buffers of what goes to other ranks

    @property
    def total(self) -> int:
        held = self.parameters + self.buffers + self.optimizer + self.inputs
        return held + self.workspace + self.wires


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
    def sent(self) -> dict[str, int]:
        """What a rank sends in a step."""
        nothing: Sent = {}
        total = functools.reduce(added, (segment.sent for segment in self.segments), nothing)
        return {name: int(size) for name, size in total.items() if size}

    @property
    def ms(self) -> float:
        """Of a step that ends when the device is done."""
        return max((end for _, end in self.timed()), default=0.0)

    def timed(self) -> Iterator[tuple[Segment, float]]:
        """Segments, and when the device is done with each."""
        clock = Clock()
        for segment in self.segments:
            clock.run(segment)
            yield segment, clock.device
