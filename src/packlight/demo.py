"""Train a small GPT on real text, with plain PyTorch and with packlight's methods, and compare.

One file, read from top to bottom: the model, the text, the training loop, the report. Nothing in it
knows of packlight but `VARIANTS`, which says how each run changes the model, and `kept_bytes`,
which asks `packlight.profile.profile` what the model keeps for the backward pass.

    packlight demo                    # a run a method, a table, a picture
    packlight demo --bits 2 --seed 1
"""

import dataclasses
import json
import math
import os
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor, nn

from packlight import __version__, fewbit, groupquant, inverted
from packlight._files import replaced, write_text
from packlight.errors import InputError, MissingDependencyError
from packlight.fewbit.method import check_bits
from packlight.profile import profile
from packlight.report import human_bytes

# ---- the model: a GPT on bytes -------------------------------------------------------------------

VOCABULARY = 256


class Attention(nn.Module):
    """Causal self-attention with `heads` heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = self.attend(q, k, v, is_causal=True)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class MLP(nn.Module):
    """Linear, GELU, Linear. The hidden layer is 4 times as wide, so GELU keeps a lot."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act: nn.Module = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.act(self.fc1(x)))
        return result


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class GPT(nn.Module):
    """Bytes [batch, length] -> logits of each next byte [batch, length, 256]."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.positions(torch.arange(text.shape[1], device=text.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


# ---- the variants: what is done to the model before it is trained --------------------------------


def unchanged(model: GPT, bits: int) -> None:
    """Plain PyTorch: every GELU, norm and Linear keeps its input, 16 or 32 bits an element."""


def few_bit(model: GPT, bits: int) -> None:
    """Every GELU keeps codes of its derivative, `bits` bits an element."""
    replace(model, {nn.GELU: lambda gelu: fewbit.GELU(bits=bits)})


def invert(model: GPT, bits: int) -> None:
    """Every GELU and norm keeps its output, which the Linear behind it keeps anyway."""
    replace(
        model,
        {
            nn.GELU: lambda gelu: inverted.GELU(),
            nn.LayerNorm: lambda norm: inverted.LayerNorm(norm.normalized_shape, norm.eps),
            # Under autocast this one reads the 16-bit output that the norm keeps.
            nn.Linear: lambda old: inverted.Linear(old.in_features, old.out_features),
        },
    )


def group_quant(model: GPT, bits: int) -> None:
    """Every layer keeps 4-bit packs, shared with its neighbours; attention keeps 8-bit ones."""
    replace(
        model,
        {
            nn.GELU: lambda gelu: groupquant.GELU(),
            nn.LayerNorm: lambda norm: groupquant.LayerNorm(norm.normalized_shape, norm.eps),
            nn.Linear: lambda old: groupquant.Linear(old.in_features, old.out_features),
        },
    )
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = groupquant.scaled_dot_product_attention


def replace(model: nn.Module, twins: dict[type, Callable[[Any], nn.Module]]) -> None:
    """Each layer of these types gives way to its twin, which takes over its weights."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in twins:
                state = torch.get_rng_state()
                twin = twins[type(child)](child)
                torch.set_rng_state(state)  # drawn for weights that are not used
                for key, weight in child.named_parameters(recurse=False):
                    setattr(twin, key, weight)
                setattr(parent, name, twin)


# The first one is what the others are compared with.
VARIANTS: dict[str, Callable[[GPT, int], None]] = {
    "PyTorch": unchanged,
    "FewBit": few_bit,
    "Inverted": invert,
    "GroupQuant": group_quant,
}


# ---- the settings --------------------------------------------------------------------------------

# On 2 CPU cores under 3 minutes for all runs.
DEFAULTS = {
    "cpu": {"steps": 160, "layers": 4, "width": 128, "heads": 4, "context": 128, "batch": 16},
    "cuda": {"steps": 400, "layers": 12, "width": 768, "heads": 12, "context": 512, "batch": 32},
}


