"""One choice of one scenario, measured in a process of its own.

    python -m benchmarks.user.worker JOB    # by `runner.py`; JOB as JSON

The process imports what it needs, says "ready" and waits for "go" before it touches the device. It
makes the model, takes the step that is compared with eager's, warms up, says "warm", and waits for
its turn: `runner.py` stops all others while it is timed. Messages are lines of JSON.
"""

import contextlib
import cProfile
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import pstats
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor, nn

import packlight
from benchmarks import rows
from benchmarks.user.choices import CHOICES, PLAN, Choice, plan_of
from benchmarks.user.scenarios import SCENARIOS, Loss, Scenario, Size

GIB = 2**30
Stops = list[list[float]]  # from when until when a process was stopped, by the monotonic clock
SLICES = 8  # of the parameters in their order, each with a norm of its own
CHECKED = 2048  # tokens of which the gradients of a long step are compared
SHORT = 20.0  # seconds of a step that is taken once more


class Job(NamedTuple):
    """What a process is to measure.

    `limit` in GiB is what the allocator may reserve: the largest batch or length is that in it, and
    one step is taken in it.
    """

    scenario: str
    choice: str
    device: str
    tiny: bool = False
    steps: int = 6
    mode: str = "step"  # or "once", "longest", "largest"
    limit: float = 0.0
    commit: str | None = None
    length: int = 0  # of a sequence, where it is not the scenario's

    @property
    def task(self) -> Scenario:
        scenario = SCENARIOS[self.scenario]
        scenario = scenario.tiny if self.tiny else scenario
        if not self.length:
            return scenario
        size = scenario.size._replace(batch=1, length=self.length)
        return scenario._replace(size=size, gib=float("inf"))  # alone on the device


