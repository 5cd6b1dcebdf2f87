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

class Code(nn.Module):
    # Attention with a trained bias and sinks, an adapted weight, functions without a rule.
    def __init__(self):
        super().__init__()
        self.first, self.last, self.rows = nn.Linear(32, 32), nn.Linear(32, 1), nn.GRU(32, 32)
        self.bias, self.sink = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(1))
        shapes = (32, 32), (2, 32), (32, 2)
        self.w, self.a, self.b = (nn.Parameter(torch.randn(shape) / 6) for shape in shapes)

    def forward(self, x):
        x = self.rows(self.first(x).expand(8, -1, -1))[0].transpose(0, 1)
        w = torch.addmm(self.w, self.b, self.a)
        q, k = x @ w, torch.sin(x).sinh()
        scores = torch.cat([q @ k.mT + self.bias, self.sink.expand(x.shape[0], 8, 1)], -1)
        return self.last(scores.softmax(-1)[..., :-1] @ x)

def written_out():
    packlight.manual_seed(0)
    model = Code()
    keep = packlight.GroupQuant(bits=8, group_size=32, rounding="nearest")
    packlight.convert(model, keep, rest=keep)
    return model

packlight.manual_seed(1)
rows, x = torch.randn(8, 32).to(device), torch.randn(8, 6).to(device)
for shard in (False, True):
    one = written_out().to(device)
    one(rows).mean().backward()
    model = written_out().to(device)
    if shard:
        for layer in (model.first, model.rows):
            fully_shard(layer)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    part = rows[4 * rank : 4 * rank + 4]
    (model(part).mean() * 2 - model(part).mean()).backward()  # two forward passes before
    for p, q in zip(model.parameters(), one.parameters(), strict=True):
        grad = p.grad.full_tensor() if shard else p.grad
        torch.testing.assert_close(grad, q.grad, rtol=1e-4, atol=1e-6)
    assert packlight._torch.saved_tensor_hooks() is None

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
