"""Layers and converted models in DDP and FSDP2."""

import itertools
import operator

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import packlight
import packlight.fewbit as few_bit
import packlight.inverted as inverted
from packlight import FewBit, GroupQuant, Inverted, groupquant
from tests.parallel.ranks import join, leave

# Groups of a row each, to nearest: the parts of a batch then have the groups of the whole.
KEEP = {"group_size": 32, "rounding": "nearest"}


def make():
    packlight.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 32),
        few_bit.GELU(bits=3),
        nn.Linear(32, 32),
        few_bit.ReLU(),
        inverted.LayerNorm(32),
        groupquant.Linear(32, 32, **KEEP),
        groupquant.LayerNorm(32, **KEEP),
        groupquant.Linear(32, 32, **KEEP),
        groupquant.GELU(**KEEP),
        groupquant.Linear(32, 1, **KEEP),
    )


def convert():
    packlight.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 32),
        nn.GELU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.LayerNorm(32),
        nn.Linear(32, 32),
        nn.LayerNorm(32),
        nn.Linear(32, 32),
        nn.GELU(),
        nn.Linear(32, 1),
    )
    methods = {"[13]": FewBit(bits=3), "4": Inverted(), "[5-9]": GroupQuant(**KEEP)}
    packlight.convert(model, methods)
    return model


class Code(nn.Module):
    """Attention with a trained bias and sinks, an adapted weight, functions without a rule."""

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
    keep = GroupQuant(bits=8, **KEEP)
    packlight.convert(model, keep, rest=keep)
    return model


def wrapped(model, parts=None):
    """In DDP, or with these parts and the rest in shards."""
    if parts is None:
        return DistributedDataParallel(model)
    for part in parts(model):
        fully_shard(part)
    return fully_shard(model)


def check(model, one, **limits):
    for p, q in zip(model.parameters(), one.parameters(), strict=True):
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(grad, q.grad, **limits)


if __name__ == "__main__":
    rank, count, kind = join()
    packlight.manual_seed(1)
    rows, x = torch.randn(4 * count, 32).to(kind), torch.randn(4 * count, 6).to(kind)
    own = slice(4 * rank, 4 * rank + 4)

    for parts in (None, operator.attrgetter("first", "rows")):
        one, model = written_out().to(kind), wrapped(written_out().to(kind), parts)
        one(rows).mean().backward()
        (model(rows[own]).mean() * 2 - model(rows[own]).mean()).backward()  # two forward passes
        check(model, one, rtol=1e-4, atol=1e-6)
        assert packlight._torch.saved_tensor_hooks() is None

    one = make().to(kind)
    one(x).mean().backward()
    some = operator.itemgetter(0, 2, 5, 7)
    for build, parts in itertools.product((make, convert), (None, some)):
        model = wrapped(build().to(kind), parts)
        model(x[own]).mean().backward()
        check(model, one)

    model = wrapped(convert().to(kind))
    with model.no_sync():  # gradients of two micro-batches, of which the last sends them
        model(x[own][:2]).mean().div(2).backward()
    model(x[own][2:]).mean().div(2).backward()
    check(model, one)
    leave("same gradients")
