"""Measures: kernels, whole training steps, or training.

    python -m benchmarks.run --suite step --filter 'llama/*' --budget 500
    python -m benchmarks.run --suite kernels --filter fewbit norms
    python -m benchmarks.run --suite train --data shared/data --filter cifar

Cases run one after another in one process on one device; each says in its module what it checks
before it times. A row a case goes to `benchmarks/results/` as soon as it is measured. Where a run
fails the row says why. Cases whose row is there already, of this device and this commit, are
skipped; failed ones too, but for `--retry`. A short table comes last.

`--filter` takes patterns of case names (`*`, `?`), or parts of them; `--list` shows the names.
`--budget` stops before a case that would not fit into so many seconds: each row says what it took.
`--missing` takes rows of any device and commit for done. `--processes 1` spreads models, or kinds
of kernels, over the GPUs; more on each are for training runs, whose times mean nothing then.
A kernel that is more than 10% slower than in the last row of the same device is printed in red.
"""

import argparse
import gc
import os
import pathlib
import queue
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import Any

import torch

from benchmarks import kernel_suite, rows, step, train_suite

SUITES = {"kernels": kernel_suite, "step": step, "train": train_suite}
SLOWER = 1.1


def chosen(cases: list[rows.Case], filters: list[str]) -> list[rows.Case]:
    """The cases that a filter names, all that are not hidden if there is none."""

    def matches(name: str, pattern: str) -> bool:
        if any(sign in pattern for sign in "*?["):
            return fnmatchcase(name, pattern)
        return pattern in name

    if not filters:
        return [case for case in cases if not case.hidden]
    return [
        case
        for case in cases
        if any(
            # "*/eager" is not meant for models that are there to try things out.
            matches(case.name, pattern) and not (case.hidden and pattern.startswith("*"))
            for pattern in filters
        )
    ]


def attempt(case: rows.Case) -> dict[str, Any]:
    """The case's row: what was measured, or why nothing was, and how long that took."""
    started = time.perf_counter()
    try:
        row = case.measure()
    except Exception as error:  # noqa: BLE001 - whatever it is, the next case may run
        reason = str(error).strip().partition("\n")[0][:200]
        row = {"failed": f"{type(error).__name__}: {reason}"}
    return {**case.key, **row, "seconds": round(time.perf_counter() - started, 1)}


def clean(device: str) -> None:
    """Frees what a case left. Raises where its failure has broken the device's context."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def expected_seconds(case: rows.Case, known: list[dict[str, Any]], device: str) -> float:
    """What the case took when it last ran on this device, or a guess."""
    took = [
        row["seconds"]
        for row in known
        if "seconds" in row and row["device"] == device and rows.same_case(row, case)
    ]
    return took[-1] if took else case.seconds


def own_times(row: dict[str, Any]) -> dict[str, float]:
    """Times of ours in a row of a kernel, without torch's, Liger's and the copy's."""
    return {
        key: value
        for key, value in row.items()
        if key.endswith("_ms") and not any(other in key for other in ("torch", "liger", "copy"))
    }


def slowdowns(row: dict[str, Any], before: dict[str, Any] | None) -> dict[str, float]:
    """By what factor times of ours have grown, of those that grew by more than a tenth."""
    if before is None or row["device"] != before["device"]:
        return {}
    then = own_times(before)
    factors = {name: value / then[name] for name, value in own_times(row).items() if then.get(name)}
    return {name: factor for name, factor in factors.items() if factor > SLOWER}


