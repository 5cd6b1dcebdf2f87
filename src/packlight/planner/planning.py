"""`plan`: the fastest methods with which a training step fits into a number of bytes."""

from typing import Any

from torch import nn

from packlight.errors import InfeasibleBudgetError, InputError
from packlight.planner.devices import Device, device_of, parse_bytes
from packlight.planner.menu import EXACT, MENU, PACKED_4, PACKED_8, allowed, selectors
from packlight.planner.result import Plan, PlannedBlock, peak_parts, where
from packlight.planner.searching import Candidate, candidates, fastest
from packlight.planner.study import Study
from packlight.planner.timeline import FORWARD
from packlight.planner.walk import Loss, OptimizerOf
from packlight.report.words import human_bytes


def plan(
    model: nn.Module,
    /,
    *batch: Any,
    memory: int | float | str,
    optimizer: OptimizerOf | None = None,
    loss: Loss | None = None,
    max_error: float | None = None,
    device: str | Device | None = None,
    head: bool | None = None,
) -> Plan:
    """The methods with which a step of training fits into `memory` and takes the least time.

    The step is forward, loss, backward and optimiser, without an accumulation of gradients. It is
    walked on tensors without values, once for each option of the blocks, so nothing is computed, no
    GPU is needed and the model may be on "meta". Options of a block are: as it is, packs of 8 and 4
    bits, and checkpoints whose inputs are kept exactly or in 8 bits and whose insides are as they
    are, in packs or in tiles. With b the options of all blocks, the plan solves

        min ms(b)   with   max_t static + kept(t; b) + working(t; b) <= memory,

    over the mixes of two neighbours on the front of bytes and time (`searching.py`). Transients are
    counted where they are. The planned methods are data: nothing of the model changes.

    Args:
        model: any module, in training mode. It runs under the caller's autocast.
        batch: what the model is called with: tensors, or one dict of keywords. "meta" will do.
        memory: bytes at the peak, as CUDA's allocator counts what is allocated: an int or "22GiB".
            Or a float up to 1, a share of what plain training keeps for its backward pass. A limit
            of the allocator (`torch.cuda.set_per_process_memory_fraction`) is of reserved bytes,
            which are up to a few percent more.
        optimizer: what makes the optimiser of a list of parameters: a class of torch.optim, or
            `functools.partial(torch.optim.AdamW, fused=True)`. None: no optimiser is counted.
        loss: of the model's output; None: its `loss`, or else the mean of its floating outputs.
        max_error: the largest error of gradients, relative, that a block's option may have, by the
            table in docs/plan.md; 0 leaves what is exact. None allows all.
        device: a card's name, "H200" or "RTX 4090"; None: the GPU that is here. Times of devices
            that nobody measured are estimated from bandwidth and arithmetic, and say so.
        head: whether losses are computed by chunks of logits, exactly; None: where there is a head
            of a language model.

    Raises `InfeasibleBudgetError` where no plan fits, naming the least that is possible and what
    holds it, and `InputError` for a model whose step cannot be foretold (see `packlight.predict`).

    >>> import torch, packlight
    >>> layer = torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
    >>> plan = packlight.plan(model, torch.randn(4, 128, 64), memory=0.4, device="H200")
    >>> plan.kept_bytes <= 0.4 * plan.plain.kept
    True
    >>> len(packlight.convert(model, plan).replaced) > 0
    True
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected an nn.Module")
    budget, share = _asked(memory)
    inputs, kwargs = (
        ((), batch[0]) if len(batch) == 1 and isinstance(batch[0], dict) else (batch, {})
    )
    known = device if isinstance(device, Device) else device_of(device)
    study = Study(model, inputs, kwargs, known, loss, optimizer, head)
    return planned(study, budget, share, max_error)


def _asked(memory: object) -> tuple[int | None, float | None]:
    """Bytes at the peak, or a share of what is kept."""
    if isinstance(memory, str) and (size := parse_bytes(memory)) is not None:
        return size, None
    if isinstance(memory, bool) or not isinstance(memory, int | float):
        raise InputError(f'memory={memory!r} is neither bytes, such as "22GiB", nor a share')
    if isinstance(memory, int) and memory > 0:
        return memory, None
    if isinstance(memory, float) and 0 < memory <= 1:
        return None, memory
    raise InputError(
        f"memory={memory!r} is neither a positive number of bytes nor a share between 0.0 and 1.0"
        " of what plain training keeps"
    )


def planned(study: Study, budget: int | None, share: float | None, max_error: float | None) -> Plan:
    plain = study.plain().timeline
    options = allowed(MENU, max_error)
    if not options:
        raise InputError(f"max_error={max_error} is below 0, so that nothing is allowed")
    found = candidates(study, options, allowed((PACKED_4, PACKED_8, EXACT), max_error))
    if share is None:
        assert budget is not None
        best = fastest(found, lambda one: one.peak <= budget)
    else:
        best = fastest(found, lambda one: one.kept <= share * plain.kept)
    if best is None:
        raise InfeasibleBudgetError(_why(found, plain.kept, budget, share, max_error))
    blocks = tuple(_rows(best))
    rates = study.device.rates
    source = "measured" if study.device.measured else f"estimated, by rates {rates.source}"
    return Plan(
        selectors(best.options, best.outside),
        study.head,
        blocks,
        best.mix.timeline(),
        plain,
        study.device.name,
        source,
        budget,
    )


def _rows(best: Candidate) -> list[PlannedBlock]:
    rows = []
    for name, parts in best.mix.by_block().items():
        kept = sum(part.grows for part in parts if part.phase == FORWARD)
        working = max((part.peak for part in parts if part.phase != FORWARD), default=0)
        ms = sum(max(part.device_ms, part.host_ms) for part in parts)
        option = best.options[name]
        rows.append(PlannedBlock(name, option.name, kept, working, ms, option.error))
    return rows


def _why(
    found: list[Candidate],
    plain_kept: int,
    budget: int | None,
    share: float | None,
    max_error: float | None,
) -> str:
    limit = "" if max_error is None else f" with errors of gradients of at most {max_error:g}"
    if share is not None:
        least = min(found, key=lambda one: one.kept)
        return (
            f"no plan keeps {share:g} of what plain training keeps{limit}; the least is"
            f" {least.kept / max(plain_kept, 1):.3f}, {human_bytes(least.kept)} of"
            f" {human_bytes(plain_kept)}; a smaller batch keeps less"
        )
    assert budget is not None
    least = min(found, key=lambda one: one.peak)
    timeline = least.mix.timeline()
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in peak_parts(timeline).items())
    highest = timeline.highest
    return (
        f"no plan fits into {human_bytes(budget)}{limit}; the least is {human_bytes(least.peak)},"
        f" in the {where(highest.phase, highest.place)}: {parts}. A smaller batch, a shorter"
        " sequence, fewer trained weights or a smaller optimiser would take less"
    )
