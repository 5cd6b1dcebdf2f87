"""Counter-based random numbers: the same in a Triton kernel and in plain PyTorch.

A layer that needs random numbers draws one seed a forward from the ambient generator of its
tensor's device, keeps it, and replays: Philox4x32-10 (Salmon et al., SC 2011) turns the seed and a
counter into four 32-bit numbers. `triton.language.philox` computes the same function.
"""

import random
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Of Philox2x32.
PAIR_MULTIPLIER = 0xD256D193
PAIR_WEYL = 0x9E3779B9


def draw_seed(x: Tensor) -> Tensor:
    """A fresh seed, [1] int64 on the device of `x`. No synchronisation; CUDA graphs replay it."""
    return torch.randint(2**63 - 1, (1,), device=x.device)


def pass_seed(x: Tensor) -> Tensor:
    """A seed as `draw_seed` draws one, for a layer that does not keep it."""
    return pass_seeds(x, 1)


def pass_seeds(x: Tensor, count: int) -> Tensor:
    """Several such seeds, [count], in one draw.

    On a CUDA device a draw is a kernel, which costs the CPU more than most layers do otherwise.
    There seeds are made many at once, for the places of the ambient generator that come next.
    """
    if (
        torch.compiler.is_compiling()
        or not x.is_cuda
        or type(x) not in (Tensor, torch.nn.Parameter)  # a fake one, for example
        or torch.cuda.is_current_stream_capturing()
    ):
        return torch.randint(2**63 - 1, (count,), device=x.device)
    device = x.get_device()
    generator = torch.cuda.default_generators[device]
    return seeds_ahead(generator, x.device, torch._C._cuda_getCurrentRawStream(device), count)


# Made at once, and the most that may be asked for at once. A draw moves a generator by _STEP.
AHEAD, MOST, _STEP = 1024, 16, 4
# Of each device and stream, the last that were made, together and one by one, and what of.
_made: dict[tuple[torch.device, int], tuple[tuple[int, int], Tensor, tuple[Tensor, ...]]] = {}


def seeds_ahead(generator: Any, device: torch.device, stream: int, count: int) -> Tensor:
    """The next `count` seeds of a generator, which moves on.

    They are a function of its seed and its offset alone: a checkpoint's second pass, which starts
    from the generator's old state, draws what the first drew.
    """
    offset = generator.get_offset()
    generator.set_offset(offset + _STEP * count)
    block, place = divmod(offset // _STEP, AHEAD)
    of = generator.initial_seed(), block
    known = _made.get((device, stream))
    if known is None or known[0] != of:
        known = _made[device, stream] = of, *_make(*of, device)
    _, seeds, single = known
    return single[place] if count == 1 else seeds.narrow(0, place, count)


def _make(seed: int, block: int, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    generator = torch.Generator(device)
    generator.manual_seed(random.Random(f"{seed} {block}").getrandbits(63))
    # They outlive whatever this call happens to be made in.
    with torch.inference_mode(False), _disable_current_modes():
        seeds = torch.randint(2**63 - 1, (AHEAD + MOST,), device=device, generator=generator)
        return seeds, seeds.split(1)


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
