"""Tiles and checkpoints in DDP and FSDP2."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import packlight
from packlight import Checkpoint, Tiles
from tests.parallel.ranks import join, leave


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))

    def forward(self, x):
        return x + self.mlp(self.norm(x + x.roll(1, -2)))


def make(methods):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(32, 1))
    if methods:
        packlight.convert(model, methods)
    return model


if __name__ == "__main__":
    rank, count, kind = join()
    torch.manual_seed(1)
    x = torch.randn(2 * count, 7, 32).to(kind)
    own = x[2 * rank : 2 * rank + 2]
    one = make(None).to(kind)
    one(x).mean().backward()
    expected = [p.grad for p in one.parameters()]

    for methods in (Tiles(4, keep=None), (Checkpoint(keep=None), Tiles(4, keep=None))):
        model = DistributedDataParallel(make(methods).to(kind))
        model(own).mean().backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], expected)
        model = make(methods).to(kind)
        for block in model[:2]:
            fully_shard(block)
        fully_shard(model)
        model(own).mean().backward()
        found = [p.grad.full_tensor() for p in model.parameters()]
        torch.testing.assert_close(found, expected)
    leave("same gradients")
