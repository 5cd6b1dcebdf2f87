"""Counter-based random numbers: the same in a Triton kernel and in plain PyTorch.

Philox4x32-10 (Salmon et al., SC 2011) turns a seed and a counter into four 32-bit numbers; where
seeds come from is in `_seeds.py`. `triton.language.philox` computes the same function.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Of Philox2x32.
PAIR_MULTIPLIER = 0xD256D193
PAIR_WEYL = 0x9E3779B9


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two unsigned 32-bit numbers held in int64."""
    low, high = b * (a & 0xFFFF), b * (a >> 16)
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _MASK


def philox(
    seed: Tensor, c0: Tensor, c1: Tensor | int, rounds: int = _ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four unsigned 32-bit numbers, as int64, for each counter (c0, c1, 0, 0), given in int64."""
    c1 = torch.as_tensor(c1, device=c0.device).expand_as(c0)
    c = [c0 & _MASK, c1 & _MASK, torch.zeros_like(c0), torch.zeros_like(c0)]
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(rounds):
        high0, low0 = _multiply(_MULTIPLIERS[0], c[0])
        high1, low1 = _multiply(_MULTIPLIERS[1], c[2])
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c[0], c[1], c[2], c[3]


def philox2x32(key: Tensor, c0: Tensor, c1: Tensor, rounds: int = _ROUNDS) -> tuple[Tensor, Tensor]:
    """Two unsigned 32-bit numbers for each counter (c0, c1): Philox2x32, all held in int64."""
    for _ in range(rounds):
        high, low = _multiply(PAIR_MULTIPLIER, c0)
        c0, c1 = high ^ key ^ c1, low
        key = (key + PAIR_WEYL) & _MASK
    return c0, c1
