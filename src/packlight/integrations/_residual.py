"""Residual blocks whose code is known: each convolution runs with its batch norm as one function.

And with the ReLU, and at the end of a block with the sum. Where a layer is not what a conversion
by `FixedPoint` and a quantiser has made of it, or is called for more than its forward, the layers
run one by one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from packlight import sharing
from packlight._checks import is_taken
from packlight.calls import covers_now, is_bare, uncovered
from packlight.groupquant import conv_modules
from packlight.groupquant.fixed_point import modules
from packlight.groupquant.fixed_point.conv_norm import conv_norm, geometry_of
from packlight.groupquant.fixed_point.method import bin_width
from packlight.groupquant.fixed_point.residual import add_
from packlight.layers.twin import start_batch
from packlight.pack import Pack
from packlight.quantiser import pack_input

_CONVOLUTIONS = (conv_modules.Conv1d, conv_modules.Conv2d, conv_modules.Conv3d)
_NORMS = (modules.BatchNorm1d, modules.BatchNorm2d, modules.BatchNorm3d)


class Known(NamedTuple):
    """A tensor in a block, and what is kept of it, where the layer that made it says so."""

    x: Tensor
    kept: Pack | None = None

    def noted(self) -> Tensor:
        """The tensor for a layer that looks for notes."""
        if self.kept is not None:
            sharing.note_pack(self.x, self.kept)
        return self.x


def known(x: Tensor) -> Known:
    """What comes into a block."""
    return Known(x, sharing.pack_of(x))


class Block(nn.Module):
    """The forward of a residual block, by `run`; its own code where `run` does not apply.

    Where the calls of the block are covered, what reads the sum rebuilds it from its terms.
    """

    may_run_plain_code = True

    def run(self, x: Tensor, covered: bool) -> Tensor:
        raise NotImplementedError

    def fits(self) -> bool:
        """Whether the parts of the block are those that `run` knows."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        trains = self.training and torch.is_grad_enabled()
        if not trains or torch.compiler.is_compiling() or not is_taken(x) or not self.fits():
            y: Tensor = super().forward(x)
        else:
            y = uncovered(self.run, x, covers_now())
        return y


def conv_norm_act(at: Known, conv: Any, norm: Any, act: Any = None) -> Known:
    """act(norm(conv(x)))."""
    found = _fitting(at.x, conv, norm, act)
    if found is None:
        y = norm(conv(at.noted()))
        return Known(y if act is None else act(y))
    return _at_once(at, conv, norm, found[0], act is not None)


def end(
    at: Known,
    conv: Any,
    norm: Any,
    act: nn.Module,
    shortcut: Known,
    downsample: nn.Module | None,
    covered: bool,
    between: Sequence[nn.Module | None] = (),
) -> Tensor:
    """act(norm(conv(x)) + downsample(shortcut)), with modules `between` norm and sum."""
    found = _fitting(at.x, conv, norm, act)
    if found is not None and passes(*between):
        geometry, shape = found
        term = downsampled(shortcut, downsample)
        if term.x.shape == shape:
            return _at_once(at, conv, norm, geometry, True, term, covered).noted()
        y = conv_norm_act(at, conv, norm).noted()  # which raises, or the term is broadcast
    else:
        y = conv_norm_act(at, conv, norm).noted()
        for each in between:
            y = y if each is None else each(y)
        term = downsampled(shortcut, downsample)
    y = add_(y, term.noted()) if covered else y.add_(term.x)
    activated: Tensor = act(y)
    return activated


def downsampled(at: Known, downsample: nn.Module | None) -> Known:
    """What the shortcut of a block adds."""
    if downsample is None:
        return at
    if type(downsample) is nn.Sequential and len(downsample) == 2 and is_bare(downsample):
        return conv_norm_act(at, *downsample)
    return Known(downsample(at.noted()))


def passes(*modules: nn.Module | None) -> bool:
    """Whether a call of each module, if there is one, gives back what it is given."""
    for module in modules:
        if module is not None and not (type(module) is nn.Identity and is_bare(module)):
            return False
    return True


def _fitting(x: Tensor, conv: Any, norm: Any, act: Any) -> tuple[Any, tuple[int, ...]] | None:
    """Geometry and shape of the output, if the layers may run as one function; None if not."""
    if type(conv) not in _CONVOLUTIONS or type(norm) not in _NORMS:
        return None
    if act is not None and not (type(act) is modules.ReLU and act.training):
        return None
    parts = (conv, norm) if act is None else (conv, norm, act)
    if not (conv.training and norm.training and is_bare(*parts)):
        return None
    weight = conv.weight
    # Without a gradient of the weight nothing is kept for it.
    if not weight.requires_grad or x.numel() < conv.method.smallest:
        return None
    if conv.padding_mode != "zeros" or type(conv.padding) is str:
        return None
    if conv.out_channels != norm.num_features or x.dim() != len(conv.stride) + 2:
        return None  # which raises
    window = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return geometry_of(x.shape, weight.shape, *window)


def _at_once(
    at: Known,
    conv: Any,
    norm: Any,
    geometry: Any,
    relu: bool,
    other: Known | None = None,
    covered: bool = False,
) -> Known:
    kept = at.kept
    if kept is None or not kept.grade.serves(conv.method.grade):
        kept = pack_input(at.x, conv.method)
    term = None
    if other is not None:
        x, of_other = other
        # What is noted on a leaf may be gone in one pass of a checkpoint and there in the other.
        if not covered or x.grad_fn is None:
            of_other = None
        elif of_other is None:
            of_other = sharing.pack_of(x)
        term = x, of_other
    given = start_batch(norm)
    affine = (given["weight"], given["bias"])
    width = bin_width(norm.bits, norm.window)
    statistics = (given["running_mean"], given["running_var"], given["momentum"], given["eps"])
    settings = (*statistics, norm.bits, width)
    layer = (conv.weight, conv.bias, geometry)
    return Known(*conv_norm(at.x, kept, layer, affine, settings, relu, term))
