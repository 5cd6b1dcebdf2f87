"""Does it train: runs on real data, exact and by every method, seed by seed."""

import argparse
import statistics
from typing import Any

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


def line(row: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """A row in words, with what all seeds of its method say beside the exact runs."""
    what = row.get("task") or row.get("model") or row["case"]
    text = f"{what:9s} {row['method']:18s} seed {row['seed']}"
    if "failed" in row:
        return f"{text} {row['failed']}"
    name, value = metric(row)
    text += f": {name} {value:.4f}, kept {row['kept_bytes'] / 2**20:.1f} MiB"
    alike = [other for other in others if is_alike(other, row)]
    ours, exact = (
        {other["seed"]: metric(other)[1] for other in alike if other["method"] == method}
        for method in (row["method"], "exact")
    )
    if len(ours) > 1:
        spread = statistics.stdev(ours.values())
        text += f"; {len(ours)} seeds {statistics.fmean(ours.values()):.4f} +- {spread:.4f}"
    pairs = [(ours[seed], exact[seed]) for seed in ours if seed in exact]
    if len(pairs) > 1 and row["method"] != "exact":
        differences = [a - b for a, b in pairs]
        text += f", to exact {statistics.fmean(differences):+.4f}"
        if statistics.stdev(differences) > 0:
            p = stats.ttest_rel(*zip(*pairs, strict=True)).pvalue
            text += f" (paired t-test, p = {p:.2f})"
    return text


def is_alike(other: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a row is of the same experiment, by whatever method and seed, on whatever device.

    What a run ends at is no matter of the GPU it ran on; its times are.
    """
    names = ("case", "task", "model", "epochs", "steps", "batch", "lr", "limit")
    same = all(other.get(name) == row.get(name) for name in names)
    return same and "seed" in other and "failed" not in other
