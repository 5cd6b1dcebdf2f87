"""Launching Triton kernels with little work on the CPU.

Triton binds arguments, specialises and hashes at every call: about 80 microseconds on the CPU of a
GPU server, several times what a small kernel takes. `@quick` above `@triton.jit` keeps each
compiled kernel by what it was specialised for, and further calls go to it directly. They hand over
addresses in place of tensors, of which the launcher would ask the address again, and of the driver
whether it is one.

`prepare` goes further: a launcher keeps what it makes of shapes and settings, under
`functools.lru_cache`, and hands over nothing but tensors and a seed.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

from packlight import _torch

# Launches that one launcher keeps: one for each shape and setting.
LAUNCHES = 1024


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
        """What is called with the tensors and seed of a launch, which come before its numbers."""
        return Launch(self, grid, numbers, constants)

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
    """A kernel with its grid, numbers and constants. Called with the tensors and a seed.

    A seed may be a number, of which the kernel says `do_not_specialize`.
    """

    def __init__(
        self,
        kernel: quick,
        grid: tuple[int, ...],
        numbers: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.numbers = numbers
        self.constants = constants
        # By what differs between calls: the compiled kernel, and the arguments after the tensors.
        self.found: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}

    def __call__(self, *arguments: Any) -> None:
        # Addresses and dtypes are mapped, as a launch has ten of each.
        key: list[Any]
        if int in map(type, arguments):
            plain, key, bits = _addresses(arguments)
        else:
            plain, key = list(map(_address, arguments)), list(map(_dtype, arguments))
            bits = functools.reduce(operator.or_, plain)
        if bits & 15:  # which arguments are not aligned; seeds are told apart by no more than above
            key += [
                type(argument) is not int and address & 15 != 0
                for argument, address in zip(arguments, plain, strict=True)
            ]
        device = arguments[0].get_device()
        key.append(device)
        found = self.found.get(tuple(key))
        if found is not None:
            compiled, rest = found
            plain += rest
            _run(compiled, self.grid, device, plain)
            return
        launched = self.kernel.launch(self.grid, (*arguments, *self.numbers), self.constants)
        if launched is not None:
            compiled, names = launched
            rest = [*self.numbers, *(self.constants[name] for name in names)]
            self.found[tuple(key)] = compiled, rest


_address: Callable[[Any], int] = Tensor.data_ptr
_dtype: Callable[[Any], Any] = operator.attrgetter("dtype")


def _addresses(arguments: tuple[Any, ...]) -> tuple[list[Any], list[Any], int]:
    """What a kernel is given for tensors and seeds, by what it was compiled, all addresses."""
    plain: list[Any] = []
    key: list[Any] = []
    bits = 0
    for argument in arguments:
        if type(argument) is int:
            plain.append(argument)
            key.append(-(2**31) <= argument < 2**31)
        else:
            plain.append(address := argument.data_ptr())
            bits |= address
            key.append(argument.dtype)
    return plain, key, bits


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
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", hook):
            return True
    return False


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
