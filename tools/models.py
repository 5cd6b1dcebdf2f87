"""Looks at what a conversion makes of models of other packages.

    python -m tools.models               # of all; writes tests/families.json and docs/models.md
    python -m tools.models 'timm/*' t5   # of those that match, and leaves the others as recorded

`tests/test_families.py` looks at those of `tests/families.py` again, so that an upstream change of
a forward is noticed; those of `tools/zoo.py` are in the page alone. What is recorded belongs to the
versions of torch and of the packages that it was found with, and says so.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from tools.zoo import ZOO
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import packlight
from packlight.errors import InputError
from packlight.report import human_bytes
from packlight.report.left import Left
from packlight.report.words import percent
from tests.families import FAMILIES, Family

ROOT = Path(__file__).parents[1]
PAGE, RECORD = ROOT / "docs" / "models.md", ROOT / "tests" / "families.json"

# What is left of less than these shares of all is not recorded, and not in the page.
SHARE, SHOWN = 0.05, 0.01

GROUPS = {"families": FAMILIES, "models": ZOO}
PACKAGES = ("torch", "transformers", "diffusers", "timm", "torchvision")


def look_at(family: Family) -> dict[str, Any]:
    """What the record has of a model: it is run before and after `convert(model)`."""
    model, batch = family.started()
    exact, gradients = _step(model, batch)
    of_bf16 = _gradients_of_bf16(model, batch)
    before = packlight.profile(model, **batch)
    conversion = packlight.convert(model)
    after = packlight.profile(model, **batch)
    predicted = _predicted(model, batch)
    ours, found = _step(model, batch)
    left = conversion.left_of(before - after)
    row = next((row for row in left.rows if not row.is_packed), None)
    return {
        **recorded(left),
        "predicted": None if predicted is None else round(predicted / after.activation_bytes, 4),
        "error": round(_error(found, gradients), 3),
        "error of bf16": None if of_bf16 is None else round(_error(of_bf16, gradients), 3),
        "equal": all(map(torch.equal, ours, exact)),
        "finite": all(bool(gradient.isfinite().all()) for gradient in found.values()),
        "largest": None if row is None else [left.share(row), row.operation, row.why, row.remedy],
    }


def _gradients_of_bf16(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor] | None:
    """Gradients under autocast; None where the model's own code fails there."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            return _step(model, batch)[1]
    except RuntimeError as error:
        print(f"under autocast: {error}", file=sys.stderr)
        return None


def _predicted(model: nn.Module, batch: dict[str, Any]) -> int | None:
    """Bytes by `predict`; None where the forward pass depends on values."""
    try:
        return packlight.predict(model, **batch).activation_bytes
    except InputError as error:
        if "needs the values" not in str(error):
            raise
        return None


