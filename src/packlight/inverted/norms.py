"""Inverted norms as functions: torch.nn.functional's names and arguments, and `exact_channels`.

Each computes what torch's function computes. What differs is what is kept for the backward pass:
the output y, the very tensor that is returned and that a following Linear or Conv keeps too, and
`rstd` (32 bits a row, a channel or a group), in place of the input. With g = dy gamma and

    x_hat = (y - beta) / gamma,
    dx = rstd (g - mean(g) - x_hat mean(g x_hat)),  dgamma = sum dy x_hat,  dbeta = sum dy

(RMSNorm without mean(g)). Exact but for the rounding of y: x_hat has an error of up to
u (|x_hat| + |beta / gamma|), where u is half a unit of the dtype in which y is kept: 2^-24 in
float32, 2^-11 in float16, 2^-8 in bfloat16.

- **Ill-posed channels** (large |beta / gamma|, vanishing gamma; see `ill_posed`) are kept exactly:
  x_hat of these channels alone, k / width of the size of y. Where they are more than half, torch's
  own function runs and keeps its input. `exact_channels` names them, as int64 indices into the
  flattened weight. Where it is not given, the weights are read to find them, which waits for the
  device; the modules do so once in a while. Under `torch.compile` nothing can be read: there a
  function without `exact_channels` runs torch's own, where it has a weight or a bias.
- A channel that is not kept exactly and whose gamma is 0 has a NaN gradient, never a wrong one.
- **Under autocast** in 16 bits torch may return y in float32, of which the next layer keeps a cast.
  Then the function makes the cast itself, keeps it, and leaves a note of it on y; `inverted.Linear`
  and `inverted.Conv1d/2d/3d` read the cast and keep this same tensor. x_hat has the rounding of the
  16 bits. Any other layer works on y as ever and keeps a cast of its own. The gradient that comes
  through the cast does not pass y: `y.retain_grad()` and `torch.autograd.grad(loss, y)` see what
  comes through y itself.
- The output, weight and bias must stay as they are until the backward pass: modified in place, they
  make it raise, as any saved tensor does.

Where no gradient is asked for nothing is kept and the plain torch function runs. A second
derivative raises `DoubleBackwardError`. Errors: `InputError` for tensors that are not float32,
bfloat16, float16 or float64; for other arguments torch's own.

Source: the in-place LayerNorm of Tempo (NeurIPS 2022), `memory_efficient` norms of Apex,
InPlace-ABN (CVPR 2018) for BatchNorm. The exact channels and the shared cast are ours.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch, sharing
from packlight._checks import autocast_dtype, check_tensor
from packlight.errors import InputError
from packlight.inverted.norm_functions import norm_channels, norm_rows
from packlight.inverted.norm_ill_posed import (
    WELL_POSED,
    Verdict,
    verdict_of_channels,
    verdict_of_weights,
)
from packlight.packing.layout import compute_dtype

# What to keep exactly when the output is kept in this dtype; None where that cannot be known.
FindVerdict = Callable[[torch.dtype], Verdict | None]

_SHORT = (torch.bfloat16, torch.float16)


# --- What all norms decide before any work.


def _may_invert(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether something is to be kept, and these are tensors that torch's norms take together.

    Where they are not, torch's own function says what is wrong.
    """
    tensors = [x, *(p for p in parameters if p is not None)]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors) or not x.numel():
        return False
    allowed = {x.dtype, torch.float32} if x.dtype in _SHORT else {x.dtype}
    if torch.is_autocast_enabled(x.device.type if not x.is_meta else "cpu"):
        allowed |= {torch.float32, *_SHORT}
    return all(t.device == x.device and t.dtype in allowed for t in tensors)


