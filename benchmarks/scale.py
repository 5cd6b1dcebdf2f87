"""The rows of docs/scale.md: bytes and communication of a rank, for models on 8 to 1024 GPUs.

    python -m benchmarks.scale                    # all rows, anew
    python -m benchmarks.scale --only "8B, 8"     # those whose title begins so
    python -m benchmarks.scale --measured         # two H200, beside rows that were measured there

Nothing runs on a GPU: steps are walked on tensors without values, as `packlight fit` does. A run
has weights of bfloat16 while it computes, and shards, gradients and AdamW of float32. Its GPUs are
H100, of which NVLink takes 450 GB/s out of a GPU and the network 50 GB/s (400 Gb/s).
"""

import argparse
import functools
import json
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import rows
from packlight import Parallel
from packlight.planner.cutting import group_for
from packlight.planner.devices import device_of
from packlight.planner.fit import choices
from packlight.planner.study import Study
from packlight.planner.timeline import Timeline

OUT = rows.RESULTS / "scale.jsonl"
NVLINK, NETWORK = 450e9, 50e9  # bytes a second out of a GPU
BY_NVLINK = ("tensor",)  # what stays in a host of eight


class Run(NamedTuple):
    """`batch` rows of `length` tokens on each data-parallel rank."""

    title: str
    kind: str
    shape: dict[str, Any]
    batch: int
    length: int
    parallel: Parallel

    @property
    def tokens(self) -> int:
        """Of a step, by rank."""
        ranks = self.parallel.context * self.parallel.tensor * self.parallel.pipeline
        return self.batch * self.length // ranks

    def model(self) -> nn.Module:
        import transformers

        config = getattr(transformers, f"{self.kind}Config")(use_cache=False, **self.shape)
        with torch.device("meta"):
            made = getattr(transformers, f"{self.kind}ForCausalLM")(config)
        return made.to(torch.bfloat16)


def _llama(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 2**18,
    }  # fmt: skip


_8B = _llama(4096, 14336, 32, 32)
_70B = _llama(8192, 28672, 80, 64)
_235B = {
    "hidden_size": 4096, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "vocab_size": 151936, "max_position_embeddings": 2**15,
    "mlp_only_layers": [],
}  # fmt: skip
_parallel = functools.partial(Parallel, shard_dtype=torch.float32)
RUNS = (
    Run("8B, 8 GPUs", "Llama", _8B, 2, 8192, _parallel(shard=8)),
    Run("8B, 8 GPUs, a long sequence", "Llama", _8B, 1, 2**18, _parallel(context=8)),
    Run("8B, 128 GPUs", "Llama", _8B, 2, 8192, _parallel(shard=128)),
    Run("8B, 1024 GPUs", "Llama", _8B, 2, 8192, _parallel(shard=64, replicate=16)),
    Run("70B, 64 GPUs", "Llama", _70B, 1, 8192, _parallel(shard=64)),
    Run("70B, 256 GPUs", "Llama", _70B, 16, 8192, _parallel(shard=32, tensor=8)),
    Run("70B, 1024 GPUs", "Llama", _70B, 32, 8192, _parallel(shard=16, tensor=8, pipeline=8)),
    Run("235B mixture, 64 GPUs", "Qwen3Moe", _235B, 1, 8192, _parallel(shard=64, expert=32)),
    Run("235B mixture, 256 GPUs", "Qwen3Moe", _235B, 1, 8192, _parallel(shard=256, expert=64)),
    Run("235B mixture, 1024 GPUs", "Qwen3Moe", _235B, 1, 8192, _parallel(shard=1024, expert=64)),
)


