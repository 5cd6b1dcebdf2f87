"""`packlight.plan`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from packlight.batches import arguments_of
from packlight.errors import InputError
from packlight.parallel import Parallel, checked
from packlight.planner.devices import Device, device_of, parse_bytes
from packlight.planner.result import Plan
from packlight.report.gradients import GradientReport

Loss = Callable[[Any], Tensor]
MAX_ERROR = 0.1  # that of the default methods, 0.08, and not that of 3 bits, 0.145
OptimizerOf = Callable[[list[nn.Parameter]], Any]  # as a class of torch.optim


def plan(
    model: nn.Module,
    /,
    *batch: Any,
    memory: int | float | str,
    optimizer: OptimizerOf | None = None,
    loss: Loss | None = None,
    max_error: float | None = MAX_ERROR,
    device: str | Device | None = None,
    head: bool | None = None,
    parallel: Parallel | None = None,
    errors: GradientReport | None = None,
) -> Plan:
    """The methods with which a step of training fits into `memory` and takes the least time.

    The step is forward, loss, backward and optimiser, without an accumulation of gradients. It is
    walked on tensors without values, once for each option of the blocks, so nothing is computed, no
    GPU is needed and the model may be on "meta". Options of a block are: as it is, packs of 8 to 2
    bits, and checkpoints whose inputs are kept exactly or in 8 bits, or offloaded, and whose
    insides are as they are, in packs or in tiles. With b the options of all blocks, the plan solves

        min ms(b)   with   R(max_t static + kept(t; b) + working(t; b)) <= memory,

    over the mixes of two neighbours on the front of bytes and time (`searching.py`). Transients are
    counted where they are. R adds what the allocator of CUDA reserves for a peak, beside what is
    allocated: 1.5% and 208 MiB, of peaks below 2 GiB 11.5%, with expandable segments
    (PYTORCH_ALLOC_CONF=expandable_segments:True in the environment); without, it is more. The
    planned methods are data: nothing of the model changes.

    Args:
        model: any module, in training mode. It runs under the caller's autocast.
        batch: what the model is called with: a tensor, several, or one mapping of keywords.
            "meta" will do.
        memory: bytes that the allocator may reserve, as a limit of it is counted
            (`torch.cuda.set_per_process_memory_fraction`): an int or "22GiB". Or a float up to 1, a
            share of what plain training keeps for its backward pass.
        optimizer: what makes the optimiser of a list of parameters: a class of torch.optim, or
            `functools.partial(torch.optim.AdamW, fused=True)`. None: no optimiser is counted.
        loss: of the model's output; None: its `loss`, or else the mean of its floating outputs.
        max_error: the largest error of gradients, relative, that a block's option may have, by the
            table in docs/plan.md or by `errors`; 0 leaves what is exact. As it is, it leaves packs
            of 4 bits by the table, with which most models train like without; None allows all,
            down to 2 bits.
        device: a card's name, "H200" or "RTX 4090"; None: the GPU that is here. Times of devices
            that nobody measured are estimated from bandwidth and arithmetic, and say so.
        head: whether losses are computed by chunks of logits, exactly; None: where there is a head
            of a language model.
        parallel: degrees of parallelism, see `Parallel`. Then `batch` is that of a data-parallel
            rank, bytes are those of the rank with most, and each rank is converted by the plan,
            whose rows are the blocks of all stages. Times are without waits for other ranks.
        errors: what `packlight.gradient_error` says of this model, by methods that are in the table
            (all blocks alike): then errors are those, of an option that of the block that errs
            most, and packs that it has not measured are not taken. None: by the table.

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
    for name, value, such in (
        ("optimizer", optimizer, "a class of torch.optim, such as torch.optim.AdamW"),
        ("loss", loss, "a function of the model's output that returns a scalar"),
    ):
        if value is not None and not callable(value):
            raise InputError(f"{name} is a {type(value).__name__}, which cannot be called; {such}")
    if errors is not None and not isinstance(errors, GradientReport):
        raise InputError(
            f"errors is a {type(errors).__name__}; expected what packlight.gradient_error returned"
        )
    budget, share = _asked(memory)
    inputs, kwargs = arguments_of(model, *batch)
    known = device if isinstance(device, Device) else device_of(device)
    # What it runs on takes much of torch's inside, which `import packlight` leaves alone.
    from packlight.planner.cutting import group_for
    from packlight.planner.planning import planned
    from packlight.planner.study import Study

    degrees = checked(parallel)
    with group_for(degrees):
        study = Study(model, inputs, kwargs, known, loss, optimizer, head, degrees)
        return planned(study, budget, share, max_error, errors)


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
