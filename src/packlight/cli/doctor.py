"""What `packlight doctor` does: one operator of each kind, tried on the machine that is here.

Each is compared with torch's own function, and on a GPU its kernel with its reference, the plain
PyTorch that defines what is true. What is said is one block of text for an issue.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packlight
from packlight import _torch, env, fewbit, groupquant, head, inverted, rotary, sketch
from packlight._library import kernels_available, use_reference
from packlight._torch.capabilities import TESTED_TORCH, TESTED_TRITON
from packlight.errors import InputError

# Of the norm of a gradient: codes may fall to the other side of an edge where a kernel and the
# reference round differently, and the reference computes in the dtype of its tensors.
_SAME = 0.02
_ROUNDS = 30  # of launches, whose median counts,
_SECONDS = 0.3  # or as many as end in this time, on a machine that is slow or busy

Function = Callable[..., Any]


@dataclass(frozen=True)
class Kind:
    """An operator, torch's own, shapes of its tensors, and how far gradients may be from torch's.

    The limit is of the norm of all gradients, some three times what such packs give.
    """

    name: str
    ours: Function
    torchs: Function
    shapes: tuple[tuple[int, ...], ...]
    limit: float


@dataclass(frozen=True)
class Outcome:
    """How one kind fared.

    Attributes:
        name: of the kind.
        reference: |g - g'| / |g'| of the kernel's gradients beside the reference's; None where no
            kernel runs.
        torchs: the same beside the gradients of torch's function.
        limit: what `torchs` may be.
        launch_us: microseconds that a forward and a backward pass on small tensors take.
        torch_us: the same of torch's function.
        seconds: of the whole check; a kernel that was never used before is compiled in them.
        failure: what was wrong, or the error that was raised; None where all is well.
    """

    name: str
    reference: float | None = None
    torchs: float | None = None
    limit: float = 0.0
    launch_us: float | None = None
    torch_us: float | None = None
    seconds: float = 0.0
    failure: str | None = None


def doctor(arguments: argparse.Namespace) -> int:
    """Prints what was found, a line a check as it is done; 1 if anything is wrong, else 0."""
    device = _device(arguments.device)
    attempts = {kind.name: partial(_tried, kind, device) for kind in kinds()} | _models(device)
    outcomes: list[Outcome] = []
    lines = _lines((_outcome(*attempt) for attempt in attempts.items()), outcomes, device)
    if arguments.json:
        for _ in lines:
            pass
        answers = [asdict(outcome) for outcome in outcomes]
        data = {"machine": env.collect(), "checks": answers, "without": list(unsupported(device))}
        print(json.dumps(data, indent=1))
    else:
        for line in lines:
            print(line, flush=True)
    return int(any(outcome.failure is not None for outcome in outcomes))


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise InputError(f"--device {name} cannot be used here: {error}") from error
    return torch.device(name)


# ---- what is tried -------------------------------------------------------------------------------


def kinds() -> list[Kind]:
    """One operator of each kind of kernel."""
    rows, images, heads = (64, 512), (4, 32, 16, 16), (2, 4, 128, 64)
    rows_and_weights, images_and_weights = (rows, (512,), (512,)), (images, (32,), (32,))
    linear = rows, (256, 512)

    def packed_linear(**settings: Any) -> tuple[Function, Function, tuple[Any, ...], float]:
        return partial(groupquant.linear, **settings), F.linear, linear, 0.4

    return [
        Kind("few-bit GELU", fewbit.gelu, F.gelu, (rows,), 0.3),
        Kind("few-bit ReLU", fewbit.relu, F.relu, (rows,), 1e-2),
        Kind("dropout", partial(fewbit.dropout, p=0.25), _masked, (rows,), 1e-2),
        Kind("max pooling", partial(fewbit.max_pool2d, kernel_size=2), _max_pool, (images,), 1e-2),
        Kind("inverted GELU", inverted.gelu, F.gelu, (rows,), 5e-2),
        Kind("inverted LayerNorm", _norm(inverted), _norm(F), rows_and_weights, 5e-2),
        Kind("packed Linear", *packed_linear()),
        Kind("  rotated", *packed_linear(code="rotated")),
        Kind("  scaled", *packed_linear(code="scaled")),
        Kind("  offset", *packed_linear(rounding="offset")),
        Kind("packed GELU", groupquant.gelu, F.gelu, (rows,), 0.4),
        Kind("packed SwiGLU", groupquant.swiglu, _swiglu, (rows, rows), 0.5),
        Kind("packed LayerNorm", _norm(groupquant), _norm(F), rows_and_weights, 0.4),
        Kind("packed RMSNorm", _rms_norm(groupquant), _rms_norm(F), rows_and_weights[:2], 0.4),
        Kind("packed attention", _attention(groupquant), _attention(F), (heads,) * 3, 5e-2),
        Kind("packed convolution", groupquant.conv2d, F.conv2d, (images, (16, 32, 3, 3)), 0.4),
        Kind("packed BatchNorm", _batch_norm(groupquant), _batch_norm(F), images_and_weights, 0.2),
        Kind("fixed point", _fixed_point, _batch_norm_relu, images_and_weights, 0.2),
        Kind("sketched Linear", partial(sketch.linear, kind="srht"), F.linear, linear, 6.0),
        Kind("loss of a head", _head_loss, _plain_loss, (rows, (1000, 512)), 5e-2),
        Kind(
            "rotary embedding", _turned_by(rotary.rotate), _turned_by(_turned), (heads,) * 2, 2e-2
        ),
    ]


def _masked(x: Tensor) -> Tensor:
    """The factors of a dropout by the same seed, times x."""
    return x * (fewbit.dropout(x.detach(), 0.25) / x.detach())


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


def _norm(functions: Any) -> Function:
    return lambda x, weight, bias: functions.layer_norm(x, x.shape[-1:], weight, bias)


def _rms_norm(functions: Any) -> Function:
    return lambda x, weight: functions.rms_norm(x, x.shape[-1:], weight)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _attention(functions: Any) -> Function:
    return partial(functions.scaled_dot_product_attention, is_causal=True)


def _batch_norm(functions: Any) -> Function:
    return lambda x, weight, bias: functions.batch_norm(x, None, None, weight, bias, training=True)


def _batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True))


def _fixed_point(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return groupquant.relu(groupquant.fixed_point.batch_norm(x, None, None, weight, bias, True))


def _targets(x: Tensor, classes: int) -> Tensor:
    return torch.arange(len(x), device=x.device) * 7 % classes


def _head_loss(x: Tensor, weight: Tensor) -> Tensor:
    return head.linear_cross_entropy(x, weight, _targets(x, len(weight)))


def _plain_loss(x: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), _targets(x, len(weight)))


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    halves = ((x, *x.chunk(2, -1)) for x in (q, k))
    return tuple(x * cos + torch.cat((-second, first), -1) * sin for x, first, second in halves)


def _turned_by(function: Function) -> Function:
    def turned(q: Tensor, k: Tensor) -> Any:
        length, size = q.shape[-2:]
        rates = 1 / torch.arange(1, 1 + size // 2, device=q.device)
        angles = torch.outer(torch.arange(length, device=q.device), rates).repeat(1, 2)[None]
        return function(q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype))

    return turned


# ---- how it is tried -----------------------------------------------------------------------------


def _outcome(name: str, attempt: Callable[[], Outcome]) -> Outcome:
    """What came of an attempt, an error among it: the other kinds are tried all the same."""
    start = time.perf_counter()
    try:
        found = attempt()
    except Exception as error:  # noqa: BLE001  whatever a machine may raise is what is asked for
        reason = str(error).partition("\n")[0][:200]
        found = Outcome(name, failure=f"{type(error).__name__}: {reason}")
    return replace(found, seconds=time.perf_counter() - start)


def _tried(kind: Kind, device: torch.device) -> Outcome:
    tensors = _tensors(kind, device)
    found = _gradients(kind.ours, tensors)
    failures = []
    reference = None
    if runs_kernels(device):
        with use_reference():
            reference = _distance(found, _gradients(kind.ours, tensors))
        if not reference <= _SAME:
            failures.append(f"the kernel's gradients are {reference:.2g} from the reference's")
    torchs = _distance(found, _gradients(kind.torchs, tensors))
    if not torchs <= kind.limit:
        failures.append(f"gradients are {torchs:.2g} from torch's, more than {kind.limit:g}")
    return Outcome(
        kind.name,
        reference,
        torchs,
        kind.limit,
        _launch_us(kind.ours, tensors, device),
        _launch_us(kind.torchs, tensors, device),
        failure="; ".join(failures) or None,
    )


def runs_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and kernels_available()


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _tensors(kind: Kind, device: torch.device) -> list[Tensor]:
    """Normal values in the dtype that people train in; the same ones on every machine."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator).to(device, _dtype(device)).requires_grad_()
        for shape in kind.shapes
    ]


