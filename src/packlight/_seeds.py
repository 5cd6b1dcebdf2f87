"""Where random numbers come from.

**Rounding** and sketches have a stream of their own. It counts from a base that is read off torch's
generator and never drawn from it, so the model's own draws are those of the plain model, and two
passes of a checkpoint may round differently, which harms nothing. The base is read where a model is
converted or a layer is made, where `saving` is entered and the generator has moved since, and by
`manual_seed`. So two steps round differently, and seeding, building, converting and training again
repeats bit for bit.

**Masks** (dropout) come from torch's generator of the tensor's device, a draw for each pass, as
those of torch do: a checkpoint's second pass, which starts from the generator's old state, sees the
masks of its first.

A seed is a number in eager mode: it costs no kernel. In compiled code and in captured graphs, which
run the same instructions each time, it is a tensor [1] of int64 on the device.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from packlight import _torch
from packlight._imagined import kind_of
from packlight._library import define_op, make_early
from packlight.errors import InputError


class Drawn(NamedTuple):
    """A seed of those that a compiled graph draws at once: the element at `place`."""

    seeds: Tensor
    place: int


# A number, a tensor [1] of int64 or an element of one; None where values are rounded to nearest.
Seed: TypeAlias = Tensor | int | Drawn | None

NEAREST = -1  # the number of no seed, for operators
_DRAW = 4  # places of a CUDA generator's counter that one draw takes
_MASK = (1 << 64) - 1


# ---- the stream of rounding ----------------------------------------------------------------------


class _Stream:
    """Seeds counted from a base."""

    def __init__(self) -> None:
        self.base: int | None = None
        self.count = 0

    def next(self) -> int:
        if self.base is None:
            self.start(_generator_state())
        number = mixed(self.base or 0, self.count)
        self.count += 1
        return number

    def start(self, base: int, count: int = 0) -> None:
        self.base, self.count = base, count


_rounding = _Stream()


def mixed(base: int, count: int) -> int:
    """A number of 63 bits, the highest of them set, which no other count of this base has likely.

    The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    z = (base + (count + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    # As large as that, Triton takes each for an integer of 64 bits.
    return ((z ^ (z >> 31)) >> 2) | 1 << 62


def _generator_state() -> int:
    """A number that stands for the state of torch's generator, which stays as it is."""
    state = torch.default_generator.get_state().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "little")


def start_rounding() -> None:
    """Has the stream of rounding count from the present state of torch's generator."""
    _rounding.start(_generator_state())


def follow_generator() -> None:
    """`start_rounding`, where the generator is in another state than it was then."""
    state = _generator_state()
    if state != _rounding.base:
        _rounding.start(state)


def manual_seed(seed: int) -> None:
    """Seeds torch's generators of all devices and the stream of packlight's rounding.

    From here on the same program draws the same numbers: `torch.manual_seed` alone does not start
    the rounding of a model that was converted before anew.

    >>> import packlight
    >>> packlight.manual_seed(0)
    """
    if not _is_number(seed):
        raise InputError(f"seed={seed!r} is not a whole number")
    torch.manual_seed(seed)
    start_rounding()


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def rounding_state() -> dict[str, int | None]:
    """Where the stream of rounding is, as plain data; `set_rounding_state` goes back to it.

    A checkpoint that holds it beside torch's generators has training go on bit for bit. Callbacks
    of `packlight.integrations` hold it. CUDA graphs count on the device, and are not in it.
    """
    return {"base": _rounding.base, "next": _rounding.count}


def set_rounding_state(state: Mapping[str, int | None]) -> None:
    """Has the stream of rounding go on from where `rounding_state` found it.

    Call it after `convert`, which starts the stream anew. An empty mapping changes nothing.

    >>> import packlight
    >>> state = packlight.rounding_state()
    >>> packlight.set_rounding_state(state)
    """
    base, count = state.get("base"), state.get("next")
    if base is not None and count is not None:
        _rounding.start(base, count)


@contextlib.contextmanager
def rounding_left_as_found() -> Iterator[None]:
    """The stream of rounding goes on afterwards from where it was."""
    base, count = _rounding.base, _rounding.count
    try:
        yield
    finally:
        _rounding.base, _rounding.count = base, count


# ---- seeds ---------------------------------------------------------------------------------------


def rounding_seed(x: Tensor) -> Seed:
    """The next seed of the stream of rounding, for the device of `x`."""
    if _torch.is_traced():
        make_early(x.device, lambda: _counter(x.device))
        place = _torch.next_place()
        seeds = _torch.seeds_of_graph(place)
        return _next_rounding_seed(x.device, place) if seeds is None else Drawn(*seeds)
    if x.is_cuda:
        if _table is not None or torch.cuda.is_current_stream_capturing():
            return rounding_tensor(x)
        if x.device not in _counters and not _torch.is_fake(x):
            _counter(x.device)  # a graph that is captured later advances it
    return _rounding.next()


def rounding_tensor(x: Tensor) -> Tensor:
    """`rounding_seed` as a tensor [1] of int64 on the device of `x`."""
    place = 0
    if _torch.is_traced():
        make_early(x.device, lambda: _counter(x.device))
        place = _torch.next_place()
    seed: Tensor = _next_rounding_seed(x.device, place)
    return seed


def mask_seed(x: Tensor) -> Tensor | int:
    """A seed drawn from torch's generator of the device of `x`."""
    if _torch.is_traced() or _is_captured(x):
        return torch.randint(2**63 - 1, (1,), device=x.device)
    if _torch.is_fake(x) or x.is_meta:
        return 0  # nothing is computed of it
    if x.is_cuda:
        # What a draw does to the generator, without a kernel.
        generator: Any = torch.cuda.default_generators[x.get_device()]
        offset = generator.get_offset()
        generator.set_offset(offset + _DRAW)
        return mixed(generator.initial_seed(), offset)
    seed = torch.randint(2**63 - 1, (1,), device=x.device)
    return int(seed.item()) if x.device.type == "cpu" else seed


def can_draw_again(x: Tensor) -> bool:
    """Whether `drawn_again` can repeat what torch draws on the device of `x` now.

    Not where one set of instructions draws anew at each run, and so has no numbers to go back to.
    """
    return kind_of(x) == "cuda" and not _torch.is_traced() and not _is_captured(x)


def draws_at(x: Tensor) -> tuple[int, int] | None:
    """Where torch's generator of the CUDA device of `x` is; None where that is imagined."""
    if _torch.is_fake(x) or not x.is_cuda:
        return None
    generator: Any = torch.cuda.default_generators[x.get_device()]
    return generator.initial_seed(), generator.get_offset()


@contextlib.contextmanager
def drawn_again(x: Tensor, place: tuple[int, int]) -> Iterator[None]:
    """Within, torch draws on the device of `x` what it drew from `place` on. Nothing waits."""
    generator: Any = torch.cuda.default_generators[x.get_device()]
    before = generator.initial_seed(), generator.get_offset()
    try:
        _set(generator, place)
        yield
    finally:
        _set(generator, before)


def _set(generator: Any, place: tuple[int, int]) -> None:
    seed, offset = place
    generator.manual_seed(seed)
    generator.set_offset(offset)


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and (_table is not None or torch.cuda.is_current_stream_capturing())


# ---- seeds on a device ---------------------------------------------------------------------------

# For each CUDA device a counter, which graphs advance as they are replayed, and how far seeds of a
# compiled graph are from one that is drawn: one kernel makes them all.
_counters: dict[torch.device, Tensor] = {}
_steps: dict[torch.device, Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    found = _counters.get(device)
    if found is None:
        with torch.inference_mode(False):  # it outlives whatever this call happens to be made in
            found = _counters[device] = torch.zeros(1, dtype=torch.int64, device=device)
            _steps[device] = _made_steps(device)
    return found


class SeedTable:
    """Seeds of one recording's operators, which `draw` writes anew before each replay."""

    def __init__(self, device: torch.device) -> None:
        # A seed is at every second place: kernels are compiled for aligned addresses.
        steps = [mixed(0, i // 2) for i in range(2 * _TABLE)]
        self.steps = torch.tensor(steps, dtype=torch.int64, device=device)
        self.seeds = self.steps.clone()
        self.used = 0

    def next(self) -> Tensor | None:
        """The seed of the next operator; None where the table is too small."""
        if self.used == _TABLE:
            return None
        self.used += 1
        return self.seeds[2 * self.used - 2 : 2 * self.used - 1]

    def draw(self) -> None:
        """Other seeds, from the stream of rounding. One kernel."""
        torch.bitwise_xor(self.steps, _rounding.next(), out=self.seeds)

    @contextlib.contextmanager
    def used_by_operators(self) -> Iterator[None]:
        """Operators take their seeds from the table, in the order in which they run."""
        global _table
        before, _table = _table, self
        try:
            yield
        finally:
            _table = before


_TABLE = 4096
_table: SeedTable | None = None


def _reference(device: torch.device, place: int) -> Tensor:
    seed = _next_seed(device)
    if isinstance(seed, Tensor):
        return seed
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _next_seed(device: torch.device) -> Tensor | int:
    """A tensor [1] where each replay of what is captured is to have another."""
    if _table is not None and _table.seeds.device == device:
        seed = _table.next()
        if seed is not None:
            return seed
    number = _rounding.next()
    if device.type != "cuda":
        return number
    if not torch.cuda.is_current_stream_capturing():
        _counter(device)
        return number
    if device not in _counters:  # no pass has run before the capture
        return torch.randint(2**63 - 1, (1,), device=device)
    return _counters[device].add_(1) + number


def _seeds_reference(device: torch.device, place: int) -> Tensor:
    # Keys of Philox and of hashes: that they differ is enough.
    steps = _steps.get(device)
    return (_made_steps(device) if steps is None else steps) + _next_seed(device)


_STEP = 0x1E3779B97F4A7C15


def _made_steps(device: torch.device) -> Tensor:
    return torch.arange(2 * _torch.SEEDS_AT_ONCE, device=device) * _STEP


# The seeds of a graph, of which one is at every second place (`SeedTable`).
define_op(
    "rounding_seeds(Device device, int place) -> Tensor",
    reference=_seeds_reference,
    fake=lambda device, place: torch.empty(
        2 * _torch.SEEDS_AT_ONCE, dtype=torch.int64, device=device
    ),
    tags=(torch.Tag.nondeterministic_seeded,),
)

# `place` tells two calls in one graph apart, of which a compiler would make one.
_next_rounding_seed = define_op(
    "next_rounding_seed(Device device, int place) -> Tensor",
    reference=_reference,
    fake=lambda device, place: torch.empty(1, dtype=torch.int64, device=device),
    tags=(torch.Tag.nondeterministic_seeded,),
)


# ---- seeds of operators --------------------------------------------------------------------------


def operands(seed: Seed) -> tuple[Tensor | None, int]:
    """A seed as operators take it: a tensor or None, and a number."""
    if type(seed) is int:  # first, as every operator asks
        return None, seed
    if seed is None:
        return None, NEAREST
    if isinstance(seed, Drawn):
        return seed.seeds, seed.place
    assert not isinstance(seed, int)
    return seed, 0


def as_given(seed: Seed) -> Tensor | int | None:
    """A seed as methods of packages of their own take it."""
    return seed.seeds[seed.place : seed.place + 1] if isinstance(seed, Drawn) else seed


def from_operands(seed: Tensor | None, number: int) -> Seed:
    """The inverse of `operands`, but an element of a tensor is a tensor [1]."""
    return _element(seed, number) if seed is not None else None if number == NEAREST else number


def as_tensor(seed: Tensor | None, number: int, device: torch.device) -> Tensor | None:
    """What an operator was given as a tensor [1] of int64, None to round to nearest."""
    if seed is not None:
        return _element(seed, number)
    return None if number == NEAREST else torch.tensor([number], device=device)


def _element(seed: Tensor, place: int) -> Tensor:
    return seed if seed.numel() == 1 else seed[place : place + 1]
