"""Counter-based random numbers against published answers and against Triton's own."""

import pytest
import torch
import triton
import triton.language as tl

from packlight._philox import philox, philox2x32
from tests.helpers import every_device


def number(value):
    return torch.tensor([value])


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "words"),
    [
        (7, (0, 0), 0, (0x257A3673, 0xCD26BE2A)),
        (7, (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0xAB302C4D, 0x3DC9D239)),
        (7, (0x243F6A88, 0x85A308D3), 0x13198A2E, (0xBEDBBE6B, 0xE4C770B3)),
        (10, (0, 0), 0, (0xFF1DAE59, 0x6CD10DF2)),
        (10, (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0x2C3F628B, 0xAB4FD7AD)),
        (10, (0x243F6A88, 0x85A308D3), 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
    ],
)
def test_philox2x32_gives_the_known_answers_of_random123(rounds, counter, key, words):
    found = philox2x32(number(key), number(counter[0]), number(counter[1]), rounds)
    assert tuple(word.item() for word in found) == words


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        (7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_philox4x32_gives_the_known_answers_of_random123(rounds, words):
    found = philox(number(0), number(0), 0, rounds)
    assert tuple(word.item() for word in found) == words


@triton.jit
def _philox_kernel(out, seed, first, second, ROUNDS: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    c0, c1 = tl.load(first + place).to(tl.uint32), tl.load(second + place).to(tl.uint32)
    zero = tl.zeros([SIZE], tl.uint32)
    words = tl.philox(tl.load(seed), c0, c1, zero, zero, n_rounds=ROUNDS)
    for k in tl.static_range(4):
        tl.store(out + k * SIZE + place, words[k].to(tl.int64))


@every_device
@pytest.mark.parametrize("rounds", [7, 10])
def test_philox4x32_is_that_of_triton(rounds, device):
    seed = torch.tensor([0x123456789ABCDEF1], device=device)
    c0, c1 = torch.randint(2**32, (2, 64), device=device)
    out = torch.empty(4, 64, dtype=torch.int64, device=device)
    _philox_kernel[(1,)](out, seed, c0, c1, ROUNDS=rounds, SIZE=64)
    assert torch.equal(torch.stack(philox(seed, c0, c1, rounds)), out)
    one_for_all = torch.stack(philox(seed, c0, 5, rounds))
    assert torch.equal(one_for_all, torch.stack(philox(seed, c0, torch.full_like(c0, 5), rounds)))
