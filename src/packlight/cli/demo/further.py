"""What the demo foretells and does not train: the loss by chunks, and a plan for less memory."""

from collections import Counter

import torch
from rich.console import Console
from torch import Tensor

from packlight.cli.demo.model import GPT
from packlight.cli.demo.settings import Settings
from packlight.cli.demo.training import loss_of
from packlight.convert import convert
from packlight.errors import InfeasibleBudgetError
from packlight.planner.planner import plan
from packlight.report import human_bytes
from packlight.report.words import times_less

_SHARE = 0.12  # of what plain PyTorch keeps: less than the default does
_CARD = "RTX 4090"  # that the plan's times are for, where there is no GPU


def print_further(settings: Settings, console: Console) -> None:
    """Bytes with the head's loss by chunks, and the plan's first line; nothing is run."""
    with torch.device("meta"):
        model = GPT(settings.layers, settings.width, settings.heads, settings.context)
        text = torch.zeros(settings.batch, settings.context, dtype=torch.long)
    device = "cpu" if settings.device == "cpu" else "cuda"
    with torch.autocast(device, torch.bfloat16, enabled=settings.autocast):
        planned = _planned(model, text, _CARD if device == "cpu" else None)
        change = convert(model, head="head").bytes(text, loss=_loss)
    sizes = change.before.activation_bytes, change.after.activation_bytes
    console.print(
        f'packlight.convert(model, head="head") keeps {human_bytes(sizes[1])}'
        f"{times_less(*sizes)}: no logits, the loss by chunks (predicted)"
    )
    console.print(f"packlight.plan(model, batch, memory={_SHARE}): {planned} (predicted)")


def _planned(model: GPT, text: Tensor, card: str | None) -> str:
    """What a plan keeps, and how many blocks become what; or why there is none."""
    try:
        found = plan(
            model,
            text,
            memory=_SHARE,
            optimizer=torch.optim.AdamW,
            loss=_loss,
            device=card,
            head=False,
        )
    except InfeasibleBudgetError as error:
        return str(error).partition(",")[0]
    options = Counter(block.option for block in found.blocks)
    blocks = ", ".join(f"{count} x {option}" for option, count in options.items())
    sizes = f"{human_bytes(found.kept_bytes)} of {human_bytes(found.plain.kept)}"
    return f"keeps {sizes}; blocks: {blocks}"


def _loss(logits: Tensor) -> Tensor:
    """The loss of some bytes: which ones makes no difference to its memory."""
    return loss_of(logits, torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device))