def red(text: str) -> str:
    return f"\033[31m{text}\033[0m"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--filter", nargs="+", default=[], metavar="PATTERN")
    parser.add_argument("--list", action="store_true", help="only show the names of the cases")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument("--out", type=pathlib.Path, default=rows.RESULTS, help="folder of rows")
    parser.add_argument("--commit", help="where git cannot tell")
    parser.add_argument("--budget", type=float, metavar="SECONDS")
    parser.add_argument("--missing", action="store_true", help="skip what was ever measured")
    parser.add_argument("--processes", type=int, metavar="N", help="so many at once on each GPU")
    parser.add_argument("--retry", action="store_true", help="also run what has failed before")
    group = parser.add_argument_group("step")
    group.add_argument("--largest-batch", type=float, metavar="GIB")
    group = parser.add_argument_group("kernels")
    group.add_argument("--log2-elements", type=int, nargs="+", default=[28])
    group = parser.add_argument_group("train")
    group.add_argument("--data", type=pathlib.Path, help="folder with cifar10/ and glue.npz")
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    group.add_argument("--limit", type=int, help="images of CIFAR-10, to try things out")
    group.add_argument("--epochs", type=int, help="on CIFAR-10, in place of each network's own")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    options = arguments(words)
    started = time.perf_counter()
    suite = SUITES[options.suite]
    cases = chosen(suite.cases(options), options.filter)
    if options.list:
        print("\n".join(case.name for case in cases))
        return
    if not cases:
        sys.exit(f"no case is called like {options.filter}; --list shows the names")
    settings = rows.settings(options.device, options.commit)
    lines = []
    if options.processes:
        waiting = [
            case
            for case in cases
            if done(case, rows.read(options.out / case.out), options, settings) is None
        ]
        side_by_side(waiting, options, words)
    for case in cases:
        path = options.out / case.out
        known = rows.read(path)
        found = done(case, known, options, settings)
        if found is not None:
            lines.append(suite.line(found, known))
            continue
        if options.processes:
            continue
        left = float("inf")
        if options.budget is not None:
            left = options.budget - (time.perf_counter() - started)
        needed = expected_seconds(case, known, settings["device"])
        if needed > left:
            print(f"{case.name}: about {needed:.0f} s, {left:.0f} s left; stopped", flush=True)
            break
        row = {**attempt(case), **settings}
        rows.append(path, row)
        text = suite.line(row, [*known, row])
        same = [old for old in known if rows.same_case(old, case)]
        before = [old for old in same if "failed" not in old and old["device"] == row["device"]]
        if options.suite == "kernels":
            for name, factor in slowdowns(row, before[-1] if before else None).items():
                text += red(f" {name} {factor:.2f} times as long as at {before[-1]['commit']}")
        print(text, flush=True)
        lines.append(text)
        clean(options.device)
    print(f"\n{len(lines)} of {len(cases)} cases\n" + "\n".join(lines))


def done(
    case: rows.Case,
    known: list[dict[str, Any]],
    options: argparse.Namespace,
    settings: dict[str, Any],
) -> dict[str, Any] | None:
    """The row for which a case need not run."""
    found = [
        row
        for row in known
        if rows.same_case(row, case) and (options.missing or is_of(row, settings))
    ]
    if not found or ("failed" in found[-1] and options.retry):
        return None
    return found[-1]


def is_of(row: dict[str, Any], settings: dict[str, Any]) -> bool:
    return all(row[key] == settings[key] for key in ("device", "commit"))


def side_by_side(cases: list[rows.Case], options: argparse.Namespace, words: Sequence[str]) -> None:
    """Runs cases in processes of their own, `options.processes` at once on each GPU.

    Steps of one model, and kernels of one kind, stay together: they are compared with each other.
    """
    started = time.perf_counter()
    groups: dict[str, list[str]] = {}
    for case in cases:
        group = case.name if options.suite == "train" else case.name.partition("/")[0]
        groups.setdefault(group, []).append(f"[{case.name[0]}]{case.name[1:]}")  # not a part
    count = torch.cuda.device_count() if options.device == "cuda" else 1
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(device) for device in range(count)]
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in devices * options.processes:
        free.put(device)

    def run(patterns: list[str]) -> None:
        device = free.get()
        call = [sys.executable, "-m", "benchmarks.run", *words, "--processes", "0"]
        if options.budget is not None:
            left = options.budget - (time.perf_counter() - started)
            call += ["--budget", str(left)]
        call += ["--filter", *patterns]
        ended = subprocess.run(call, env={**os.environ, "CUDA_VISIBLE_DEVICES": device})
        if ended.returncode:
            print(f"{patterns[0]} and what follows: ended with {ended.returncode}", flush=True)
        free.put(device)

    with ThreadPoolExecutor(len(devices) * options.processes) as pool:
        list(pool.map(run, groups.values()))


if __name__ == "__main__":
    main()
