"""Which weight and tail rule of the codebooks trains best.

    python -m benchmarks.codebook_choice --out benchmarks/results/codebook_choice.jsonl
    python -m benchmarks.codebook_choice --summary benchmarks/results/codebook_choice.jsonl

The GPT of `packlight demo` is trained on the standard library's source with exact activations and
with codebooks of 1 to 3 bits, fitted under each of `WEIGHTS` with free and with pinned tails. Runs
of one seed share initial weights and batches, so losses are compared within a seed. "exact,
perturbed" is exact training from weights changed by a thousandth: a rule that differs from exact,
or from another rule, by no more than this run does is as good. Rules that give the same codebook,
as most do at 1 bit, share one run.

Beside the losses, gradients of all weights on one held-out batch are compared with the exact ones
at the same weights, in float32 and without autocast, before and after training.

Without --steps, a rehearsal times a few steps and chooses as many as fit into --seconds for all
seeds. One round is all runs of a seed; rows are written as they are measured.
"""

import argparse
import copy
import dataclasses
import itertools
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import rows
from packlight import fewbit
from packlight.cli import demo

SIZES = {
    "cpu": {"layers": 2, "width": 64, "heads": 2, "context": 64, "batch": 8},
    "cuda": {"layers": 6, "width": 384, "heads": 6, "context": 256, "batch": 64},
}
VALIDATION_WINDOWS = {"cpu": 64, "cuda": 1536}
GRADIENT_WINDOWS = 16
STEPS = (50, 500)  # what the rehearsal may choose

# The numbers after "normal" are sigma.
WEIGHTS: tuple[tuple[str, float | None], ...] = (
    ("uniform", None),
    ("normal", 1.0),
    ("normal", 2.0),
    ("normal", 3.0),
)
PERTURBATION = 1e-3


class Activation(NamedTuple):
    """An activation as torch and as packlight have it, and the widths it is tried at."""

    function: Callable[[Tensor], Tensor]
    exact: type[nn.Module]
    coded: type[nn.Module]
    bits: tuple[int, ...]


ACTIVATIONS = {
    "gelu": Activation(F.gelu, nn.GELU, fewbit.GELU, (1, 2, 3)),
    "silu": Activation(F.silu, nn.SiLU, fewbit.SiLU, (2,)),
}


# ---- what is compared ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a row says about its codebook; all None for exact activations."""

    rule: str
    bits: int | None = None
    weight: str | None = None
    sigma: float | None = None
    pin_tails: bool | None = None


class Variant(NamedTuple):
    """One run, which stands for every rule that gives its codebook. No codebook means exact."""

    rules: tuple[Rule, ...]
    book: fewbit.Codebook | None


EXACT = Variant((Rule("exact"),), None)
PERTURBED = Variant((Rule("exact, perturbed"),), None)


def variants(activation: Activation, bits: tuple[int, ...]) -> list[Variant]:
    """Exact twice, then every distinct codebook."""
    groups: dict[fewbit.Codebook, list[Rule]] = {}
    for width, (weight, sigma), pinned in itertools.product(bits, WEIGHTS, (False, True)):
        of_sigma = "" if sigma is None else f" s={sigma:g}"
        name = f"{weight}{of_sigma}, {'pinned' if pinned else 'free'}"
        book = fewbit.fit_codebook(
            activation.function,
            width,
            weight=weight if sigma is None else (weight, sigma),
            pin_tails=pinned,
        )
        groups.setdefault(book, []).append(Rule(name, width, weight, sigma, pinned))
    return [EXACT, PERTURBED, *(Variant(tuple(rules), book) for book, rules in groups.items())]


def set_activation(model: demo.GPT, make: Callable[[], nn.Module]) -> None:
    """Gives every MLP an activation of its own."""
    for module in model.modules():
        if isinstance(module, demo.MLP):
            module.act = make()


# ---- data, on the device from the start ----------------------------------------------------------


class Data(NamedTuple):
    """The text to train on, the batches to validate on, and the one to compare gradients on."""

    training: Tensor
    validation: list[tuple[Tensor, Tensor]]
    gradient: tuple[Tensor, Tensor]


def load(text: demo.Text, settings: demo.Settings, validation_windows: int) -> Data:
    """Held-out windows are evenly spread over the validation text and the same for all runs."""
    last = len(text.validation) - settings.context - 1

    def held_out(count: int) -> tuple[Tensor, Tensor]:
        starts = torch.arange(count) * last // count
        inputs, targets = demo.windows(text.validation, starts, settings.context)
        return inputs.to(settings.device), targets.to(settings.device)

    inputs, targets = held_out(validation_windows)
    batches = zip(inputs.split(4 * settings.batch), targets.split(4 * settings.batch), strict=True)
    return Data(text.training.to(settings.device), list(batches), held_out(GRADIENT_WINDOWS))


