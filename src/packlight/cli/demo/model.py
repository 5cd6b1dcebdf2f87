"""The demo's model, a GPT on bytes, and its variants: what each run changes in it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight import fewbit, inverted
from packlight.convert import convert

# ---- the model: a GPT on bytes -------------------------------------------------------------------

VOCABULARY = 256


class Attention(nn.Module):
    """Causal self-attention with `heads` heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class MLP(nn.Module):
    """Linear, GELU, Linear. The hidden layer is 4 times as wide, so GELU keeps a lot."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act: nn.Module = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.act(self.fc1(x)))
        return result


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class GPT(nn.Module):
    """Bytes [batch, length] -> logits of each next byte [batch, length, 256]."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.positions(torch.arange(text.shape[1], device=text.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


# ---- the variants: what is done to the model before it is trained --------------------------------


def unchanged(model: GPT, bits: int) -> None:
    """Plain PyTorch: every GELU, norm and Linear keeps its input, 16 or 32 bits an element."""


def few_bit(model: GPT, bits: int) -> None:
    """Every GELU keeps codes of its derivative, `bits` bits an element."""
    replace(model, {nn.GELU: lambda gelu: fewbit.GELU(bits=bits)})


def invert(model: GPT, bits: int) -> None:
    """Every GELU and norm keeps its output, which the Linear behind it keeps anyway."""
    replace(
        model,
        {
            nn.GELU: lambda gelu: inverted.GELU(),
            nn.LayerNorm: lambda norm: inverted.LayerNorm(norm.normalized_shape, norm.eps),
            # Under autocast this one reads the 16-bit output that the norm keeps.
            nn.Linear: lambda old: inverted.Linear(old.in_features, old.out_features),
        },
    )


def default(model: GPT, bits: int) -> None:
    """`packlight.convert(model)`: packs of 4 bits, shared by neighbours, attention's of 8."""
    convert(model)


def replace(model: nn.Module, twins: dict[type, Callable[[Any], nn.Module]]) -> None:
    """Each layer of these types gives way to its twin, which takes over its weights."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in twins:
                state = torch.get_rng_state()
                twin = twins[type(child)](child)
                torch.set_rng_state(state)  # drawn for weights that are not used
                for key, weight in child.named_parameters(recurse=False):
                    setattr(twin, key, weight)
                setattr(parent, name, twin)


# The first one is what the others are compared with.
VARIANTS: dict[str, Callable[[GPT, int], None]] = {
    "PyTorch": unchanged,
    "FewBit": few_bit,
    "Inverted": invert,
    "default": default,
}
