"""Launching Triton kernels with little work on the CPU.

Triton binds arguments, specialises and hashes at every call: about 80 microseconds on the CPU of a
GPU server, several times what a small kernel takes. `@quick` above `@triton.jit` keeps each
compiled kernel by what it was specialised for, and further calls go to it directly.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class quick:
    """`kernel[grid](*arguments, **constants, num_warps=n)` of a `@triton.jit` function, sooner."""

    def __init__(self, kernel: Any) -> None:
        self.__name__ = kernel.__name__
        self.__doc__ = kernel.__doc__
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], tuple[Any, tuple[str, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(*arguments: Any, **constants: Any) -> None:
            key = (*_specialisation(arguments), *constants, *map(_identity, constants.values()))
            found = self.compiled.get(key)
            if found is not None:
                compiled, names = found
                whole_grid = (*grid, 1, 1)[:3]
                compiled[whole_grid](*arguments, *[constants[name] for name in names])
                return
            compiled = self.kernel[grid](*arguments, **constants)
            if hasattr(compiled, "function"):  # the interpreter compiles nothing
                names = tuple(self.kernel.arg_names[len(arguments) :])
                self.compiled[key] = compiled, names

        return call


def _specialisation(arguments: tuple[Any, ...]) -> list[Any]:
    """What Triton compiles a kernel anew for: devices, dtypes, alignment, kinds of integers."""
    key: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            key += (argument.dtype, argument.get_device(), argument.data_ptr() % 16 == 0)
        elif isinstance(argument, int):  # 1 becomes a constant; 32 and 64 bits differ
            key.append((argument % 16 == 0, argument == 1, -(2**31) <= argument < 2**31))
        else:
            key.append(type(argument))
    return key


def _identity(constant: Any) -> Any:
    """A constant by value; functions that are constants by identity: Triton's are slow to hash."""
    return id(constant) if callable(constant) else constant
