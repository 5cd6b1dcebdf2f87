"""Writes the tables of documents that are made of rows, each between its two marks.

    python -m benchmarks.table    # those of docs/benchmarks, distributed, scale.md, README

A table begins behind a line `<!-- table NAME -->` and ends before the next `<!-- end -->`.
"""

import argparse
import pathlib
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import rows, step, train_suite

DOCS = rows.RESULTS.parents[1] / "docs" / "benchmarks.md"
DISTRIBUTED = rows.RESULTS.parents[1] / "docs" / "distributed.md"
SCALE = rows.RESULTS.parents[1] / "docs" / "scale.md"
README = rows.RESULTS.parents[1] / "README.md"

Rows = Sequence[dict[str, Any]]


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(
        " ".join(["|", *(f"{cell} |" if cell else "|" for cell in cells)]) for cells in lines
    )


def less(value: float, exact: float) -> str:
    """How many times less, in three digits."""
    if value > exact:
        return f"{value / exact:.2f}x more"
    ratio = exact / value
    return f"{ratio:.{2 if ratio < 9.995 else 1}f}x less"


# ---- whole steps ----------------------------------------------------------------------------

DEVICE = "NVIDIA H200"

# The choices shown, and what they are called; those of a model that has others of its own.
SHOWN = {
    "eager": "eager",
    "checkpoint": "checkpoint every block",
    "compile": "compile",
    "compile + checkpoint": "compile + checkpoint",
    "compile, budget 0.2": "compile, memory budget 0.2",
    "packlight 4": "packlight 4 bits",
    "packlight 4, compile": "packlight 4 bits, compile",
    "packlight 3": "packlight 3 bits, rotated",
    "packlight 2, rotated": "packlight 2 bits, rotated",
    "packlight 2": "packlight 2 bits, min-max",
    "packlight 2, compile": "packlight 2 bits, compile",
    "packlight 2, checkpoint 2 of 3, compile": "packlight 2 bits, checkpoint 2 of 3, compile",
    "packlight checkpoint, compile": "packlight checkpoint every block, compile",
}
SHOWN_OF = {
    "resnet50": {
        **{choice: name for choice, name in SHOWN.items() if not choice.startswith("packlight")},
        "packlight default": "packlight default",
        "packlight default, compile": "packlight default, compile",
        "packlight checkpoint, compile": SHOWN["packlight checkpoint, compile"],
    }
}


def steps(found: Rows) -> str:
    """Of each choice the last row of its GPU alone, and the shortest step that Python launched."""
    body = []
    for name, model in step.MODELS.items():
        own = [
            row
            for row in found
            if row["device"] == DEVICE and row["model"] == name and "kept_bytes" in row
        ]
        for choice, title in SHOWN_OF.get(name, SHOWN).items():
            cells = step_cells(choice, own)
            if cells:
                body.append([f"**{model.title}**: {title}" if choice == "eager" else title, *cells])
    last = [row for row in found if row["device"] == DEVICE][-1]
    head = [
        f"{DEVICE}, torch {last['torch'].partition('+')[0]}",
        *("kept", "as a graph", "launched", "largest batch in 24 GiB", "gradient error, median"),
    ]
    return markdown(head, body)


def step_cells(choice: str, own: Rows) -> list[str]:
    """The columns of a choice of one model, none where it was not measured."""
    of_choice = [row for row in own if row["choice"] == choice and "graph_ms" in row]
    if not of_choice:
        return []
    in_turns = [row for row in of_choice if "graph_compile_ms" in row and "compile" in choice]
    row = in_turns[-1] if in_turns else of_choice[-1]
    eager = step.baseline(row, own) or row
    launched, eager_launched = (
        min(other["step_ms"] for other in own if other["choice"] == name)
        for name in (choice, "eager")
    )
    batches = [other["largest_batch"] for other in of_choice if "largest_batch" in other]
    kept, graph, by_python, error = (
        f"{row['kept_bytes'] / 2**30:.2f} GiB",
        f"{row['graph_ms']:.1f} ms",
        f"{launched:.1f} ms",
        "-",
    )
    if choice != "eager":
        kept += f" ({less(row['kept_bytes'], eager['kept_bytes'])})"
        speed = f"{step.speed(row, eager, 'graph_ms'):.2f}x"
        if choice.startswith("packlight") and "compile" in choice and in_turns:
            speed += f"; {row['graph_compile_ms'] / row['graph_ms']:.2f}x of compile"
        graph += f" ({speed})"
        by_python += f" ({eager_launched / launched:.2f}x)"
        # Where rounding alone takes eager that far, the figure says nothing of the choice.
        rounding = row.get("rounding_median", 0) > step.ROUNDING
        error = "(rounding)" if rounding else f"{row['error_median']:.3f}"
    return [kept, graph, by_python, str(batches[-1]) if batches else "", error]


