"""Bytes that a rank allocates, beside those that were foretold: data, tensor, pipeline."""

import contextlib
import dataclasses
import os
import sys

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
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
        plan |= {
            block + name: ColwiseParallel()
            for name in ("attention.q", "attention.k", "attention.v", "mlp.up")
        }
        plan |= {
            block + name: RowwiseParallel(output_layouts=tokens)
            for name in ("attention.out", "mlp.out")
        }
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


def data(model: nn.Module, mesh) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(case: str, model: nn.Module, tokens, timelines, sees_loss: bool = True) -> None:
    (timeline,) = timelines
    size = sum(t.numel() * t.element_size() for t in local(model))
    check(f"{case}: weights", size, timeline.parts.parameters, 0.01)
    with contextlib.nullcontext() if sees_loss else loss_parallel():
        kept, peak = measured(model, tokens)
    # Weights that stay gathered are static where they are foretold.
    wires = timeline.parts.wires
    check(f"{case}: kept", kept, timeline.kept + wires, 0.03)
    expected = timeline.peak - timeline.static + wires
    if sees_loss:  # on shards of logits no mode sees what it allocates
        check(f"{case}: peak", peak, expected, 0.05)


def pipeline(case: str, mesh, option: Option, tokens, timelines) -> None:
    mine, count = mesh.get_local_rank("pipeline"), mesh["pipeline"].size()
    timeline, last = timelines[mine], mine == count - 1
    model = Decoder()
    own = len(model.blocks) // count
    model.blocks = model.blocks[mine * own : (mine + 1) * own]
    if mine > 0:
        model.embedding = None
    if not last:
        model.norm = model.head = None
    model = converted(model, option)
    if mesh["shard"].size() > 1:
        data(model, mesh["shard"])
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_reshard_after_forward(False)
    size = sum(t.numel() * t.element_size() for t in local(model))
    check(f"{case}, stage {mine}: weights", size, timeline.parts.parameters, 0.01)
    group = mesh.get_group("pipeline")
    stage = PipelineStage(model, mine, count, torch.device("cpu"), group=group)
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
                *((tokens,) if mine == 0 else ()),
                target=tokens if last else None,
                return_outputs=False,
            )
    check(f"{case}, stage {mine}: kept", kept[0], timeline.kept + timeline.parts.wires, 0.03)
    peak = timeline.peak - timeline.static + timeline.parts.wires
    check(f"{case}, stage {mine}: peak", allocated.peak, peak, 0.05)


def cases(count: int) -> dict[str, Parallel]:
    found = {
        "shard": Parallel(shard=count),
        "tensor": Parallel(tensor=count, sequence=False, cuts=CUTS),
        "sequence": Parallel(tensor=count, cuts=CUTS),
        "pipeline": Parallel(pipeline=count),
    }
    if count == 4:
        found["shard and sequence"] = Parallel(shard=2, tensor=2, cuts=CUTS)
        found["shard and pipeline"] = Parallel(shard=2, pipeline=2)
    return found


if __name__ == "__main__":
    count = int(os.environ["WORLD_SIZE"])
    expected = {
        (case, name): foretold(parallel, option)
        for case, parallel in cases(count).items()
        for name, option in OPTIONS.items()
    }
    rank, count, kind = join()
    torch.manual_seed(0)
    tokens = torch.randint(0, 512, (ROWS, TOKENS))
    for case, parallel in cases(count).items():
        degrees = (parallel.pipeline, parallel.shard, parallel.tensor)
        mesh = init_device_mesh(kind, degrees, mesh_dim_names=("pipeline", "shard", "tensor"))
        for name, option in OPTIONS.items():
            said = f"{case}, {name}"
            if parallel.pipeline > 1:
                pipeline(said, mesh, option, tokens, expected[case, name])
                continue
            model = converted(Decoder(), option)
            if parallel.tensor > 1:
                cut(model, mesh["tensor"], parallel.sequence)
            if parallel.shard > 1:
                data(model, mesh["shard"])
            whole(said, model, tokens, expected[case, name], parallel.tensor == 1)
    leave("as foretold")