def _dtypes(
    x: Tensor, name: str, probe: Callable[[Tensor], Tensor]
) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype of the output, and that of the cast which 16-bit autocast makes of it."""
    dtype, kind = autocast_dtype(x, name, probe), x.device.type
    if kind == "meta" or dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return dtype, None
    cast = torch.get_autocast_dtype(kind)
    return dtype, cast if cast in _SHORT else None


@_torch.one_node
def _noted(norm: Callable[..., Any], cast: torch.dtype | None, *arguments: Any) -> Tensor:
    """The output of a norm, with the note of its cast where there is one."""
    result = norm(*arguments)
    if cast is None:
        y: Tensor = result
        return y
    y, narrow = result
    sharing.note_cast(y, narrow)
    return y


def verdict_finder(
    weight: Tensor | None, bias: Tensor | None, exact_channels: Tensor | None
) -> FindVerdict:
    """What a function keeps exactly: the channels given to it, else those that its weights say."""

    def find(dtype: torch.dtype) -> Verdict | None:
        width = 0 if weight is None and bias is None else _numel(weight, bias)
        if exact_channels is not None:
            return verdict_of_channels(exact_channels, width)
        if width == 0:
            return WELL_POSED
        return None if _torch.is_traced() else verdict_of_weights(weight, bias, dtype)

    return find


def _numel(weight: Tensor | None, bias: Tensor | None) -> int:
    given = bias if weight is None else weight
    return 0 if given is None else given.numel()


def _check_channels(function: str, channels: Tensor | None) -> None:
    if channels is None:
        return
    known = isinstance(channels, Tensor)
    if not known or channels.dtype != torch.int64 or channels.dim() != 1:
        raise InputError(
            f"{function}: exact_channels is {channels!r}; expected a one-dimensional int64 tensor"
            " of channel numbers, or None to find them"
        )


# --- LayerNorm and RMSNorm.


def row_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    centred: bool,
    find_verdict: FindVerdict,
) -> Tensor:
    """`layer_norm` if `centred`, else `rms_norm`; `find_verdict` says what is kept exactly."""
    name = "layer_norm" if centred else "rms_norm"
    check_tensor(input, name)
    if eps is None:
        eps = torch.finfo(compute_dtype(input)).eps

    def plain() -> Tensor:
        if centred:
            return F.layer_norm(input, normalized_shape, weight, bias, eps)
        return F.rms_norm(input, normalized_shape, weight, eps)

    fits = tuple(input.shape[max(0, input.dim() - len(normalized_shape)) :]) == normalized_shape
    fits = fits and all(p is None or tuple(p.shape) == normalized_shape for p in (weight, bias))
    if not normalized_shape or not fits or not _may_invert(input, weight, bias):
        return plain()
    dtype, cast = _dtypes(
        input,
        name,
        lambda empty: (
            F.layer_norm(empty.new_empty(1, 1), (1,))
            if centred
            else F.rms_norm(empty.new_empty(1, 1), (1,))
        ),
    )
    verdict = find_verdict(cast or dtype)
    if verdict is None or verdict.plain:
        return plain()
    arguments = (verdict.channels, normalized_shape, eps, centred, dtype, cast)
    return _noted(norm_rows, cast, input, weight, bias, *arguments)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    exact_channels: Tensor | None = None,
) -> Tensor:
    """Layer norm over the last dimensions. Keeps the output and 32 bits a row; exact to rounding.

    Without `exact_channels` the weights are read to find them, which waits for the device.
    """
    _check_channels("layer_norm", exact_channels)
    find_verdict = verdict_finder(weight, bias, exact_channels)
    return row_norm(input, tuple(normalized_shape), weight, bias, eps, True, find_verdict)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    exact_channels: Tensor | None = None,
) -> Tensor:
    """RMS norm over the last dimensions. Keeps the output and 32 bits a row; exact to rounding.

    Without `exact_channels` the weights are read to find them, which waits for the device.
    """
    _check_channels("rms_norm", exact_channels)
    find_verdict = verdict_finder(weight, None, exact_channels)
    return row_norm(input, tuple(normalized_shape), weight, None, eps, False, find_verdict)


# --- BatchNorm, GroupNorm and InstanceNorm.


def _channel_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    arguments: tuple[Any, ...],
    probe: Callable[[Tensor], Tensor],
    plain: Callable[[], Tensor],
    find_verdict: FindVerdict,
) -> Tensor:
    fits = input.dim() >= 2
    fits = fits and all(p is None or tuple(p.shape) == (input.shape[1],) for p in (weight, bias))
    if not fits or not _may_invert(input, weight, bias):
        return plain()
    dtype, cast = _dtypes(input, kind + "_norm", probe)
    verdict = find_verdict(cast or dtype)
    if verdict is None or verdict.plain:
        return plain()
    given = (verdict.channels, kind, arguments, dtype, cast)
    return _noted(norm_channels, cast, input, weight, bias, *given)


def batch_norm_by_verdict(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    find_verdict: FindVerdict,
) -> Tensor:
    """`batch_norm`; `find_verdict` says what is kept exactly."""
    check_tensor(input, "batch_norm")

    def plain() -> Tensor:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

    if not training or input.dim() < 2 or input.numel() <= input.shape[1]:
        return plain()  # torch refuses a batch of one value a channel
    return _channel_norm(
        input,
        weight,
        bias,
        "batch",
        (running_mean, running_var, momentum, eps),
        lambda empty: F.batch_norm(empty.new_empty(2, 1), None, None, training=True),
        plain,
        find_verdict,
    )


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    exact_channels: Tensor | None = None,
) -> Tensor:
    """Batch norm of dimension 1. Keeps the output and 32 bits a channel; exact to rounding.

    Updates the running statistics as torch does. Not in training: torch's own function. Without
    `exact_channels` the weights are read to find them, which waits for the device.
    """
    _check_channels("batch_norm", exact_channels)
    find_verdict = verdict_finder(weight, bias, exact_channels)
    return batch_norm_by_verdict(
        input, running_mean, running_var, weight, bias, training, momentum, eps, find_verdict
    )


def group_norm_by_verdict(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    find_verdict: FindVerdict,
) -> Tensor:
    """`group_norm`; `find_verdict` says what is kept exactly."""
    check_tensor(input, "group_norm")

    def plain() -> Tensor:
        return F.group_norm(input, num_groups, weight, bias, eps)

    shape = input.shape
    if input.dim() < 2 or num_groups < 1 or shape[1] % num_groups:
        return plain()
    if math.prod(shape) <= shape[0] * num_groups and shape[0] * shape[1] <= num_groups:
        return plain()  # torch refuses one value a group
    return _channel_norm(
        input,
        weight,
        bias,
        "group",
        (num_groups, eps),
        lambda empty: F.group_norm(empty.new_empty(1, 1, 2), 1),
        plain,
        find_verdict,
    )


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    exact_channels: Tensor | None = None,
) -> Tensor:
    """Group norm of dimension 1. Keeps the output and 32 bits a group; exact to rounding.

    Without `exact_channels` the weights are read to find them, which waits for the device.
    """
    _check_channels("group_norm", exact_channels)
    find_verdict = verdict_finder(weight, bias, exact_channels)
    return group_norm_by_verdict(input, num_groups, weight, bias, eps, find_verdict)


def instance_norm_by_verdict(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    find_verdict: FindVerdict,
) -> Tensor:
    """`instance_norm`; `find_verdict` says what is kept exactly."""
    check_tensor(input, "instance_norm")

    def plain() -> Tensor:
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )

    if not use_input_stats or input.dim() < 3 or math.prod(input.shape[2:]) == 1:
        return plain()  # torch refuses one value an instance
    return _channel_norm(
        input,
        weight,
        bias,
        "instance",
        (running_mean, running_var, momentum, eps),
        lambda empty: F.instance_norm(empty.new_empty(1, 1, 2)),
        plain,
        find_verdict,
    )


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    exact_channels: Tensor | None = None,
) -> Tensor:
    """Instance norm of dimension 1. Keeps the output, 32 bits an instance; exact to rounding.

    Updates the running statistics as torch does. With `use_input_stats=False`: torch's own
    function. Without `exact_channels` the weights are read to find them, which waits for the
    device.
    """
    _check_channels("instance_norm", exact_channels)
    find_verdict = verdict_finder(weight, bias, exact_channels)
    return instance_norm_by_verdict(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, find_verdict
    )
