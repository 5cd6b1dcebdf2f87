"""Plans beside what a GPU does: peaks and times of them, and of choices that are one for all.

    python -m benchmarks.plans write --out plans               # no GPU: files for `--plan`
    python -m benchmarks.plans foretell --out jobs.jsonl       # no GPU: walks models, makes plans
    python -m benchmarks.plans measure jobs.jsonl --out benchmarks/results/planner.jsonl

A job is what a model becomes, with the bytes and milliseconds that are foretold. One with a budget
runs while the allocator is limited to it, in reserved bytes, with an optimiser that has no state
yet, as a user's first step. One with "least", a limit in which it surely runs, is also run at lower
ones, for the lowest in which its first steps run; "refused" is a limit in which the smallest plan
should not run, and "size" the largest batch or longest sequence that should. Times are without a
limit, and none of one with "untimed". Losses and norms of gradients stand beside those of the plain
model. Models and precision are those of `benchmarks.user`.

All jobs of a model are run by one process, which empties the allocator's cache and changes its
limit between them: first what is asked of memory, then times. With `--turn FILE` it waits between
the two for the lock of that file, so that processes of several models find out side by side what
fits, and are timed one after the other; with `--alone` it waits before both. Of two rows of a job
the later one has all of the earlier.
"""

import argparse
import contextlib
import fcntl
import functools
import gc
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

import packlight
from benchmarks import rows
from benchmarks.user.choices import CHOICES, PLANS
from benchmarks.user.scenarios import SCENARIOS, Loss, Size
from benchmarks.user.worker import Device, Trained, device_events
from packlight.method_files import format_methods, parse_methods
from packlight.planner import menu
from packlight.planner.devices import device_of
from packlight.planner.fit import Choice, choices, extremes
from packlight.planner.planner import MAX_ERROR
from packlight.planner.planning import front, planned
from packlight.planner.study import Mix, Study
from packlight.planner.timeline import allocatable, reserved

NAMES = ("vitb", "llama1b", "lora8b-4k")
BUDGETS = 6
Row = dict[str, Any]


# ---- what is foretold ----------------------------------------------------------------------------


def tensors_of(loss: Loss) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The batch that a loss of a scenario holds, as the model is called with it."""
    cells = zip(loss.__code__.co_freevars, loss.__closure__ or (), strict=True)
    held = {name: cell.cell_contents for name, cell in cells}
    if "ids" in held:
        return (), {"input_ids": held["ids"], "labels": held.get("labels", held["ids"])}
    return (held["x"],), {}


def study_of(name: str) -> Study:
    scenario = SCENARIOS[name]
    with torch.device("meta"):
        model, loss = scenario.model(scenario.size), scenario.batch(scenario.size)
    inputs, kwargs = tensors_of(loss)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-5, fused=True)
    return Study(model.train(), inputs, kwargs, device_of("H200"), None, optimizer)


def write(names: list[str], folder: pathlib.Path) -> None:
    """The plans of `benchmarks.user`, each as FOLDER/SCENARIO-CHOICE.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        study = study_of(name)
        for choice, limits in PLANS.items():
            if name not in limits:
                continue
            budget = reserved(int(limits[name].gib * 2**30))
            with torch.autocast("cpu", torch.bfloat16, enabled=SCENARIOS[name].autocast):
                plan = planned(study, budget, None, limits[name].error)
            plan.save(folder / f"{name}-{choice}.toml")
            options = [block.option for block in plan.blocks]
            counts = {option: options.count(option) for option in dict.fromkeys(options)}
            print(f"{name} {choice}: {plan.peak_bytes / 2**30:.2f} GiB, {plan.ms:.0f} ms", counts)


def _uniform(study: Study) -> Iterator[Choice]:
    """Choices that are one for all blocks."""
    for option in menu.MENU:
        packed = any(option.inside)
        outside = option if packed and option.block is None else menu.EXACT
        outside = menu.PACKED_4 if packed and option.block is not None else outside
        yield Choice(option.name, option, outside, packed and study.head, "")


