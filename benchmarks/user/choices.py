"""What a user could do about the memory of a training step. Another choice is one more line."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import packlight

# A variable of the environment, which workers see: a file, with "{scenario}" and "{choice}" in it.
PLAN = "PACKLIGHT_BENCHMARKS_PLAN"

Change = Callable[[nn.Module], nn.Module | None]  # of a model: in place, or what is to be called


class Choice(NamedTuple):
    """Changes of a model in their order, and what its forward pass runs in.

    Titles are what pictures and tables say: those of packlight begin with its name, and those of
    compiled models have "compile" in them.
    """

    title: str
    changes: tuple[Change, ...] = ()
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    kind: str = ""  # what a scenario must be, for this to change anything

    @property
    def compiled(self) -> bool:
        return "compile" in self.title

    @property
    def graphed(self) -> bool:
        """Whether `packlight.graphed` has recorded the passes."""
        return "graph" in self.title

    @property
    def replayed(self) -> bool:
        """Whether CUDA graphs are replayed, by whoever recorded them."""
        return self.graphed or "overhead" in self.title


def checkpoint(model: nn.Module, **options: Any) -> None:
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": False}, **options)
    else:
        model.set_grad_checkpointing(True)


def liger(model: nn.Module, **parts: bool) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _apply_liger_kernel_to_instance(model=base, **parts)


def rope_and_head(model: nn.Module) -> None:
    """Liger's rotary embedding, head and loss; norms and MLPs stay what they are."""
    others = dict.fromkeys(("swiglu", "rms_norm", "cross_entropy"), False)
    liger(model, rope=True, fused_linear_cross_entropy=True, **others)


def default(model: nn.Module, **options: Any) -> None:
    packlight.convert(model, functional=True, **options)


def attention4(model: nn.Module) -> None:
    """Attention at 4 bits, which runs once more on its packs."""
    rotated = packlight.GroupQuant(code="rotated")
    methods = packlight.DEFAULT_METHODS
    packlight.convert(model, {"*.self_attn": (rotated, *methods), "*": methods}, head=True)


def graphed(model: nn.Module) -> None:
    packlight.graphed(model)


def packed_by(model: nn.Module, **how: Any) -> None:
    """As the default, with groups by other bits or another code."""
    fixed, group, few = packlight.DEFAULT_METHODS
    methods = (fixed, dataclasses.replace(group, **how), few)
    packlight.convert(model, methods, functional=True)


_head = functools.partial(default, head=True)
_minmax, _rotated = (functools.partial(packed_by, code=code) for code in ("minmax", "rotated"))
_minmax2, _auto2 = (functools.partial(packed_by, bits=2, code=code) for code in ("minmax", "auto"))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that repeat: of lists of modules of one class that is not torch's own."""
    found: list[nn.Module] = []
    for container in model.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential) and len(container) > 1:
            kinds = {type(module) for module in container}
            if len(kinds) == 1 and _is_of_a_model(kinds.pop()):
                found.extend(container)
    inner = {id(part) for block in found for part in block.modules() if part is not block}
    if not found:  # a row would say "compiled" of a model that is launched
        raise ValueError(f"{type(model).__name__} has no layers that repeat")
    return [block for block in found if id(block) not in inner]


def _is_of_a_model(kind: type) -> bool:
    """Whether a class, or one that a converted class derives from, is neither torch's nor ours."""
    ours = ("torch.", "packlight.", "builtins")
    return any(not base.__module__.startswith(ours) for base in kind.__mro__)


def compile_blocks(model: nn.Module, **options: Any) -> None:
    for block in blocks(model):
        block.compile(**options)


def budget() -> contextlib.AbstractContextManager[Any]:
    import torch._functorch.config

    return torch._functorch.config.patch(activation_memory_budget=0.5)


def recompute(model: nn.Module, bits: int, tiles: bool = True) -> None:
    """Blocks keep packs of their inputs, MLPs run in tiles, and what is within keeps packs."""
    methods: list[packlight.Method] = [packlight.Checkpoint(packlight.GroupQuant(bits))]
    methods += [packlight.Tiles()] * tiles
    packlight.convert(model, (*methods, *packlight.DEFAULT_METHODS), functional=True, head=True)


def bits3(model: nn.Module) -> None:
    """Packs of 3 bits, whose groups are rotated, and the head's loss by chunks."""
    methods = (packlight.GroupQuant(bits=3), packlight.FewBit(bits=3))
    packlight.convert(model, methods, functional=True, head=True)


class Limits(NamedTuple):
    """Of a plan: GiB that may be allocated at the peak, and the error of a block's gradients.

    With 3 bits in all blocks gradients of the 8B with LoRA are .67 of their norm away from eager's,
    where `runner.check` allows half; of Llama 1.1B, all of whose weights are trained, .49.
    """

    gib: float
    error: float = 0.1  # up to packs of 4 bits


