"""Tiles and checkpoints in DDP and FSDP2: two processes give the gradients of one."""

import subprocess
import sys

PROGRAM = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import packlight
from packlight import Checkpoint, Tiles

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)

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

torch.manual_seed(1)
x = torch.randn(4, 7, 32)
one = make(None)
one(x).mean().backward()
expected = [p.grad for p in one.parameters()]
half = x[2 * rank : 2 * rank + 2]

for methods in (Tiles(4, keep=None), (Checkpoint(keep=None), Tiles(4, keep=None))):
    model = DistributedDataParallel(make(methods))
    model(half).mean().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    model = make(methods)
    for block in model[:2]:
        fully_shard(block)
    fully_shard(model)
    model(half).mean().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), grad)
dist.destroy_process_group()
print("fine")
"""


def test_two_processes_give_the_gradients_of_one(tmp_path):
    commands = [
        [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "store")] for rank in (0, 1)
    ]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    for process in started:
        output, errors = process.communicate(timeout=300)
        assert output == "fine\n", errors[-3000:]
