"""The kernels of all methods, as one suite."""

import argparse
from typing import Any

from benchmarks import attention, groupquant, head, kernels, norms, rows, sketch


def cases(options: argparse.Namespace) -> list[rows.Case]:
    return [
        case
        for module in (kernels, norms, groupquant, sketch, head, attention)
        for case in module.cases(options)
    ]


def units(part: str) -> list[tuple[str, str]]:
    return [
        (f"{part}_of_copy", "of copy"),
        (f"{part}_ratio", "x torch"),
        (f"{part}_liger_ratio", "x Liger"),
    ]


def line(row: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """A row in words."""
    name = f"{row['kind']} {row['rows']}" if "kind" in row else row["case"]
    text = f"{name:16s} {row['dtype']}"
    for key, label in (("bits", "{} bits"), ("width", "{}"), ("exact", "exact {}")):
        if row.get(key):
            text += " " + label.format(row[key])
    text += " autocast" * bool(row.get("cast"))
    if "failed" in row:
        return f"{text:34s} {row['failed']}"
    parts = []
    for graph in ("", "graph_"):
        for part in ("forward", "backward", "both", "pack", "unpack"):
            figures = [f"{row[key]:.2f} {unit}" for key, unit in units(graph + part) if key in row]
            if figures:
                parts.append(f"{part} " + " ".join(figures) + " as a graph" * bool(graph))
    return f"{text:34s} {', '.join(parts)}"