def measure(run: Run, only: str = "") -> dict[str, Any]:
    """A row: what each choice, or one, takes of a rank, at the stage where that is most."""
    ids = torch.empty(run.batch, run.length, dtype=torch.int64, device="meta")
    optimizer = functools.partial(torch.optim.AdamW, fused=True)
    given = {"input_ids": ids, "labels": ids}
    found: dict[str, Any] = {}
    with group_for(run.parallel):
        model = run.model()
        weights = sum(p.numel() for p in model.parameters())
        device = device_of("H100")
        study = Study(model, (), given, device, None, optimizer, parallel=run.parallel)
        for choice in choices(study.head, transformers=True):
            if only not in ("", choice.name):
                continue
            stages = [
                stage.walked(choice.option, choice.outside, choice.head).timeline
                for stage in study.stages
            ]
            found[choice.name] = _said(max(stages, key=lambda one: one.peak))
    return {
        "title": run.title, "weights": weights, "batch": run.batch, "length": run.length,
        "tokens": run.tokens, "parallel": run.parallel.to_dict(),
        "microbatches": study.microbatches, "choices": found,
    }  # fmt: skip


def _said(timeline: Timeline) -> dict[str, Any]:
    parts = timeline.parts
    return {
        "static": parts.total, "wires": parts.wires, "kept": timeline.kept, "peak": timeline.peak,
        "ms": round(timeline.ms, 1), "sent": timeline.sent,
    }  # fmt: skip


def wires_ms(sent: dict[str, int]) -> float:
    """How long a rank sends, were nothing else going on."""
    seconds = sum(size / (NVLINK if kind in BY_NVLINK else NETWORK) for kind, size in sent.items())
    return 1e3 * seconds


# ---- beside what two H200 measured ---------------------------------------------------------------


def beside_measured(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `benchmarks/results/sharded.jsonl`, and what is foretold for it."""
    from benchmarks.user.scenarios import SCENARIOS

    task, parallel = SCENARIOS[row["scenario"]], PARALLEL[row["parallel"]]
    batch = row["batch"] // parallel.shard
    size = task.size._replace(batch=batch, length=row["length"])
    with torch.device("meta"):
        model = task.model(size).train()
        ids = torch.empty(batch, row["length"], dtype=torch.int64)
    wanted = {choice.name: choice for choice in choices(False, transformers=True)}
    name, head = CHOICES[row["choice"]]
    optimizer = functools.partial(torch.optim.AdamW, fused=True)
    given = {"input_ids": ids, "labels": ids}
    with group_for(parallel):
        study = Study(model, (), given, device_of("H200"), None, optimizer, parallel=parallel)
        choice = wanted[name]
        timeline = study.walked(choice.option, choice.outside, head).timeline
    key = {name: row[name] for name in ("scenario", "choice", "parallel", "world")}
    kept = timeline.kept + timeline.parts.wires
    return {
        **key, "kept_gib": row["kept_gib"], "peak_gib": row["peak_gib"],
        "foretold_kept_gib": round(kept / 2**30, 3),
        "foretold_peak_gib": round(timeline.peak / 2**30, 3),
    }  # fmt: skip


# The rows gathered their logits.
PARALLEL = {"fsdp": Parallel(shard=2), "tensor": Parallel(tensor=2, loss=False)}
CHOICES = {
    "eager": ("PyTorch", False),
    "checkpoint": ("checkpointing", False),
    "default": ("packlight", False),
    "default+head": ("packlight", True),
}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="TITLE", help="rows whose title begins so")
    parser.add_argument("--measured", action="store_true", help="beside rows of two H200")
    arguments = parser.parse_args(words)
    if arguments.measured:
        latest = {
            (r["scenario"], r["choice"], r["parallel"]): r
            for r in rows.read(rows.RESULTS / "sharded.jsonl")
            if r["world"] == 2 and r["choice"] in CHOICES
        }
        for row in latest.values():
            _written({"measured": beside_measured(row)})
        return
    for run in RUNS:
        if run.title.startswith(arguments.only):
            _written(measure(run))


def _written(row: dict[str, Any]) -> None:
    with OUT.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


if __name__ == "__main__":
    main()
