"""A user's step on several GPUs of one host: FSDP2, or tensor and sequence parallel.

    torchrun --nproc-per-node 2 -m benchmarks.user.sharded --scenarios llama1b --choices eager
    python -m benchmarks.user.sharded --scenarios llama1b --choices eager    # on one device

Choices and scenarios are those of the suite `user`. The batch of a scenario is that of all ranks
together, so that losses can be laid beside one device's: `--batch 2` for one of one sequence.
A row a choice, written by rank 0: the median step of 50, the largest peak of a rank, bytes kept for
the backward pass on it, and the losses. All choices of a call share a process: call it once for
those that patch classes.
"""

import argparse
import contextlib
import gc
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import packlight
from benchmarks import rows
from benchmarks.user.choices import CHOICES, blocks
from benchmarks.user.scenarios import SCENARIOS, Scenario
from benchmarks.user.worker import GIB, Device, versions

OUT = rows.RESULTS / "sharded.jsonl"
BATCHES = 4  # that are seen in turn, so that a loss falls
STEPS = 50


def fsdp(model: nn.Module, mesh: DeviceMesh) -> None:
    """Every block a shard, and the rest one more."""
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Llama's Linears by columns and rows, its norms and residuals by tokens."""
    tokens, whole = Shard(1), Replicate()
    columns, rows_ = ColwiseParallel(), RowwiseParallel(output_layouts=tokens)
    gathered = {"input_layouts": (tokens,), "desired_input_layouts": (whole,)}
    named = {
        "input_kwarg_layouts": {"hidden_states": tokens},
        "desired_input_kwarg_layouts": {"hidden_states": whole},
    }
    for layer in model.model.layers:
        plan = {
            "self_attn": PrepareModuleInput(**named),
            "mlp": PrepareModuleInput(**gathered),
            "input_layernorm": SequenceParallel(),
            "post_attention_layernorm": SequenceParallel(),
            "self_attn.o_proj": rows_,
            "mlp.down_proj": rows_,
        }
        plan |= {f"self_attn.{name}_proj": columns for name in "qkv"}
        plan |= {f"mlp.{name}_proj": columns for name in ("gate", "up")}
        parallelize_module(layer, mesh, plan)
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=tokens),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=tokens, output_layouts=whole),
    }
    parallelize_module(model, mesh, plan)


PARALLEL: dict[str, Callable[[nn.Module, DeviceMesh], None]] = {
    "fsdp": fsdp,
    "tensor": tensor_parallel,
}


class Run:
    """A model as a choice and a way of sharding leave it, on this rank."""

    def __init__(
        self, task: Scenario, choice: str, parallel: str, mesh: DeviceMesh | None, kind: str
    ) -> None:
        self.rank, self.world = (mesh.get_rank(), mesh.size()) if mesh else (0, 1)
        self.device, self.task = Device(kind), task
        # All ranks of tensor parallel see the same sequences.
        self.shares = self.world if parallel == "fsdp" else 1
        if task.size.batch % self.shares:
            raise SystemExit(f"a batch of {task.size.batch} has no {self.shares} equal parts")
        size = task.size._replace(batch=task.size.batch // self.shares)
        torch.manual_seed(0)
        with torch.device(kind):
            self.model = task.model(size)
        self.model.train()
        self.around = CHOICES[choice].around
        for change in CHOICES[choice].changes:
            change(self.model)
        if mesh is not None:
            PARALLEL[parallel](self.model, mesh)
        self.size = size
        self.ids = self.tokens()
        # Sequences are cut into tokens of a rank: it has to be said where these stand.
        self.more = {}
        if parallel == "tensor":
            self.more["position_ids"] = torch.arange(size.length, device=kind)[None]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # Some parameters are DTensors and some are not: no fused or foreach call takes both.
        options = {"foreach": False} if parallel == "tensor" and mesh else {"fused": True}
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, **options)
        packlight.manual_seed(self.rank)

    def tokens(self) -> list[Tensor]:
        """Those of this rank, of batches that all ranks draw alike."""
        generator, batch = torch.Generator().manual_seed(1), self.size.batch
        shape = (batch * self.shares, self.size.length)
        first = batch * (self.rank % self.shares)
        drawn = [
            torch.randint(5, self.model.config.vocab_size, shape, generator=generator)
            for _ in range(BATCHES)
        ]
        return [ids[first : first + batch].to(self.device.kind) for ids in drawn]

    def forward(self, i: int) -> Tensor:
        ids = self.ids[i % BATCHES]
        with torch.autocast(self.device.kind, torch.bfloat16, self.task.autocast), self.around():
            return self.model(input_ids=ids, labels=ids, **self.more).loss

    def step(self, i: int) -> Tensor:
        loss = self.forward(i)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def reduced(value: float, how: "dist.ReduceOp.RedOpType", device: Device) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=device.kind)
    if dist.is_initialized():
        dist.all_reduce(tensor, how)
    return tensor.item()