# ---- kernels --------------------------------------------------------------------------------

ROTATED = {
    "pack rotated": "pack / unpack",
    "gelu rotated": "GELU",
    "silu rotated": "SiLU",
    "swiglu rotated": "SwiGLU",
    "layer_norm 768 rotated": "LayerNorm, width 768",
    "layer_norm 1024 rotated": "LayerNorm, width 1024",
    "layer_norm 4096 rotated": "LayerNorm, width 4096",
    "rms_norm 4096 rotated": "RMSNorm, width 4096",
}


def rotated(found: Rows) -> str:
    """Of each kernel with rotated packs its last row at each width."""
    last = {
        (row["case"], row["bits"]): row
        for row in found
        if row["case"] in ROTATED and row["device"] == DEVICE and "failed" not in row
    }
    body = []
    for case, title in ROTATED.items():
        cells = [title]
        for bits in (4, 3, 2):
            row = last.get((case, bits))
            if row is None:
                cells.append("")
            elif "pack_of_copy" in row:
                cells.append(f"{row['pack_of_copy']:.2f} / {row['unpack_of_copy']:.2f} of copy")
            else:
                names = ("forward_ratio", "backward_ratio", "both_ratio")
                ahead, back, both = (f"{row[name]:.2f}" for name in names)
                cells.append(f"{ahead} / {back} / **{both}**")
        body.append(cells)
    return markdown(["rotated packs, bf16, one H200", "4 bits", "3 bits", "2 bits"], body)


# ---- training -------------------------------------------------------------------------------

METHODS = {
    "few-bit 3": "few-bit, 3 bits",
    "few-bit 3, calibrated": "few-bit, 3 bits, calibrated",
    **{f"rotated{bits}": f"GroupQuant rotated, {bits} bits" for bits in (4, 3, 2)},
    "rotated2, exact ends": "GroupQuant rotated, 2 bits, exact ends",
    "default": "default (4 bits)",
    "sketch 0.2": "sketch, a fifth of the tokens",
    **{f"group{bits}": f"GroupQuant, {bits} bits" for bits in (8, 4, 2)},
    **{f"fixed{bits}": f"fixed point, {bits} bits" for bits in (8, 4)},
    **{f"fixed{bits} window 3": f"fixed point of the paper, {bits} bits" for bits in (8, 4)},
}


def training(found: Rows) -> str:
    """The runs of one network: what each method ends at, beside exact runs of the same seeds."""
    found = train_suite.main_experiment(found)
    of_method: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        of_method.setdefault(row["method"], []).append(row)
    kept = {
        method: statistics.median(row["kept_bytes"] for row in runs)
        for method, runs in of_method.items()
    }
    classifies = "accuracy" in found[0]
    body = []
    for method in sorted(kept, key=lambda method: (method != "exact", -kept[method])):
        size, difference = f"{kept[method] / 2**20:.0f} MiB", ""
        ended = train_suite.outcome(method, found)
        if method != "exact":
            size += f" ({less(kept[method], kept['exact'])})"
        if ended.difference is not None:
            difference = f"{ended.difference:+.4f}" if ended.difference else "0"
        if ended.p is not None:
            difference += f", {train_suite.p_text(ended.p)}"
        values = [value for _, value in sorted(ended.values.items())]
        spread = f"{statistics.fmean(values):.4f} +- {statistics.stdev(values):.4f}"
        by_seed = ", ".join(f"{value:.4f}" for value in values)
        cells = [METHODS.get(method, method), size, by_seed, spread, difference]
        if classifies:
            cells.append(f"{statistics.fmean(row['loss'][-1] for row in of_method[method]):.4f}")
        body.append(cells)
    head = ["", "kept, a batch", "by seed", "mean", "to exact, paired"]
    return markdown(head + ["training loss"] * classifies, body)


