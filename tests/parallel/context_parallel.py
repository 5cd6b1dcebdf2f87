"""Context parallel: each rank has some of the tokens, and attention goes around all ranks."""

import contextlib
import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import packlight
from packlight import GroupQuant
from tests.parallel.ranks import join, leave

WIDTH, HEADS, TOKENS, ROWS = 128, 4, 64, 2
NEAREST = GroupQuant(8, group_size=32, rounding="nearest")
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}
attention = F.scaled_dot_product_attention


class Own(nn.Module):
    """Attention in code of the model's own, around which tokens and heads may be exchanged."""

    causal = True

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.act, self.down = nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)
        self.exchange = None

    def forward(self, x, places):
        h = self.norm(x)
        heads = [
            each(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.q, self.k, self.v)
        ]
        if self.exchange is not None:
            heads = [self.exchange(each, 1, 2) for each in heads]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=self.causal)
        if self.exchange is not None:
            mixed = self.exchange(mixed, 2, 1)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.last(x))))


class Llama(nn.Module):
    causal = True

    def __init__(self):
        super().__init__()
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=8)
        self.model = transformers.LlamaModel(config)

    def forward(self, x, places):
        turns = self.model.rotary_emb(x, places[None])
        for block in self.model.layers:
            x = block(x, position_embeddings=turns)
        return x


class Bert(nn.Module):
    """Query, key and value by one function, and norms by one with what stands before them."""

    causal = False

    def __init__(self):
        super().__init__()
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.model = transformers.BertModel(transformers.BertConfig(**SIZES, **rates)).encoder

    def forward(self, x, places):
        return self.model(x)[0]


# ---- attention of all tokens ---------------------------------------------------------------------


class _Gathered(torch.autograd.Function):
    """The tokens of all ranks, from those of this one."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size(), 2)[dist.get_rank()]


def over_all_ranks(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Attention of this rank's queries to the keys of all ranks, by torch's own function."""
    own, rank = q.shape[2], dist.get_rank()
    mask = torch.ones(own, own * dist.get_world_size(), dtype=torch.bool, device=q.device)
    mask = mask.tril(own * rank) if is_causal else mask
    k, v = _Gathered.apply(k), _Gathered.apply(v)
    return attention(q, k, v, mask, dropout_p, scale=scale, enable_gqa=enable_gqa)


def of_all_tokens(*tensors, **options):
    """torch's own function, which something stands in the place of."""
    return attention(*tensors, **options)


class _Exchanged(torch.autograd.Function):
    """Some heads of all tokens for all heads of some tokens, and back (Ulysses)."""

    @staticmethod
    def forward(ctx, x, split, joined):
        ctx.dims = (split, joined)
        sent = [part.contiguous() for part in x.chunk(dist.get_world_size(), split)]
        found = [torch.empty_like(part) for part in sent]
        for to in range(dist.get_world_size()):  # gloo has no all-to-all of lists
            dist.gather(sent[to], found if to == dist.get_rank() else None, dst=to)
        return torch.cat(found, joined)

    @staticmethod
    def backward(ctx, gradient):
        split, joined = ctx.dims
        return _Exchanged.apply(gradient, joined, split), None, None


@contextlib.contextmanager
def replaced(function):
    F.scaled_dot_product_attention = function
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


@contextlib.contextmanager
def registered(function):
    def forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
        out = function(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = forward
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain


@contextlib.contextmanager
def of_torch(mesh, *tensors):
    """torch's; within, `tensors` are this rank's part.

    Its ring is of CUDA kernels. Of matmuls and a softmax DTensors make the same, without a causal
    mask, and with more than two ranks in a layout that `context_parallel` does not expect.
    """
    on_cpu = mesh.device_type == "cpu"
    kernels = [SDPBackend.MATH if on_cpu else SDPBackend.EFFICIENT_ATTENTION]
    dims = [1 if x.dim() > 1 else 0 for x in tensors]
    with sdpa_kernel(kernels), context_parallel(mesh, buffers=list(tensors), buffer_seq_dims=dims):
        yield


def gradients(model, x, places, dy):
    model.zero_grad()
    x = x.detach().requires_grad_()
    model(x, places).backward(dy)
    return {
        "x": x.grad,
        **{name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    }


def near(found, expected, own, what, limit=1e-6):
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        if name == "x":
            truth = truth[:, own]
        else:
            dist.all_reduce(found[name])
        # That of a bias of keys is 0 but for rounding.
        error = (found[name] - truth).norm() / truth.norm().clamp_min(1e-3)
        assert error < limit, (what, name, error.item())


if __name__ == "__main__":
    rank, count, kind = join()
    mesh = init_device_mesh(kind, (count,), mesh_dim_names=("cp",))
    torch.manual_seed(1)
    x, dy = torch.randn(2, ROWS, TOKENS, WIDTH, dtype=torch.float64).to(kind)
    places = torch.arange(TOKENS, device=kind)
    own = slice(TOKENS // count * rank, TOKENS // count * (rank + 1))
    part = (x[:, own], places[own], dy[:, own])

    for make in (Own, Llama, Bert) if count == 2 else (Own, Llama):
        torch.manual_seed(2)
        plain = make().to(kind, torch.float64).train()
        model = copy.deepcopy(plain)
        packlight.convert(model, NEAREST)

        # What stands in the place of torch's function runs, on ranks and in one process alike.
        with replaced(of_all_tokens):
            expected = gradients(model, x, places, dy)
        with replaced(over_all_ranks):
            near(gradients(model, *part), expected, own, (make, "replaced"))
        if make is Llama:  # the code that stands there calls torch's function, which keeps packs
            with registered(of_all_tokens):
                one = gradients(model, x, places, dy)
            with registered(over_all_ranks):
                near(gradients(model, *part), one, own, (make, "registered"))
        elif make is Own:  # attention of some heads keeps packs
            one = gradients(model, x, places, dy)
            model.exchange = _Exchanged.apply
            near(gradients(model, *part), one, own, (make, "exchanged"))
            model.exchange = None
        # Its kernel for keys that several heads share is of 16 bits alone.
        if make is not Llama if kind == "cuda" else (count == 2 and not make.causal):
            # The kernels of its ring take no float64.
            dtype, limit = (torch.float32, 1e-3) if kind == "cuda" else (torch.float64, 1e-6)
            rows = [x.to(dtype, copy=True), places.clone(), dy.to(dtype, copy=True)]
            with of_torch(mesh, *rows):
                found = gradients(model.to(dtype), *rows)
                near(found, expected, rows[1], (make, "torch's"), limit)
    leave("same gradients")