def measure(run: Run, steps: int) -> dict[str, Any]:
    """The row of a choice; all ranks call it, and each has the same one."""
    device, most, ms = run.device, dist.ReduceOp.MAX, []
    losses = [run.step(0), run.step(1)]
    device.wait()
    device.clean()
    static = torch.cuda.memory_allocated() if device.is_cuda else 0
    for i in range(2, steps):
        begin = time.perf_counter()
        losses.append(run.step(i))
        device.wait()
        ms.append(1e3 * (time.perf_counter() - begin))
    row: dict[str, Any] = {"ms": round(reduced(statistics.median(ms), most, device), 2)}
    row["per_s"] = round(1e3 * run.size.items * run.shares / row["ms"], 1)
    if device.is_cuda:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        before = torch.cuda.memory_allocated()
        loss = run.forward(0)
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        run.optimizer.zero_grad(set_to_none=True)
        sizes = {"static": static, "kept": kept, "peak": peak, "reserved": reserved}
        row |= {
            f"{name}_gib": round(reduced(n, most, device) / GIB, 3) for name, n in sizes.items()
        }
    mean = [reduced(loss.item(), dist.ReduceOp.SUM, device) / run.world for loss in losses]
    return row | {"losses": [round(loss, 4) for loss in mean]}


@contextlib.contextmanager
def group(kind: str) -> Iterator[DeviceMesh | None]:
    """All ranks of `torchrun`; None for a process of its own."""
    if "WORLD_SIZE" not in os.environ:
        yield None
        return
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    yield init_device_mesh(kind, (dist.get_world_size(),))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenarios", default="llama1b", metavar="NAME,NAME")
    parser.add_argument("--choices", default="eager,default", metavar="NAME,NAME")
    parser.add_argument("--parallel", choices=PARALLEL, default="fsdp")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=0, help="of all ranks together")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="file of rows")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, to try it")
    parser.add_argument("--commit", help="where git cannot tell")
    options = parser.parse_args()
    with group(options.device) as mesh:
        rank, world = (mesh.get_rank(), mesh.size()) if mesh else (0, 1)
        for scenario in options.scenarios.split(","):
            task = SCENARIOS[scenario]
            task = task.tiny if options.tiny else task
            if options.batch:
                task = task._replace(size=task.size._replace(batch=options.batch))
            for choice in options.choices.split(","):
                key = {"scenario": scenario, "choice": choice, "parallel": options.parallel}
                row = key | {"world": world, "batch": task.size.batch, "length": task.size.length}
                run = Run(task, choice, options.parallel, mesh, options.device)
                row |= measure(run, options.steps)
                row |= rows.settings(options.device, options.commit) | {"versions": versions()}
                del run
                gc.collect()
                if rank == 0:
                    rows.append(options.out, row)
                    shown = {k: v for k, v in row.items() if k.endswith(("_gib", "ms", "per_s"))}
                    print(scenario, choice, options.parallel, world, shown, flush=True)
                    print("   loss", row["losses"][:: max(1, options.steps // 5)], flush=True)


if __name__ == "__main__":
    main()