# Of any of the choices; what does not fit into memory is found out later.
_MOST = 10**6


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the two runs have in common. Raises `InputError` for values that cannot work."""

    steps: int
    layers: int
    width: int
    heads: int
    context: int
    batch: int
    bits: int
    device: str
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "layers", "width", "heads", "context", "batch"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name}={value} is not a positive whole number")
            if value > _MOST:
                raise InputError(f"{name}={value} is too large; expected at most {_MOST}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed} is not a whole number from 0 to 2^63 - 1")
        if self.width % self.heads:
            raise InputError(
                f"width={self.width} is not divisible by heads={self.heads}; "
                "choose a multiple, or another number of heads"
            )
        check_bits(self.bits)

    @property
    def autocast(self) -> bool:
        """Whether to compute in bfloat16: on GPUs that have it."""
        return self.device != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False)


def make_settings(
    device: str | None = None, bits: int = 3, seed: int = 0, **choices: int | None
) -> Settings:
    """Settings with the device's defaults for every choice left out or None."""
    name = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = {key: value for key, value in choices.items() if value is not None}
    values = {**DEFAULTS["cpu" if name == "cpu" else "cuda"], **chosen}
    return Settings(**values, bits=bits, device=name, seed=seed)


def check_device(name: str) -> str:
    """`name` if this machine has that device, else an `InputError`."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device={name!r} is not a device of this demo; use cpu, cuda or cuda:1")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(
            f"device={name!r} does not exist: PyTorch sees {count} CUDA devices; "
            "use another one or cpu"
        )
    return "cpu" if device.type == "cpu" else name


# ---- the text: the source of Python's standard library -------------------------------------------

# Other people's packages, tests, and tables of data.
SKIPPED = {
    *("__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data"),
    *("site-packages", "test", "tests", "turtledemo"),
}


class Text(NamedTuple):
    """Training and validation text as uint8 tensors; no file is in both."""

    training: Tensor
    validation: Tensor


def load_text(root: Path | None = None) -> Text:
    """All Python files under `root` (default: the standard library), every 20th for validation."""
    root = root or Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    files = [path.read_bytes().replace(b"\r\n", b"\n") for path in paths]
    validation = bytearray().join(files[::20])
    training = bytearray().join(data for index, data in enumerate(files) if index % 20)
    if not training:
        raise InputError(
            f"there are {len(files)} Python files under {root}, too few to train on; "
            "this demo reads the source files of Python's standard library: install them"
        )
    return Text(
        torch.frombuffer(training, dtype=torch.uint8),
        torch.frombuffer(validation, dtype=torch.uint8),
    )


def windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [len(starts), length]: the target of a byte is the byte after it."""
    found = text[starts[:, None] + torch.arange(length + 1)].long()
    return found[:, :-1], found[:, 1:]


