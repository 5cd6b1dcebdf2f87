"""Sketches in DDP and FSDP2: two gloo processes average the gradients that each has alone."""

import subprocess
import sys

PROGRAM = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import packlight
from packlight import sketch

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)

def make():
    packlight.manual_seed(0)
    return nn.Sequential(sketch.Linear(6, 32, rows=16, kind="srht"), nn.Tanh(),
                         sketch.Linear(32, 32, rows=16, kind="top_rows"), nn.Tanh(),
                         nn.Linear(32, 1))

def train(model):
    packlight.manual_seed(rank)  # another draw on every rank
    model(torch.randn(40, 6)).mean().backward()
    return [p.grad for p in model.parameters()]

expected = train(make())
for grad in expected:
    dist.all_reduce(grad)
    grad /= 2

for p, grad in zip(train(DistributedDataParallel(make())), expected, strict=True):
    torch.testing.assert_close(p, grad)

model = make()
fully_shard(model[0])
fully_shard(model[2])
fully_shard(model)
for p, grad in zip(train(model), expected, strict=True):
    torch.testing.assert_close(p.full_tensor(), grad)
dist.barrier()
dist.destroy_process_group()
print("same gradients")
"""


def test_two_processes_average_their_gradients(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        output, errors = worker.communicate(timeout=240)
        assert output == "same gradients\n", errors[-3000:]