def _job(name: str, kind: str, methods: dict[Any, Any], head: bool, **more: Any) -> Row:
    texts = [(selector, format_methods(choice)) for selector, choice in methods.items()]
    return {"scenario": name, "kind": kind, "methods": texts, "head": head, **more}


def _foretold(timeline: Any) -> Row:
    device = sum(segment.device_ms for segment in timeline.segments)
    host = sum(segment.host_ms for segment in timeline.segments)
    return {
        "predicted_peak": timeline.peak,
        "predicted_ms": round(timeline.ms, 2),
        "predicted_device_ms": round(device, 2),
        "predicted_host_ms": round(host, 2),
    }


def _budgets(study: Study, max_error: float | None, count: int) -> list[int]:
    """Those for which points of the front are enough, from the smallest to the fastest."""
    peaks = [peak for _, peak in front(study, max_error)][::-1]
    places = [round(place * (len(peaks) - 1) / (count - 1)) for place in range(count)]
    return [reserved(peaks[place]) + 1 for place in sorted(set(places))]


def foretell(name: str, sizes: bool, budgets: int) -> Iterator[Row]:
    study = study_of(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=SCENARIOS[name].autocast):
        for choice in _uniform(study):
            methods = menu.selectors(dict.fromkeys(study.blocks, choice.option), choice.outside)
            timeline = study.walked(choice.option, choice.outside, choice.head).timeline
            yield _job(name, choice.name, methods, choice.head, **_foretold(timeline))
        every = {
            block: menu.CHECKPOINTED if place % 2 else menu.EXACT
            for place, block in enumerate(study.blocks)
        }
        walks = {o: study.walked(o, menu.EXACT, False) for o in (menu.EXACT, menu.CHECKPOINTED)}
        mix = Mix(walks[menu.EXACT], {block: walks[option] for block, option in every.items()})
        methods = menu.selectors(every, menu.EXACT)
        yield _job(name, "checkpoint every second", methods, False, **_foretold(mix.timeline()))
        for max_error in (MAX_ERROR, None, 0.0):
            for budget in _budgets(study, max_error, budgets):
                plan = planned(study, budget, None, max_error)
                options = [block.option for block in plan.blocks]
                yield _job(
                    name, "plan", dict(plan), plan.head, budget=budget, max_error=max_error,
                    options={option: options.count(option) for option in dict.fromkeys(options)},
                    **_foretold(plan.timeline),
                )  # fmt: skip
            plan = planned(study, _budgets(study, max_error, budgets)[0], None, max_error)
            yield _job(
                name, "refused", dict(plan), plan.head, max_error=max_error,
                refused=int(0.97 * plan.reserved_bytes), **_foretold(plan.timeline),
            )  # fmt: skip
        if sizes:
            yield from _sizes(name, study)
    if "liger" in SCENARIOS[name].kinds:
        choice = "liger+checkpoint"
        yield _job(name, "Liger, checkpoint", {}, False, choice=choice)


def _sizes(name: str, study: Study) -> Iterator[Row]:
    """The largest batch and the longest sequence, with the memory of a card of 24 GiB."""
    limit = 24 * 2**30
    for choice in choices(study.head, transformers=False):
        found = extremes(study, choice, allocatable(limit), None)
        methods = menu.selectors(dict.fromkeys(study.blocks, choice.option), choice.outside)
        for by, size in found.items():
            if size:
                yield _job(name, choice.name, methods, choice.head, by=by, size=size, limit=limit)


# ---- what is measured ----------------------------------------------------------------------------


