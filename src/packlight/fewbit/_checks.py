"""Checks that every few-bit function makes before any work."""

import torch
from torch import Tensor

from packlight.errors import DoubleBackwardError, InputError
from packlight.fewbit.codebook import Codebook

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(x: object, function: str) -> None:
    """Raises `InputError` unless `x` is a tensor of a floating dtype that the kernels know."""
    if not isinstance(x, Tensor):
        raise InputError(f"{function} takes a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise InputError(
            f"{function} takes float32, bfloat16, float16 or float64, got {x.dtype};"
            " convert it first, or use torch's own function"
        )


def check_codebook(codebook: object) -> Codebook:
    """`codebook` if it is one, else an `InputError`."""
    if not isinstance(codebook, Codebook):
        raise InputError(
            f"codebook={codebook!r} is not a Codebook; fit_codebook(f, bits) makes one"
        )
    return codebook


def needs_codes(x: Tensor) -> bool:
    """Whether a backward pass may come, so that something must be kept."""
    return torch.is_grad_enabled() and x.requires_grad


def refuse_second_derivative() -> None:
    """Raises when a backward pass is itself being recorded (`create_graph=True`)."""
    # Under torch.compile the tracer records with gradients on, and refuses double backward itself.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise DoubleBackwardError(
            "a few-bit layer keeps codes of its derivative and cannot be differentiated twice;"
            " use the torch layer here (model.eval() does so too), or drop create_graph=True"
        )
