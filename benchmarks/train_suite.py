"""Does it train: runs on real data, exact and by every method, seed by seed."""

import argparse
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from scipy import stats

from benchmarks import cifar, glue, gpt, rows


def cases(options: argparse.Namespace) -> list[rows.Case]:
    found = gpt.cases(options)
    if options.data is not None:
        found += cifar.cases(options) + glue.cases(options)
    return found


def metric(row: dict[str, Any]) -> tuple[str, float]:
    """What a run is judged by, at its end."""
    for name in ("matthews", "f1", "accuracy"):
        if name in row:
            return name, row[name][-1] if isinstance(row[name], list) else row[name]
    return "validation loss", row["loss"][-1]


class Outcome(NamedTuple):
    """What a method's runs end at, by seed, beside exact runs of the same seeds."""

    values: dict[int, float]
    difference: float | None  # the mean over seeds, None where fewer than two have both
    p: float | None  # of a paired t-test, None where all seeds differ by the same


def outcome(method: str, found: Sequence[dict[str, Any]]) -> Outcome:
    """Of the last run of each seed."""
    ours, exact = (
        {row["seed"]: metric(row)[1] for row in found if row["method"] == name}
        for name in (method, "exact")
    )
    pairs = [(ours[seed], exact[seed]) for seed in ours if seed in exact]
    if len(pairs) < 2 or method == "exact":
        return Outcome(ours, None, None)
    differences = [a - b for a, b in pairs]
    p = None
    if statistics.stdev(differences) > 0:
        p = float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return Outcome(ours, statistics.fmean(differences), p)


def p_text(p: float) -> str:
    return "p < 0.01" if p < 0.01 else f"p = {p:.2f}"


def line(row: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """A row in words, with what all seeds of its method say beside the exact runs."""
    what = row.get("task") or row.get("model") or row["case"]
    text = f"{what:9s} {row['method']:18s} seed {row['seed']}"
    if "failed" in row:
        return f"{text} {row['failed']}"
    name, value = metric(row)
    text += f": {name} {value:.4f}, kept {row['kept_bytes'] / 2**20:.1f} MiB"
    ended = outcome(row["method"], [other for other in others if is_alike(other, row)])
    values = ended.values.values()
    if len(values) > 1:
        spread = statistics.stdev(values)
        text += f"; {len(values)} seeds {statistics.fmean(values):.4f} +- {spread:.4f}"
    if ended.difference is not None:
        text += f", to exact {ended.difference:+.4f}"
    if ended.p is not None:
        text += f" (paired t-test, {p_text(ended.p)})"
    return text


# By which runs of one network are different experiments.
SETTINGS = ("epochs", "steps", "batch", "lr", "width", "limit")


def is_alike(other: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a row is of the same experiment, by whatever method and seed, on whatever device.

    What a run ends at is no matter of the GPU it ran on; its times are.
    """
    names = ("case", "task", "model", *SETTINGS)
    same = all(other.get(name) == row.get(name) for name in names)
    return same and "seed" in other and "failed" not in other


def main_experiment(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of one network the rows of the experiment, on one device, that has most of them."""

    def settings(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in (*SETTINGS, "device"))

    [(chosen, _)] = Counter(map(settings, found)).most_common(1)
    return [row for row in found if settings(row) == chosen]
