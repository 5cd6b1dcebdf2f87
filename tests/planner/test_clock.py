"""When a step is done, of a host, a device and copies between them."""

import dataclasses
from typing import Any

import pytest
import torch

from packlight.planner.devices import device_of
from packlight.planner.menu import CHECKPOINTED, EXACT, OFFLOADED, OFFLOADED_PACKED, PACKED_4
from packlight.planner.study import Study
from packlight.planner.timeline import BACKWARD, FORWARD, Segment, Static, Timeline
from tests.planner.models import on_meta


def _timeline(*rows: tuple[Any, ...]) -> Timeline:
    segments = [Segment(phase, "", "", 0, 0, 0, *times) for phase, *times in rows]
    return Timeline(Static(0, 0, 0, 0, 0, 0), tuple(segments))


def test_the_longer_of_host_and_device_counts_pass_by_pass() -> None:
    assert _timeline((FORWARD, 5, 1, 0), (BACKWARD, 5, 1, 0)).ms == 10
    assert _timeline((FORWARD, 1, 5, 0), (BACKWARD, 1, 5, 0)).ms == 10
    # The host is late in the forward pass, and ahead in the backward pass.
    assert _timeline((FORWARD, 1, 10, 0), (BACKWARD, 10, 1, 0)).ms == 20


@pytest.mark.parametrize(("copy", "expected"), [(0, 60), (5, 65), (10, 70), (30, 190)])
def test_copies_are_hidden_where_blocks_run_longer(copy: float, expected: float) -> None:
    """Three blocks of 10 ms, forward and backward.

    The first one back sends for its own input and waits; the others were sent for a block ahead.
    Copies of 30 ms out are done at 90, those back at 120, 150 and 180, and then a block runs.
    """
    back = (BACKWARD, 10, 0, copy, True)
    rows = [(FORWARD, 10, 0, copy)] * 3
    rows += [(BACKWARD, 0, 0, copy), back, back, (BACKWARD, 10, 0, 0, True)]
    assert _timeline(*rows).ms == expected


def _with_link(link: float) -> Study:
    model, tokens = on_meta(depth=6)
    device = dataclasses.replace(device_of("H200"), link=link)
    return Study(model, (tokens,), {}, device, None, torch.optim.SGD)


def test_a_plan_knows_what_a_copy_takes() -> None:
    fast, slow = _with_link(1e15), _with_link(1e6)
    offloaded = fast.walked(OFFLOADED, EXACT).timeline
    kept = fast.walked(CHECKPOINTED, EXACT).timeline
    assert offloaded.ms == pytest.approx(kept.ms, rel=0.05)
    assert offloaded.kept < kept.kept
    copied = sum(segment.copy_ms for segment in slow.walked(OFFLOADED, EXACT).timeline.segments)
    # Each of six inputs goes out and comes back.
    bytes_each = 8 * 256 * 64 * 4
    assert copied == pytest.approx(
        1e3 * 2 * 6 * bytes_each * slow.device.rates.copies / 1e6, rel=0.01
    )
    assert slow.walked(OFFLOADED, EXACT).timeline.ms > 0.9 * copied
    packed = slow.walked(OFFLOADED_PACKED, PACKED_4).timeline
    assert sum(segment.copy_ms for segment in packed.segments) < 0.3 * copied
    assert sum(s.copy_ms for s in slow.walked(PACKED_4, PACKED_4).timeline.segments) == 0
