"""What layers do by operators of group quantisation, in place of plain operations and `keep`."""

from collections.abc import Callable

import torch
from torch import Tensor

from packlight._seeds import Seed, operands
from packlight.groupquant import channel_norm_ops, ops
from packlight.groupquant.grouping import Groups, row_group_size
from packlight.groupquant.method import GroupQuant
from packlight.groupquant.packs import AppliedCodes, GatedCodes, ScaledRows
from packlight.groupquant.traced import operators
from packlight.layers import norms, post_norm
from packlight.layers.channel_norms import rebuild_batch, rebuild_group
from packlight.quantiser import Fused

Kept = tuple[Tensor, ...] | list[Tensor]

# ---- activations and gated units -----------------------------------------------------------------


def _activation(
    x: Tensor, name: str, parameters: tuple[float, ...], method: GroupQuant, seed: Seed
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = ops.activation(x, name, parameters, method.groups, *operands(seed))
    return found


def _activation_backward(
    grad_output: Tensor,
    kept: Kept,
    name: str,
    parameters: tuple[float, ...],
    stride: tuple[int, ...],
    method: GroupQuant,
) -> Tensor:
    function = (name, parameters)
    dx: Tensor = ops.activation_backward(grad_output, *kept, *function, stride, method.groups)
    return dx


def _activation_over(
    x: Tensor, name: str, parameters: tuple[float, ...], method: GroupQuant, seed: Seed
) -> tuple[Tensor, ...]:
    return x, *ops.activation_(x, name, parameters, method.groups, *operands(seed))


def _activation_backward_over(
    grad_output: Tensor,
    kept: Kept,
    name: str,
    parameters: tuple[float, ...],
    _: tuple[int, ...],
    method: GroupQuant,
) -> Tensor:
    ops.activation_backward_(grad_output, *kept, name, parameters, method.groups)
    return grad_output


def _activation_rebuild(
    y: Tensor, name: str, parameters: tuple[float, ...], method: GroupQuant
) -> AppliedCodes:
    return AppliedCodes(method, tuple(y.shape), y.stride(), name, parameters)


def _gated(
    gate: Tensor, up: Tensor, name: str, method: GroupQuant, seed: Seed, _: Seed
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = ops.gated(gate, up, name, method.groups, *operands(seed))
    return found


def _gated_backward(
    grad_output: Tensor, kept: Kept, name: str, stride: tuple[int, ...], method: GroupQuant
) -> tuple[Tensor, Tensor]:
    dgate, dup = ops.gated_backward(grad_output, *kept, name, stride, method.groups, True)
    return dgate, dup


def _gated_backward_over(
    grad_output: Tensor, kept: Kept, name: str, _: tuple[int, ...], method: GroupQuant
) -> tuple[Tensor, Tensor]:
    dup: Tensor = ops.gated_backward_(grad_output, *kept, name, method.groups)
    return grad_output, dup


def _gated_rebuild(
    shape: tuple[int, ...], stride: tuple[int, ...], name: str, method: GroupQuant
) -> GatedCodes:
    return GatedCodes(method, shape, stride, name)


# ---- norms of rows: rows narrower than a group have smaller groups -------------------------------
#
# Channels are scaled before they are packed, by plain operations.


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    method: GroupQuant,
    seed: Seed,
    rounded_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], Kept]:
    if method.scales_channels:
        return norms.plain_forward(x, weight, bias, eps, center, method, seed)
    width = x.shape[-1]
    groups = _row_groups(width, method)
    run = operators(width, groups)[0]
    y, codes, scales, rstd, *copies = run(
        x, width, weight, bias, eps, center, groups, *operands(seed), rounded_to
    )
    return y, rstd, copies, (codes, scales)


def _rounded_norm(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, method: GroupQuant, seed: Seed
) -> tuple[Tensor, Tensor, list[Tensor], Kept]:
    if method.scales_channels:
        return norms.plain_rounded(x, weight, eps, dtype, method, seed)
    return _norm(x, weight, None, eps, False, method, seed, dtype)


