"""Layers and converted models in DDP and FSDP2: two processes give the gradients of one."""

import subprocess
import sys

import pytest
import torch

PROGRAM = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
import packlight.fewbit as few_bit
import packlight.inverted as inverted
import packlight
from packlight import groupquant

rank, backend = int(sys.argv[1]), sys.argv[3]
# NCCL: a GPU each.
device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
if backend == "nccl":
    torch.cuda.set_device(device)
dist.init_process_group(backend, init_method="file://" + sys.argv[2], rank=rank, world_size=2)

def make():
    packlight.manual_seed(0)
    # Groups of a row each, to nearest: the halves of a batch then have the groups of the whole.
    keep = {"group_size": 32, "rounding": "nearest"}
    return nn.Sequential(nn.Linear(6, 32), few_bit.GELU(bits=3), nn.Linear(32, 32), few_bit.ReLU(),
                         inverted.LayerNorm(32), groupquant.Linear(32, 32, **keep),
                         groupquant.LayerNorm(32, **keep), groupquant.Linear(32, 32, **keep),
                         groupquant.GELU(**keep), groupquant.Linear(32, 1, **keep))

def convert():
    packlight.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(),
                          nn.LayerNorm(32), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32),
                          nn.GELU(), nn.Linear(32, 1))
    keep = packlight.GroupQuant(group_size=32, rounding="nearest")
    packlight.convert(model, {"[13]": packlight.FewBit(bits=3), "4": packlight.Inverted(),
                              "[5-9]": keep})
    return model

packlight.manual_seed(1)
x = torch.randn(8, 6).to(device)
one = make().to(device)
one(x).mean().backward()
expected = [p.grad for p in one.parameters()]
half = x[4 * rank : 4 * rank + 4]

for build in (make, convert):
    model = DistributedDataParallel(build().to(device))
    model(half).mean().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)

    model = build().to(device)
    for layer in (model[0], model[2], model[5], model[7]):
        fully_shard(layer)
    fully_shard(model)
    model(half).mean().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert isinstance(p.grad, DTensor)
        torch.testing.assert_close(p.grad.full_tensor(), grad)
dist.barrier()
dist.destroy_process_group()
print("same gradients")
"""


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def test_two_processes_give_the_gradients_of_one(tmp_path, backend):
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "rendezvous"), backend],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        output, errors = worker.communicate(timeout=240)
        assert output == "same gradients\n", errors[-3000:]