# ---- several GPUs ----------------------------------------------------------------------------


def sharded(found: Rows) -> str:
    """A row a choice: of one GPU and of several, ms / GiB at a rank's peak, the last loss."""
    from benchmarks.user.choices import CHOICES
    from benchmarks.user.scenarios import SCENARIOS

    latest = {(r["scenario"], r["choice"], r["parallel"], r["world"]): r for r in found}
    kinds = sorted({(parallel, world) for *_, parallel, world in latest}, key=lambda k: (k[1], k))
    names = {"fsdp": "FSDP2", "tensor": "tensor and sequence parallel"}
    head = ["one GPU" if n == 1 else f"{names[parallel]}, {n} GPUs" for parallel, n in kinds]
    body = []
    for scenario, choice in dict.fromkeys((r["scenario"], r["choice"]) for r in found):
        cells = [SCENARIOS[scenario].title.partition(", 1 x")[0], CHOICES[choice].title]
        for kind in kinds:
            row = latest.get((scenario, choice, *kind))
            cells.append(f"{row['ms']:.0f} / {row['peak_gib']:.1f}" if row else "")
            if row and kind[0] == "fsdp":
                cells[-1] += f", loss {row['losses'][-1]:.3f} after {len(row['losses'])}"
        body.append(cells)
    return markdown(["", "", *head], sorted(body, key=lambda cells: cells[0]))


# ---- ranks that are foretold ----------------------------------------------------------------


def scale_rows(which: str) -> Rows:
    """The last row of each run, or of each comparison."""
    found = [row for row in rows.read(rows.RESULTS / "scale.jsonl") if which in row]
    if which == "title":
        return list({row["title"]: row for row in found}.values())
    each = (row["measured"] for row in found)
    return list({(r["scenario"], r["choice"], r["parallel"]): r for r in each}.values())


def scale_bytes(found: Rows) -> str:
    """GiB at the peak of the fullest rank, and of them what is kept, by choice."""
    body = []
    for row in found:
        first, *_ = row["choices"].values()
        cells = [row["title"], _degrees(row), f"{row['batch']} x {row['length']:,}"]
        cells.append(f"{first['static'] / 2**30:.1f}")
        cells += [
            f"{choice['peak'] / 2**30:.1f}, {choice['kept'] / 2**30:.1f}"
            for choice in row["choices"].values()
        ]
        body.append(cells)
    names = list(found[0]["choices"]) if found else []
    return markdown(["", "degrees", "batch of a rank", "static", *names], body)


def _degrees(row: dict[str, Any]) -> str:
    names = ("replicate", "shard", "context", "tensor", "pipeline", "expert")
    return ", ".join(f"{name} {n}" for name in names if (n := row["parallel"][name]) > 1)


def scale_wires(found: Rows) -> str:
    """GiB that a rank sends in a step with packs, and how long that and arithmetic take."""
    from benchmarks.scale import wires_ms

    kinds = ("shard", "replicate", "tensor", "context", "pipeline", "expert")
    body = []
    for row in found:
        cells = [row["title"]]
        choice = row["choices"]["packlight"]
        for kind in kinds:
            size = choice["sent"].get(kind, 0)
            gib = size / 2**30
            cells.append("" if not size else f"{gib:,.0f}" if gib >= 10 else f"{gib:.1f}")
        pipeline, count = row["parallel"]["pipeline"], row["microbatches"]
        idle = (pipeline - 1) / (count + pipeline - 1)
        wires = f"{wires_ms(choice['sent']):,.0f}"
        body.append([*cells, f"{choice['ms']:,.0f}", wires, f"{idle:.0%}" if idle else ""])
    return markdown(["", *kinds, "GPU, ms", "wires, ms", "stands still"], body)


