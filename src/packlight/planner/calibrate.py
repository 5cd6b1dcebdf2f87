"""`calibrate`: how far the operators of a device are from the figures of its data sheet.

Small networks of the kinds that people train take a step each, plain and converted, under a mode of
the dispatcher that puts an event of CUDA before and after each operator. The device is kept busy
first, so that the host is ahead and what lies between two events is the operator alone. Then the
same steps run without events: under load clocks are lower, and what operators take is scaled to
what the steps take. Attention is measured by itself, at a short length and at a long one, which
tell traffic from arithmetic. Of the host one number is measured: how slow its Python is.
"""

import contextlib
import importlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight._torch import share_storage
from packlight._torch.attributes import tree_leaves
from packlight._torch.modes import DispatchMode
from packlight.convert import DEFAULT_METHODS, convert
from packlight.groupquant.method import GroupQuant
from packlight.planner.adapted import Settings, with_lora
from packlight.planner.costs import TRAFFIC, is_hooked, name_of, parts_s
from packlight.planner.devices import Device, Rates, shipped_rates
from packlight.recompute.method import Checkpoint

_CHANGES = ("plain", "default", "recomputed")
_IN_TF32 = "default in TF32"
_STEPS = 3  # that are timed
_RANK = 16  # of adapters
_ATTENTION = "scaled_dot_product_attention"
_ADAPTED = ("qkv", "out", "gate_proj", "up_proj", "down_proj")


class _Norm(nn.Module):
    """A root-mean-square norm as models write it out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        y: Tensor = self.weight * wide.to(x.dtype)
        return y


class _Gated(nn.Module):
    """A gated MLP in the code of Llama's, by which packlight knows it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.down_proj = nn.Linear(4 * width, width)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Attention and an MLP, gated or not, with residual sums. [B, T, width]"""

    def __init__(self, width: int, heads: int, gated: bool) -> None:
        super().__init__()
        self.heads, self.gated = heads, gated
        norm = _Norm if gated else nn.LayerNorm
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = (
            _Gated(width)
            if gated
            else nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        )
        self.drop = nn.Dropout(0.0 if gated else 0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))
        out: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return out


