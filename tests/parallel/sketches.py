"""Sketches in DDP and FSDP2: ranks average the gradients that each has alone."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import packlight
from packlight import sketch
from tests.parallel.ranks import join, leave


def make():
    packlight.manual_seed(0)
    return nn.Sequential(
        sketch.Linear(6, 32, rows=16, kind="srht"),
        nn.Tanh(),
        sketch.Linear(32, 32, rows=16, kind="top_rows"),
        nn.Tanh(),
        nn.Linear(32, 1),
    )


if __name__ == "__main__":
    rank, count, kind = join()

    def train(model):
        packlight.manual_seed(rank)  # another draw on every rank
        model(torch.randn(40, 6).to(kind)).mean().backward()
        return [p.grad for p in model.parameters()]

    expected = train(make().to(kind))
    for grad in expected:
        dist.all_reduce(grad)
        grad /= count

    found = train(DistributedDataParallel(make().to(kind)))
    torch.testing.assert_close(found, expected)

    model = make().to(kind)
    fully_shard(model[0])
    fully_shard(model[2])
    fully_shard(model)
    torch.testing.assert_close([grad.full_tensor() for grad in train(model)], expected)
    leave("same gradients")
