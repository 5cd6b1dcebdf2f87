"""Looks at what a conversion makes of the families of `tests/families.py`.

    python -m tools.models            # writes docs/models.md and tests/families.json

`tests/test_families.py` compares what it finds with the second, so that an upstream change of a
forward is noticed. What it writes belongs to the versions of torch and of the packages that it ran
with, and says so.
"""

import importlib.metadata
import json
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import packlight
from packlight.report import human_bytes
from packlight.report.left import Left
from packlight.report.words import percent
from tests.families import FAMILIES

ROOT = Path(__file__).parents[1]
PAGE, RECORD = ROOT / "docs" / "models.md", ROOT / "tests" / "families.json"

# What is left of less than this share of all is not recorded.
SHARE = 0.05


class Found(NamedTuple):
    left: Left
    equal: bool  # whether the forward pass gives torch's numbers
    error: float  # of gradients: |g~ - g| / |g|, the median over parameters


def look_at(name: str) -> Found:
    """Converts a family's model by `convert(model)` and runs both."""
    torch.manual_seed(0)
    model, batch = FAMILIES[name].make()
    model.train()
    before = packlight.profile(model, **batch)
    exact = _step(model, batch)
    conversion = packlight.convert(model)
    after = packlight.profile(model, **batch)
    ours = _step(model, batch)
    whole = torch.stack([g.norm() for g in exact[1].values()]).norm().item()
    errors = [
        ((ours[1][key] - g).norm() / max(g.norm().item(), 1e-4 * whole)).item()
        for key, g in exact[1].items()
    ]
    left = conversion.left_of(before - after)
    return Found(left, torch.equal(exact[0], ours[0]), statistics.median(errors))


def _step(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The result of one pass, and the gradients of the parameters."""
    model.zero_grad()
    packlight.manual_seed(0)
    output = model(**batch)
    logits = output if isinstance(output, Tensor) else output.logits
    loss = getattr(output, "loss", None)
    loss = logits.square().mean() if loss is None else loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach().clone(), gradients


def recorded(left: Left) -> dict[str, Any]:
    """What the record has of a family."""
    rows = [row for row in left.rows if not row.is_packed and left.share(row) >= SHARE]
    return {
        "before": left.before_bytes,
        "after": left.after_bytes,
        "left": sorted(f"{row.operation} in {row.module_type}" for row in rows),
    }


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "timm")}


# ---- the page ------------------------------------------------------------------------------------

_HEAD = """# Models

What `packlight.convert(model)`, with no other argument, makes of small models of {count}
families: bytes that are kept for the backward pass, of float32 on a CPU, the loss included.
`python -m tools.models` made this page, with {versions}.
The models have two layers of a width of 64 and 128 words, so a share differs from that of a large
model; what is left and why does not. `conversion.left(batch)` says it of a model and a batch of
yours.

- **error**: of the gradients, |g~ - g| / |g|, the median over the parameters of the model. Forward
  results are torch's, bit for bit{but}.
- **what is left**: the largest share of what is still kept that is no pack, and what would help.

| family | before | after | times less | error | what is left | why | what would help |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""

_LINE = "| {name} | {before} | {after} | {ratio:.1f} | {error:.2f} | {left} | {why} | {remedy} |\n"


def page(found: dict[str, Found]) -> str:
    different = [name for name, one in found.items() if not one.equal]
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    but = f", but of {', '.join(different)}" if different else ""
    text = _HEAD.format(count=len(found), versions=named, but=but)
    for name, one in found.items():
        left = one.left
        row = next((row for row in left.rows if not row.is_packed), None)
        text += _LINE.format(
            name=name,
            before=human_bytes(left.before_bytes),
            after=human_bytes(left.after_bytes),
            ratio=left.before_bytes / left.after_bytes,
            error=one.error,
            left="" if row is None else f"{percent(left.share(row))} `{row.operation}`",
            why="" if row is None else row.why,
            remedy="" if row is None or not row.remedy else row.remedy.replace("|", "\\|"),
        )
    ratios = [one.left.before_bytes / one.left.after_bytes for one in found.values()]
    errors = [one.error for one in found.values()]
    return text + (
        f"\nMedian: {statistics.median(ratios):.1f} times less, error"
        f" {statistics.median(errors):.2f}; least {min(ratios):.1f} times, largest error"
        f" {max(errors):.2f}.\n"
    )


def main() -> None:
    warnings.simplefilter("ignore")
    found = {}
    for name in FAMILIES:
        found[name] = look_at(name)
        sys.stderr.write(f"{name}: {found[name].left!r}, error {found[name].error:.3f}\n")
    PAGE.write_text(page(found))
    families = {name: recorded(one.left) for name, one in found.items()}
    RECORD.write_text(json.dumps({"versions": versions(), "families": families}, indent=1) + "\n")


if __name__ == "__main__":
    main()
