"""Tensor and sequence parallel: gradients and bytes of ranks beside those of one process."""

import copy

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import packlight
from packlight import FewBit, GroupQuant, Inverted
from packlight._checks import is_taken
from tests.parallel.ranks import join, leave

WIDTH, TOKENS = 128, 32


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.act, self.down = nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, WIDTH)
        self.last = nn.RMSNorm(WIDTH)
        self.whole = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        mixed = self.q(h) * self.k(h).tanh()
        y = x + self.down(self.act(self.up(h))) + mixed.sum(-1, keepdim=True) * 0.01
        return self.whole(self.last(y))


def cut(block, mesh, by_tokens):
    """`whole` stays whole; q and k are gathered, so that code between them sees all columns."""
    columns, gathered = ColwiseParallel(), ColwiseParallel(output_layouts=Replicate())
    plan = {"q": gathered, "k": gathered, "up": columns, "down": RowwiseParallel()}
    if by_tokens:
        # The norm's result lies on ranks by tokens; Linears gather it.
        plan["norm"] = SequenceParallel(use_local_output=False)
        plan["up"] = ColwiseParallel(input_layouts=Shard(1))
        plan["q"] = plan["k"] = ColwiseParallel(
            input_layouts=Shard(1), output_layouts=Shard(1), use_local_output=True
        )
        plan["down"] = RowwiseParallel(output_layouts=Shard(1))
        plan["last"] = SequenceParallel(use_local_output=False)
        plan["whole"] = PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Shard(1), use_local_output=False
        )
    parallelize_module(block, mesh, plan)
    if by_tokens:  # a whole Linear on rows that lie on ranks
        for name, parameter in list(block.whole.named_parameters()):
            held = DTensor.from_local(parameter.data, mesh, [Replicate()], run_check=False)
            setattr(block.whole, name, nn.Parameter(held))


def gradients(model, x, dy):
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y = y.full_tensor() if isinstance(y, DTensor) else y
    y.backward(dy)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        name: grad.full_tensor() if isinstance(grad, DTensor) else grad
        for name, grad in found.items()
    }


NEAREST = GroupQuant(8, group_size=32, rounding="nearest")
METHODS = {
    "packs": NEAREST,
    "exact": (FewBit(), Inverted()),
    "mixed": {"act": FewBit(bits=8), "*norm": Inverted(), "last": NEAREST, "[qku]*": NEAREST},
    "random": GroupQuant(4),
}

if __name__ == "__main__":
    rank, count, kind = join()
    two = count == 4
    shape, names = ((2, 2), ("dp", "tp")) if two else ((count,), ("tp",))
    mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    tp = mesh["tp"]
    torch.manual_seed(0)
    plain = Block().to(kind, torch.float64)
    x, dy = torch.randn(2, 4, TOKENS, WIDTH, device=kind, dtype=torch.float64)
    own = (
        slice(2 * mesh.get_local_rank("dp"), 2 * mesh.get_local_rank("dp") + 2) if two else slice(4)
    )

    whole = DTensor.from_local(x, tp, [Replicate()], run_check=False)
    assert is_taken(x)
    assert not is_taken(whole)  # what runs several layers at once takes no DTensors

    for by_tokens in (False, True):
        part = x[own]
        if by_tokens:  # residuals and results are this rank's tokens
            first = TOKENS // tp.size() * tp.get_local_rank()
            part = part[:, first : first + TOKENS // tp.size()].contiguous()
        for name, methods in METHODS.items():
            if two and name not in ("packs", "random"):
                continue
            for frozen in (False, True):
                torch.manual_seed(3)
                one = copy.deepcopy(plain)
                if frozen:
                    one.up.weight.requires_grad_(False)
                ours = copy.deepcopy(one)
                packlight.convert(one, methods)
                expected = gradients(one, x, dy)
                for order in ("convert", "cut") if name == "packs" else ("convert",):
                    model = copy.deepcopy(ours)
                    if order == "convert":
                        packlight.convert(model, methods)
                    cut(model, tp, by_tokens)
                    if order == "cut":
                        packlight.convert(model, methods)
                    if two:
                        fully_shard(model, mesh=mesh["dp"])
                    grads = gradients(model, part, dy[own])
                    for key, truth in expected.items():
                        if truth is None:
                            assert grads[key] is None, key
                            continue
                        error = (grads[key] * (2 if two else 1) - truth).norm() / truth.norm()
                        limit = 0.3 if name == "random" else 1e-6
                        assert error < limit, (by_tokens, name, frozen, order, key, error)
                # Norms and residuals of all tokens are on every rank where tokens are not cut.
                if not two and name == "packs" and not frozen:
                    kept, of_one = (packlight.profile(*pair) for pair in ((model, part), (one, x)))
                    share = kept.activation_bytes / of_one.activation_bytes
                    assert share < (0.53 if by_tokens else 0.86), share
                model.eval()
                model(part)
    leave("same gradients")
