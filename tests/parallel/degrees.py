"""Bytes that a rank allocates, beside those that were foretold: data, tensor, pipeline."""

import dataclasses
import os
import sys

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import packlight
from packlight import FewBit, GroupQuant
from packlight.parallel import Parallel
from packlight.planner.cutting import group_for
from packlight.planner.devices import device_of
from packlight.planner.menu import EXACT, Option
from packlight.planner.study import Study
from tests.parallel.decoder import CUTS, Allocated, Decoder, local, loss_of
from tests.parallel.ranks import join, leave

ROWS, TOKENS = 4, 256
# Without what kernels of a GPU take for themselves.
DEVICE = dataclasses.replace(device_of("H200"), multiprocessors=0)
PACKS = Option("packs", (GroupQuant(4), FewBit(3)))
OPTIONS = {"torch": EXACT, "packs": PACKS}


def foretold(parallel: Parallel, option: Option) -> tuple[Study, list]:
    """Timelines of the stages."""
    def loss(logits):
        return loss_of(logits, torch.empty(logits.shape[:2], dtype=torch.int64))

    with torch.device("meta"):
        model, tokens = Decoder(), torch.empty(ROWS, TOKENS, dtype=torch.int64)
    with group_for(parallel):
        study = Study(model, (tokens,), {}, DEVICE, loss, head=False, parallel=parallel)
        return [stage.walked(option, option).timeline for stage in study.stages]


def converted(model: nn.Module, option: Option) -> nn.Module:
    if option is not EXACT:
        packlight.convert(model, option.inside, functional=True)
    return model


def cut(model: nn.Module, mesh, by_tokens: bool) -> None:
    """As torchtitan cuts a decoder."""
    tokens = Shard(1) if by_tokens else Replicate()
    plan = {"embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens)}
    plan["head"] = ColwiseParallel(
        input_layouts=tokens, output_layouts=Shard(-1), use_local_output=False
    )
    if by_tokens:
        plan["norm"] = SequenceParallel()
    for place in range(len(model.blocks)):
        block = f"blocks.{place}."
        plan |= {block + name: ColwiseParallel() for name in ("attention.q", "attention.k", "attention.v", "mlp.up")}
        plan |= {block + name: RowwiseParallel(output_layouts=tokens) for name in ("attention.out", "mlp.out")}
        if by_tokens:
            gathers = PrepareModuleInput(input_layouts=tokens, desired_input_layouts=Replicate())
            plan |= {block + "attention": gathers, block + "mlp": gathers}
            plan |= {block + "before": SequenceParallel(), block + "between": SequenceParallel()}
    parallelize_module(model, mesh, plan)


def measured(model: nn.Module, tokens: torch.Tensor) -> tuple[int, int]:
    """Bytes that are kept as the backward pass begins, and at the peak, of a second step."""
    loss_of(model(tokens), tokens).backward()
    model.zero_grad()
    with Allocated(model) as allocated:
        loss = loss_of(model(tokens), tokens)
        kept = allocated.now
        loss.backward()
    return kept, allocated.peak


def check(what: str, found: int, expected: int, limit: float) -> None:
    off = found / expected - 1
    print(f"{what}: {expected} foretold, {found} there, {off:+.3%}", file=sys.stderr)
    if not os.environ.get("LOOK"):
        assert abs(off) < limit, (what, expected, found)


def data(mesh, option: Option, name: str, tokens, timelines, policy) -> None:
    (timeline,) = timelines
    model = converted(Decoder(), option)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    size = sum(t.numel() * t.element_size() for t in local(model))
    check(f"shard {name}: weights", size, timeline.parts.parameters, 0.01)
    kept, peak = measured(model, tokens)
    # Weights that stay gathered are static where they are foretold.
    check(f"shard {name}: kept", kept, timeline.kept + timeline.parts.wires, 0.03)
    check(f"shard {name}: peak", peak, timeline.peak - timeline.static + timeline.parts.wires, 0.03)


def tensor(mesh, by_tokens: bool, option: Option, name: str, tokens, timelines) -> None:
    (timeline,) = timelines
    model = converted(Decoder(), option)
    cut(model, mesh, by_tokens)
    size = sum(t.numel() * t.element_size() for t in local(model))
    check(f"tensor {by_tokens} {name}: weights", size, timeline.parts.parameters, 0.01)
    with loss_parallel():
        kept, peak = measured(model, tokens)
    check(f"tensor {by_tokens} {name}: kept", kept, timeline.kept, 0.03)
    check(f"tensor {by_tokens} {name}: peak", peak, timeline.peak - timeline.static, 0.03)


def pipeline(rank: int, count: int, option: Option, name: str, tokens, timelines) -> None:
    timeline = timelines[rank]
    model = Decoder()
    own = len(model.blocks) // count
    model.blocks = model.blocks[rank * own : (rank + 1) * own]
    if rank > 0:
        model.embedding = None
    last = rank == count - 1
    if not last:
        model.norm = model.head = None
    model = converted(model, option)
    stage = PipelineStage(model, rank, count, torch.device("cpu"))
    kept = []
    with Allocated(model) as allocated:

        def note(*_):
            kept.append(allocated.now)

        def loss(logits, target):
            found = loss_of(logits, target)
            note()
            return found

        def hook(module, args, output):
            if output.requires_grad:
                output.register_hook(note)

        if not last:  # the last has a loss, after which its backward pass begins
            model.register_forward_hook(hook)
        schedule = Schedule1F1B(stage, ROWS, loss_fn=loss)
        for _ in range(2):  # the second has no look at shapes
            kept.clear()
            allocated.peak = 0
            model.zero_grad()
            schedule.step(
                *((tokens,) if rank == 0 else ()),
                target=tokens if last else None,
                return_outputs=False,
            )
    check(f"stage {rank} {name}: kept", kept[0], timeline.kept + timeline.parts.wires, 0.03)
    peak = timeline.peak - timeline.static + timeline.parts.wires
    check(f"stage {rank} {name}: peak", allocated.peak, peak, 0.03)


if __name__ == "__main__":
    count = int(os.environ["WORLD_SIZE"])
    cases = {
        "shard": Parallel(shard=count),
        "wide": Parallel(shard=count, shard_dtype=torch.float32),
        "tensor": Parallel(tensor=count, sequence=False, cuts=CUTS),
        "sequence": Parallel(tensor=count, cuts=CUTS),
        "pipeline": Parallel(pipeline=count),
    }
    expected = {
        (case, name): foretold(parallel, option)
        for case, parallel in cases.items()
        for name, option in OPTIONS.items()
        if case != "wide"
    }
    rank, count, kind = join()
    mesh = init_device_mesh(kind, (count,))
    torch.manual_seed(0)
    tokens = torch.randint(0, 512, (ROWS, TOKENS))
    for name, option in OPTIONS.items():
        data(mesh, option, name, tokens, expected["shard", name], MixedPrecisionPolicy())
        tensor(mesh, False, option, name, tokens, expected["tensor", name])
        tensor(mesh, True, option, name, tokens, expected["sequence", name])
        pipeline(rank, count, option, name, tokens, expected["pipeline", name])
    leave("as foretold")
