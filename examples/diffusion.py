"""A diffusion transformer that foretells noise (Peebles and Xie, 2023): blocks with adaptive norms.

python examples/diffusion.py
python examples/diffusion.py --tiny
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packlight

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--width", type=int, default=768)
parser.add_argument("--depth", type=int, default=12)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, as in CI")
options = parser.parse_args()
device = "cuda"
if options.tiny:
    options.width, options.depth, options.batch, options.steps, device = 64, 2, 4, 3, "cpu"


class Block(nn.Module):
    """Attention and an MLP, whose shifts, scales and gates come of the time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.adapt = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adapt(time)[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = x + gate1 * self.out(y)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Model(nn.Module):
    def __init__(self, width: int, depth: int, patch: int = 2, channels: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, width // 64) for _ in range(depth))
        self.out = nn.ConvTranspose2d(width, channels, patch, patch)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.embed(x)
        tokens, time = y.flatten(2).transpose(1, 2), self.time(time[:, None])
        for block in self.blocks:
            tokens = block(tokens, time)
        return self.out(tokens.transpose(1, 2).unflatten(-1, y.shape[-2:]))


torch.manual_seed(0)
model = Model(options.width, options.depth).to(device)
latents = torch.randn(options.batch, 4, 16, 16, device=device)
conversion = packlight.convert(model)
print(conversion.bytes(latents, torch.rand(options.batch, device=device)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

for step in range(options.steps):
    time, noise = torch.rand(options.batch, device=device), torch.randn_like(latents)
    mixed = latents.lerp(noise, time[:, None, None, None])
    with torch.autocast(device, torch.bfloat16, enabled=not options.tiny):
        loss = F.mse_loss(model(mixed, time), noise - latents)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
