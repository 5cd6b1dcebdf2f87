"""Seeds that are drawn ahead of the layers that take them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from packlight import _philox
from packlight._philox import AHEAD, MOST, pass_seed, pass_seeds, seeds_ahead

CPU = torch.device("cpu")


class Generator:
    """What is asked of a generator of a CUDA device."""

    def __init__(self, seed: int, offset: int = 0) -> None:
        self.seed, self.offset = seed, offset

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


@pytest.fixture(autouse=True)
def _nothing_made(monkeypatch):
    monkeypatch.setattr(_philox, "_made", {})


def some(generator, draws, count=1, stream=0):
    drawn = [seeds_ahead(generator, CPU, stream, count) for _ in range(draws)]
    assert all(seed.shape == (count,) and seed.dtype == torch.int64 for seed in drawn)
    return torch.cat(drawn).tolist()


@pytest.mark.parametrize("count", [1, 4, MOST])
def test_no_two_draws_are_alike(count):
    generator = Generator(1)
    seeds = some(generator, 3 * AHEAD // count, count)
    others = some(Generator(2), AHEAD)
    assert len({*seeds, *others}) == len(seeds) + AHEAD
    assert min(seeds) >= 0


def test_a_generator_that_goes_back_draws_the_same():
    generator = Generator(7, offset=4 * (AHEAD - 10))  # into the next block
    first = some(generator, 20)
    some(generator, 2 * AHEAD)
    generator.set_offset(4 * (AHEAD - 10))
    assert some(generator, 20) == first


def test_other_draws_between_change_nothing_but_the_place():
    left, right = Generator(7), Generator(7)
    some(left, 1)
    right.set_offset(400)
    left.set_offset(400)
    assert some(left, 5) == some(right, 5, stream=1)


def test_what_is_made_within_a_mode_is_of_use_after_it():
    class Wrapping(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return torch.nn.Parameter(function(*args, **(kwargs or {})), requires_grad=False)

    with torch.inference_mode(), Wrapping():
        assert type(seeds_ahead(Generator(3), CPU, 0, 2)) is torch.nn.Parameter
    for count in (1, 2):
        later = seeds_ahead(Generator(3, offset=8), CPU, 0, count)
        assert type(later) is torch.Tensor
        assert not later.is_inference()


def test_on_the_cpu_a_seed_is_a_draw():
    x = torch.ones(3)
    torch.manual_seed(5)
    expected = torch.randint(2**63 - 1, (1,)), torch.randint(2**63 - 1, (4,))
    torch.manual_seed(5)
    assert torch.equal(pass_seed(x), expected[0])
    assert torch.equal(pass_seeds(x, 4), expected[1])


@pytest.mark.gpu
def test_on_a_gpu_seeds_follow_the_generator():
    x = torch.ones(3, device="cuda")
    torch.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.cat([pass_seed(x), *pass_seeds(x, 3).split(1), pass_seed(x)]).tolist()
    after = torch.rand(3, device="cuda")
    assert len(set(first)) == 5
    torch.cuda.set_rng_state(state)
    assert torch.cat([pass_seed(x) for _ in range(5)]).tolist() == first
    assert torch.equal(torch.rand(3, device="cuda"), after)  # moved on all the same
    torch.manual_seed(6)
    assert pass_seed(x).item() != first[0]


@pytest.mark.gpu
def test_on_a_gpu_a_stream_has_seeds_of_its_own():
    x, stream = torch.ones(3, device="cuda"), torch.cuda.Stream()
    torch.manual_seed(5)
    here = pass_seed(x)
    torch.manual_seed(5)
    with torch.cuda.stream(stream):
        there = pass_seed(x)
    torch.cuda.synchronize()
    assert here.data_ptr() != there.data_ptr()
    assert here.item() == there.item()
