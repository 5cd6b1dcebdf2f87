"""Functions that run once more, in the backward pass, on packs of what they read.

For attention of which no part is ours: torch's own composition of products and a softmax, which it
takes for a bias that is trained, heads of unequal numbers or odd sizes, and code of a model that
has several results. Nothing of the function is kept, whatever it computes in between.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from packlight._checks import autocasts, refuse_second_derivative, saved_with_operands
from packlight._overwrite import writable
from packlight._seeds import drawn_again, draws_at
from packlight._torch.hooks import unseen_by_hooks
from packlight.layers.computed import computed_pack_of, exact, is_of_parameters
from packlight.pack import Pack
from packlight.packing.layout import dense_stride
from packlight.packing.ops import pack_mask, unpack_mask
from packlight.quantiser import KEEPS, Quantiser, new_pack, pack_input, worth_packing


@dataclasses.dataclass
class _Operands:
    """How the operands come back, those that need a gradient among them.

    It has no tensors of packs: autograd frees those that it saved, however long its graph lives.
    """

    parts: list[tuple[Callable[..., Tensor], int]]
    like: list[tuple[torch.dtype, bool]]

    def again(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        operands, start = [], 0
        for (rebuild, count), (dtype, needed) in zip(self.parts, self.like, strict=True):
            end = start + count
            x = rebuild(dtype, *tensors[start:end])
            operands.append(x.detach().requires_grad_(needed))
            start = end
        return operands


class _Replayed(torch.autograd.Function):
    """function(*operands); keeps packs of the operands."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Any],
        kept: _Operands,
        draws: bool,
        count: int,
        *given: Any,
    ) -> Any:
        operands, tensors = given[:count], given[count:]
        ctx.draws = draws_at(operands[0]) if draws else None
        kind = operands[0].device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind)) if autocasts(kind) else None
        # With gradients, by which torch chooses kernels; what it keeps goes at the end of the call.
        own = [x.detach().requires_grad_(x.requires_grad) for x in operands]
        with unseen_by_hooks(), torch.enable_grad():
            results = function(*own)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.settings = (function, kept, len(given))
        if isinstance(results, tuple):
            return tuple(None if y is None else writable(y.detach()) for y in results)
        return writable(results.detach())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        refuse_second_derivative(KEEPS)
        function, kept, count = ctx.settings
        nothing = (None,) * (4 + count)
        if all(dy is None for dy in grad_outputs):
            return nothing
        operands = kept.again(saved_with_operands(ctx))
        casting = nullcontext() if ctx.autocast is None else torch.autocast(*ctx.autocast)
        drawing = nullcontext() if ctx.draws is None else drawn_again(operands[0], ctx.draws)
        with casting, drawing, torch.enable_grad():
            results = function(*operands)
        results = results if isinstance(results, tuple) else (results,)
        wanted = [x for x in operands if x.requires_grad]
        pairs = [
            (y, dy)
            for y, dy in zip(results, grad_outputs, strict=True)
            if dy is not None and y.requires_grad
        ]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], wanted, [dy for _, dy in pairs], allow_unused=True
            )
        )
        gradients = [next(found) if x.requires_grad else None for x in operands]
        return None, None, None, None, *gradients, *nothing[4 + len(gradients) :]


_replay: Callable[..., Any] = _Replayed.apply


def replayed(
    function: Callable[..., Any],
    operands: Sequence[Tensor],
    method: Quantiser,
    draws: bool = False,
    biases: Collection[int] = (),
) -> Any:
    """function(*operands), which runs once more on packs of them; biased, as attention is.

    The operands at `biases` are added to scores. They stay as they are, or are computed again; one
    that is trained and as large as the scores is packed, with a bit for each number of a mask in
    it: the largest of those would leave no code for the others of their group.

    `function` gives a tensor or a tuple of tensors and None, and reads no tensor that needs a
    gradient but its operands. With `draws` it draws on the device of the first, and draws the same
    again.
    """
    own = list({id(x): x for x in operands}.values())
    places = [next(place for place, x in enumerate(own) if x is operand) for operand in operands]
    added = {id(operands[place]) for place in biases}
    packs = [_kept_bias(x, own[0], method) if id(x) in added else _kept(x, method) for x in own]
    parts = [(pack.rebuild, len(pack.tensors)) for pack in packs]
    kept = _Operands(parts, [(x.dtype, x.requires_grad) for x in own])
    tensors = [part for pack in packs for part in pack.tensors]

    def call(*found: Tensor) -> Any:
        return function(*(found[place] for place in places))

    return _replay(call, kept, draws, len(own), *own, *tensors)


def _kept(x: Tensor, method: Quantiser) -> Pack:
    known = computed_pack_of(x)
    if known is not None:
        return known
    if is_of_parameters(x) or not worth_packing(x, method):
        return exact(x)
    return pack_input(x, method)


# A probability of a score that is so much lower than others is 0.
_MASKED = -1e3


@dataclasses.dataclass
class _Masked:
    """A bias with a mask in it: bits of the mask, the least number a row, a pack of the rest."""

    rebuild: Callable[..., Tensor]
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __call__(self, dtype: torch.dtype, bits: Tensor, least: Tensor, *tensors: Tensor) -> Tensor:
        x = self.rebuild(dtype, *tensors)
        return torch.where(unpack_mask(bits, self.shape, self.stride), least, x)


def _kept_bias(x: Tensor, query: Tensor, method: Quantiser) -> Pack:
    """What is kept of a bias of scores."""
    known = computed_pack_of(x)
    is_as_large = x.numel() * query.shape[-1] == query.numel() * x.shape[-1]
    if known is not None or is_of_parameters(x) or not is_as_large:
        return exact(x) if known is None else known
    if not worth_packing(x, method):
        return exact(x)
    bias, stride = x.detach(), dense_stride(x)
    masked = bias < _MASKED
    rest = new_pack(bias.masked_fill(masked, 0.0), method)
    tensors = (
        pack_mask(masked.view(torch.uint8), stride),
        bias.amin(-1, keepdim=True),
        *rest.tensors,
    )
    rebuild = _Masked(rest.rebuild, tuple(x.shape), stride)
    return Pack(rebuild, tuple(x.shape), tensors, rest.grade)
