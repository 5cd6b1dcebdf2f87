"""One run of the demo: a model trained from scratch, and what it keeps, costs and learns."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight.cli.demo.model import GPT
from packlight.cli.demo.settings import Settings
from packlight.cli.demo.text import Text, training_batches, validation_batches
from packlight.graphs import graphed
from packlight.profile import profile


@dataclasses.dataclass
class Result:
    """What one run showed. Losses are in nats a byte."""

    kept_bytes: dict[str, int]
    training_losses: list[float] = dataclasses.field(default_factory=list)
    validation_steps: list[int] = dataclasses.field(default_factory=list)
    validation_losses: list[float] = dataclasses.field(default_factory=list)
    step_ms: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        return sum(self.kept_bytes.values())

    @property
    def median_step_ms(self) -> float:
        return statistics.median(self.step_ms)

    @property
    def training_loss(self) -> float:
        """Mean over the last tenth of the steps, since one batch alone says little."""
        return statistics.fmean(self.training_losses[-max(1, len(self.training_losses) // 10) :])


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of all bytes of a batch."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak."""
    # Wider models take smaller steps: 3e-3 up to width 128, 5e-4 at width 768.
    peak = min(3e-3, 0.4 / settings.width)
    warmup = max(1, settings.steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def kept_bytes(
    model: GPT, inputs: Tensor, targets: Tensor, autocast: torch.autocast
) -> dict[str, int]:
    """What the model keeps for the backward pass of a batch, by the class of the module."""

    def loss(logits: Tensor) -> Tensor:
        return loss_of(logits, targets)

    with autocast:
        return profile(model, inputs, loss=loss).by_module_type()


def train(
    change: Callable[[GPT, int], None],
    text: Text,
    settings: Settings,
    after_step: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Train one model from scratch: the same settings give the same weights and batches."""
    torch.manual_seed(settings.seed)
    model = GPT(settings.layers, settings.width, settings.heads, settings.context)
    change(model, settings.bits)
    device = torch.device(settings.device)
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda"
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast)
    held_out = [(x.to(device), y.to(device)) for x, y in validation_batches(text, settings)]

    result = Result(kept_bytes(model, *held_out[0], autocast))
    if device.type == "cuda":
        # With and without packlight: a launched step of a model of this size shows the CPU's speed.
        graphed(model)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    for step, (inputs, targets) in enumerate(training_batches(text, settings)):
        if step % max(1, settings.steps // 10) == 0:
            result.validation_steps.append(step)
            result.validation_losses.append(mean_loss(model, held_out, autocast))
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        with autocast:
            loss = loss_of(model(inputs.to(device)), targets.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result.training_losses.append(loss.item())  # waits for the GPU, so the time is the step's
        result.step_ms.append(1000 * (time.perf_counter() - started))
        after_step(result)

    result.validation_steps.append(settings.steps)
    result.validation_losses.append(mean_loss(model, held_out, autocast))
    if device.type == "cuda":
        result.peak_bytes = torch.cuda.max_memory_reserved(device)  # the pools of graphs with it
    return result


def mean_loss(model: GPT, batches: list[tuple[Tensor, Tensor]], autocast: torch.autocast) -> float:
    """Mean loss over batches, without training on them."""
    model.eval()
    with torch.no_grad(), autocast:
        losses = [loss_of(model(inputs), targets).item() for inputs, targets in batches]
    model.train()
    return statistics.fmean(losses)