def scale_measured(found: Rows) -> str:
    names = {"fsdp": "FSDP2", "tensor": "tensor and sequence parallel"}
    body = []
    for r in found:
        pairs = [
            f"{r[f'foretold_{what}_gib']:.2f} / {r[f'{what}_gib']:.2f}" for what in ("kept", "peak")
        ]
        body.append([r["scenario"], names[r["parallel"]], r["choice"], *pairs])
    return markdown(["", "", "", "kept: foretold / measured", "peak: foretold / measured"], body)


# ---- the document ---------------------------------------------------------------------------


def _cifar(network: str) -> Callable[[], str]:
    def table() -> str:
        found = rows.read(rows.RESULTS / "cifar.jsonl")
        return training([row for row in found if row.get("model") == network])

    return table


def _user(which: str) -> str:
    from benchmarks.user import show  # which takes `markdown` from here

    found = show.read()
    if which == "extremes":
        return show.extremes(found)
    return show.steps(found, show.README) if which == "readme" else show.steps(found)


# ---- plans -----------------------------------------------------------------------------------


def plans(found: Rows) -> str:
    """Plans at their budgets, and the fastest choice for all blocks that should fit there and errs
    no more; of a model those of its last run.
    """
    from benchmarks.user.scenarios import SCENARIOS

    timed = [row for row in found if "device_ms" in row and not row.get("out_of_memory")]
    last = {row["scenario"]: row["commit"] for row in timed if row["kind"] == "plan"}
    body = []
    for scenario, commit in last.items():
        own = [row for row in timed if (row["scenario"], row["commit"]) == (scenario, commit)]
        planned = [row for row in own if row["kind"] == "plan" and row["max_error"] != 0.0]
        for row in sorted(planned, key=lambda row: (row["max_error"] is None, row["budget"])):
            rival = best_for_all(own, row["budget"], any_bits=row["max_error"] is None)
            body.append(
                [
                    SCENARIOS[scenario].title,
                    "any" if row["max_error"] is None else "4 or more",
                    f"{row['budget'] / 2**30:.2f}",
                    f"{row['peak'] / 2**30:.2f} ({row['predicted_peak'] / 2**30:.2f})",
                    f"{row['device_ms']:.1f} ({row['predicted_device_ms']:.1f})",
                    "none" if rival is None else f"{rival['device_ms']:.1f}, {rival['kind']}",
                ]
            )
    head = ["", "bits", "budget, GiB", "peak, GiB (foretold)", "plan: GPU, ms (foretold)"]
    return markdown([*head, "the best for all blocks: GPU, ms"], body)


def best_for_all(own: Rows, budget: int, any_bits: bool) -> dict[str, Any] | None:
    from packlight.planner.timeline import reserved

    coarse = () if any_bits else ("packs of 3 bits", "packs of 2 bits")
    fitting = [
        row
        for row in own
        if row["kind"] not in ("plan", *coarse) and reserved(row["peak"]) <= budget
    ]
    return min(fitting, key=lambda row: row["device_ms"], default=None)


TABLES: dict[str, Callable[[], str]] = {
    "steps": lambda: steps(rows.read(rows.RESULTS / step.OUT)),
    "rotated": lambda: rotated(rows.read(rows.RESULTS / "groupquant.jsonl")),
    "preact29": _cifar("preact29"),
    "resnet18": _cifar("resnet18"),
    "vit": _cifar("vit"),
    "user": lambda: _user("steps"),
    "user_extremes": lambda: _user("extremes"),
    "user_readme": lambda: _user("readme"),
    "scale_bytes": lambda: scale_bytes(scale_rows("title")),
    "scale_wires": lambda: scale_wires(scale_rows("title")),
    "scale_measured": lambda: scale_measured(scale_rows("measured")),
    "sharded": lambda: sharded(rows.read(rows.RESULTS / "sharded.jsonl")),
    "plans": lambda: plans(rows.read(rows.RESULTS / "planner.jsonl")),
    "gpt": lambda: training(rows.read(rows.RESULTS / "gpt.jsonl")),
}


PAGES = [DOCS, DISTRIBUTED, SCALE, README]


def filled(text: str) -> str:
    """The document with its tables made anew. Raises KeyError where a mark names none."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", table, text, flags=re.DOTALL)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", type=pathlib.Path, default=PAGES)
    for path in parser.parse_args(words).paths:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
