"""A GPT of 11 million parameters on the source of Python's standard library, by every method.

    python -m benchmarks.run --suite train --filter gpt

Model, text, schedule and batches are those of `packlight demo`. Every method sees the same weights
and batches for a seed. A row a run goes to `results/gpt.jsonl`: validation loss in nats a byte at
eleven points, bytes kept for the backward pass of one batch, peak memory, seconds.
"""

import argparse
import functools
import statistics
from typing import Any

from benchmarks import rows
from packlight import DEFAULT_METHODS, FewBit, GroupQuant, Inverted, Sketch, convert
from packlight.cli import demo
from packlight.selectors import Methods

METHODS: dict[str, Methods | None] = {
    "exact": None,
    "default": DEFAULT_METHODS,
    "few-bit 3": FewBit(3),
    "inverted": Inverted(),
    "group8": (GroupQuant(8), FewBit(3)),
    "group2": (GroupQuant(2, code="minmax"), FewBit(3)),
    **{f"rotated{bits}": (GroupQuant(bits, code="rotated"), FewBit(3)) for bits in (4, 3, 2)},
    "sketch 0.2": Sketch(0.2),
}
SIZES = {
    "cpu": {"steps": 60, "layers": 2, "width": 64, "heads": 2, "context": 64, "batch": 8},
    "cuda": {"steps": 1500, "layers": 6, "width": 384, "heads": 6, "context": 256, "batch": 64},
}


@functools.lru_cache(maxsize=1)
def text() -> demo.Text:
    return demo.load_text()


def train(method: str, seed: int, device: str) -> dict[str, Any]:
    """Trains once and returns what goes into the row."""

    def change(model: demo.GPT, bits: int) -> None:
        if (methods := METHODS[method]) is not None:
            convert(model, methods, functional=True)

    settings = demo.make_settings(device, seed=seed, **SIZES[device])
    result = demo.train(change, text(), settings)
    return {
        "loss": result.validation_losses,
        "loss_steps": result.validation_steps,
        "training_loss": result.training_loss,
        "kept_bytes": result.total_bytes,
        "peak_bytes": result.peak_bytes,
        "train_seconds": round(statistics.fmean(result.step_ms) * settings.steps / 1e3, 1),
    }


def cases(options: argparse.Namespace) -> list[rows.Case]:
    """Every method, seed by seed."""
    found = []
    for seed in options.seeds:
        for method in METHODS:
            key = {"case": "gpt", "method": method, "seed": seed, **SIZES[options.device]}
            run = functools.partial(train, method, seed, options.device)
            found.append(rows.Case(f"gpt/{method}/{seed}", "gpt.jsonl", key, run, 120))
    return found
