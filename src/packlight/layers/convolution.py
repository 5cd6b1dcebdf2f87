"""Convolutions that keep a pack of their input, or nothing where something stands for it already.

The forward is torch's. Gradients with respect to input and bias are exact; the weight's
is that of the rebuilt input: unbiased with stochastic rounding where the pack is of the input
itself. A convolution behind a batch norm of `fixed_point` or of this package, with or without the
`relu` between them, and convolutions that read one tensor keep one pack in all. Where the weight
needs no gradient, torch keeps no input and the plain function runs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch, sharing
from packlight._checks import (
    check_tensor,
    needs_gradient,
    numbers,
    refuse_second_derivative,
    saved_with_weight,
    without_autocast,
)
from packlight._gradients import as_dtype, recast
from packlight._overwrite import writable
from packlight.errors import InputError
from packlight.layers import shape_only
from packlight.layers.computed import is_of_parameters
from packlight.pack import Pack
from packlight.quantiser import KEEPS, Quantiser, pack_input, worth_packing
from packlight.reading import reader

Size = int | Sequence[int]

_PLAIN: dict[tuple[int, bool], Callable[..., Tensor]] = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}
_backward = torch.ops.aten.convolution_backward.default


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class Geometry:
    """All of a convolution but its tensors, one number an axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain = _PLAIN[len(self.stride), self.transposed]
        if self.transposed:
            output = (self.output_padding, self.groups, self.dilation)
            return plain(x, weight, bias, self.stride, self.padding, *output)
        return plain(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(
        self, grad_output: Tensor, x: Tensor, weight: Tensor, mask: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, weight and bias, those that `mask` asks for."""
        single = x.dim() == len(self.stride) + 1  # no batch dimension
        if single:
            grad_output, x = grad_output.unsqueeze(0), x.unsqueeze(0)
        features = grad_output.shape[1]
        dx, dweight, dbias = _backward(
            grad_output, x, weight, [features], self.stride, self.padding, self.dilation,
            self.transposed, self.output_padding, self.groups, mask,
        )  # fmt: skip
        return dx.squeeze(0) if single and mask[0] else dx, dweight, dbias

    def input_gradient(self, grad_output: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """That of an input of this shape, which need not be there.

        A convolution the other way is the same kernel as `backward`'s, which asks a tensor for the
        shape and cuDNN's copies the gradient to the layout of that tensor.
        """
        axes, others = len(self.stride), (0,) * len(self.stride)
        single = grad_output.dim() == axes + 1
        dy = grad_output.unsqueeze(0) if single else grad_output
        if not self.transposed:  # of the sizes that this window makes one, the input's
            given = zip(
                shape[-axes:], dy.shape[2:], weight.shape[2:], self.stride, self.padding,
                self.dilation, strict=True,
            )  # fmt: skip
            others = tuple(n - (m - 1) * s + 2 * p - d * (k - 1) - 1 for n, m, k, s, p, d in given)
        window = (self.stride, self.padding, self.dilation, not self.transposed, others)
        with without_autocast(dy.device.type):
            dx = torch.convolution(dy, weight, None, *window, self.groups)
        return dx.squeeze(0) if single else dx


# Of an input that does not stay in memory while the gradient with respect to it is computed. Below,
# a further operator costs more time than the memory is worth.
LARGE = 64 * 2**20


def convolution_gradients(
    geometry: Geometry,
    grad_output: Tensor,
    rebuild: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    shape: torch.Size,
    weight: Tensor,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """`Geometry.backward` of the input that is rebuilt from `tensors`."""
    x = rebuild(grad_output.dtype, *tensors)
    if x.shape != shape:
        x = x.reshape(shape)
    if x.nbytes < LARGE or not mask[0] or _torch.is_traced() or _is_read_for_its_layout(x, weight):
        return geometry.backward(grad_output, x, weight, mask)
    if geometry.groups > 1:  # torch has kernels for the gradient of a convolution of each channel
        return geometry.backward(grad_output, x, weight, mask)
    _, *of_parameters = geometry.backward(grad_output, x, weight, [False, *mask[1:]])
    del x
    return geometry.input_gradient(grad_output, weight, shape), *of_parameters


def _is_read_for_its_layout(x: Tensor, weight: Tensor) -> bool:
    """Whether x alone tells torch that the convolution is to be channels-last."""
    layout = _torch.memory_format(x)
    return layout != torch.contiguous_format and layout != _torch.memory_format(weight)


class _Convolution(torch.autograd.Function):
    """y = weight * x + bias; keeps the weight and the pack of x.

    `computed` rebuilds a weight that is no parameter, as of a weight norm, from the first tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        rebuild: Callable[..., Tensor],
        computed: tuple[Callable[..., Tensor], int] | None,
        *tensors: Tensor,
    ) -> Tensor:
        # Autocast casts in here, and keeps no copy.
        y = writable(geometry.forward(x, weight, bias))
        ctx.save_for_backward(weight if computed is None else None, *tensors)
        ctx.geometry, ctx.rebuild, ctx.shape, ctx.computed = geometry, rebuild, x.shape, computed
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        weight, *tensors = saved_with_weight(ctx)
        if ctx.computed is not None:
            rebuild, parts = ctx.computed
            weight, tensors = rebuild(ctx.dtypes[1], *tensors[:parts]), tensors[parts:]
        needs = _torch.needed_gradients(ctx)
        mask = list(needs[:3])
        gradients = convolution_gradients(
            ctx.geometry, grad_output, ctx.rebuild, tensors, ctx.shape,
            recast(weight, grad_output), mask,
        )  # fmt: skip
        pairs = zip(gradients, ctx.dtypes, mask, strict=True)
        cast = [
            None if g is None or not wanted else as_dtype(g, dtype) for g, dtype, wanted in pairs
        ]
        return *cast, *[None] * (len(needs) - len(cast))


_apply: Callable[..., Tensor] = _torch.applied(_Convolution)


def _check_shapes(name: str, axes: int, x: Tensor, weight: Tensor, geometry: Geometry) -> None:
    if x.dim() not in (axes + 1, axes + 2):
        raise InputError(
            f"{name} takes {axes + 1} or {axes + 2} dimensions, got shape {tuple(x.shape)}"
        )
    if weight.dim() != axes + 2:
        raise InputError(
            f"{name} takes a weight of {axes + 2} dimensions, got shape {tuple(weight.shape)}"
        )
    channels = weight.shape[0] if geometry.transposed else weight.shape[1] * geometry.groups
    if x.shape[-axes - 1] != channels:
        raise InputError(
            f"{name}: the input has {x.shape[-axes - 1]} channels, a weight of shape"
            f" {tuple(weight.shape)} with groups={geometry.groups} takes {channels}"
        )


def _is_packed(x: Tensor, weight: Tensor, method: Quantiser) -> bool:
    return needs_gradient(weight) and worth_packing(x, method)


def _same_padding(weight: Tensor, dilation: Sequence[int]) -> list[int]:
    """What "same" adds in all, an axis."""
    return [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    axes: int,
    method: Quantiser,
    output_padding: Size | None = None,
) -> Tensor:
    """What the functions and the layers share. With `output_padding` it is a transposed one."""
    transposed = output_padding is not None
    name = f"conv_transpose{axes}d" if transposed else f"conv{axes}d"
    check_tensor(x, name)
    strides, dilations = numbers(stride, axes, "stride"), numbers(dilation, axes, "dilation")
    added: list[int] | None = None
    if isinstance(padding, str):
        if transposed or padding not in ("same", "valid"):
            raise InputError(f'{name}: padding={padding!r} is no number, "same" or "valid"')
        if padding == "same":
            if max(strides) > 1:
                raise InputError(f'{name}: padding="same" needs stride 1, got stride={stride!r}')
            added = _same_padding(weight, dilations)
        paddings = tuple(total // 2 for total in added) if added else (0,) * axes
    else:
        paddings = numbers(padding, axes, "padding")
    outputs = (0,) * axes
    if output_padding is not None:
        outputs = numbers(output_padding, axes, "output_padding")
    geometry = Geometry(strides, paddings, dilations, transposed, outputs, groups)
    _check_shapes(name, axes, x, weight, geometry)
    if added and any(total % 2 for total in added):
        # An odd number: torch, too, adds the one that is left at the far end.
        widths = [width for total in reversed(added) for width in (0, total % 2)]
        x = pad(x, weight, widths, "constant", method)
    if not _is_packed(x, weight, method):
        return geometry.forward(x, weight, bias)
    kept = pack_input(x, method)
    rebuild = reader(kept.reading, kept.rebuild)
    # A leaf is held by whoever made it. A tracer cannot tell one from a weight that is computed.
    held = _torch.is_traced() or weight.is_leaf or is_of_parameters(weight)
    if held or not worth_packing(weight, method):
        return _apply(x, weight, bias, geometry, rebuild, None, *kept.tensors)
    own = pack_input(weight, method.for_scores())
    computed = own.rebuild, len(own.tensors)
    return _apply(x, weight, bias, geometry, rebuild, computed, *own.tensors, *kept.tensors)


# --- Padding, which a rebuilt input repeats.


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class PaddedRebuild:
    """The padded x from what is kept of x."""

    input: Callable[..., Tensor]
    shape: tuple[int, ...]  # of x
    widths: tuple[int, ...]
    mode: str

    def __call__(self, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        x = self.input(dtype, *tensors).reshape(self.shape)
        return F.pad(x, self.widths, self.mode).to(dtype)  # float32 where autocast is still on


def pad(x: Tensor, weight: Tensor, widths: Sequence[int], mode: str, method: Quantiser) -> Tensor:
    """`torch.nn.functional.pad` for a convolution with this weight, which packs x.

    The pack is of x, not of the padded tensor, so that others who read x share it.
    """
    padded = shape_only.pad(x, tuple(widths), mode)
    if not _is_packed(x, weight, method):
        return padded
    kept = pack_input(x, method)
    rebuild = PaddedRebuild(kept.rebuild, tuple(x.shape), tuple(widths), mode)
    # Until the convolution reads the padded tensor, nothing else holds a new pack.
    sharing.note_held(padded, Pack(rebuild, tuple(padded.shape), kept.tensors, kept.grade))
    return padded


# --- The functions of torch, by their dimensions.


def _convolution(axes: int) -> Callable[..., Tensor]:
    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        *,
        method: Quantiser,
    ) -> Tensor:
        sizes = (stride, padding, dilation, groups, axes)
        return convolve(input, weight, bias, *sizes, method)

    return convolution


def _transposed(axes: int) -> Callable[..., Tensor]:
    def transposed(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        dilation: Size = 1,
        *,
        method: Quantiser,
    ) -> Tensor:
        sizes = (stride, padding, dilation, groups, axes)
        return convolve(input, weight, bias, *sizes, method, output_padding)

    return transposed


CONVOLUTIONS = {axes: _convolution(axes) for axes in (1, 2, 3)}
TRANSPOSED = {axes: _transposed(axes) for axes in (1, 2, 3)}