def _step(model: nn.Module, batch: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The results of one pass, and the gradients of the parameters."""
    model.zero_grad()
    packlight.manual_seed(0)
    output = model(**batch)
    results = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    loss = getattr(output, "loss", None)
    if loss is None:
        draws = torch.Generator().manual_seed(3)
        trained = [x for x in results if x.requires_grad]
        loss = sum(
            (x * torch.randn(x.shape, generator=draws)).sum() / x.numel() ** 0.5 for x in trained
        )
    loss.backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach().clone() for x in results], gradients


def _error(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """|g~ - g| / |g|, the median over parameters."""
    whole = torch.stack([g.norm() for g in exact.values()]).norm().item()
    return statistics.median(
        ((found[name] - g).norm() / max(g.norm().item(), 1e-4 * whole)).item()
        for name, g in exact.items()
    )


def recorded(left: Left) -> dict[str, Any]:
    """What tests compare."""
    rows = [row for row in left.rows if not row.is_packed and left.share(row) >= SHARE]
    return {
        "before": left.before_bytes,
        "after": left.after_bytes,
        "left": sorted(f"{row.operation} in {row.module_type}" for row in rows),
    }


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


# ---- the page ------------------------------------------------------------------------------------

_HEAD = """# Models

What `packlight.convert(model)`, with no other argument, makes of models of other packages: bytes
that are kept for the backward pass, of float32 on a CPU, the loss included where the model has one.
`python -m tools.models` made this page, with
{versions}.
The models are small, so a share differs from that of a large model; what is left and why does not.
`conversion.left(batch)` says it of a model and a batch of yours.

- **error**: of the gradients, |g~ - g| / |g|, the median over the parameters of the model, of one
  step. **of bf16** is the error of the plain model under autocast to bfloat16, where its code runs
  so. Both are large where a batch norm has few values a channel, as in the last stages of networks
  on images of 64 pixels. That of 4 bits is noise of the rounding: with 8 bits it is 16 times
  smaller, and most of it averages out. The ViT's is 0.28 of one draw and 0.03 of the mean of 64,
  Mamba 2's 0.18 and 0.05 of 16; EfficientNet's is 0.33 and 0.23, for the gradient of a batch norm
  has its packed value twice, and is biased.
- **what is left**: the largest share of what is still kept that is no pack, where it is 1% or more,
  and what would help.
- Gains of 0 and LayerScales of 1e-6 are set to 0.5 first, behind which there would be no gradient.

Forward results are torch's, bit for bit{but}. All gradients are finite{infinite}.
`packlight.predict` foretells what is kept within {off:.1%}{unknown}:
a forward pass that depends on values cannot be foretold.
"""

_COLUMNS = """
| model | before | after | times less | error | of bf16 | what is left | why | what would help |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""

_SECTIONS = {
    "families": """
## Families

Two layers of a width of 64, sequences of 64 tokens, 128 words. Tests look at these again, so that a
change of a forward in a new release is noticed.
""",
    "timm": """
## timm

The most used models, a size of each family: four images of 64 pixels, or as many as the network
takes, and few blocks where the constructor says how many.
""",
    "torchvision": """
## torchvision

Four images of 64 pixels. RetinaNet and FCOS have their losses. Of two-stage detectors the parts
that train: backbone, FPN, heads of regions, boxes and masks, on pooled features for those of boxes,
since `nms` and `roi_align` have no kernels beside a CPU build of torch.
""",
}


def page(record: dict[str, Any]) -> str:
    rows = {**record["families"], **record["models"]}
    sections = {
        "families": {name: record["families"][name] for name in FAMILIES},
        **{
            package: {
                name.removeprefix(f"{package}/"): record["models"][name]
                for name in ZOO
                if name.startswith(f"{package}/")
            }
            for package in ("timm", "torchvision")
        },
    }
    text = _HEAD.format(
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        but=_but(name for name, row in rows.items() if not row["equal"]),
        infinite=_but(name for name, row in rows.items() if not row["finite"]),
        off=max(abs((row["predicted"] or 1) - 1) for row in rows.values()),
        unknown=_but(name for name, row in rows.items() if row["predicted"] is None),
    )
    for section, models in sections.items():
        text += _SECTIONS[section] + _COLUMNS
        text += "".join(_line(name, row) for name, row in models.items())
        text += _summary(list(models.values()))
    return text


def _but(names: Any) -> str:
    found = ", ".join(names)
    return f", but of {found}" if found else ""


def _line(name: str, row: dict[str, Any]) -> str:
    share, operation, why, remedy = row["largest"] or (0, "", "", "")
    if share < SHOWN:
        operation = why = remedy = ""
    cells = (
        name,
        human_bytes(row["before"]),
        human_bytes(row["after"]),
        f"{row['before'] / row['after']:.1f}",
        f"{row['error']:.2f}",
        "-" if row["error of bf16"] is None else f"{row['error of bf16']:.2f}",
        f"{percent(share)} `{operation}`" if operation else "",
        why,
        remedy.replace("|", "\\|"),
    )
    return f"| {' | '.join(cells)} |\n"


def _summary(rows: list[dict[str, Any]]) -> str:
    ratios = [row["before"] / row["after"] for row in rows]
    errors = [row["error"] for row in rows]
    return (
        f"\nOf {len(rows)} models: median {statistics.median(ratios):.1f} times less, error"
        f" {statistics.median(errors):.2f}; least {min(ratios):.1f} times, largest error"
        f" {max(errors):.2f}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", help="names of models, as in fnmatch")
    patterns = parser.parse_args().patterns
    warnings.simplefilter("ignore")
    known = json.loads(RECORD.read_text()) if patterns else {}
    if patterns and known["versions"] != versions():
        sys.exit(f"what is recorded was found with {known['versions']}: look at all again")
    record: dict[str, Any] = {"versions": versions(), **{group: {} for group in GROUPS}}
    for group, families in GROUPS.items():
        for name in families:
            if name in known.get(group, {}):
                record[group][name] = known[group][name]
    for group, families in GROUPS.items():
        for name, family in families.items():
            if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns):
                record[group][name] = row = look_at(family)
                print(json.dumps({name: row}), file=sys.stderr)
                RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