def training_batches(text: Text, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` random batches, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    last = len(text.training) - settings.context
    for _ in range(settings.steps):
        starts = torch.randint(last, (settings.batch,), generator=generator)
        yield windows(text.training, starts, settings.context)


def validation_batches(text: Text, settings: Settings) -> list[tuple[Tensor, Tensor]]:
    """8 batches evenly spread over the validation text, the same ones for every seed."""
    count = 8 * settings.batch
    last = len(text.validation) - settings.context - 1
    starts = torch.arange(count) * last // count
    return [windows(text.validation, part, settings.context) for part in starts.chunk(8)]


# ---- the training --------------------------------------------------------------------------------


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
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast)
    held_out = [(x.to(device), y.to(device)) for x, y in validation_batches(text, settings)]

    result = Result(kept_bytes(model, *held_out[0], autocast))
    if device.type == "cuda":
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
        result.peak_bytes = torch.cuda.max_memory_allocated(device)
    return result


def mean_loss(model: GPT, batches: list[tuple[Tensor, Tensor]], autocast: torch.autocast) -> float:
    """Mean loss over batches, without training on them."""
    model.eval()
    with torch.no_grad(), autocast:
        losses = [loss_of(model(inputs), targets).item() for inputs, targets in batches]
    model.train()
    return statistics.fmean(losses)


# ---- the report ----------------------------------------------------------------------------------


def gelu_elements(settings: Settings) -> int:
    """How many numbers go through GELU in one step."""
    return settings.layers * settings.batch * settings.context * 4 * settings.width


def kinds_of(results: dict[str, Result]) -> list[str]:
    """The kinds of modules that keep anything in any run, the largest of the first run first."""
    return list(dict.fromkeys(kind for result in results.values() for kind in result.kept_bytes))


def print_report(results: dict[str, Result], settings: Settings, console: Console) -> None:
    """One table, and what it says about GELU and about the losses."""
    runs = list(results.values())
    table = Table("")
    for name in results:
        table.add_column(name, justify="right")

    def add_row(title: str, show: Callable[[float], str], values: list[float]) -> None:
        """Values, and after those that differ from the first how much they differ."""
        first = values[0]
        changes = [f" ({v / first - 1:+.1%})" if first and v != first else "" for v in values]
        table.add_row(title, *(show(v) + change for v, change in zip(values, changes, strict=True)))

    def size(value: float) -> str:
        return human_bytes(int(value))

    add_row("kept for the backward pass", size, [run.total_bytes for run in runs])
    for kind in kinds_of(results):
        add_row(f"  by {kind}", size, [run.kept_bytes.get(kind, 0) for run in runs])
    table.add_section()
    peaks: list[float] = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    if peaks:
        add_row("peak memory on the GPU", size, peaks)
    add_row("a step, median", "{:.1f} ms".format, [run.median_step_ms for run in runs])
    table.add_row("training loss, last tenth", *(f"{run.training_loss:.4f}" for run in runs))
    table.add_row("validation loss", *(f"{run.validation_losses[-1]:.4f}" for run in runs))
    console.print(table)

    elements = gelu_elements(settings)
    for name, run in results.items():
        gelu = run.kept_bytes.get("GELU", 0)
        rest = human_bytes(run.total_bytes - gelu)
        console.print(f"{name}: GELU keeps {gelu / elements:.3f} bytes an element, the rest {rest}")
    (base_name, base), *others = results.items()
    for name, run in others:
        training = run.training_loss - base.training_loss
        validation = run.validation_losses[-1] - base.validation_losses[-1]
        console.print(
            f"{name} minus {base_name}: training loss {training:+z.4f}, "
            f"validation loss {validation:+z.4f}"
        )


def save_json(results: dict[str, Result], settings: Settings, path: Path) -> None:
    """Everything that was measured, and on what."""
    cuda = settings.device != "cpu"
    data = {
        "packlight": __version__,
        "torch": torch.__version__,
        "processor": torch.cuda.get_device_name(settings.device) if cuda else "cpu",
        "settings": {**dataclasses.asdict(settings), "autocast": settings.autocast},
        "gelu_elements": gelu_elements(settings),
        "results": {name: dataclasses.asdict(result) for name, result in results.items()},
    }
    write_text(path, json.dumps(data, indent=1) + "\n")


# Okabe and Ito's colours, which stay apart for colour-blind readers. Other kinds of modules are
# shades of one, since only GELU is to stand out.
RUN_COLOURS = ("#56b4e9", "#d55e00", "#009e73", "#cc79a7")
GELU_COLOUR = "#e69f00"
OTHER_COLOURS = ("#e4eaef", "#8fa9bd", "#b3c5d3", "#d3dee6")


def check_matplotlib() -> None:
    """Raise `MissingDependencyError` now, and not after minutes of training."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "the demo's picture needs matplotlib; install it with: pip install 'packlight[plot]', "
            "or leave the picture out with --no-plot"
        ) from error


def save_picture(results: dict[str, Result], settings: Settings, path: Path) -> None:
    """Loss curves on the left, bytes kept by kind of module on the right."""
    # The figure alone, without pyplot: no window, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    losses, memory = figure.subplots(1, 2, width_ratios=(1.2, 1))

    # Later runs are drawn thinner, so that curves that lie on each other can all be seen.
    for place, (name, result) in enumerate(results.items()):
        colour, width = RUN_COLOURS[place % 4], max(1.5, 5 - 3.5 * place)
        curve = smoothed(result.training_losses, max(1, settings.steps // 20))
        steps = range(1, settings.steps + 1)
        losses.plot(steps, curve, color=colour, linewidth=width, label=f"{name}, training")
        losses.plot(
            result.validation_steps,
            result.validation_losses,
            "o",
            color=colour,
            markersize=width + 3.5,
            markeredgecolor="white",
            label=f"{name}, validation: {result.validation_losses[-1]:.4f} at the end",
        )
    losses.set_xlabel("step")
    losses.set_ylabel("loss (nats per byte)")
    losses.set_title("Loss, same seed and same batches", loc="left")
    losses.legend(loc="upper right", frameon=False)
    losses.grid(color="#e5e5e5", linewidth=0.8)

    # From the bottom up: what is too small for a label, the others, and GELU on top.
    largest = max(result.total_bytes for result in results.values())
    kinds = [kind for kind in kinds_of(results) if kind != "GELU"]
    small = [
        kind
        for kind in kinds
        if max(result.kept_bytes.get(kind, 0) for result in results.values()) < largest / 20
    ]
    kinds = [kind for kind in kinds if kind not in small]
    unit, unit_bytes = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    for place, result in enumerate(results.values()):
        kept = {kind: result.kept_bytes.get(kind, 0) for kind in [*kinds, "GELU"]}
        bars = {"other": result.total_bytes - sum(kept.values()), **kept}
        bottom = 0.0
        for index, (kind, count) in enumerate(bars.items()):
            colour = GELU_COLOUR if kind == "GELU" else OTHER_COLOURS[index % 4]
            height, label = count / unit_bytes, None if place else kind
            memory.bar(place, height, 0.6, bottom, color=colour, edgecolor="white", label=label)
            if count > largest / 12:  # tall enough to be written in
                middle = bottom + height / 2
                memory.text(place, middle, human_bytes(count), ha="center", va="center", size=8)
            bottom += height
        memory.annotate(
            human_bytes(result.total_bytes),
            (place, result.total_bytes / unit_bytes),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            weight="bold",
        )
    titles = [
        name if run.peak_bytes is None else f"{name}\npeak on the GPU {human_bytes(run.peak_bytes)}"
        for name, run in results.items()
    ]
    memory.set_xticks(range(len(results)), titles)
    memory.margins(y=0.1)
    memory.legend(reverse=True, frameon=False)
    memory.set_ylabel(f"kept for the backward pass of one batch ({unit})")
    memory.set_title(f"Memory, FewBit at {settings.bits} bits an element", loc="left")

    for axes in (losses, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    with replaced(path) as beside:
        figure.savefig(beside, dpi=150)


def smoothed(values: list[float], window: int) -> list[float]:
    """The mean of each value and those before it, `window` of them."""
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


# ---- all of it -----------------------------------------------------------------------------------


def run(
    settings: Settings, out: Path, plot: bool = True, text: Text | None = None
) -> dict[str, Result]:
    """Train every variant, print the table, write demo.json and demo.png into `out`."""
    console = Console()
    if plot:
        check_matplotlib()
    check_folder(out)
    text = load_text() if text is None else text
    check_length(text, settings)
    console.print(
        f"A GPT of {settings.layers} layers, width {settings.width}, on {settings.device}"
        f"{' in bfloat16' if settings.autocast else ''}; {len(text.training) / 1e6:.1f} MB of "
        "Python's standard library to train on."
    )
    results = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    last = TextColumn("loss {task.fields[loss]:.3f}")
    with Progress(*columns, last, TimeRemainingColumn(), console=console) as progress:
        for name, change in VARIANTS.items():
            task = progress.add_task(name, total=settings.steps, loss=math.log(VOCABULARY))

            def after_step(result: Result, task: TaskID = task) -> None:
                progress.update(task, advance=1, loss=result.training_losses[-1])

            try:
                results[name] = train(change, text, settings, after_step)
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"{name} with batch={settings.batch} does not fit into the memory of "
                    f"{settings.device}; choose a smaller --batch, --width or --layers"
                ) from error
    print_report(results, settings, console)
    save_json(results, settings, out / "demo.json")
    written = [out / "demo.json"]
    if plot:
        save_picture(results, settings, out / "demo.png")
        written.append(out / "demo.png")
    console.print("written:", *written, soft_wrap=True, highlight=False)
    return results


def check_folder(out: Path) -> None:
    """Make the folder for the results, or raise `InputError`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={str(out)!r} cannot be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise InputError(f"out={str(out)!r} cannot be written to; choose another folder")


def check_length(text: Text, settings: Settings) -> None:
    """Both texts must be longer than one window."""
    shortest = min(len(text.training), len(text.validation))
    if shortest < settings.context + 2:
        raise InputError(
            f"context={settings.context} is longer than the text to train or validate on, "
            f"{shortest} bytes; choose a smaller --context"
        )