def training_batches(text: Tensor, settings: demo.Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """The random batches of a seed, gathered on the device."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.steps, settings.batch, 1)
    starts = torch.randint(len(text) - settings.context, shape, generator=generator)
    offsets = torch.arange(settings.context + 1, device=text.device)
    for of_step in starts.to(text.device):
        found = text[of_step + offsets].long()
        yield found[:, :-1], found[:, 1:]


# ---- one run -------------------------------------------------------------------------------------


def initial_model(settings: demo.Settings) -> demo.GPT:
    """The seed's model, on the device."""
    torch.manual_seed(settings.seed)
    model = demo.GPT(settings.layers, settings.width, settings.heads, settings.context)
    return model.to(settings.device)


def perturb(model: demo.GPT, seed: int) -> None:
    """Changes every weight by about `PERTURBATION` of itself."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.mul_(1 + PERTURBATION * noise)


def train(model: demo.GPT, text: Tensor, settings: demo.Settings) -> Tensor:
    """Trains in place as the demo does; returns the loss of every step, still on the device."""
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    losses = []
    for step, (inputs, targets) in enumerate(training_batches(text, settings)):
        for group in optimizer.param_groups:
            group["lr"] = demo.learning_rate(step, settings)
        with autocast(settings):
            loss = demo.loss_of(model(inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def autocast(settings: demo.Settings) -> torch.autocast:
    kind = torch.device(settings.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=settings.autocast)


def validation_loss(model: demo.GPT, data: Data, settings: demo.Settings) -> float:
    """Mean loss of a byte. In `eval()` every variant computes the exact activation."""
    model.eval()
    with torch.no_grad(), autocast(settings):
        sums = [demo.loss_of(model(x), y) * y.numel() for x, y in data.validation]
    model.train()
    total: float = torch.stack(sums).sum().item()
    return total / sum(y.numel() for _, y in data.validation)


def weight_gradient(model: demo.GPT, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of all weights as one vector, in float32."""
    loss = demo.loss_of(model(batch[0]), batch[1])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def gradient_error(
    model: demo.GPT, activation: Activation, batch: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """How far the gradient is from the exact one at the same weights."""
    exact_model = copy.deepcopy(model)
    set_activation(exact_model, activation.exact)
    # A sum over millions of products: in float64, or the cosine of equal vectors is not 1.
    exact = weight_gradient(exact_model, batch).double()
    own = weight_gradient(model, batch).double()
    error = torch.linalg.vector_norm(own - exact) / torch.linalg.vector_norm(exact)
    return {"error": error.item(), "cosine": F.cosine_similarity(own, exact, dim=0).item()}


def input_stds(model: demo.GPT, inputs: Tensor) -> list[float]:
    """Standard deviations of what goes into the activations, layer by layer."""
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[0].std())

    layers = [module.act for module in model.modules() if isinstance(module, demo.MLP)]
    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return [round(value, 4) for value in torch.stack(found).tolist()]


def measure(
    base: demo.GPT, variant: Variant, activation: Activation, data: Data, settings: demo.Settings
) -> dict[str, Any]:
    """Trains a copy of `base` with the variant's activation."""
    started = time.perf_counter()
    model = copy.deepcopy(base)
    if variant.book is None:
        set_activation(model, activation.exact)
    else:
        set_activation(model, lambda: activation.coded(codebook=variant.book))
    if variant is PERTURBED:
        perturb(model, settings.seed)
    before = gradient_error(model, activation, data.gradient)
    losses = train(model, data.training, settings)
    training_loss = losses[-max(1, settings.steps // 10) :].mean().item()
    after = gradient_error(model, activation, data.gradient)
    return {
        "validation_loss": validation_loss(model, data, settings),
        "training_loss": training_loss,
        "gradient_error_init": before["error"],
        "gradient_cosine_init": before["cosine"],
        "gradient_error_end": after["error"],
        "gradient_cosine_end": after["cosine"],
        "input_std_init": input_stds(base, data.gradient[0]),
        "input_std_end": input_stds(model, data.gradient[0]),
        "seconds": round(time.perf_counter() - started, 3),
    }


# ---- all runs ------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What to measure."""

    activation: str
    seed: int
    variant: Variant


def plan(activations: list[str], bits: tuple[int, ...] | None, seeds: list[int]) -> list[Run]:
    """Round by round: all variants of a seed before the next seed."""
    runs = []
    for name in activations:
        activation = ACTIVATIONS[name]
        compared = variants(activation, bits or activation.bits)
        runs += [Run(name, seed, variant) for seed in seeds for variant in compared]
    return runs


def be_deterministic() -> None:
    """The same rows for the same seeds and machine, as far as torch can."""
    # Before CUDA starts, which reads it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # saves a kernel for every empty()


def warm_up(runs: list[Run], data: Data, settings: demo.Settings) -> None:
    """A few steps at every width, so that kernels are compiled before anything is timed.

    Where an operation has no deterministic form here, goes on without: better than no rows.
    """
    settings = dataclasses.replace(settings, steps=3)
    base = initial_model(settings)
    shapes = {(run.activation, run.variant.rules[0].bits): run for run in runs}
    try:
        for run in shapes.values():
            measure(base, run.variant, ACTIVATIONS[run.activation], data, settings)
    except RuntimeError as error:
        if "deterministic" not in str(error) or not torch.are_deterministic_algorithms_enabled():
            raise
        print(f"not deterministic: {str(error).splitlines()[0]}")
        torch.use_deterministic_algorithms(False)
        warm_up(runs, data, settings)


def rehearsed_steps(
    runs: list[Run], data: Data, settings: demo.Settings, seconds_left: float
) -> int:
    """As many steps as let all runs fit into the time, with a tenth of it to spare."""
    started = time.perf_counter()
    base = initial_model(settings)
    coded = next((run for run in runs if run.variant.book is not None), runs[0])
    seconds = []
    for steps in (20, 60):
        short = dataclasses.replace(settings, steps=steps)
        row = measure(base, coded.variant, ACTIVATIONS[coded.activation], data, short)
        seconds.append(row["seconds"])
    a_step = max(1e-4, (seconds[1] - seconds[0]) / 40)
    fixed = max(0.0, seconds[0] - 20 * a_step)
    seconds_left -= time.perf_counter() - started
    steps = int((0.9 * seconds_left / len(runs) - fixed) / a_step) // 10 * 10
    steps = min(max(steps, STEPS[0]), STEPS[1])
    print(f"{1000 * a_step:.1f} ms a step, {fixed:.2f} s a run besides: {steps} steps a run")
    return steps


def run_all(options: argparse.Namespace) -> None:
    """Measures what fits into the time and appends a row for every rule."""
    started = time.perf_counter()
    be_deterministic()
    kind = torch.device(options.device).type
    chosen = {name: getattr(options, name) for name in SIZES[kind]}
    sizes = {**SIZES[kind], **{name: value for name, value in chosen.items() if value is not None}}
    settings = demo.make_settings(options.device, steps=options.steps or STEPS[0], **sizes)
    text = demo.load_text(options.text)
    demo.check_length(text, settings)
    data = load(text, settings, options.validation_windows or VALIDATION_WINDOWS[kind])
    runs = plan(options.activations, tuple(options.bits or ()) or None, options.seeds)
    warm_up(runs, data, settings)
    ready = time.perf_counter() - started
    print(f"{len(runs)} runs, {len(text.training) / 1e6:.1f} MB of text, ready after {ready:.1f} s")
    if options.steps is None:
        steps = rehearsed_steps(runs, data, settings, options.seconds - ready)
        settings = dataclasses.replace(settings, steps=steps)

    model = {name: getattr(settings, name) for name in ("steps", *sizes)}
    model["parameters"] = sum(p.numel() for p in initial_model(settings).parameters())
    model["validation_bytes"] = sum(y.numel() for _, y in data.validation)
    model["autocast"] = settings.autocast
    model["deterministic"] = torch.are_deterministic_algorithms_enabled()
    machine = rows.settings(kind, options.commit)

    longest = 0.0
    for number, run in enumerate(runs):
        if time.perf_counter() - started + longest > options.seconds:
            print(f"out of time after {number} of {len(runs)} runs")
            break
        settings = dataclasses.replace(settings, seed=run.seed)
        if number == 0 or runs[number - 1].seed != run.seed:
            base = initial_model(settings)
        row = measure(base, run.variant, ACTIVATIONS[run.activation], data, settings)
        longest = max(longest, row["seconds"])
        names = [rule.rule for rule in run.variant.rules]
        for rule in run.variant.rules:
            case = {"case": "codebook_choice", "activation": run.activation, "seed": run.seed}
            case |= dataclasses.asdict(rule)
            case |= {"same_run": names} if len(names) > 1 else {}
            rows.append(options.out, {**case, **row, **model, **machine})
        bits = run.variant.rules[0].bits
        print(
            f"{run.activation} seed {run.seed} {'' if bits is None else f'{bits}-bit '}"
            f"{' = '.join(names)}: validation {row['validation_loss']:.4f}, gradient error "
            f"{row['gradient_error_end']:.4f}, {row['seconds']:.1f} s",
            flush=True,
        )


# ---- the table -----------------------------------------------------------------------------------


def print_summary(found: list[dict[str, Any]]) -> None:
    """A table for every activation and size of model and machine."""
    names = ("activation", "device", "steps", "layers", "width", "heads", "context", "batch")
    setups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found:
        if row["case"] == "codebook_choice":
            setups.setdefault(tuple(row[name] for name in names), []).append(row)
    for setup, group in setups.items():
        print("\n" + ", ".join(f"{n} {v}" for n, v in zip(names, setup, strict=True)))
        print_table(group)


def print_table(group: list[dict[str, Any]]) -> None:
    """Losses minus exact's of the same seed, in thousandths of a nat, best first within a width."""
    latest = {(row["bits"], row["rule"], row["seed"]): row for row in group}
    exact = {seed: row for (_, rule, seed), row in latest.items() if rule == "exact"}
    by_rule: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for (bits, rule, seed), row in latest.items():
        if rule != "exact" and seed in exact:
            by_rule.setdefault((bits or 0, rule), []).append(row)

    def above_exact(of_rule: list[dict[str, Any]], loss: str) -> list[float]:
        return [1000 * (row[loss] - exact[row["seed"]][loss]) for row in of_rule]

    def mean(of_rule: list[dict[str, Any]], name: str) -> float:
        return statistics.fmean(row[name] for row in of_rule)

    losses = ", ".join(f"{seed}: {row['validation_loss']:.4f}" for seed, row in exact.items())
    print(f"exact's validation loss by seed: {losses}")
    print("loss - exact's in 1e-3 nats a byte, mean and standard deviation over seeds")
    print(
        f"{'bits':>4} {'rule':20} {'seeds':>5} {'validation':>17} {'training':>9}"
        f" {'gradient error':>18} {'1 - cosine':>10}"
    )
    differences = {key: above_exact(of, "validation_loss") for key, of in by_rule.items()}
    for bits, rule in sorted(
        by_rule, key=lambda key: (key[0], statistics.fmean(differences[key]), key[1])
    ):
        of_rule, difference = by_rule[bits, rule], differences[bits, rule]
        training = statistics.fmean(above_exact(of_rule, "training_loss"))
        print(
            f"{bits or '':>4} {rule:20} {len(of_rule):5}"
            f" {statistics.fmean(difference):+9.2f} ± {spread(difference)} {training:+9.2f}"
            f" {mean(of_rule, 'gradient_error_init'):8.4f} ->"
            f" {mean(of_rule, 'gradient_error_end'):6.4f}"
            f" {1 - mean(of_rule, 'gradient_cosine_end'):10.6f}"
        )

    # Of seeds for which every rule at every width was run, lest a hard seed counts for some only.
    coded = [key for key in by_rule if key[0]]
    widths, names = {bits for bits, _ in coded}, {rule for _, rule in coded}
    seeds = set(exact).intersection(*({row["seed"] for row in by_rule[key]} for key in coded))
    if not seeds or len(coded) < len(widths) * len(names):
        return
    print(f"mean over all widths, of complete rounds (seeds {', '.join(map(str, sorted(seeds)))})")
    by_seed: dict[str, list[float]] = {}
    for rule in names:
        of_rule = [row for key in coded if key[1] == rule for row in by_rule[key]]
        by_seed[rule] = [
            statistics.fmean(
                above_exact([row for row in of_rule if row["seed"] == seed], "validation_loss")
            )
            for seed in sorted(seeds)
        ]
    for rule, values in sorted(by_seed.items(), key=lambda item: (statistics.fmean(item[1]), item)):
        print(f"     {rule:20} {len(values):5} {statistics.fmean(values):+9.2f} ± {spread(values)}")


def spread(values: list[float]) -> str:
    """The standard deviation, if there is one."""
    return f"{statistics.stdev(values):5.2f}" if len(values) > 1 else "    -"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=rows.RESULTS / "codebook_choice.jsonl")
    parser.add_argument("--summary", type=pathlib.Path, help="print the table of these rows only")
    parser.add_argument(
        "--seconds", type=float, default=200, help="start no run that would end later"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="where git cannot tell")
    parser.add_argument("--text", type=pathlib.Path, help="folder of Python files to train on")
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=["gelu"])
    parser.add_argument("--bits", type=int, nargs="+", help="default: the activation's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: as many as fit into the time")
    for name in SIZES["cpu"]:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--validation-windows", type=int)
    options = parser.parse_args()
    if options.summary is None:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            run_all(options)
    print_summary(rows.read(options.summary or options.out))


if __name__ == "__main__":
    main()
