"""Launching Triton kernels with little work on the CPU.

Triton binds arguments, specialises and hashes at every call: about 80 microseconds on the CPU of a
GPU server, several times what a small kernel takes. `@quick` above `@triton.jit` keeps each
compiled kernel by what it was specialised for, and further calls go to it directly. They hand over
addresses in place of tensors, of which the launcher would ask the address again, and of the driver
whether it is one.

`prepare` goes further: a launcher keeps what it makes of shapes and settings, under
`functools.lru_cache`, and hands over nothing but tensors and seeds. Kernels that follow each other
are one launch (`together`), for which addresses, dtypes and the stream are asked once.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from packlight import _torch

# Launches that one launcher keeps: one for each shape and setting.
LAUNCHES = 1024

SeedArgument: TypeAlias = Tensor | int | tuple[Tensor, int]


class quick:
    """`kernel[grid](*arguments, **constants, num_warps=n)` of a `@triton.jit` function, sooner."""

    def __init__(self, kernel: Any) -> None:
        self.__name__ = kernel.__name__
        self.__doc__ = kernel.__doc__
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], tuple[Any, tuple[str, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(*arguments: Any, **constants: Any) -> None:
            self.launch(grid, arguments, constants)

        return call

    def prepare(self, grid: tuple[int, ...], *numbers: Any, **constants: Any) -> "Launch":
        """What is called with the tensors and seeds of a launch, which come before its numbers."""
        return Launch(_Step(self, (*grid, 1, 1)[:3], numbers, constants))

    def launch(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> tuple[Any, tuple[str, ...]] | None:
        """Runs the kernel. The compiled one and the names of its constants, if there is one."""
        special, plain = _specialise(arguments)
        key = (*special, *constants, *map(_identity, constants.values()))
        found = self.compiled.get(key)
        if found is not None:
            compiled, names = found
            device = arguments[0].get_device()
            _run(compiled, (*grid, 1, 1)[:3], device, plain + [constants[name] for name in names])
            return found
        compiled = self.kernel[grid](*arguments, **constants)
        if not hasattr(compiled, "function"):  # the interpreter compiles nothing
            return None
        names = tuple(self.kernel.arg_names[len(arguments) :])
        self.compiled[key] = compiled, names
        return compiled, names


class Launch:
    """Kernels that run one after the other, each with its grid, numbers and constants.

    Called with the tensors of all of them, and seeds, which a kernel takes behind its tensors.
    A seed may be a number, of which the kernel says `do_not_specialize`, or one of several: their
    tensor and its place.
    """

    def __init__(self, *steps: "_Step") -> None:
        self.steps = steps
        # By what differs between calls: for each kernel what starts it, its arguments before and
        # behind the stream, which tensors it takes, and its arguments behind those.
        self.found: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}

    def __call__(self, *tensors: Tensor, seeds: tuple[SeedArgument, ...] = ()) -> None:
        # Addresses and dtypes are mapped, as a launch has ten of each.
        plain: list[Any] = list(map(_address, tensors))
        bits = functools.reduce(operator.or_, plain)
        device = tensors[0].get_device()
        key = (*map(_dtype, tensors), device)
        for seed in seeds:
            if type(seed) is int:
                plain += (seed,)
                key += (32 if -(2**31) <= seed < 2**31 else 64,)
                continue
            if type(seed) is tuple:  # a view would cost more than all else here
                address = _address(seed[0]) + seed[0].element_size() * seed[1]
            else:
                address = _address(seed)
            plain += (address,)
            key += (address & 15 == 0,)
        if bits & 15:  # which tensors are not aligned
            key += tuple([address & 15 == 0 for address in plain[: len(tensors)]])
        found = self.found.get(key)
        if found is None or _is_watched():
            self._start(key, tensors, seeds)
            return
        stream = _stream()(device)
        for launch, grid, settings, places, rest in found:
            arguments = plain if places is None else places(plain)
            launch(*grid, stream, *settings, *arguments, *rest)

    def _start(
        self, key: tuple[Any, ...], tensors: tuple[Tensor, ...], seeds: tuple[SeedArgument, ...]
    ) -> None:
        """Runs the kernels, and keeps how a next call with this key may do so sooner."""
        behind = [seed[0][seed[1] :] if isinstance(seed, tuple) else seed for seed in seeds]
        arguments, found = (*tensors, *behind), list[tuple[Any, ...]]()
        for kernel, grid, numbers, constants, places in self.steps:
            given = arguments if places is None else places(arguments)
            launched = kernel.launch(grid, (*given, *numbers), constants)
            launcher = None if launched is None else _launcher(launched[0])
            if launched is not None and launcher is not None:
                rest = (*numbers, *(constants[name] for name in launched[1]))
                found.append((launcher[0], grid, launcher[1], places, rest))
        if len(found) == len(self.steps):
            self.found[key] = found


class _Step(NamedTuple):
    """A kernel of a launch; `places` takes its tensors out of all, None where it takes all."""

    kernel: quick
    grid: tuple[int, ...]
    numbers: tuple[Any, ...]
    constants: dict[str, Any]
    places: Callable[[Any], tuple[Any, ...]] | None = None


def together(*launches: tuple[Launch, tuple[int, ...]]) -> Launch:
    """Launches as one, which takes the tensors of all; each with the places of its own in those.

    What is asked before a launch is asked once. They take no seeds.
    """
    steps = [
        step._replace(places=operator.itemgetter(*places))
        for launch, places in launches
        for step in launch.steps
    ]
    return Launch(*steps)


# ---- what kernels write to -----------------------------------------------------------------------


def new(x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """`x.new_empty(count, dtype=dtype)`, with less work on the CPU."""
    return _torch.empty(x, (count,), (1,), dtype)


def new_rows(x: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """`x.new_empty(rows, width, dtype=dtype)`, with less work on the CPU."""
    return _torch.empty(x, (rows, width), (width, 1), dtype)


def new_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.empty_like(x, dtype=dtype)`, with less work on the CPU."""
    if not x.is_contiguous():
        return torch.empty_like(x, dtype=dtype)
    return _torch.empty(x, tuple(x.shape), x.stride(), dtype or x.dtype)