def _gradients(function: Function, tensors: list[Tensor]) -> list[Tensor]:
    """Gradients of a weighted sum of what `function` returns, with seeds as they were before."""
    torch.manual_seed(0)
    packlight.manual_seed(0)
    for tensor in tensors:
        tensor.grad = None
    results = function(*tensors)
    loss = torch.zeros((), device=tensors[0].device)
    for result in results if isinstance(results, tuple) else (results,):
        weights = torch.linspace(-1, 1, result.numel(), device=result.device).view(result.shape)
        loss = loss + (result * weights).sum().float() if result.dim() else result.float()
    loss.backward()
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


def _distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """|g - g'| / |g'| over all gradients; infinite where they are not of the same tensors."""
    if [g.shape for g in ours] != [g.shape for g in theirs]:
        return float("inf")
    apart = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True)
    )
    size = sum(float(b.double().square().sum()) for b in theirs)
    return float((apart / size) ** 0.5)


def _launch_us(function: Function, tensors: list[Tensor], device: torch.device) -> float:
    """Median microseconds of the host for a forward and a backward pass."""
    times: list[float] = []
    while len(times) < _ROUNDS + 3 and sum(times) < _SECONDS:
        _synchronize(device)
        start = time.perf_counter()
        results = function(*tensors)
        first = results[0] if isinstance(results, tuple) else results
        first.backward(torch.ones_like(first))
        times.append(time.perf_counter() - start)
        for tensor in tensors:
            tensor.grad = None
    late = times[3:] or times[-1:]  # the first ones warm up
    return sorted(late)[len(late) // 2] * 1e6


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _models(device: torch.device) -> dict[str, Callable[[], Outcome]]:
    """A converted model, compiled and as a graph, beside itself launched."""
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    found: dict[str, Callable[[], Outcome]] = {
        "torch.compile": partial(_model_tried, "torch.compile", compiled, device)
    }
    if device.type == "cuda":
        found["CUDA graph"] = partial(_model_tried, "CUDA graph", packlight.graphed, device)
    return found


def _model_tried(name: str, prepare: Function, device: torch.device) -> Outcome:
    limit = 0.3  # compiled code rounds its packs by other seeds
    launched, other = (_model(device) for _ in range(2))
    apart = _distance(_of_model(other, prepare(other)), _of_model(launched, launched))
    far = f"gradients are {apart:.2g} from those of launched code"
    return Outcome(name, torchs=apart, limit=limit, failure=None if apart <= limit else far)


def _model(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    packlight.convert(model.to(device, _dtype(device)))
    return model


def _of_model(model: nn.Module, run: Function) -> list[Tensor]:
    weight = next(model.parameters())
    x = torch.linspace(-2, 2, 64 * 64, device=weight.device).view(64, 64).to(weight.dtype)
    packlight.manual_seed(0)
    run(x).float().square().mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


# ---- what is not there ---------------------------------------------------------------------------


def unsupported(device: torch.device) -> Iterator[str]:
    """What this machine does without, and what nobody has tried on such a machine."""
    yield from (f"{each.name}: no: {each.without}" for each in _torch.CAPABILITIES if not each)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _torch.warn_if_untested("torch", torch.__version__, TESTED_TORCH)
        if kernels_available():
            triton = env.collect()["packages"]["triton"]
            if triton != "not installed":
                _torch.warn_if_untested("triton", triton, TESTED_TRITON)
    yield from (str(warning.message) for warning in caught)
    if device.type != "cuda":
        yield "no CUDA device: operators run as plain PyTorch, several times slower than torch's"
        return
    if not kernels_available():
        yield "no Triton: operators run as plain PyTorch; pip install 'packlight[triton]'"
    if torch.version.hip:
        yield "ROCm: nothing of packlight was tried on it"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        yield "compute capability below 8.0: kernels do not compile, operators are plain PyTorch"
    elif torch.cuda.get_device_capability(device) != (9, 0):
        yield "measured on compute capability 9.0 alone: times on this card are not known"


# ---- what is said --------------------------------------------------------------------------------

_WIDTHS = (20, 16, 12, 8, 8, 12, 8)


def _lines(
    tried: Iterator[Outcome], outcomes: list[Outcome], device: torch.device
) -> Iterator[str]:
    """One block to copy into an issue; what `tried` gives goes into `outcomes`."""
    machine = env.collect()
    yield "```text"
    for name in ("packlight", "python", "platform", "torch", "torch built for", "GPUs", "kernels"):
        yield f"{name}: {machine[name]}"
    for name, version in machine["packages"].items():
        if version != "not installed":
            yield f"{name}: {version}"
    yield ""
    yield _row("", "from reference", "from torch", "limit", "us", "torch's us", "s")
    for outcome in tried:
        outcomes.append(outcome)
        limit = None if outcome.torchs is None else outcome.limit
        cells = (outcome.reference, outcome.torchs, limit, outcome.launch_us, outcome.torch_us)
        shown = zip(cells, (".1e", ".1e", "g", ".0f", ".0f"), strict=True)
        texts = ("" if x is None else format(x, form) for x, form in shown)
        yield _row(outcome.name, *texts, f"{outcome.seconds:.1f}")
        if outcome.failure is not None:
            yield f"FAILED: {outcome.name.strip()}: {outcome.failure}"
    yield (
        "from: relative errors of gradients, of the kernel from its reference (at most "
        f"{_SAME:g}), from torch's"
    )
    yield "us: of the host, for a forward and a backward pass on small tensors; s: of the check"
    yield ""
    yield from (f"note: {each}" for each in unsupported(device))
    yield f"{device}: " + _verdict(outcomes)
    yield "```"


def _row(name: str, *cells: str) -> str:
    places = zip((name.ljust(_WIDTHS[0]), *cells), _WIDTHS, strict=True)
    return "".join(f"{cell:>{width}}" for cell, width in places).rstrip()


def _verdict(outcomes: list[Outcome]) -> str:
    failed = [outcome.name.strip() for outcome in outcomes if outcome.failure is not None]
    if not failed:
        return f"all {len(outcomes)} checks passed"
    return f"{len(failed)} of {len(outcomes)} checks failed: {', '.join(failed)}"
