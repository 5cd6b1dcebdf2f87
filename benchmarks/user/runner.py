"""Runs jobs in processes of their own that take turns on one device, within a time.

Several processes import, make their models, compile and warm up side by side, as far as the
memory of the device goes. One at a time is timed, and all others are stopped then (SIGSTOP), with
what they have started: they take no CPU and launch nothing. What a process allocates is counted by
its own allocator, so a peak is its own.
"""

import contextlib
import json
import math
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks import rows
from benchmarks.user.choices import CHOICES, plan_of
from benchmarks.user.scenarios import SCENARIOS
from benchmarks.user.worker import Job

ROOT = rows.RESULTS.parents[1]
COMMAND = [sys.executable, "-m", "benchmarks.user.worker"]


class Worker:
    """A process and how far it is: "imports", "ready", "warms", "warm", "measures"."""

    def __init__(self, job: Job, said: "queue.SimpleQueue[Any]", folder: str) -> None:
        self.job, self.state, self.row = job, "imports", dict[str, Any]()
        self.since, self.spent_s, self.shared = time.monotonic(), 0.0, False
        self.stops = list[list[float]]()  # from when until when, the last one perhaps not yet
        self.log = pathlib.Path(folder, f"{job.scenario}-{job.choice}-{time.monotonic_ns()}.log")
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(self.log.with_suffix(""))}  # compiles are cold
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, json.dumps(job._asdict())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, **cache},
                process_group=0,  # to be stopped with what it starts
            )
        threading.Thread(target=self._listen, args=(said,), daemon=True).start()

    def _listen(self, said: "queue.SimpleQueue[Any]") -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if line.startswith("{"):  # what an import prints does not
                    said.put((self, json.loads(line)))
        said.put((self, None))

    @property
    def name(self) -> str:
        return f"{self.job.scenario}/{self.job.choice}"

    @property
    def on_device(self) -> bool:
        return self.state not in ("imports", "ready")

    def busy_s(self, now: float) -> float:
        """For how long it has been at what it does; nothing while it waits to be told."""
        if self.state in ("ready", "warm"):
            return 0.0
        stopped = sum(max(0.0, min(end, now) - max(begin, self.since)) for begin, end in self.stops)
        return now - self.since - stopped

    def comes_to(self, state: str, now: float) -> None:
        self.spent_s += self.busy_s(now) * self.on_device
        self.state, self.since = state, now

    def tell(self, word: str, state: str) -> None:
        assert self.process.stdin is not None
        self.comes_to(state, time.monotonic())
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is heard next
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()

    def _signal(self, number: int) -> None:
        # Gone already, where the group has ended by itself.
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    @property
    def is_stopped(self) -> bool:
        return bool(self.stops) and self.stops[-1][1] == math.inf

    def stop(self) -> None:
        if not self.is_stopped:
            self.stops.append([time.monotonic(), math.inf])
            self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        if self.is_stopped:
            self.stops[-1][1] = time.monotonic()
            self._signal(signal.SIGCONT)

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def words(self, count: int) -> str:
        """The last lines that it has written."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-count:])[-2000:]


class Turns:
    """All jobs, those that run, and who is measured."""

    def __init__(
        self, jobs: list[Job], processes: int, gib: float, each: float, folder: str
    ) -> None:
        self.waiting, self.workers = list(jobs), list[Worker]()
        self.processes, self.gib, self.each, self.folder = processes, gib, each, folder
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.alone: set[Job] = set()

    def run(self, seconds: float, done: Callable[[Job, dict[str, Any]], None]) -> list[Job]:
        """Hands over a row for each job; the jobs for which there was no time are returned."""
        ends = time.monotonic() + seconds
        try:
            while (self.waiting or self.workers) and time.monotonic() < ends:
                self.start()
                self.admit()
                self.give_turn()
                self.hear(done)
            for worker in [worker for worker in self.workers if "ms" in worker.row]:
                worker.end()
                self.ended(worker, done)
            now = time.monotonic()
            for worker in self.workers:
                busy = f"{worker.state}, {worker.busy_s(now):.0f} s of its own so far"
                print(f"{worker.name}: {busy}; {worker.words(2)}", file=sys.stderr, flush=True)
            return [worker.job for worker in self.workers] + self.waiting
        finally:
            for worker in self.workers:
                worker.end()

    def start(self) -> None:
        measuring = any(worker.state == "measures" for worker in self.workers)
        while self.waiting and len(self.workers) < self.processes and not measuring:
            self.workers.append(Worker(self.waiting.pop(0), self.said, self.folder))

    def needs(self, job: Job) -> float:
        if job in self.alone:
            return float("inf")
        return max(job.limit, job.task.gib)

    def admit(self) -> None:
        """Lets those that are ready onto the device, in their order, while there is room.

        Room for those that are not ready yet is left: eager, for which others wait, is the first.
        """
        present = [worker for worker in self.workers if worker.on_device]
        taken = sum(self.needs(worker.job) for worker in present)
        for worker in self.workers:
            if worker.on_device:
                continue
            needs = self.needs(worker.job)
            if taken and taken + needs > self.gib:
                break
            if worker.state == "ready":
                worker.tell("go", "warms")
                present.append(worker)
            taken += needs
        if len(present) > 1:
            for worker in present:
                worker.shared = True

    def give_turn(self) -> None:
        if any(worker.state == "measures" for worker in self.workers):
            return
        warm = next((worker for worker in self.workers if self.may_measure(worker)), None)
        for worker in self.workers:
            if warm is None or worker is warm:
                worker.go_on()
            else:
                worker.stop()
        if warm is not None:
            if len(self.workers) > 1:
                time.sleep(0.3)  # what the others had launched
            warm.tell(json.dumps(warm.stops), "measures")

    def may_measure(self, worker: Worker) -> bool:
        """Eager goes first: the others are checked by it."""
        first = worker.job._replace(choice="eager")
        before = any(other.job == first for other in self.workers if other is not worker)
        return worker.state == "warm" and not before

    def hear(self, done: Callable[[Job, dict[str, Any]], None]) -> None:
        try:
            worker, message = self.said.get(timeout=1.0)
        except queue.Empty:
            for worker in self.workers:
                if worker.busy_s(time.monotonic()) > self.each:
                    worker.row["error"] = f"TimeoutError: more than {self.each:.0f} s"
                    worker.end()
            return
        if message is None:
            self.ended(worker, done)
        elif "state" in message:
            worker.comes_to(message["state"], message["at"])
        else:
            worker.row |= message["row"]

    def ended(self, worker: Worker, done: Callable[[Job, dict[str, Any]], None]) -> None:
        worker.process.wait()
        worker.end()
        self.workers.remove(worker)
        row = worker.row
        if "out of memory" in row.get("error", "") and worker.shared:
            self.alone.add(worker.job)
            self.waiting.insert(0, worker.job)
            return
        if "ms" not in row and "error" not in row:
            row["error"] = f"ended with {worker.process.returncode}: {worker.words(1)}"
        if "error" in row:
            print(worker.words(12), file=sys.stderr, flush=True)
        worker.comes_to("ended", time.monotonic())
        done(worker.job, row | {"seconds": round(worker.spent_s, 1)})


def device_gib() -> float:
    """Memory of the first GPU, by the driver's tool: no context is made."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0.0
    return float(found.split()[0]) / 1024