class Device:
    """What is asked of a device; of a CPU, nothing."""

    def __init__(self, kind: str) -> None:
        self.kind, self.is_cuda = kind, kind == "cuda"

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def clean(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


class Trained:
    """A model as a choice leaves it, its loss and its optimiser.

    With `compared` it takes the gradients of the plain model before it is changed.
    """

    def __init__(
        self,
        scenario: Scenario,
        choice: Choice,
        size: Size,
        device: Device,
        compared: bool = False,
    ) -> None:
        self.scenario, self.device = scenario, device
        self.around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        torch.manual_seed(0)
        with torch.device(device.kind):
            self.plain = scenario.model(size)
        self.see(size)
        self.plain.train()
        self.model: nn.Module = self.plain
        self.autocast = torch.autocast(device.kind, torch.bfloat16, scenario.autocast)
        self.parameters = [p for p in self.plain.parameters() if p.requires_grad]
        self.exact = self.backward() if compared else None
        self.around = choice.around
        for change in choice.changes:
            changed = change(self.model)
            self.model = self.model if changed is None else changed
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)

    def see(self, size: Size) -> None:
        """Has a batch of this size."""
        torch.manual_seed(1)
        with torch.device(self.device.kind):
            self.loss: Loss = self.scenario.batch(size)

    def forward(self) -> Tensor:
        with self.autocast, self.around():
            return self.loss(self.model)

    def step(self) -> Tensor:
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def dropouts(self) -> list[nn.Module]:
        return [m for m in self.plain.modules() if "Dropout" in type(m).__name__ and m.p]

    def backward(self) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and gradients of a step that changes nothing."""
        torch.manual_seed(1)
        loss = self.forward()
        loss.backward()
        grads = [p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return loss.detach(), grads

    def gradients(self) -> dict[str, Any]:
        return summary(*self.backward())

    def compare(self) -> dict[str, Any]:
        """`gradients`, those of the plain model, and how far apart they are; once."""
        assert self.exact is not None
        (truth, exact), (loss, grads) = self.exact, self.backward()
        self.exact = None
        off = whole = torch.zeros((), device=truth.device)
        for one, other in zip(grads, exact, strict=True):
            if one is not None and other is not None:
                off = off + (one.float() - other.float()).square().sum()
                whole = whole + other.float().square().sum()
        error = (off / whole).sqrt().item()
        found = {"eager": summary(truth, exact), "gradient_error": float(f"{error:.3g}")}
        return summary(loss, grads) | found


def summary(loss: Tensor, grads: list[Tensor | None]) -> dict[str, Any]:
    """Loss and norms of gradients: of all, and of parameters in their order, in slices."""
    squares = torch.stack([grad.float().square().sum() for grad in grads if grad is not None])
    norms = [part.sum().sqrt().item() for part in squares.tensor_split(SLICES)]
    return {
        "loss": round(loss.item(), 5),
        "grad_norm": float(f"{math.hypot(*norms):.5g}"),
        "grad_norms": [float(f"{norm:.5g}") for norm in norms],
        "grads_missing": sum(grad is None for grad in grads),
    }


@contextlib.contextmanager
def without_dropout(dropouts: list[nn.Module]) -> Iterator[None]:
    before = [module.p for module in dropouts]
    for module in dropouts:
        module.p = 0.0
    yield
    for module, p in zip(dropouts, before, strict=True):
        module.p = p


def versions() -> dict[str, str]:
    found = {}
    for name in ("transformers", "peft", "timm", "liger_kernel", "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def measure(job: Job, turn: Callable[[], Stops]) -> Iterator[dict[str, Any]]:
    """Parts of the row, as soon as they are known. `turn` waits until nothing else runs."""
    task, choice, device = job.task, CHOICES[job.choice], Device(job.device)
    settings = rows.settings(job.device, job.commit)
    yield {**settings, "versions": versions(), "unit": task.unit}
    if job.mode != "step":
        yield from (once if job.mode == "once" else extreme)(job, turn)
        return
    trained = Trained(task, choice, task.size, device)
    yield {"batch": task.size.batch, "length": task.size.length}
    begin = time.monotonic()
    dropouts = trained.dropouts()
    # Without dropout a compiled model would be compiled once more.
    kept_on = bool(dropouts) and choice.compiled
    with without_dropout([] if kept_on else dropouts):
        yield {**trained.gradients(), "dropout_in_check": kept_on}
    if choice.graphed:  # what is recorded with dropout is not to lie beside what was without
        packlight.graphed(trained.plain)
    first = trained.step().item()
    for _ in range(2):
        trained.step()
    device.wait()
    end = time.monotonic()
    device.clean()
    stopped = sum(max(0.0, min(b, end) - max(a, begin)) for a, b in turn())
    yield {"warm_s": round(end - begin - stopped, 2), "first_loss": round(first, 5)}
    yield memory(trained, device, choice.replayed)
    yield times(trained, device, job.steps, task.size.items)
    yield launches(trained, device)
    yield {"python_calls": python_calls(trained)}


def memory(trained: Trained, device: Device, replayed: bool) -> dict[str, Any]:
    """GiB. Of what lies in the pool of a graph the allocator counts only what it has reserved."""
    for _ in range(2):  # the allocator's cache was emptied
        trained.step()
    device.wait()
    if not device.is_cuda:
        return dict.fromkeys(("static_gib", "kept_gib", "peak_gib", "reserved_gib"))
    torch.cuda.reset_peak_memory_stats()
    static = torch.cuda.memory_allocated()
    loss = trained.forward()
    kept = torch.cuda.memory_allocated() - static
    loss.backward()
    trained.optimizer.step()
    trained.optimizer.zero_grad(set_to_none=True)
    device.wait()
    found = {"static_gib": static, "kept_gib": kept}
    found["reserved_gib"] = torch.cuda.max_memory_reserved()
    found["peak_gib"] = found["reserved_gib"] if replayed else torch.cuda.max_memory_allocated()
    return {name: round(size / GIB, 3) for name, size in found.items()}


def times(trained: Trained, device: Device, steps: int, items: int) -> dict[str, Any]:
    """Of single steps: until Python has launched them, and until the device is done."""
    whole, host = list[float](), list[float]()
    # Short steps scatter more, and more of them fit.
    while len(whole) < steps or (sum(whole) < 1.0 and len(whole) < 5 * steps and device.is_cuda):
        device.wait()
        begin = time.perf_counter()
        loss = trained.step()
        host.append(time.perf_counter() - begin)
        device.wait()
        whole.append(time.perf_counter() - begin)
    median = statistics.median(whole)
    return {
        "ms": round(1e3 * median, 2),
        "ms_least": round(1e3 * min(whole), 2),
        "host_ms": round(1e3 * statistics.median(host), 2),
        "steps": len(whole),
        "per_s": round(items / median, 1),
        "last_loss": round(loss.item(), 5),
    }


def launches(trained: Trained, device: Device) -> dict[str, Any]:
    """How long and how much the GPU ran in one step."""
    if not device.is_cuda:
        return {"gpu_ms": None, "kernels": None}
    events = device_events(trained, device)
    total = sum(event.device_time for event in events)
    return {"gpu_ms": round(total / 1e3, 2), "kernels": len(events)}


def device_events(trained: Trained, device: Device) -> list[Any]:
    """What the GPU ran in one step, copies included, by the profiler."""
    from torch.autograd import DeviceType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        trained.step()
        device.wait()
    return [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


def python_calls(trained: Trained) -> int:
    """Calls of functions in one step, those of the backward pass too, which has its own thread."""
    profiler = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        profiler.enable()
        trained.step()
        profiler.disable()
    return pstats.Stats(profiler).total_calls


def once(job: Job, turn: Callable[[], Stops]) -> Iterator[dict[str, Any]]:
    """Of steps that are long, or of a length that eager has no memory for.

    Loss and gradients are compared with the plain model's in this process, on `CHECKED` tokens of
    one sequence, which also warms up. The first step of full length is not timed, if there are
    more. Where the host is ahead of the device, its time is the device's but for what is queued: a
    thousand launches.
    """
    task, device = job.task, Device(job.device)
    short = task.size._replace(batch=1, length=min(task.size.length, CHECKED))
    begin = time.monotonic()
    trained = Trained(task, CHOICES[job.choice], short, device, compared=True)
    yield {"batch": task.size.batch, "length": task.size.length, "compared": short.length}
    yield {**trained.compare(), "dropout_in_check": bool(trained.dropouts())}
    trained.step()
    device.wait()
    end = time.monotonic()
    trained.see(task.size)
    device.clean()
    turn()
    yield {"warm_s": round(end - begin, 2)}
    if job.limit:
        _limit_to(job.limit)
    taken, host = list[float](), list[float]()
    # Short steps scatter more, and more of them fit.
    most = 5 * job.steps if device.is_cuda else job.steps
    while len(taken) < job.steps or (sum(taken) < 2.0 and len(taken) < most):
        start = time.perf_counter()
        trained.step()
        host.append(time.perf_counter() - start)
        device.wait()
        taken.append(time.perf_counter() - start)
    later = slice(1 if len(taken) > 1 else 0, None)
    median = statistics.median(taken[later])
    row = {
        "ms": round(1e3 * median, 2),
        "host_ms": round(1e3 * statistics.median(host[later]), 2),
        "steps": len(taken[later]),
        "per_s": round(task.size.items / median, 1),
    }
    yield row | peaks(CHOICES[job.choice], device)  # at once: a row with a time is complete
    if median < 3:
        yield launches(trained, device)


def _limit_to(gib: float) -> None:
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib / total))


def peaks(choice: Choice, device: Device) -> dict[str, float | None]:
    """GiB, of what has run so far; of graphs as in `memory`."""
    if not device.is_cuda:
        return dict.fromkeys(("static_gib", "peak_gib", "reserved_gib"))
    found = {"static_gib": torch.cuda.memory_allocated()}
    found["reserved_gib"] = torch.cuda.max_memory_reserved()
    allocated = torch.cuda.max_memory_allocated()
    found["peak_gib"] = found["reserved_gib"] if choice.replayed else allocated
    return {name: round(size / GIB, 3) for name, size in found.items()}


def extreme(job: Job, turn: Callable[[], Stops]) -> Iterator[dict[str, Any]]:
    """The largest batch, or the longest sequence, whose step fits into `job.limit` GiB.

    The peak is taken as linear in the size, from steps of two smaller sizes, of which the second
    is of an eighth of what the first guess says, or larger; a step of the size so found runs with
    the allocator limited to `job.limit`, of one a thirtieth smaller if it does not fit. What CUDA
    itself takes of a GPU is not counted.
    """
    task, device = job.task, Device(job.device)
    by = "length" if job.mode == "longest" else "batch"
    unit, base = 1, task.size
    if by == "length":
        unit, base = 256, base._replace(batch=1, length=min(base.length, 4096))
    trained = Trained(task, CHOICES[job.choice], base, device)
    turn()

    def step(count: int) -> tuple[float, float]:
        """Seconds, and GiB at the peak."""
        trained.see(base._replace(**{by: count}))
        device.clean()
        begin = time.perf_counter()
        trained.step()
        device.wait()
        return time.perf_counter() - begin, torch.cuda.max_memory_allocated() / GIB

    largest = getattr(base, by)
    small = max(1, largest // 2)
    step(small)  # makes the optimiser's state
    (_, low), (_, high) = step(small), step(largest)

    def fitting() -> int:
        slope = (high - low) / (largest - small)
        return int((0.985 * job.limit - low) / slope + small) // unit * unit

    if (further := fitting() // 8 // unit * unit) > largest:
        largest, (_, high) = further, step(further)
    count, slope = fitting(), (high - low) / (largest - small)
    _limit_to(job.limit)
    while count > 0:
        try:
            seconds, peak = step(count)
            if seconds < SHORT:
                seconds, peak = step(count)
            break
        except torch.OutOfMemoryError:
            count = int(count * 29 / 30) // unit * unit
            trained.optimizer.zero_grad(set_to_none=True)
    else:
        raise torch.OutOfMemoryError(f"no {by} fits into {job.limit:g} GiB")
    items = base._replace(**{by: count}).items
    yield {
        **base._asdict(),
        by: count,
        "ms": round(1e3 * seconds, 2),
        "per_s": round(items / seconds, 1),
        "peak_gib": round(peak, 3),
        "mib_each": round(1024 * slope, 3),
    }


def main() -> None:
    # Libraries print; what the runner reads is a pipe of its own.
    pipe = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")

    def turn() -> Stops:
        say({"state": "warm", "at": time.monotonic()})
        return json.loads(sys.stdin.readline())

    job = Job(**json.loads(sys.argv[1]))
    os.environ[PLAN] = plan_of(job.scenario, job.choice)
    try:
        for name in ("torch._dynamo", "transformers", "peft", "timm", "liger_kernel.transformers"):
            if importlib.util.find_spec(name.partition(".")[0]):
                importlib.import_module(name)
        torch.set_float32_matmul_precision("high")
        if torch.cuda.is_initialized():
            say({"row": {"early": "an import has made a context on the GPU, ahead of the turn"}})
        say({"state": "ready", "at": time.monotonic()})
        sys.stdin.readline()
        for part in measure(job, turn):
            say({"row": part})
    except Exception as error:  # noqa: BLE001 - whatever it is, the row says it
        reason = " ".join(str(error).split())[:300]
        say({"row": {"error": f"{type(error).__name__}: {reason}"}})
        traceback.print_exc()
    finally:
        pipe.flush()
        sys.stderr.flush()
        os._exit(0)  # tearing down takes seconds, and the next process waits


if __name__ == "__main__":
    main()
