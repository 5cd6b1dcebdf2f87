"""A small decoder that engines can cut, and what is allocated while it trains."""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH, HEADS, WORDS = 128, 4, 512
CUTS = {"*.[qkv]": "colwise", "*.up": "colwise", "*.out": "rowwise", "head": "colwise"}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.v, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.out = nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.between, self.mlp = nn.RMSNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class Decoder(nn.Module):
    def __init__(self, depth: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens if self.embedding is None else self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x if self.head is None else self.head(self.norm(x))


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class Allocated(TorchDispatchMode):
    """Bytes of the storages that operators made and that are alive, as large as they are now."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in local(model)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind.__module__.startswith("torch.distributed.tensor") for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.known:
                storage = leaf.untyped_storage()
                if storage._cdata not in self.storages:
                    key = storage._cdata
                    self.storages[key] = weakref.ref(
                        storage, lambda _, key=key: self.storages.pop(key, None)
                    )
        self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        alive = (reference() for reference in list(self.storages.values()))
        return sum(storage.nbytes() for storage in alive if storage is not None)


def local(model: nn.Module) -> list[Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