# ---- launching -----------------------------------------------------------------------------------


_address: Callable[[Any], int] = Tensor.data_ptr
_dtype: Callable[[Any], Any] = operator.attrgetter("dtype")


def _run(compiled: Any, grid: tuple[int, ...], device: int, arguments: list[Any]) -> None:
    """What `compiled[grid](*arguments)` does in the tested Tritons, where no profiler listens.

    `device` is that of the tensors, which is the current one: see `define_op`.
    """
    launcher = _launcher(compiled)
    if launcher is None or _is_watched():
        compiled[grid](*arguments)
        return
    launch, settings = launcher
    launch(*grid, _stream()(device), *settings, *arguments)


@functools.cache
def _launcher(compiled: Any) -> tuple[Callable[..., None], tuple[Any, ...]] | None:
    """What launches a compiled kernel, and its arguments between the stream and the kernel's.

    None where the launchers of this Triton are not known.
    """
    if not _torch.launches_directly():
        return None
    run = compiled.run
    common = (compiled.packed_metadata, None, None, None)
    own = _torch.own_launch(run)
    if own is None:
        return run, (compiled.function, *common)
    launch, settings = own
    return launch, (compiled.function, *settings, *common)


def _is_watched() -> bool:
    """Whether a profiler has hooks on launches; an empty chain of them is called all the same."""
    assert _torch.TRITON.values is not None
    runtime = _torch.TRITON.values[0]
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", enter))
        or (leave is not None and getattr(leave, "calls", leave))
    )


@functools.cache
def _stream() -> Callable[[int], Any]:
    """What gives the current stream of a device."""
    assert _torch.TRITON.values is not None
    found: Callable[[int], Any] = _torch.TRITON.values[1].active.get_current_stream
    return found


def _specialise(arguments: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """What Triton compiles a kernel anew for, and the arguments with addresses for tensors.

    It compiles anew for devices, dtypes, alignment, and kinds of integers.
    """
    key: list[Any] = []
    plain: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            address = argument.data_ptr()
            key += (argument.dtype, argument.get_device(), address % 16 == 0)
            plain.append(address)
            continue
        if isinstance(argument, int):  # 1 becomes a constant; 32 and 64 bits differ
            key.append((argument % 16 == 0, argument == 1, -(2**31) <= argument < 2**31))
        else:
            key.append(type(argument))
        plain.append(argument)
    return key, plain


def _identity(constant: Any) -> Any:
    """A constant by value; functions that are constants by identity: Triton's are slow to hash."""
    return id(constant) if callable(constant) else constant
