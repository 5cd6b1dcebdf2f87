"""Expert parallel: each rank has some of the experts, and gets as many rows as are routed to them.

A rank or an expert may get none.
"""

import copy
import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import packlight
from packlight import Checkpoint, FewBit, GroupQuant, Inverted
from tests.parallel.ranks import join, leave

WIDTH, HIDDEN, EXPERTS, TOKENS = 64, 96, 8, 24
NEAREST = GroupQuant(8, group_size=32, rounding="nearest")
METHODS = {
    "packs": {"methods": NEAREST, "rest": NEAREST},
    "exact": {"methods": (FewBit(bits=8), Inverted())},
    "checkpoint": {"methods": (Checkpoint(NEAREST), NEAREST)},
}


# ---- rows that are sent to the ranks of their experts --------------------------------------------


class _Sent(torch.autograd.Function):
    """Rows in the order of their ranks to these ranks, and back in the backward pass."""

    @staticmethod
    def forward(ctx, x, sent, received):
        ctx.sizes = (received, sent)
        found = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(found, x.contiguous(), received, sent)
        return found

    @staticmethod
    def backward(ctx, gradient):
        return _Sent.apply(gradient, *ctx.sizes), None, None


class Grouped(nn.Module):
    """Experts as one product by groups of rows."""

    def __init__(self, count):
        super().__init__()
        shapes = (count, WIDTH, HIDDEN), (count, WIDTH, HIDDEN), (count, HIDDEN, WIDTH)
        gate, up, down = (nn.Parameter(torch.randn(shape) / 8) for shape in shapes)
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x, counts):
        ends = torch.tensor(counts, device=x.device).cumsum(0).int()
        gate, up = (F.grouped_mm(x, weight, offs=ends) for weight in (self.gate, self.up))
        return F.grouped_mm(F.silu(gate) * up, self.down, offs=ends)


class Apart(nn.Module):
    """Experts as modules, each of which gets its rows."""

    def __init__(self, count):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, WIDTH)
            )
            for _ in range(count)
        )

    def forward(self, x, counts):
        pairs = zip(self.experts, x.split(counts), strict=True)
        return torch.cat([expert(rows) for expert, rows in pairs])


class Mixture(nn.Module):
    """A block with a mixture of experts; on several ranks `experts` are this one's."""

    def __init__(self, kind):
        super().__init__()
        self.norm, self.router = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.experts, self.ranks = kind(EXPERTS), 1

    def forward(self, x, offered):
        h = self.norm(x)
        scores, chosen = self.router(h).masked_fill(~offered, -torch.inf).softmax(-1).topk(2)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
        rows = h[order // 2]
        if self.ranks == 1:
            y = self.experts(rows, counts.tolist())
        else:
            y = self.elsewhere(rows, counts)
        y = torch.zeros_like(y).index_copy(0, order, y)
        return x + (y.unflatten(0, (-1, 2)) * scores.unsqueeze(-1)).sum(1)

    def elsewhere(self, rows, counts):
        """By the experts of all ranks, which sort what they get from each rank by expert."""
        here = torch.empty_like(counts)
        dist.all_to_all_single(here, counts)
        here = here.view(self.ranks, -1)
        sent, received = (each.view(self.ranks, -1).sum(1).tolist() for each in (counts, here))
        rows = _Sent.apply(rows, sent, received)
        of_expert = torch.arange(here.shape[1], device=here.device).repeat(self.ranks)
        order = of_expert.repeat_interleave(here.flatten()).argsort(stable=True)
        y = self.experts(rows[order], here.sum(0).tolist())
        y = torch.zeros_like(y).index_copy(0, order, y)
        return _Sent.apply(y, received, sent)


def part_of(experts, rank, count):
    """This rank's experts."""
    own = slice(EXPERTS // count * rank, EXPERTS // count * (rank + 1))
    if isinstance(experts, Apart):
        experts.experts = experts.experts[own]
    else:
        for name, weight in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(weight.detach()[own].clone()))
    return own


def check(grad, truth, limit, what):
    assert (grad is None) == (truth is None), what
    if truth is not None:
        error = (grad - truth).norm() / truth.norm().clamp_min(1e-3)
        assert error < limit, (what, error.item())


def check_rows(rank, count, kind):
    torch.manual_seed(1)
    x, dy = torch.randn(2, count * TOKENS, WIDTH).to(kind)
    # Nobody sends to expert 1, nor to the last of four ranks; the first sends to the second alone.
    offered = torch.ones(count * TOKENS, EXPERTS, dtype=torch.bool)
    each = EXPERTS // count
    offered[:, 1] = False
    offered[:, -each:] = count == 2
    offered[:TOKENS] = False
    offered[:TOKENS, each : 2 * each] = True
    offered = offered.to(kind)
    part = slice(TOKENS * rank, TOKENS * (rank + 1))
    for experts in (Grouped, Apart):
        for name, how in METHODS.items():
            torch.manual_seed(0)
            one = Mixture(experts).train().to(kind)
            model = copy.deepcopy(one)
            own, model.ranks = part_of(model.experts, rank, count), count
            for each_model in (one, model):
                packlight.convert(each_model, **how)
            one(x, offered).backward(dy)
            model(x[part], offered[part]).backward(dy[part])
            first = own.start
            truths = dict(one.named_parameters())
            for key, parameter in model.named_parameters():
                grad = parameter.grad
                if not key.startswith("experts."):
                    dist.all_reduce(grad)
                    truth = truths[key].grad
                elif experts is Grouped:
                    truth = truths[key].grad[own]
                else:
                    _, _, number, rest = key.split(".", 3)
                    truth = truths[f"experts.experts.{int(number) + first}.{rest}"].grad
                check(grad, truth, 1e-4, (experts, name, key))


# ---- transformers' own plan ----------------------------------------------------------------------


def mixtral():
    config = transformers.MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
        vocab_size=8,
    )
    # Under a plan its "eager" raises for experts elsewhere, and its "batched_mm" gives the plain
    # model's router another gradient (transformers 5.17).
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    return transformers.MixtralModel(config).train()


def check_plan(mesh):
    """Each rank has all tokens, and its experts those that are routed to them."""
    torch.manual_seed(1)
    x, dy = torch.randn(2, 1, TOKENS, WIDTH).to(mesh.device_type)
    for (name, how), first in itertools.product(METHODS.items(), ("convert", "distribute")):
        one, model = mixtral().to(mesh.device_type), mixtral().to(mesh.device_type)
        packlight.convert(one, **how)
        if first == "convert":
            packlight.convert(model, **how)
        model.tp_plan = model._ep_plan
        apply_tensor_parallelism(model, mesh)
        if first == "distribute":
            packlight.convert(model, **how)
        for each in (one, model):
            each(inputs_embeds=x).last_hidden_state.backward(dy)
        truths = {key: parameter.grad for key, parameter in one.named_parameters()}
        for key, parameter in model.named_parameters():
            grad = parameter.grad
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            # What stands between the norm and its readers makes them pack for themselves: another
            # rounding, and errors of 8 bits.
            check(grad, truths[key], 1e-4 if name == "exact" else 0.02, (name, first, key))


if __name__ == "__main__":
    rank, count, kind = join()
    check_rows(rank, count, kind)
    check_plan(init_device_mesh(kind, (count,), mesh_dim_names=("ep",)))
    leave("same gradients")
