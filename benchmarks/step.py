"""One training step of whole models: what is kept, peak memory and time, beside plain PyTorch.

    python -m benchmarks.step --models roberta llama --out benchmarks/results/step.jsonl

Every choice runs in one process on one device, forward and backward, without an optimiser. `kept`
is what the allocator holds more after the forward pass than before it, the output taken off;
`step_ms` are medians by CUDA events of steps that Python launches, `graph_ms` of the same step
captured in a CUDA graph and replayed: what the GPU alone takes. Gradients are compared with those
of the eager model first: the median and the worst relative error over the weight matrices. The
models have random weights and no output head, whose logits would be the same in every row. Rows
that are in the file already are skipped.
"""

import argparse
import functools
import gc
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import rows
from benchmarks.kernels import interleaved
from packlight import fewbit, groupquant
from packlight.groupquant import GroupQuant

# ---- models ---------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with `heads` query heads and `groups` key and value heads."""

    def __init__(self, width: int, heads: int, groups: int, bias: bool, causal: bool, p: float):
        super().__init__()
        self.size, self.causal, self.p = width // heads, causal, p
        self.q = nn.Linear(width, width, bias)
        self.k = nn.Linear(width, groups * self.size, bias)
        self.v = nn.Linear(width, groups * self.size, bias)
        self.out = nn.Linear(width, width, bias)
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        gqa = k.shape[1] != q.shape[1]
        mixed = self.attend(q, k, v, dropout_p=self.p, is_causal=self.causal, enable_gqa=gqa)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class EncoderBlock(nn.Module):
    """A post-norm block of BERT and RoBERTa, with dropout."""

    def __init__(self, width: int, heads: int, hidden: int, p: float = 0.1):
        super().__init__()
        self.attention = Attention(width, heads, heads, True, False, p)
        self.drop1, self.norm1 = nn.Dropout(p), nn.LayerNorm(width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        self.drop2, self.norm2 = nn.Dropout(p), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.drop1(self.attention(x)))
        return self.norm2(x + self.drop2(self.fc2(self.act(self.fc1(x)))))


class SwiGLU(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class DecoderBlock(nn.Module):
    """A block of Llama, without rotary embeddings."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.attention = Attention(width, heads, groups, False, True, 0.0)
        self.gate, self.up = nn.Linear(width, hidden, False), nn.Linear(width, hidden, False)
        self.act, self.down = SwiGLU(), nn.Linear(hidden, width, False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        return x + self.down(self.act(self.gate(h), self.up(h)))


class Stack(nn.Module):
    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


MODELS: dict[str, dict[str, Any]] = {
    "roberta": {
        "make": lambda: Stack([EncoderBlock(768, 12, 3072) for _ in range(12)]),
        "shape": (128, 128, 768),
        "autocast": True,
    },
    "llama": {
        "make": lambda: Stack([DecoderBlock(2048, 32, 4, 5632) for _ in range(22)]),
        "shape": (4, 2048, 2048),
        "autocast": False,
    },
    "tiny": {
        "make": lambda: Stack([EncoderBlock(64, 4, 256), DecoderBlock(64, 4, 2, 128)]),
        "shape": (2, 64, 64),
        "autocast": True,
    },
}

# ---- choices --------------------------------------------------------------------------------

LIGHT = {
    nn.Linear: groupquant.Linear,
    nn.LayerNorm: groupquant.LayerNorm,
    nn.RMSNorm: groupquant.RMSNorm,
    nn.GELU: groupquant.GELU,
    SwiGLU: groupquant.SwiGLU,
}


def pack(model: nn.Module, bits: int, attention_bits: int | None = 8) -> None:
    """Every layer becomes its group-quantised twin, dropout a one-bit one."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = fewbit.Dropout
        elif type(module) in LIGHT:
            module.__class__ = LIGHT[type(module)]
            module.method = GroupQuant(bits)
        elif isinstance(module, Attention) and attention_bits:
            module.attend = functools.partial(
                groupquant.scaled_dot_product_attention, bits=attention_bits
            )


def checkpointed(model: nn.Module) -> None:
    model.checkpointed = True


CHOICES: dict[str, tuple[Callable[[nn.Module], None], bool]] = {
    "eager": (lambda model: None, False),
    "checkpoint": (checkpointed, False),
    "compile": (lambda model: None, True),
    "compile + checkpoint": (checkpointed, True),
    "packlight 8": (functools.partial(pack, bits=8), False),
    "packlight 4": (functools.partial(pack, bits=4), False),
    "packlight 2": (functools.partial(pack, bits=2, attention_bits=4), False),
    "packlight 4, compile": (functools.partial(pack, bits=4), True),
}

# ---- measuring ------------------------------------------------------------------------------


def build(name: str, choice: str, device: str) -> tuple[Callable[..., Tensor], nn.Module, Tensor]:
    case = MODELS[name]
    torch.manual_seed(0)
    model = case["make"]().to(device)
    x = torch.randn(case["shape"], device=device)
    if not case["autocast"]:
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    change, compiled = CHOICES[choice]
    change(model)
    torch._dynamo.reset()
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True)
    autocast = torch.autocast(device, torch.bfloat16, enabled=case["autocast"])

    def run(x: Tensor) -> Tensor:
        with autocast:
            return model(x)

    return run, model, x