class Measuring:
    """A model of a scenario on the GPU, which becomes what jobs say and is as it was after each."""

    def __init__(self, name: str) -> None:
        self.device = Device("cuda")
        task = SCENARIOS[name]
        self.trained, self.size = Trained(task, CHOICES["eager"], task.size, self.device), task.size

    def compile(self, jobs: list[Row]) -> None:
        """Has the kernels of all jobs compiled: a pass of each choice for all blocks."""
        for job in jobs:
            if not {"choice", "by", "refused", "budget"} & job.keys():
                with self._converted(job):
                    self.gradients()
        self.clean()

    def memory(self, job: Row) -> Row:
        """Whether it runs where it should and where it should not; no times."""
        if "by" in job:
            return {"tried": self.tried(job)}
        if "refused" in job:
            return {"ran": self.fits(job, job["refused"])}
        found: Row = {}
        if "budget" in job:
            found["out_of_memory"] = [] if self.fits(job, job["budget"]) else [job["budget"]]
        if "least" in job:
            ran = "budget" in job and not found["out_of_memory"]
            found["least_limit"] = self.least(job, job["budget" if ran else "least"])
        return found

    def tried(self, job: Row) -> dict[int, bool]:
        """Whether sizes run: that of the job, and 3% more or less until the answer is another."""
        unit = 64 if job["by"] == "sequence" else 1
        found = {job["size"]: self.runs(job, job["size"])}
        up = found[job["size"]]
        for percent in (3, 6, 9):
            size = int((1 + percent / 100 * (1 if up else -1)) * job["size"]) // unit * unit
            size += unit if up else 0
            found[size] = self.runs(job, size)
            if found[size] != up:
                break
        return found

    def runs(self, job: Row, size: int) -> bool:
        """Whether steps of this size run within the limit of the job."""
        changed = {"batch": size} if job["by"] == "batch" else {"batch": 1, "length": size}
        self.trained.see(Size(**{**self.size._asdict(), **changed}))
        try:
            return self.fits(job, job["limit"], steps=2)
        finally:
            self.trained.see(self.size)

    def least(self, job: Row, high: int) -> int:
        """The lowest limit of reserved bytes in which steps run, to 0.4%; they run in `high`."""
        low = int(0.99 * job["predicted_peak"])
        while high - low > 0.004 * high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(job, middle) else (middle, high)
        return high

    def fits(self, job: Row, limit: int, steps: int = 3) -> bool:
        """Whether steps run within a limit: the first has no state of the optimiser yet."""
        with self._converted(job), _limited(limit):
            try:
                for _ in range(steps):
                    self.trained.step()
                self.device.wait()
                return True
            except torch.OutOfMemoryError:
                return False

    def times(self, job: Row, steps: int) -> Row:
        """Peak and times of steps without a limit, loss and gradients."""
        with self._converted(job):
            try:
                return {**self._steps(steps), **self.gradients()}
            except torch.OutOfMemoryError:
                return {"out_of_memory": [None]}

    def gradients(self) -> Row:
        found = self.trained.gradients()
        return {name: found[name] for name in ("loss", "grad_norm")}

    def clean(self) -> None:
        trained = self.trained
        trained.optimizer.zero_grad(set_to_none=True)
        # Weights stay what they are, so that gradients can be compared.
        trained.optimizer = torch.optim.AdamW(trained.parameters, lr=0.0, fused=True)
        self.device.wait()
        self.device.clean()

    @contextlib.contextmanager
    def _converted(self, job: Row) -> Iterator[None]:
        self.clean()
        methods = {selector: parse_methods(text) for selector, text in job["methods"]}
        model = self.trained.plain
        with contextlib.suppress(packlight.NothingMatchedError):
            if job["head"] or any(methods.values()):
                packlight.convert(model, methods, functional=True, head=job["head"], strict=False)
        if "choice" in job:  # which is not undone, so of the last job of a model
            for change in CHOICES[job["choice"]].changes:
                change(model)
        try:
            yield
        finally:
            packlight.revert(model)

    def _steps(self, steps: int) -> Row:
        self.trained.step()
        self.device.wait()
        torch.cuda.reset_peak_memory_stats()
        whole, host = list[float](), list[float]()
        for _ in range(steps + 1):
            begin = time.perf_counter()
            self.trained.step()
            host.append(time.perf_counter() - begin)
            self.device.wait()
            whole.append(time.perf_counter() - begin)
        return {
            "peak": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "ms": round(1e3 * statistics.median(whole[1:]), 2),
            "least_ms": round(1e3 * min(whole[1:]), 2),
            "host_ms": round(1e3 * statistics.median(host[1:]), 2),
            "device_ms": round(busy_ms(device_events(self.trained, self.device)), 2),
        }


