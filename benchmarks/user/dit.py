"""A diffusion transformer in plain PyTorch: Peebles and Xie 2022 (arXiv 2212.09748), adaLN-Zero.

The last layers of the blocks' modulation are at random here, not zero: zero gates would leave the
blocks without gradients.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """Attention and MLP whose norms are shifted and scaled by the condition. [B, T, width]"""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        qkv = self.qkv(_modulated(self.norm1(x), shift1, scale1))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1.unsqueeze(1) * self.out(mixed)
        return x + gate2.unsqueeze(1) * self.mlp(_modulated(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """Predicts the noise in latents [B, 4, 32, 32] at times [B] with labels [B]."""

    def __init__(self, width: int, depth: int, heads: int, patch: int = 2) -> None:
        super().__init__()
        self.width, self.checkpointed = width, False
        self.patches = nn.Conv2d(4, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (32 // patch) ** 2, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(1001, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.ConvTranspose2d(width, 4, patch, patch)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpointed = enable

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        x = self.patches(x)
        rows = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2) + self.positions
        rates = torch.exp(-math.log(1e4) * torch.arange(128, device=x.device) / 128)
        angles = 1e3 * time.unsqueeze(1) * rates
        condition = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(label)
        for block in self.blocks:
            if self.checkpointed:
                x = checkpoint(block, x, condition, use_reentrant=False)
            else:
                x = block(x, condition)
        x = _modulated(self.norm(x), *self.modulation(condition).chunk(2, dim=-1))
        return self.head(x.transpose(1, 2).unflatten(2, rows))