# By choice and scenario. `benchmarks.plans write` makes the files of them.
PLANS = {
    "plan": {
        "llama1b": Limits(8.45, 0.15),
        "lora8b-4k": Limits(17.9),
        "lora8b-8k": Limits(20.0),
        "lora8b-32k": Limits(33.9),
        "lora8b-110k": Limits(74.0),
        "lora8b-4bit-32k": Limits(23.2),
    },
    "tight": {
        "lora8b-4k": Limits(17.0),
        "lora8b-8k": Limits(18.0),
        "lora8b-32k": Limits(26.4),
    },
}


def plan_of(scenario: str, choice: str) -> str:
    """The file of a plan, which `packlight.plan(...).save(FILE)` wrote."""
    return os.environ.get(PLAN, "").format(scenario=scenario, choice=choice)


def planned(model: nn.Module) -> None:
    packlight.convert(model, packlight.load_methods(os.environ[PLAN]), strict=False)


def packed() -> contextlib.AbstractContextManager[Any]:
    """Inputs of checkpoints as packs of 8 bits."""
    overrides = {"checkpoint": packlight.GroupQuant(8), "*": None}
    return packlight.saving(packlight.GroupQuant(8), overrides=overrides)


_offload = functools.partial(checkpoint, offload=True)
_overhead, _overhead_blocks = (
    functools.partial(function, mode="reduce-overhead")
    for function in (torch.compile, compile_blocks)
)

# In the order of what is worth knowing first.
CHOICES = {
    "eager": Choice("eager"),
    "checkpoint": Choice("checkpoint", (checkpoint,)),
    "default": Choice("packlight default", (default,)),
    "default+head": Choice("packlight default, head", (_head,), kind="head"),
    "graphed": Choice("graph", (graphed,)),
    "bits3": Choice("packlight 3 bits, head", (bits3,), kind="head"),
    "minmax": Choice("packlight min-max", (_minmax,)),
    "rotated": Choice("packlight rotated", (_rotated,)),
    "minmax2": Choice("packlight min-max, 2 bits", (_minmax2,)),
    "auto2": Choice("packlight 2 bits", (_auto2,)),
    "minmax+graphed": Choice("packlight min-max, graph", (_minmax, graphed)),
    "auto2+graphed": Choice("packlight 2 bits, graph", (_auto2, graphed)),
    "attention4": Choice("packlight default, attention 4 bits", (attention4,), kind="liger"),
    "attention4+graphed": Choice(
        "packlight default, attention 4 bits, graph", (attention4, graphed), kind="liger"
    ),
    "default+graphed": Choice("packlight default, graph", (default, graphed)),
    "head+graphed": Choice("packlight default, head, graph", (_head, graphed), kind="head"),
    "liger+checkpoint": Choice("Liger, checkpoint", (liger, checkpoint), kind="liger"),
    "compile": Choice("compile", (torch.compile,)),
    "liger": Choice("Liger", (liger,), kind="liger"),
    "default+liger": Choice("packlight default, Liger", (rope_and_head, default), kind="liger"),
    "packed": Choice("packlight checkpoint", (checkpoint,), packed),
    "tiles": Choice("packlight tiles", (functools.partial(recompute, bits=8),), kind="head"),
    "tiles4": Choice(
        "packlight tiles, 4 bits", (functools.partial(recompute, bits=4),), kind="head"
    ),
    "checkpoint+packs": Choice(
        "packlight checkpoint, packs",
        (functools.partial(recompute, bits=8, tiles=False),),
        kind="head",
    ),
    "plan": Choice("packlight plan", (planned,), kind="plan"),
    "tight": Choice("packlight plan, tight", (planned,), kind="plan"),
    "liger+packed": Choice("packlight checkpoint, Liger", (liger, checkpoint), packed, "liger"),
    "default+compile": Choice("packlight default, compile", (default, compile_blocks)),
    "compile+checkpoint": Choice("compile + checkpoint", (checkpoint, torch.compile)),
    "offload": Choice("offload", (_offload,), kind="transformers"),
    "liger+offload": Choice("Liger, offload", (liger, _offload), kind="liger"),
    "budget": Choice("compile, budget 0.5", (torch.compile,), budget),
    "default+whole": Choice("packlight default, whole, compile", (default, torch.compile)),
    "overhead": Choice("compile, reduce-overhead", (_overhead,)),
    "default+overhead": Choice(
        "packlight default, compile, reduce-overhead", (default, _overhead_blocks)
    ),
    "whole+overhead": Choice(
        "packlight default, whole, compile, reduce-overhead", (default, _overhead)
    ),
}