def busy_ms(events: list[Any]) -> float:
    """How long the device takes for what it ran, by a profile of it, were nothing late to come.

    Copies beside kernels are within their time. Between two kernels that wait for the device there
    is a microsecond or two; what is more than `GAP` is the host's.
    """
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    total, done = 0.0, spans[0][0]
    for start, end in spans:
        total += max(0.0, end - max(start, done)) + min(max(0.0, start - done), GAP)
        done = max(done, end)
    return total / 1e3


GAP = 2.0  # microseconds


@contextlib.contextmanager
def _limited(limit: int | None) -> Iterator[None]:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else limit / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def measure(
    name: str,
    jobs: list[Row],
    out: pathlib.Path,
    steps: int,
    until: tuple[float, float],
    commit: str,
    turn: pathlib.Path | None,
    alone: bool,
) -> None:
    """The jobs of a model; `until` is when to begin no more of what is asked of memory, of times"""
    settings = rows.settings("cuda", commit)
    measuring = Measuring(name)
    measuring.compile(jobs)
    gc.freeze()  # so that collections between jobs are short
    # What a choice changes is not undone, so that those that have one come last.
    jobs = sorted(jobs, key=lambda job: "choice" in job)
    shown = [{k: v for k, v in job.items() if k != "methods"} for job in jobs]
    found = [dict[str, Any]() for _ in jobs]
    with _turn_of(turn if alone else None):
        for place, job in enumerate(jobs):
            if {"by", "refused", "budget", "least"} & job.keys() and time.monotonic() < until[0]:
                found[place] = measuring.memory(job)
                rows.append(out, {**settings, **shown[place], **found[place]})
    with _turn_of(None if alone else turn):
        plain = measuring.gradients()
        for place, job in enumerate(jobs):
            if {"by", "refused", "untimed"} & job.keys() or time.monotonic() > until[1]:
                continue
            timed = {"plain": plain, **measuring.times(job, steps)}
            rows.append(out, {**settings, **shown[place], **found[place], **timed})


@contextlib.contextmanager
def _turn_of(path: pathlib.Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with path.open("a") as file:
        print("ready", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["write", "foretell", "measure"])
    parser.add_argument("jobs", nargs="?", type=pathlib.Path, help="that are measured")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="*", default=NAMES)
    parser.add_argument("--sizes", action="store_true", help="also largest batches and sequences")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--budgets", type=int, default=BUDGETS, help="of each model and error")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no job after these")
    parser.add_argument(
        "--memory-seconds", type=float, default=1e9, help="ask no more of memory after these"
    )
    parser.add_argument("--turn", type=pathlib.Path, help="a file whose lock is waited for")
    parser.add_argument("--alone", action="store_true", help="ask nothing before the turn")
    parser.add_argument("--commit")
    given = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if given.what == "write":
        write(given.only, given.out)
        return
    if given.what == "foretell":
        for name in given.only:
            for job in foretell(name, given.sizes, given.budgets):
                rows.append(given.out, job)
        return
    jobs = [job for job in rows.read(given.jobs) if job["scenario"] in given.only]
    now = time.monotonic()
    until = now + given.memory_seconds, now + given.seconds
    for name in dict.fromkeys(job["scenario"] for job in jobs):
        own = [job for job in jobs if job["scenario"] == name]
        measure(name, own, given.out, given.steps, until, given.commit, given.turn, given.alone)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