def _norm_backward(
    grad_output: Tensor,
    kept: Kept,
    rstd: Tensor,
    weight: Tensor | None,
    center: bool,
    need_weight: bool,
    need_bias: bool,
    method: GroupQuant,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if method.scales_channels:
        given = (rstd, weight, center, need_weight, need_bias, method, added)
        return norms.adding(norms.plain_backward)(grad_output, tuple(kept), *given)
    width = grad_output.shape[-1]
    groups = _row_groups(width, method)
    run = operators(width, groups)[1]
    flags = (center, need_weight, need_bias, groups, added)
    dx, dweight, dbias = run(grad_output, *kept, rstd, weight, *flags)
    return dx, dweight, dbias


def _post_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float,
    eps: float,
    dtype: torch.dtype,
    method: GroupQuant,
    seeds: tuple[Seed, Seed],
) -> tuple[Tensor, Tensor, list[Tensor], Kept, Tensor | None]:
    if method.scales_channels:
        return post_norm.plain_forward(x, residual, weight, bias, p, eps, dtype, method, seeds)
    groups = _row_groups(x.shape[-1], method)
    drawn = (*operands(seeds[0]), *operands(seeds[1]))
    y, codes, scales, rstd, *copies, mask = ops.post_norm(
        x, residual, weight, bias, p, eps, dtype, groups, *drawn
    )
    return y, rstd, copies, (codes, scales), mask


def _post_norm_backward(
    grad_output: Tensor,
    kept: Kept,
    rstd: Tensor,
    weight: Tensor,
    mask: Tensor,
    p: float,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool],
    method: GroupQuant,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if method.scales_channels:
        given = (rstd, weight, mask, p, dtypes, needs, method)
        return post_norm.plain_backward(grad_output, tuple(kept), *given)
    groups = _row_groups(grad_output.shape[-1], method)
    dx, dresidual, sums = ops.post_norm_backward(
        grad_output, *kept, rstd, weight, mask, p, *dtypes, *needs, groups
    )
    if not p and dtypes[0] == dtypes[1]:
        dx = dresidual
    rows = sums.unbind()
    return dx, dresidual, rows[0] if needs[0] else None, rows[-1] if needs[1] else None


def _norm_rebuild(y: Tensor, width: int, method: GroupQuant) -> Callable[..., Tensor]:
    if method.scales_channels:
        return norms.plain_rebuild(y, width, method)
    return ScaledRows(tuple(y.shape), y.stride(), width, _row_groups(width, method))


def _row_groups(width: int, method: GroupQuant) -> Groups:
    bits, group_size, code = method.groups
    size = row_group_size(width, group_size, code)
    assert size is not None  # `keeps_rows` said so
    return bits, size, code


# ---- norms of channels ---------------------------------------------------------------------------


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    method: GroupQuant,
    seed: Seed,
) -> tuple[Tensor, ...]:
    given = (running_mean, running_var, momentum, eps, method.groups)
    y, codes, scales, table = channel_norm_ops.batch_norm(x, weight, bias, *given, *operands(seed))
    return y, table, codes, scales


def _batch_norm_backward(
    grad_output: Tensor, kept: Kept, eps: float, stride: tuple[int, ...], method: GroupQuant
) -> tuple[Tensor, Tensor, Tensor]:
    table, codes, scales = kept
    layout = (eps, stride, method.groups)
    dx, dgamma, dbeta = channel_norm_ops.batch_norm_backward(
        grad_output, codes, scales, table, *layout
    )
    return dx, dgamma, dbeta


def _group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    method: GroupQuant,
    seed: Seed,
) -> tuple[Tensor, ...]:
    given = (num_groups, weight, bias, eps, method.groups)
    y, codes, scales, table, rstd = channel_norm_ops.group_norm(x, *given, *operands(seed))
    return y, table, rstd, codes, scales


def _group_norm_backward(
    grad_output: Tensor, kept: Kept, eps: float, stride: tuple[int, ...], method: GroupQuant
) -> tuple[Tensor, Tensor, Tensor]:
    table, rstd, codes, scales = kept
    layout = (eps, stride, method.groups)
    dx, dgamma, dbeta = channel_norm_ops.group_norm_backward(
        grad_output, codes, scales, table, rstd, *layout
    )
    return dx, dgamma, dbeta


GroupQuant.fused = {
    "activation": Fused(_activation, _activation_backward, _activation_rebuild),
    "activation_": Fused(_activation_over, _activation_backward_over, _activation_rebuild),
    "batch_norm": Fused(_batch_norm, _batch_norm_backward, rebuild_batch),
    "gated": Fused(_gated, _gated_backward, _gated_rebuild),
    "gated_": Fused(_gated, _gated_backward_over, _gated_rebuild),
    "group_norm": Fused(_group_norm, _group_norm_backward, rebuild_group),
    "norm": Fused(_norm, _norm_backward, _norm_rebuild),
    "rounded_norm": Fused(_rounded_norm, _norm_backward, _norm_rebuild),
    "post_norm": Fused(_post_norm, _post_norm_backward, _norm_rebuild),
}
