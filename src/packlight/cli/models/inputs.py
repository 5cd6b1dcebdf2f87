"""What is asked of a model's inputs: sizes, shapes, dtypes, and values of its configuration."""

import ast
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packlight.errors import InputError
from packlight.method_files import is_beyond_64_bits, shortened

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# What a size counts. Defaults: batch 1, sequence 512 or the longest, image as in the configuration.
SIZES = ("batch", "sequence", "image")

_SHAPE = re.compile(r"(\d+(?:x\d+)*)(?::(\w+))?")


class Shape(NamedTuple):
    """A tensor to be made as an input; None as dtype is that of the model's parameters."""

    sizes: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Inputs:
    """Sizes by name, from which inputs are made, or the shapes of the positional inputs."""

    sizes: dict[str, int] = field(default_factory=dict)
    shapes: tuple[Shape, ...] = ()


def parse_inputs(texts: Iterable[str]) -> Inputs:
    """`batch=8,sequence=1024`, or shapes: `8x3x224x224`, `8x128:int64`."""
    sizes: dict[str, int] = {}
    shapes: list[Shape] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, equals, value = part.partition("=")
        if equals:
            _check_size(name, value, sizes)
            sizes[name] = int(value)
        else:
            shapes.append(_shape(part))
    if sizes and shapes:
        raise InputError("an input is either sizes, batch=8,sequence=1024, or shapes, 8x3x224x224")
    return Inputs(sizes, tuple(shapes))


def _check_size(name: str, value: str, sizes: Mapping[str, int]) -> None:
    if name not in SIZES:
        raise InputError(
            f"unknown size {shortened(name)}; expected {', '.join(SIZES)}, or a shape, 8x128"
        )
    if name in sizes:
        raise InputError(f"{name} is given twice; give it once, by --input or by its own name")
    if not re.fullmatch(r"0*[1-9]\d*", value):
        raise InputError(f"{name}={value[:_DIGITS]} is not a positive whole number")
    _size(value)


def _shape(text: str) -> Shape:
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise InputError(
            f"input {shortened(text)} is neither a size, batch=8, nor a shape, 8x3x224x224"
            " or 8x128:int64"
        )
    sizes = tuple(map(_size, found[1].split("x")))
    if found[2] is None:
        return Shape(sizes, None)
    dtype = DTYPES.get(found[2], getattr(torch, found[2], None))
    if not isinstance(dtype, torch.dtype):
        raise InputError(
            f"input {shortened(text)}: {found[2]} is no dtype; such as int64, float32, bf16"
        )
    return Shape(sizes, dtype)


# Digits of a size: no tensor has more elements in one dimension than fit into nine.
_DIGITS = 9


def _size(digits: str) -> int:
    if len(digits.lstrip("0")) > _DIGITS:
        raise InputError(f"a size of {len(digits)} digits is too large; at most {_DIGITS} fit")
    return int(digits)


def input_of(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if math.prod(shape) > 2**56:
        raise InputError(f"an input of {shape_text(shape)} has more elements than any memory")
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def parse_value(text: str) -> Any:
    """The value of a configuration's entry: a Python literal, or else the text itself."""
    try:
        value = ast.literal_eval(text)
        if is_beyond_64_bits(value):
            raise InputError(f"{shortened(text)} is a number beyond 64 bits")
        return value
    except InputError:
        raise
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        if len(text) > 1000:
            raise InputError(f"{shortened(text)} has {len(text)} characters") from None
        return {"true": True, "false": False, "null": None}.get(text, text)


def short_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
