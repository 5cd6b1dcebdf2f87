"""One training step of whole models: what is kept, peak memory and time, beside plain PyTorch.

    python -m benchmarks.run --suite step --filter '*/eager' '*/packlight 4*'

Every choice runs in one process on one device, forward and backward, without an optimiser. The
models have random weights and are bodies: no embedding, and no output head, whose logits would be
the same in every row. Blocks are compiled one by one.

A choice is timed only once it is right: its output is the eager model's to rounding, and its
gradients are as near as the choice promises (`Choice.limit`). Both are taken without dropout, whose
masks differ between implementations, and on the whole batch. With dropout the gradients' norms are
compared.

- `kept_bytes`: what the allocator holds more after the forward pass than before it, the output
  taken off; `profile_bytes`: the same as `packlight.profile` counts it.
- `peak_bytes`: the most that the allocator held during a step, beyond what it held before.
- `step_ms`: median of steps that Python launches; `graph_ms`: of the same step captured in a CUDA
  graph and replayed, which is what the GPU alone takes. `graph_eager_ms` and `graph_compile_ms` are
  the eager and the compiled model's, replayed in turns with it.
- `error_median`, `error_worst`: relative error of the gradients of weight matrices, by layer;
  `rounding_median`: the same of the eager model, beside float32.
- `largest_batch`: with `--largest-batch GIB`, what fits when the allocator may take no more.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from benchmarks import cifar, rows
from benchmarks.kernels import interleaved
from packlight import (
    DEFAULT_METHODS,
    FewBit,
    GroupQuant,
    Sketch,
    convert,
    groupquant,
    profile,
    saving,
)
from packlight._seeds import SeedTable
from packlight.groupquant.grouping import Code
from packlight.selectors import Methods
from tests import resnets
from tests.blocks import Attention, DecoderBlock, EncoderBlock, PreNormBlock, Stack, SwiGLU
from tests.graphs import captured

# ---- models ---------------------------------------------------------------------------------


class Stem(nn.Sequential):
    """A class of our own: the compiler leaves a frame of torch's own container alone."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def resnet50(width: int = 64) -> Stack:
    """The convolutions of ResNet-50."""
    layers = resnets.resnet50(resnets.KITS["exact"], nn.MaxPool2d(3, 2, 1), width)
    blocks = [layer for layer in layers if isinstance(layer, resnets.Bottleneck)]
    return Stack([Stem(*layers[:4]), *blocks])


class Model(NamedTuple):
    """A model, the shape of its input, and how it computes: "bf16", "fp32" or under "autocast"."""

    make: Callable[[], Stack]
    shape: tuple[int, ...]
    precision: str
    title: str


def _roberta() -> Stack:
    return Stack([EncoderBlock(768, 12, 3072) for _ in range(12)])


def _tiny() -> Stack:
    return Stack([EncoderBlock(64, 4, 256), DecoderBlock(64, 4, 2, 128)])


# ResNet-50 late: its blocks have many shapes, each of which is compiled.
MODELS = {
    "roberta": Model(_roberta, (128, 128, 768), "autocast", "RoBERTa-base, 128 x 128, bf16"),
    "llama": Model(
        lambda: Stack([DecoderBlock(2048, 32, 4, 5632) for _ in range(22)]),
        (4, 2048, 2048),
        "bf16",
        "Llama-like 1.1B, 4 x 2048, bf16",
    ),
    "vit": Model(
        lambda: Stack([PreNormBlock(768, 12, False, 0.0) for _ in range(12)]),
        (128, 197, 768),
        "autocast",
        "ViT-B/16, 128 images, bf16",
    ),
    "gpt2-medium": Model(
        lambda: Stack([PreNormBlock(1024, 16, True, 0.1) for _ in range(24)]),
        (8, 1024, 1024),
        "autocast",
        "GPT-2 medium, 8 x 1024, bf16",
    ),
    "resnet50": Model(resnet50, (128, 3, 224, 224), "autocast", "ResNet-50, 128 images, bf16"),
    "roberta-fp32": Model(_roberta, (128, 128, 768), "fp32", "RoBERTa-base, 128 x 128, fp32"),
}