def run(
    jobs: list[Job],
    out: pathlib.Path,
    known: list[dict[str, Any]],
    processes: int,
    budget: float,
    each: float,
) -> list[Job]:
    """Writes a row a job to `out`; returns the jobs that were not done."""

    def done(job: Job, row: dict[str, Any]) -> None:
        key = {"scenario": job.scenario, "choice": job.choice, "mode": job.mode}
        extra = {"tiny": True} if job.tiny else {}
        extra |= {"limit_gib": job.limit} if job.limit else {}
        row = key | extra | row | {"processes": processes}
        if job.mode in ("step", "once") and "ms" in row:
            row["check"] = check(row, [*known, row])
        known.append(row)
        rows.append(out, row)
        print(line(row), flush=True)

    gib = 0.93 * device_gib() or float("inf")
    with tempfile.TemporaryDirectory() as folder:
        return Turns(jobs, processes, gib, each, folder).run(budget, done)


# ---- what rows say --------------------------------------------------------------------------


def check(row: dict[str, Any], known: list[dict[str, Any]]) -> str:
    """Whether loss and gradients are eager's, with the same weights and batch: "passed", or not.

    Norms are of gradients of all and of slices of the parameters, in their order: where a gradient
    is lost, or comes twice, one of them shows it. Dropout is off, but for compiled models that have
    it: their masks differ from eager's, so that a factor of two is let pass.
    """
    same = ("scenario", "mode", "device", "torch", "batch", "length")
    eager = (
        [row["eager"]]
        if "eager" in row
        else [
            other
            for other in known
            if other["choice"] == "eager"
            and "ms" in other
            and all(other.get(key) == row.get(key) for key in same)
        ]
    )
    if not eager:
        return "no eager row"
    base, loose = eager[-1], row["dropout_in_check"]
    if row["grads_missing"] != base["grads_missing"]:
        return f"failed: {row['grads_missing']} parameters without a gradient"
    off = abs(row["loss"] - base["loss"]) / abs(base["loss"])
    if not off <= (0.1 if loose else 0.02):  # nor NaN
        return f"failed: loss {row['loss']}, eager's {base['loss']}"
    limit = 1.0 if loose else Job(row["scenario"], row["choice"], "").task.tolerance
    if (error := row.get("gradient_error")) is not None:
        if not error <= 0.5:
            return f"failed: gradients are {error} of their norm away from eager's"
        limit = 0.3  # what is at random within this error makes norms larger
    for i, (norm, truth) in enumerate(zip(row["grad_norms"], base["grad_norms"], strict=True)):
        if not truth / (1 + limit) <= norm <= truth * (1 + limit):
            return f"failed: norm {i} of gradients is {norm / truth:.3f} of eager's"
    return "passed"


