"""Bodies of transformers in plain PyTorch: no embedding, no head, no other package."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Self-attention with `heads` query heads and `groups` key and value heads."""

    def __init__(self, width: int, heads: int, groups: int, bias: bool, causal: bool, p: float):
        super().__init__()
        self.size, self.causal, self.p = width // heads, causal, p
        self.q = nn.Linear(width, width, bias)
        self.k = nn.Linear(width, groups * self.size, bias)
        self.v = nn.Linear(width, groups * self.size, bias)
        self.out = nn.Linear(width, width, bias)
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        gqa = k.shape[1] != q.shape[1]
        mixed = self.attend(q, k, v, dropout_p=self.p, is_causal=self.causal, enable_gqa=gqa)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class EncoderBlock(nn.Module):
    """A post-norm block of BERT and RoBERTa, with dropout."""

    def __init__(self, width: int, heads: int, hidden: int, p: float = 0.1):
        super().__init__()
        self.attention = Attention(width, heads, heads, True, False, p)
        self.drop1, self.norm1 = nn.Dropout(p), nn.LayerNorm(width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        self.drop2, self.norm2 = nn.Dropout(p), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.drop1(self.attention(x)))
        return self.norm2(x + self.drop2(self.fc2(self.act(self.fc1(x)))))


class PreNormBlock(nn.Module):
    """A block of ViT, or of GPT-2 where causal: with the tanh form of GELU, and dropout."""

    def __init__(self, width: int, heads: int, causal: bool, p: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, heads, True, causal, p)
        self.drop1, self.drop2 = nn.Dropout(p), nn.Dropout(p)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = nn.GELU("tanh" if causal else "none")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop1(self.attention(self.norm1(x)))
        return x + self.drop2(self.fc2(self.act(self.fc1(self.norm2(x)))))


class SwiGLU(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class DecoderBlock(nn.Module):
    """A block of Llama, without rotary embeddings."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.attention = Attention(width, heads, groups, False, True, 0.0)
        self.gate, self.up = nn.Linear(width, hidden, False), nn.Linear(width, hidden, False)
        self.act, self.down = SwiGLU(), nn.Linear(hidden, width, False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        return x + self.down(self.act(self.gate(h), self.up(h)))


class Stack(nn.Module):
    """Blocks one after another; `checkpoints` has arguments of a checkpoint for some of them."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.checkpoints: dict[nn.Module, dict[str, Any]] = {}

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if block in self.checkpoints:
                x = checkpoint(block, x, use_reentrant=False, **self.checkpoints[block])
            else:
                x = block(x)
        return x