# To try the harness on a CPU; run only where --filter names them.
TINY = {
    "tiny": Model(_tiny, (2, 64, 64), "autocast", "tiny"),
    "tiny-gpt2": Model(
        lambda: Stack([PreNormBlock(64, 4, True, 0.1)]), (2, 64, 64), "autocast", "tiny GPT-2"
    ),
    "tiny-resnet50": Model(lambda: resnet50(8), (4, 3, 64, 64), "autocast", "tiny ResNet-50"),
}

# ---- choices --------------------------------------------------------------------------------

# Of the median relative gradient error. The loss has random weights, so a gradient is itself as
# small as noise, and unbiased noise of a few times its size is what few bits must look like here.
ROUNDING = 0.06
LIMITS = {8: 0.1, 4: 0.6, 3: 0.1, 2: 4.0}


class Choice(NamedTuple):
    """What a user could do to a model for its memory."""

    prepare: Callable[[Stack], None] = lambda model: None
    compiled: bool = False
    fullgraph: bool = True  # no break, which would be a cost of ours; Liger asks for some
    limit: float = ROUNDING
    # Within what the forward pass runs.
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    graph: bool = True  # whether a CUDA graph can hold the step


def checkpointed(model: Stack) -> None:
    model.checkpoints = {block: {} for block in model.blocks}