def gradients(run: Callable[..., Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """Weight gradients of a small batch, for a loss with random weights."""
    torch.manual_seed(1)
    few = x[:2]
    weights = torch.randn_like(few)  # before anything else draws
    loss = (run(few).float() * weights).mean()
    return [g.float() for g in torch.autograd.grad(loss, list(model.parameters()))]


def without_dropout(model: nn.Module) -> list[tuple[Any, str, float]]:
    """Turns dropout off, whose masks differ between implementations; returns what it was."""
    before = []
    for module in model.modules():
        if isinstance(module, nn.Dropout | Attention):
            before.append((module, "p", module.p))
            module.p = 0.0
    return before


def measure(name: str, choice: str, device: str, exact: list[Tensor] | None) -> dict[str, Any]:
    run, model, x = build(name, choice, device)
    row: dict[str, Any] = {}
    before = without_dropout(model)
    grads = gradients(run, model, x)
    if exact is not None:
        errors = [
            ((a - b).norm() / b.norm()).item()
            for a, b in zip(grads, exact, strict=True)
            if b.dim() > 1
        ]
        row |= {"error_median": statistics.median(errors), "error_worst": max(errors)}
    else:
        row["grads"] = grads
    for module, key, value in before:
        setattr(module, key, value)
    del grads
    if device == "cuda":
        row |= timed(run, model, x)
    return row


def timed(run: Callable[..., Tensor], model: nn.Module, x: Tensor) -> dict[str, Any]:
    dy = torch.randn_like(run(x))
    for _ in range(3):
        run(x).backward(dy)
        model.zero_grad(set_to_none=False)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    y = run(x)
    kept = torch.cuda.memory_allocated() - start - y.numel() * y.element_size()
    y.backward(dy)
    del y
    peak = torch.cuda.max_memory_allocated() - start
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(x).backward(dy)
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    milliseconds = statistics.median(begin.elapsed_time(end) for begin, end in times)
    row = {"kept_bytes": kept, "peak_bytes": peak, "step_ms": milliseconds}
    return row | graphed(lambda: run(x).backward(dy))


def graphed(step: Callable[[], None]) -> dict[str, Any]:
    """Time of the step as a CUDA graph, or why it cannot be captured."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        return {"graph_failed": str(error)[:200]}
    times = interleaved({"graph": graph.replay}, 7)
    return {"graph_ms": times["graph"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=rows.RESULTS / "step.jsonl")
    parser.add_argument("--models", nargs="+", default=["roberta", "llama"], choices=MODELS)
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=CHOICES)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--commit", help="where git cannot tell")
    options = parser.parse_args()
    settings = rows.settings(options.device, options.commit)
    mark = ("device", "commit")
    done = {
        (row["model"], row["choice"])
        for row in rows.read(options.out)
        if all(row.get(key) == settings[key] for key in mark) and "failed" not in row
    }
    for name in options.models:
        exact, eager = None, None
        for choice in ["eager", *(c for c in options.choices if c != "eager")]:
            if (name, choice) in done and choice != "eager":
                continue
            try:
                row = measure(name, choice, options.device, exact)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                reason = str(error).partition("\n")[0][:200]
                row = {"failed": f"{type(error).__name__}: {reason}"}
            exact = row.pop("grads", exact)
            eager = eager or row
            rows.append(options.out, {"model": name, "choice": choice, **row, **settings})
            print(line(name, choice, row, eager), flush=True)
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()


def line(name: str, choice: str, row: dict[str, Any], eager: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{name:8s} {choice:22s} {row['failed']}"
    text = f"{name:8s} {choice:22s}"
    if "step_ms" in row:
        text += (
            f" kept {row['kept_bytes'] / 2**30:6.2f} GiB"
            f" ({eager['kept_bytes'] / row['kept_bytes']:5.2f}x less)"
            f" peak {row['peak_bytes'] / 2**30:6.2f} GiB step {row['step_ms']:7.1f} ms"
            f" ({eager['step_ms'] / row['step_ms']:4.2f}x)"
        )
        if "graph_ms" in row and "graph_ms" in eager:
            ratio = eager["graph_ms"] / row["graph_ms"]
            text += f" as a graph {row['graph_ms']:7.1f} ms ({ratio:4.2f}x)"
    if "error_median" in row:
        text += f" gradient error {row['error_median']:.3f}, worst {row['error_worst']:.3f}"
    return text


if __name__ == "__main__":
    main()