class _Language(nn.Module):
    def __init__(self, width: int, heads: int, vocabulary: int, gated: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, gated) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(channels // 4, channels // 4, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(channels // 4, channels, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels // 4), nn.BatchNorm2d(channels // 4)
        self.bn3, self.act = nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        out: Tensor = self.act(x + self.bn3(self.conv3(y)))
        return out


class _Images(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels // 4, 7, stride=2, padding=3)
        self.wide = nn.Conv2d(channels // 4, channels, 1)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.blocks = nn.Sequential(_Residual(channels), _Residual(channels))
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.wide(self.pool(self.stem(x)))).mean((2, 3))
        return F.cross_entropy(self.fc(y), torch.zeros(len(x), dtype=torch.int64, device=x.device))


class _Case(NamedTuple):
    model: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    autocast: bool
    changes: tuple[str, ...] = _CHANGES
    has_blocks: bool = True  # that can be checkpointed


def _channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _cases(tiny: bool) -> Iterator[_Case]:
    width, heads, batch, length, words = (64, 4, 2, 16, 256) if tiny else (2048, 16, 8, 2048, 32000)

    def tokens() -> Tensor:
        return torch.randint(0, words, (batch, length))

    def images() -> Tensor:
        shape = (2, 3, 32, 32) if tiny else (128, 3, 224, 224)
        return torch.randn(shape).to(memory_format=torch.channels_last)

    def of(dtype: torch.dtype, gated: bool) -> Callable[[], nn.Module]:
        return lambda: _Language(width, heads, words, gated).to(dtype)

    yield _Case(of(torch.bfloat16, True), tokens, False)
    yield _Case(of(torch.float32, False), tokens, True)
    adapted = of(torch.bfloat16, True)
    yield _Case(lambda: _adapted(adapted()), tokens, False, ("plain", "default", _IN_TF32))
    yield _Case(
        lambda: _channels_last(_Images(64 if tiny else 256)), images, True, has_blocks=False
    )


def _adapted(model: nn.Module) -> nn.Module:
    """With adapters on the Linears of blocks: PEFT's, where it is installed."""
    device = next(model.parameters()).device.type
    return with_lora(model, Settings(_RANK, 2 * _RANK, 0.0, _ADAPTED), device)


def _changed(model: nn.Module, case: str) -> nn.Module:
    if case in ("default", _IN_TF32):
        convert(model, functional=True, head="head", strict=False)
    elif case == "recomputed":
        convert(model, (Checkpoint(GroupQuant(8)), *DEFAULT_METHODS), strict=False)
    elif case == "checkpointed":
        convert(model, Checkpoint(keep=None), strict=False)
    return model


class _Timed(DispatchMode):  # type: ignore[misc]
    """`parts_s` of each operator, and when it began and ended."""

    def __init__(self, device: Device, clock: Callable[[], Any]) -> None:
        super().__init__()
        self.device, self.clock = device, clock
        self.rows: list[tuple[str, tuple[float, float], Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        begin = self.clock()
        result = func(*args, **(kwargs or {}))
        end = self.clock()
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if not func._schema.is_mutable and _are_views(made, given):
            return result
        tensors = [*given, *made]
        parts = parts_s(self.device, func, args, result, tensors)
        self.rows.append((name_of(func, args), parts, begin, end))
        return result


def _are_views(made: list[Tensor], given: list[Tensor]) -> bool:
    """Whether nothing was computed: all that was made lies in what was given."""
    return all(any(share_storage(one, other) for other in given) for one in made)


def calibrate(device: Device, tiny: bool = False) -> Rates:
    """Measures the rates of the device that is here; `device` has the figures of its data sheet.

    `tiny` takes small networks, to try it on the CPU, whose times are no rates.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    for package in ("transformers", "peft"):  # whose layers packlight knows where they are loaded
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    workspace, copies, kernel_s = _workspace(kind), _copies(kind, device), _kernel_s(kind)
    nominal, taken = defaultdict[str, float](float), defaultdict[str, float](float)
    for case in _cases(tiny):
        for change in case.changes:
            with _precision("high" if change == _IN_TF32 else "highest"):
                for name, seconds, took in _operators(device, kind, case, change, kernel_s):
                    nominal[name] += seconds
                    taken[name] += took
    own = {name for name in nominal if name.startswith("packlight::")}
    # What moves next to nothing says nothing of a rate.
    factors = {
        name: round(taken[name] / nominal[name], 3)
        for name in sorted(nominal)
        if nominal[name] > (0 if tiny else 2e-5)
    }
    others, others_packlight = (
        _share(taken, nominal, names) for names in (set(factors) - own, own & set(factors))
    )
    return Rates(
        factors=factors | _attention(device, kind, tiny),
        others=others,
        others_packlight=others_packlight,
        copies=copies,
        kernel_us=round(1e6 * kernel_s, 2),
        workspace=workspace,
        source=f"measured on {_called(kind)}, torch {torch.__version__}",
        **_host(kind, shipped_rates()),
    )


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    """Of products in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _operators(
    device: Device, kind: str, case: _Case, change: str, kernel_s: float
) -> Iterator[tuple[str, float, float]]:
    """Nominal seconds of the operators of a step, and seconds that they take in it."""
    torch.manual_seed(0)
    with torch.device(kind):
        model, batch = _changed(case.model(), change), case.batch()
    optimizer = _optimizer(model)

    def step() -> None:
        _step(model, batch, optimizer, case.autocast)

    for _ in range(2):
        step()
    operators = list(_timed(device, batch.is_cuda, step))
    alone = sum(took for _, _, took in operators)
    whole = _whole_s(step) - kernel_s * len(operators) if batch.is_cuda else alone
    for name, parts, took in operators:
        yield name, max(parts), took * max(whole, 0.0) / alone


def _attention(device: Device, kind: str, tiny: bool) -> dict[str, float]:
    """Factors of arithmetic by heads of 128 and of 64, and of traffic by both, each way.

    t = a (arithmetic) + b (traffic), solved for a and b at heads of 128 of two lengths.
    """
    short, long = (16, 64) if tiny else (512, 8192)
    rows = [
        _attention_at(device, kind, width, length, 2 * long)
        for width, length in ((128, short), (128, long), (64, long))
    ]
    factors = {}
    for (name, (m, f), t), (_, (n, g), u), (narrow, (k, h), v) in zip(*rows, strict=True):
        by_traffic = min(max((t * g - u * f) / (m * g - n * f), 0.0), u / n)
        factors[name + TRAFFIC] = round(by_traffic, 3)
        factors[name] = round((u - by_traffic * n) / g, 3)
        factors[narrow] = round(max(v - by_traffic * k, 0.0) / h, 3)
    return factors


def _attention_at(
    device: Device, kind: str, width: int, length: int, tokens: int
) -> list[tuple[str, tuple[float, float], float]]:
    """As `_timed`, the forward and the backward pass of attention."""
    shape = (max(tokens // length, 1), 16, length, width)
    query, key, value = (
        torch.randn(shape, device=kind, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )

    def step() -> None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, (query, key, value), torch.ones_like(out))

    step()
    return [row for row in _timed(device, kind == "cuda", step) if _ATTENTION in row[0]]


def _share(taken: dict[str, float], nominal: dict[str, float], names: set[str]) -> float:
    """The median factor of operators."""
    return round(statistics.median([taken[name] / nominal[name] for name in names]), 3)


def _called(kind: str) -> str:
    return torch.cuda.get_device_name() if kind == "cuda" else "the CPU"


def _step(model: nn.Module, batch: Tensor, optimizer: Any, autocast: bool) -> None:
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
        loss = model(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _optimizer(model: nn.Module) -> Any:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, fused=True)


def _now() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _kept_busy(products: int) -> None:
    """The host gets ahead while the device multiplies."""
    torch.cuda.synchronize()
    big = torch.randn(16384, 16384, device="cuda", dtype=torch.bfloat16)
    for _ in range(products):
        big @ big


def _kernel_s(kind: str, kernels: int = 500) -> float:
    """Seconds from one kernel to the next."""
    x = torch.zeros(1024, device=kind)
    if kind == "cpu":
        begin = time.perf_counter()
        for _ in range(kernels):
            x.add_(1)
        return (time.perf_counter() - begin) / kernels
    x.add_(1)
    _kept_busy(5)
    first = _now()
    for _ in range(kernels):
        x.add_(1)
    last = _now()
    torch.cuda.synchronize()
    return float(1e-3 * first.elapsed_time(last) / kernels)


def _whole_s(step: Callable[[], None], steps: int = 2 * _STEPS) -> float:
    """Seconds of a step among others, of the device."""
    _kept_busy(10)
    first = _now()
    for _ in range(steps):
        step()
    last = _now()
    torch.cuda.synchronize()
    return float(1e-3 * first.elapsed_time(last) / steps)


def _timed(
    device: Device, is_cuda: bool, step: Callable[[], None]
) -> Iterator[tuple[str, tuple[float, float], float]]:
    """Operators of a step, `parts_s` of each and seconds that it takes."""
    if not is_cuda:
        timed = _Timed(device, time.perf_counter)
        with timed:
            step()
        for name, parts, begin, end in timed.rows:
            yield name, parts, end - begin
        return

    timed = _Timed(device, _now)
    _kept_busy(20 * _STEPS)
    with timed, torch.autograd.set_multithreading_enabled(False):
        for _ in range(_STEPS):
            step()
    torch.cuda.synchronize()
    # Between two events that follow each other there is time too.
    ends = [(a, b) for (_, _, _, a), (_, _, b, _) in zip(timed.rows, timed.rows[1:], strict=False)]
    between = 1e-3 * statistics.median(a.elapsed_time(b) for a, b in ends)
    # Of the same operator in several steps the shortest: some wait for a library that is loaded.
    size = len(timed.rows) // _STEPS
    steps = [timed.rows[place * size : (place + 1) * size] for place in range(_STEPS)]
    for alike in zip(*steps, strict=True):
        took = min(begin.elapsed_time(end) for _, _, begin, end in alike)
        yield alike[0][0], alike[0][1], max(1e-3 * took - between, 0.0)


def _workspace(kind: str) -> int:
    """Bytes that stay allocated once there were products, in the forward and the backward pass,
    whose threads have a handle of cuBLAS each.
    """
    if kind == "cpu":
        return 0
    before = torch.cuda.memory_allocated()
    x = torch.randn(512, 512, device=kind, dtype=torch.bfloat16, requires_grad=True)
    (x @ x).sum().backward()
    del x
    return torch.cuda.memory_allocated() - before


def _copies(kind: str, device: Device) -> float:
    """How many times as long copies to and from pinned memory take as the data sheet says."""
    size = 2**28 if kind == "cuda" else 2**16
    here = torch.empty(size, dtype=torch.uint8, device=kind)
    away = torch.empty(size, dtype=torch.uint8, pin_memory=kind == "cuda")
    times = []
    for _ in range(5):
        for one, other in ((here, away), (away, here)):
            begin = time.perf_counter()
            one.copy_(other)
            times.append(time.perf_counter() - begin)
    return round(statistics.median(times) * device.link / size, 3)


class _Counted(DispatchMode):  # type: ignore[misc]
    """How many operators compute something, and how many save something that hooks see."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.hooked = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if func._schema.is_mutable or not _are_views(made, given):
            self.operators += 1
            self.hooked += is_hooked()
        return result


def _host(kind: str, known: Rates) -> dict[str, float]:
    """What the host takes for operators, modules and hooks: as `known` says, times one number.

    The number is how many times as long networks take that are so small that the device waits, in
    the median. The four kinds of work are Python's, whose proportions a host does not change, and
    steps of a few networks tell them apart badly. Converted networks are left out: it is
    packlight's code for known models whose operators `known` speaks of.
    """
    shares = []
    for case in _cases(tiny=True):
        for change in ("plain", *(["checkpointed"] if case.has_blocks else [])):
            with torch.device(kind):
                model, batch = _changed(case.model(), change), case.batch()
            optimizer = _optimizer(model)
            calls = [0]

            def count(module: nn.Module, args: Any, calls: list[int] = calls) -> None:
                calls[0] += 1

            hooks = [module.register_forward_pre_hook(count) for module in model.modules()]
            counted = _Counted()
            with counted, torch.autograd.set_multithreading_enabled(False):
                _step(model, batch, optimizer, case.autocast)
            for hook in hooks:
                hook.remove()
            foretold = (
                counted.operators * known.host_us
                + calls[0] * known.module_us
                + counted.hooked * known.hooks_us
            )
            took = _host_us(lambda: _step(model, batch, optimizer, case.autocast), kind)  # noqa: B023
            shares.append(took / foretold)
    share = statistics.median(shares)
    names = ("host_us", "host_us_packlight", "module_us", "hooks_us")
    return {name: round(share * getattr(known, name), 2) for name in names}


def _host_us(function: Callable[[], Any], kind: str, steps: int = 10) -> float:
    times = []
    for _ in range(steps + 2):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
        if kind == "cuda":
            torch.cuda.synchronize()
    return 1e6 * statistics.median(times[2:])
