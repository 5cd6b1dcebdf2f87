"""Random numbers of group quantisation, which a kernel and plain PyTorch compute alike."""

import torch
from torch import Tensor

from packlight._philox import philox2x32
from packlight.groupquant.grouping import HEADER, Grouping

# Rounds of Philox2x32: 7 are the fewest that pass BigCrush (Random123 by Salmon et al.).
ROUNDS = 7


def fraction_bits(bits: int) -> int:
    """Bits of a random number: as many as fit a float32 number's 23 below a code, at most 16."""
    return min(16, 23 - bits)


def draws(seed: Tensor, grouping: Grouping) -> Tensor:
    """Uniform numbers k / 2^f on [0, 1), f = `fraction_bits`, [rows, row_groups, group_size].

    One Philox call gives eight numbers: to the `parts` elements of one position in 8 / parts
    consecutive groups. Its counter is (position, counted from the row's first, row). The key is the
    low half of the seed; the high half is xored to the row, so two seeds share numbers with a
    chance of about rows / 2^63.

    A word of bytes 0 to 3 gives the numbers of bytes (0, 1), (1, 2), (2, 3) and (3, 0), low byte
    first, without the top bit at 8 bits. Each is uniform, so each rounding is unbiased.

    Of two neighbours, one byte is the high one of the first and the low one of the second. Given
    that byte, the chance that the second rounds up takes one of two values 2^(8 - f) apart, so its
    deviation is at most 2^(7 - f); that of the first one's rounding is at most 1/2. So their
    covariance is at most 2^(6 - f), in steps squared: 1/1024, at 8 bits 1/512. All other pairs are
    independent. A sum of n roundings, as many neighbours, has a variance of at most n / 512 (at 8
    bits n / 256) more than independent ones, whose is at most n / 4.
    """
    rows, row_groups, size = grouping.rows, grouping.row_groups, grouping.size
    sets = 8 // grouping.parts
    calls = -(-row_groups // sets)
    c0 = torch.arange(calls * size, device=seed.device).repeat(rows) & 0xFFFFFFFF
    c1 = torch.arange(rows, device=seed.device)
    c1 = ((seed >> 32) ^ c1) & 0xFFFFFFFF
    c1 = c1.repeat_interleave(calls * size)
    words = torch.stack(philox2x32(seed & 0xFFFFFFFF, c0, c1, ROUNDS))
    fraction = fraction_bits(grouping.bits)
    turned = torch.stack([words >> shift | words << (32 - shift) for shift in (0, 8, 16, 24)], 1)
    uniform = (turned & ((1 << fraction) - 1)).float() / (1 << fraction)  # [2, 4, rows ...]
    uniform = uniform.view(sets, grouping.parts, rows, calls, size)
    uniform = uniform.permute(2, 3, 0, 1, 4).reshape(rows, calls * sets, grouping.group_size)
    return uniform[:, :row_groups]


def other_seed(seed: Tensor | None) -> Tensor | None:
    """The seed of the second pack of an operator."""
    return None if seed is None else seed ^ (1 << 32)


# ---- numbers of groups, which whoever reads a pack draws again -----------------------------------

# Of an integer hash with little bias (Wellons, 2018), and of the places of signs.
HASH = (0x7FEB352D, 0x846CA68B)
STEP = 0x9E3779B9
_MASK = 0xFFFFFFFF


def mixed(x: Tensor) -> Tensor:
    """A hash of 32 bits, held in int64."""
    x = x ^ (x >> 16)
    x = (x * HASH[0]) & _MASK
    x = x ^ (x >> 15)
    x = (x * HASH[1]) & _MASK
    return x ^ (x >> 16)


def group_hashes(seed: Tensor, groups: int) -> Tensor:
    """32 bits for each group of a pack, [groups], int64."""
    group = torch.arange(groups, device=seed.device) & _MASK
    return mixed(group ^ mixed(mixed(seed & _MASK) ^ ((seed >> 32) & _MASK)))


def offsets(seed: Tensor, groups: int, bits: int) -> Tensor:
    """One number k / 2^f for each group, f = `fraction_bits`: the highest bits of its hash."""
    fraction = fraction_bits(bits)
    return (group_hashes(seed, groups) >> (32 - fraction)).float() / (1 << fraction)


def signs(seed: Tensor, groups: int, group_size: int) -> Tensor:
    """1 and -1 for each element of each group, [groups, group_size].

    The eight elements group_size / 8 apart have a byte of a hash, the highest bit first; four
    places after each other have its four bytes, the lowest first.
    """
    size = group_size // 8
    place = torch.arange(size, device=seed.device)
    # Less 2^32, which the mask undoes: a compiler may compute with a range in int32.
    of_place = (place // 4 + 1) * (STEP - (1 << 32)) & _MASK
    words = mixed(group_hashes(seed, groups).view(-1, 1) ^ of_place)
    bytes_ = (words >> (8 * (place % 4))).view(-1, 1, size)
    bits = (bytes_ >> (7 - torch.arange(8, device=seed.device)).view(8, 1)) & 1
    return (1 - 2 * bits).float().view(groups, group_size)


def words_of(seed: Tensor) -> Tensor:
    """A seed [1] as the two words [2] int32 at the head of a pack."""
    return seed.view(torch.int32)


def seed_of(scales: Tensor) -> Tensor:
    """The seed [1] at the head of a pack."""
    return scales[:HEADER].contiguous().view(torch.int64)
