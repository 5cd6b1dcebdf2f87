"""What `FewBit` makes of the layers of torch.nn, and of calls of torch's functions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight import _torch
from packlight.errors import CannotConvertError
from packlight.fewbit import functional, modules, pooling, slopes
from packlight.fewbit.codebook import why_of_another
from packlight.fewbit.dropout import dropout_as_torch
from packlight.fewbit.method import FewBit
from packlight.groupquant.method import GroupQuant
from packlight.groupquant.modules import PReLU
from packlight.layers.prelu import prelu
from packlight.method import rows


def function_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What an activation layer computes, without hooks, and with nothing written in place."""
    return lambda x: type(module).forward(module, x * 1)


def check_codebook_is_of(method: FewBit, module: nn.Module) -> None:
    """Raises `CannotConvertError` where the method's codebook is not one of what a layer computes.

    A layer would raise at its first forward pass else.
    """
    if method.codebook is None:
        return
    with _torch.with_values():
        reason = why_of_another(method.codebook, function_of(module))
    if reason is not None:
        raise CannotConvertError(
            f"the codebook of the method is not of {type(module).__name__}: {reason}; select the "
            "layers that it is of, {nn.GELU: FewBit(codebook=book)}"
        )


rows(
    FewBit,
    {
        (nn.CELU, F.celu): (modules.CELU, functional.celu),
        (nn.ELU, F.elu): (modules.ELU, functional.elu),
        (nn.GELU, F.gelu): (modules.GELU, functional.gelu),
        (nn.Hardswish, F.hardswish): (modules.Hardswish, functional.hardswish),
        (nn.LogSigmoid, F.logsigmoid): (modules.LogSigmoid, functional.logsigmoid),
        (nn.Mish, F.mish): (modules.Mish, functional.mish),
        (nn.SELU, F.selu): (modules.SELU, functional.selu),
        (nn.Sigmoid, torch.sigmoid, Tensor.sigmoid): (modules.Sigmoid, functional.sigmoid),
        (nn.SiLU, F.silu): (modules.SiLU, functional.silu),
        (nn.Softplus, F.softplus): (modules.Softplus, functional.softplus),
        (nn.Softsign, F.softsign): (modules.Softsign, functional.softsign),
        (nn.Tanh, torch.tanh, Tensor.tanh): (modules.Tanh, functional.tanh),
        (nn.Tanhshrink, F.tanhshrink): (modules.Tanhshrink, functional.tanhshrink),
    },
    lambda method: method.options,
    check_codebook_is_of,
)

rows(
    FewBit,
    {(nn.RReLU, F.rrelu, torch.rrelu): (modules.RReLU, slopes.rrelu)},
    lambda method: {"bits": method.bits},
)


def _for_slopes(method: FewBit) -> GroupQuant:
    """What keeps the input of a PReLU for the gradient of its slopes: a sum over many elements."""
    return GroupQuant(next(bits for bits in (2, 4, 8) if bits >= method.bits))


rows(
    FewBit,
    {(nn.PReLU, F.prelu, torch.prelu, Tensor.prelu): (PReLU, prelu)},
    lambda method: {"method": _for_slopes(method)},
)

# Exact, whatever the bits.
rows(
    FewBit,
    {
        (nn.Dropout, F.dropout): (modules.Dropout, dropout_as_torch),
        (nn.Hardshrink, F.hardshrink): (modules.Hardshrink, functional.hardshrink),
        (nn.Hardsigmoid, F.hardsigmoid): (modules.Hardsigmoid, functional.hardsigmoid),
        (nn.Hardtanh, F.hardtanh): (modules.Hardtanh, functional.hardtanh),
        (nn.LeakyReLU, F.leaky_relu): (modules.LeakyReLU, functional.leaky_relu),
        (nn.MaxPool1d, F.max_pool1d): (modules.MaxPool1d, pooling.max_pool1d),
        (nn.MaxPool2d, F.max_pool2d): (modules.MaxPool2d, pooling.max_pool2d),
        (nn.MaxPool3d, F.max_pool3d): (modules.MaxPool3d, pooling.max_pool3d),
        (nn.ReLU, F.relu, torch.relu, Tensor.relu): (modules.ReLU, functional.relu),
        (nn.ReLU6, F.relu6): (modules.ReLU6, functional.relu6),
        (nn.Softshrink, F.softshrink): (modules.Softshrink, functional.softshrink),
        (nn.Threshold, F.threshold): (modules.Threshold, functional.threshold),
        (torch.abs, torch.absolute, Tensor.abs, Tensor.absolute): (functional.abs,),
        (torch.clamp, torch.clip, Tensor.clamp, Tensor.clip): (functional.clamp,),
        (torch.clamp_max, Tensor.clamp_max): (functional.clamp_max,),
        (torch.clamp_min, Tensor.clamp_min): (functional.clamp_min,),
    },
)