_aten = torch.ops.aten
_PRODUCTS = (
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.convolution.default),
    *(
        getattr(_aten, f"_scaled_dot_product_{name}").default
        for name in ("flash_attention", "efficient_attention", "cudnn_attention")
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in _PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def selective(model: Stack) -> None:
    """Checkpoints that keep what matmuls, convolutions and attention return."""
    keep = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    model.checkpoints = {block: {"context_fn": keep} for block in model.blocks}


def budget(share: float) -> contextlib.AbstractContextManager[Any]:
    import torch._functorch.config

    return torch._functorch.config.patch(activation_memory_budget=share)


def liger(model: Stack) -> None:
    """Liger-Kernel's norms and SwiGLU, with the weights of torch's."""
    from liger_kernel.ops import LigerSiLUMulFunction
    from liger_kernel.transformers import LigerLayerNorm, LigerRMSNorm

    class LigerSwiGLU(nn.Module):
        def forward(self, gate: Tensor, up: Tensor) -> Tensor:
            return LigerSiLUMulFunction.apply(gate, up)

    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is SwiGLU:
                setattr(parent, name, LigerSwiGLU())
            elif type(layer) in (nn.LayerNorm, nn.RMSNorm):
                kind = LigerLayerNorm if type(layer) is nn.LayerNorm else LigerRMSNorm
                ours = kind(layer.normalized_shape[0], layer.eps)
                for key, weight in layer.named_parameters():
                    setattr(ours, key, weight)
                setattr(parent, name, ours)


def packlight(
    model: nn.Module, methods: Methods, attention_bits: int | None = None, code: Code = "auto"
) -> None:
    """Converts layers and calls; `attention_bits` in place of the 8 of the conversion."""
    for module in model.modules():
        if isinstance(module, Attention) and attention_bits:
            module.attend = functools.partial(
                groupquant.scaled_dot_product_attention, bits=attention_bits, code=code
            )
    convert(model, methods, functional=True)


def _then(*changes: Callable[[Stack], None]) -> Callable[[Stack], None]:
    def prepare(model: Stack) -> None:
        for change in changes:
            change(model)

    return prepare


def _grouped(
    bits: int, attention_bits: int | None = None, code: Code = "auto"
) -> Callable[[nn.Module], None]:
    # Dropout, and max pooling, by FewBit: one bit, exact.
    methods = (GroupQuant(bits, code=code), FewBit(3))
    return functools.partial(packlight, methods=methods, attention_bits=attention_bits, code=code)


def _one_of_three(model: Stack) -> None:
    """Every third block packed at 2 bits, the others checkpointed."""
    for i, block in enumerate(model.blocks):
        if i % 3 == 2:
            _grouped(2, 4, "minmax")(block)
        else:
            model.checkpoints[block] = {}


def _packed_checkpoints() -> contextlib.AbstractContextManager[Any]:
    return saving(GroupQuant(8), overrides={"checkpoint": GroupQuant(8), "*": None})


_PACKLIGHT = {
    "packlight 4": Choice(_grouped(4), limit=LIMITS[4]),
    "packlight default": Choice(
        functools.partial(packlight, methods=DEFAULT_METHODS), limit=LIMITS[4]
    ),
    "packlight 2": Choice(_grouped(2, 4, "minmax"), limit=LIMITS[2]),
    "packlight 2, rotated": Choice(_grouped(2, 4, "rotated"), limit=LIMITS[2]),
    "packlight 3": Choice(_grouped(3), limit=LIMITS[2]),
    "packlight 2, attention 8": Choice(_grouped(2, 8), limit=LIMITS[2]),
    "packlight 8": Choice(_grouped(8), limit=LIMITS[8]),
    "packlight 4, attention 4": Choice(_grouped(4, 4), limit=LIMITS[4]),
    "packlight 4 + checkpoint": Choice(
        _then(_grouped(4), checkpointed), limit=LIMITS[4], around=_packed_checkpoints
    ),
    "packlight checkpoint": Choice(
        checkpointed, limit=LIMITS[8], around=_packed_checkpoints
    ),
    "packlight 2, checkpoint 2 of 3": Choice(
        _one_of_three, limit=LIMITS[2], around=_packed_checkpoints
    ),
    "packlight few-bit 3": Choice(
        functools.partial(packlight, methods=FewBit(3)), limit=LIMITS[3]
    ),
    "packlight inverted": Choice(
        functools.partial(packlight, methods=cifar.CONVERSIONS["inverted"])
    ),
    # A fifth of the rows: the variance is about that of the batch four times over.
    "packlight sketch 0.2": Choice(
        functools.partial(packlight, methods=Sketch(0.2)), limit=LIMITS[2]
    ),
}  # fmt: skip

# In the order of what is worth knowing first.
CHOICES: dict[str, Choice] = {
    "eager": Choice(),
    "checkpoint": Choice(checkpointed),
    "compile": Choice(compiled=True),
    "compile + checkpoint": Choice(checkpointed, compiled=True),
    **{
        name + ", compile" * compiled: choice._replace(compiled=compiled)
        for name, choice in _PACKLIGHT.items()
        for compiled in (False, True)
    },
    "compile, budget 0.5": Choice(compiled=True, around=lambda: budget(0.5)),
    "compile, budget 0.2": Choice(compiled=True, around=lambda: budget(0.2)),
    "selective checkpoint": Choice(selective),
    # Every step waits for copies that Python starts.
    "save_on_cpu": Choice(around=lambda: save_on_cpu(torch.cuda.is_available()), graph=False),
}
if importlib.util.find_spec("liger_kernel"):
    CHOICES |= {
        "liger": Choice(liger),
        "liger, compile": Choice(liger, compiled=True, fullgraph=False),
    }


def applies(model: Stack, choice: str) -> bool:
    """Whether a choice would change anything in a model that no other choice does."""
    kinds = {type(module) for module in model.modules()}
    if choice.startswith("packlight default"):  # the same as at 4 bits, but for batch norms
        return nn.BatchNorm2d in kinds
    if choice.startswith(("packlight inverted", "liger")):
        return bool(kinds & {nn.LayerNorm, nn.RMSNorm}) or "inverted" in choice
    if "sketch" in choice:
        return nn.Linear in kinds
    return not any(word in choice for word in ("attention", "2 of 3")) or Attention in kinds


# ---- measuring ------------------------------------------------------------------------------


class Step:
    """A model as a choice leaves it, its input, and a forward pass."""

    def __init__(self, case: Model, choice: Choice, device: str) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.model, self.x = case.make(), torch.randn(case.shape)
        if len(case.shape) == 4:
            self.model = self.model.to(memory_format=torch.channels_last)
            self.x = self.x.to(memory_format=torch.channels_last)
        if case.precision == "bf16":
            self.model, self.x = self.model.to(torch.bfloat16), self.x.to(torch.bfloat16)
        self.choice, self.device = choice, device
        self.autocast = torch.autocast(device, torch.bfloat16, case.precision == "autocast")
        choice.prepare(self.model)
        torch._dynamo.reset()
        if choice.compiled:
            for block in self.model.blocks:
                # Blocks of other shapes are other programs: dynamic ones would be slower.
                block.compile(fullgraph=choice.fullgraph, dynamic=False)

    def __call__(self, x: Tensor) -> Tensor:
        with self.autocast, self.choice.around():
            return self.model(x)

    @property
    def _with_dropout(self) -> list[Any]:
        return [m for m in self.model.modules() if isinstance(m, nn.Dropout | Attention)]

    @property
    def has_dropout(self) -> bool:
        return any(module.p for module in self._with_dropout)

    @contextlib.contextmanager
    def without_dropout(self) -> Iterator[None]:
        found = self._with_dropout
        before = [module.p for module in found]
        for module in found:
            module.p = 0.0
        yield
        for module, p in zip(found, before, strict=True):
            module.p = p

    def gradients(self, dropout: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Output, and weight gradients of a loss with random weights."""
        with contextlib.nullcontext() if dropout else self.without_dropout():
            y = self(self.x)
            torch.manual_seed(1)
            loss = (y.float() * torch.randn_like(y, dtype=torch.float32)).mean()
            grads = torch.autograd.grad(loss, list(self.model.parameters()))
        return y.detach(), list(grads)


class IncorrectError(Exception):
    """A choice does not compute what it promises."""


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.float(), b.to(a.device).float()
    return ((a - b).norm() / b.norm()).item()


def norms(step: Step) -> list[float]:
    """Of the gradients of weight matrices, with dropout; none where there is none."""
    if not step.has_dropout:
        return []
    return [grad.norm().item() for grad in step.gradients(dropout=True)[1] if grad.dim() > 1]


class Errors(NamedTuple):
    """Relative errors of an output and of weight gradients."""

    output: float
    median: float
    worst: float

    @classmethod
    def of(cls, found: tuple[Tensor, list[Tensor]], truth: tuple[Tensor, list[Tensor]]) -> "Errors":
        pairs = zip(found[1], truth[1], strict=True)
        errors = [relative(a, b) for a, b in pairs if b.dim() > 1]
        return cls(relative(found[0], truth[0]), statistics.median(errors), max(errors))


class Exact:
    """What eager models compute, kept on the CPU, and how far rounding alone takes them.

    A deep network at random weights magnifies the rounding of 16 bits, a ResNet without mercy: any
    other order of operations is as far from eager as eager is from float32.
    """

    def __init__(self) -> None:
        self.name, self.values = "", (torch.empty(0), [torch.empty(0)])
        self.rounding, self.norms = Errors(0.0, 0.0, 0.0), list[float]()

    def make(self, name: str, case: Model, device: str) -> None:
        if name == self.name:
            return
        eager = Step(case, CHOICES["eager"], device)
        found, self.norms = eager.gradients(), norms(eager)
        if case.precision != "fp32":
            # Checkpointed, which computes the same: attention in float32 keeps all its scores.
            single = Step(case._replace(precision="fp32"), Choice(checkpointed), device)
            self.rounding = Errors.of(found, single.gradients())
        else:
            self.rounding = Errors(0.0, 0.0, 0.0)
        self.name, self.values = name, (found[0].cpu(), [grad.cpu() for grad in found[1]])

    def check(self, step: Step) -> dict[str, float]:
        """Errors of the weight gradients. Raises where they, or the output, are not as promised."""
        errors, limit = Errors.of(step.gradients(), self.values), step.choice.limit
        if not errors.output <= ROUNDING + 2 * self.rounding.output:  # nor NaN
            raise IncorrectError(f"the output is off by {errors.output:.3f} of its norm")
        if not (
            errors.median <= limit + 2 * self.rounding.median
            and errors.worst <= 10 * limit + 2 * self.rounding.worst
        ):
            raise IncorrectError(
                f"gradients are off by {errors.median:.3f} (median), {errors.worst:.3f} (worst)"
            )
        for i, (norm, truth) in enumerate(zip(norms(step), self.norms, strict=True)):
            if not truth / 2 <= norm <= 2 * (1 + 2 * limit) * truth:
                raise IncorrectError(f"with dropout gradient {i} is {norm / truth:.2f} of eager's")
        return {"error_median": errors.median, "error_worst": errors.worst}


class Graph:
    """A step captured in a CUDA graph, with seeds as `packlight.graphed` has them.

    Raises RuntimeError where it cannot be.
    """

    def __init__(self, step: Step) -> None:
        self.step, self.dy = step, torch.randn_like(step(step.x))
        self.seeds = SeedTable(step.x.device)
        with self.seeds.used_by_operators():
            self.graph, _ = captured(self._launch)

    def _launch(self) -> None:
        self.step(self.step.x).backward(self.dy)

    def __call__(self) -> None:
        self.seeds.draw()
        self.graph.replay()


class Beside:
    """Graphs of a model, eager and compiled, with which those of other choices take turns.

    Power and heat move a GPU's clock by several percent within minutes: times that were taken one
    after the other do not compare.
    """

    def __init__(self) -> None:
        self.name, self.graphs = "", dict[str, Graph]()

    def clear(self) -> None:
        self.graphs.clear()

    def make(self, name: str, case: Model, device: str) -> None:
        """The eager model's, before another model is made: that resets the compiler."""
        if name != self.name:
            self.clear()
            self.name = name
        if "eager" not in self.graphs:
            self.graphs["eager"] = Graph(Step(case, CHOICES["eager"], device))

    def timed(self, choice: str, step: Step) -> dict[str, Any]:
        """Columns `graph_*` of a row, or why the step is no graph."""
        try:
            graph = Graph(step)
        except RuntimeError as error:
            # A generator that took part in a capture that failed goes on believing in it.
            fresh = torch.Generator("cuda").manual_seed(0)
            torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
            return {"graph_failed": str(error)[:200]}
        others = {other: found for other, found in self.graphs.items() if other != choice}
        times = interleaved({choice: graph, **others}, 7)
        if choice == "compile":
            self.graphs[choice] = graph
        torch.cuda.empty_cache()
        if torch.cuda.memory_reserved() > torch.cuda.mem_get_info()[1] / 2:
            self.clear()  # a graph keeps the memory of its step
        return {"graph_ms": times.pop(choice)} | {
            f"graph_{other}_ms": milliseconds for other, milliseconds in times.items()
        }


def measure(
    name: str, choice: str, device: str, exact: Exact, beside: Beside, gib: float | None = None
) -> dict[str, Any]:
    """A row: first what is right, then what it costs."""
    case = {**MODELS, **TINY}[name]
    exact.make(name, case, device)
    if device == "cuda":
        beside.make(name, case, device)
    row: dict[str, Any] = {"rounding_median": exact.rounding.median}
    # Each block of another shape is one more program.
    with torch._dynamo.config.patch(recompile_limit=64):
        step = Step(case, CHOICES[choice], device)
        if choice != "eager":
            row |= exact.check(step)
        row |= timed(step) if device == "cuda" else timed_on_cpu(step)
        if device == "cuda" and step.choice.graph:
            row |= beside.timed(choice, step)
        with step.autocast, step.choice.around():
            row["profile_bytes"] = profile(step.model, step.x).activation_bytes
        if gib is not None:
            beside.clear()
            found = largest_batch(step, gib, row["peak_bytes"])
            row |= {"largest_batch": found, "largest_batch_GiB": gib}
    return row


def timed(step: Step) -> dict[str, Any]:
    model, x = step.model, step.x
    dy = torch.randn_like(step(x))
    for _ in range(8):
        step(x).backward(dy)
        model.zero_grad(set_to_none=False)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    y = step(x)
    kept = torch.cuda.memory_allocated() - start - y.numel() * y.element_size()
    y.backward(dy)
    del y
    peak = torch.cuda.max_memory_allocated() - start
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step(x).backward(dy)
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    milliseconds = statistics.median(begin.elapsed_time(end) for begin, end in times)
    return {"kept_bytes": kept, "peak_bytes": peak, "step_ms": milliseconds}


def timed_on_cpu(step: Step) -> dict[str, Any]:
    dy = torch.randn_like(step(step.x))
    times = interleaved({"step": lambda: step(step.x).backward(dy)}, 3, "cpu")
    return {"step_ms": times["step"]}


def largest(fits: Callable[[int], bool], guess: int, within: float = 1 / 32) -> int:
    """The largest number that fits, 0 if none does, to a share of it.

    A try may cost a compilation: strides away from the guess double, and halve once on both sides.
    """
    low, high, size = 0, None, max(1, guess)
    stride = max(1, size // 16)
    while high is None or high - low > max(1, within * low):
        if fits(size):
            low = size
        else:
            high = size
        size = low + stride if high is None else max((low + high) // 2, high - stride)
        stride *= 2
    return low


def largest_batch(step: Step, gib: float, peak_bytes: int) -> int:
    """The largest batch whose step fits when the allocator may take no more than `gib` GiB.

    `peak_bytes` is what the step of the batch at hand needs.
    """
    batch_bytes = peak_bytes + step.x.nbytes
    left = gib * 2**30 - (torch.cuda.memory_allocated() - step.x.nbytes)
    guess = int(len(step.x) * left / batch_bytes)

    def fits(size: int) -> bool:
        repeated = -(-size // len(step.x))
        try:
            x = torch.cat([step.x] * repeated)[:size]
            y = step(x)
            y.backward(torch.ones_like(y))
        except torch.OutOfMemoryError:
            return False
        finally:
            x = y = None
            gc.collect()
            torch.cuda.empty_cache()
        return True

    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
    try:
        return largest(fits, guess)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ---- the suite ------------------------------------------------------------------------------

OUT = "step.jsonl"


def cases(options: argparse.Namespace) -> list[rows.Case]:
    """Every choice that means something for a model, model by model."""
    if options.largest_batch is not None and options.device != "cuda":
        raise SystemExit("--largest-batch needs a CUDA device, whose allocator has a limit")
    exact, beside = Exact(), Beside()
    found = []
    for name, model in {**MODELS, **TINY}.items():
        with torch.device("meta"):
            body = model.make()
        for choice, what in CHOICES.items():
            if not applies(body, choice):
                continue
            run = functools.partial(
                measure, name, choice, options.device, exact, beside, options.largest_batch
            )
            key = {"model": name, "choice": choice}
            hidden = name in TINY
            found.append(
                rows.Case(f"{name}/{choice}", OUT, key, run, 60 if what.compiled else 10, hidden)
            )
    return found


def line(row: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """A row in words, beside the eager row of its model."""
    text = f"{row['model']:13s} {row['choice']:33s}"
    if "failed" in row:
        return f"{text} {row['failed']}"
    eager = baseline(row, others) or row
    for key, label in (("kept_bytes", "kept"), ("profile_bytes", "counted")):
        if key in row:
            text += f" {label} {row[key] / 2**30:6.2f} GiB"
            if row[key] and eager.get(key):
                text += f" ({eager[key] / row[key]:5.2f}x less)"
    if "peak_bytes" in row:
        text += f" peak {row['peak_bytes'] / 2**30:6.2f}"
    for key, label in (("step_ms", "launched"), ("graph_ms", "as a graph")):
        if key in row:
            text += f" {label} {row[key]:7.1f} ms"
            if key in eager:
                text += f" ({speed(row, eager, key):4.2f}x)"
    if "graph_compile_ms" in row:
        text += f" ({row['graph_compile_ms'] / row['graph_ms']:4.2f}x of compile)"
    if "error_median" in row:
        text += f" error {row['error_median']:.3f}, worst {row['error_worst']:.3f}"
        if row.get("rounding_median", 0) > ROUNDING:  # else it says nothing of the choice
            text += f" (rounding of eager {row['rounding_median']:.3f})"
    if "largest_batch" in row:
        text += f" batch {row['largest_batch']} in {row['largest_batch_GiB']:g} GiB"
    return text


def speed(row: dict[str, Any], eager: dict[str, Any], key: str) -> float:
    """As a share of eager's, by "step_ms" or "graph_ms": beside it where they took turns."""
    beside: float = row.get(key.replace("_", "_eager_"), eager[key])
    return beside / float(row[key])


def baseline(row: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The eager row to compare with: of the same model and device, and commit if there is one.

    Of several the last, since rows of one process follow each other.
    """
    same = [
        other
        for other in others
        if other["choice"] == "eager"
        and "failed" not in other
        and all(other[key] == row[key] for key in ("model", "device"))
    ]
    return next(
        (other for other in reversed(same) if other["commit"] == row["commit"]),
        same[-1] if same else None,
    )