BESIDE = {
    "host": "host_ms",
    "GPU": "gpu_ms",
    "kernels": "kernels",
    "warm": "warm_s",
    "error": "gradient_error",
}


def line(row: dict[str, Any]) -> str:
    text = f"{row['scenario']:14s} {row['choice']:18s}"
    if "ms" not in row:
        return f"{text} {row['error']}"
    figures = [f"{row['ms']:8.1f} ms", f"{row['per_s']:9.0f} {row['unit']}/s"]
    if row.get("peak_gib") is not None:
        figures.append(f"peak {row['peak_gib']:6.2f} GiB")
    if row["mode"] in ("longest", "largest"):
        by = {"longest": "length", "largest": "batch"}[row["mode"]]
        figures.append(f"{by} {row[by]} in {row['limit_gib']:g} GiB")
    else:
        figures += [f"{name} {row[key]}" for name, key in BESIDE.items() if key in row]
        figures.append(row["check"])
    return " ".join([text, *figures, row.get("error", "")])


def order(names: str | None, table: dict[str, Any]) -> list[str]:
    """Of words with commas between them; all of the table for none. Raises SystemExit."""
    found = names.split(",") if names else list(table)
    if unknown := [name for name in found if name not in table]:
        raise SystemExit(f"{', '.join(unknown)}: not one of {', '.join(table)}")
    return found


def jobs(scenarios: list[str], choices: list[str], job: Job) -> list[Job]:
    """Scenario by scenario, so that those that are compared lie close in time."""

    def means_something(scenario: str, choice: str) -> bool:
        kinds, changes = {*SCENARIOS[scenario].kinds, ""}, CHOICES[choice]
        kinds |= {"plan"} if os.path.isfile(plan_of(scenario, choice)) else set()
        if (job.mode == "longest" or job.length) and "long" not in kinds:
            return False
        if job.mode == "largest" and SCENARIOS[scenario].size.batch == 1:
            return False
        # Every size is compiled anew.
        return changes.kind in kinds and not (changes.compiled and job.mode != "step")

    return [
        job._replace(scenario=scenario, choice=choice)
        for scenario in scenarios
        for choice in choices
        if means_something(scenario, choice)
    ]
