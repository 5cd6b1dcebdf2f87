"""Which functions of lazy logits are followed, and how.

Between a head and its loss: views and choices of rows, casts, a factor, a softcap, a bias. Their
result is `LazyLogits` again, of rows of the head's input. Losses: `cross_entropy` and `logsumexp`;
of logarithms of probabilities `nll_loss`, those at given classes, and their sum.

A function is followed where its result is known without the logits, whatever their values. All
else, an argument that is not known here included, computes the logits (`lazy.py`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight._checks import autocasts, is_plain
from packlight.head import functional
from packlight.head.lazy import FOLLOWED, Follow, LazyLogits, Logits, made
from packlight.head.rows import Curve, Shares, logits_at, row_losses, row_losses_and_sums


def _after(
    lazy: LazyLogits, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], **changes: Any
) -> LazyLogits:
    """The logits after a call, which is the step to them where they are computed."""
    state, rest = lazy._state, args[1:]
    after = dataclasses.replace(
        state,
        steps=(*state.steps, lambda logits: func(logits, *rest, **kwargs)),
        before=state,
        values=None,
        bare=None,
        sums=None,
        **{"records": state.records and torch.is_grad_enabled(), **changes},
    )
    return made(after)


def _number(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The second argument if it is all that there is, and a usual number."""
    value: Any = args[1] if len(args) == 2 and not kwargs else None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) and value != 0 else None


def _scaled(curve: Curve, factor: float) -> Curve:
    if curve.cap:
        return curve._replace(cap=curve.cap * factor)
    return curve._replace(scale=curve.scale * factor)


def _multiply(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    factor = _number(args, kwargs)
    if factor is None:
        return None
    return _after(lazy, func, args, kwargs, curve=_scaled(lazy._state.curve, factor))


def _divide(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    divisor = _number(args, kwargs)
    if divisor is None:
        return None
    return _after(lazy, func, args, kwargs, curve=_scaled(lazy._state.curve, 1.0 / divisor))


def _tanh(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    curve = lazy._state.curve
    if curve.cap or len(args) > 1 or kwargs:
        return None
    return _after(lazy, func, args, kwargs, curve=curve._replace(cap=1.0))


def _add(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    """A bias of each class that is not trained, as the `final_logits_bias` of BART."""
    state = lazy._state
    other = args[1] if len(args) == 2 and not kwargs else None
    if not isinstance(other, Tensor) or not is_plain(other) or state.curve != Curve():
        return None
    same = other.dtype == state.dtype == state.root.dtype and other.device == state.x.device
    classes = state.weight.shape[0]
    if not same or other.dim() > len(state.shape) or other.shape[-1:] != (classes,):
        return None
    if other.numel() != classes or other.requires_grad:
        return None
    other = other.clone()  # as it is now
    flat = other.reshape(classes)
    bias = flat if state.bias is None else state.bias.to(flat.dtype) + flat
    return _after(lazy, func, (lazy, other), kwargs, bias=bias)


def _cast_to(name: torch.dtype) -> Callable[..., LazyLogits | None]:
    def cast(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
        return _after(lazy, func, args, kwargs, dtype=name)

    return cast


def _to(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    state = lazy._state
    dtype = state.dtype
    for value in (*args[1:], *kwargs.values()):
        if isinstance(value, Tensor) and is_plain(value):
            dtype, value = value.dtype, value.device
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)):
            device = torch.device(value)
            if device.type != state.x.device.type or device.index not in (
                None,
                state.x.device.index,
            ):
                return None
        elif not (value is None or isinstance(value, (bool, torch.memory_format))):
            return None
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return None
    return _after(lazy, func, args, kwargs, dtype=dtype)


def _same(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    return _after(lazy, func, args, kwargs)


def _detach(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    state = lazy._state
    bias = None if state.bias is None else state.bias.detach()
    return _after(
        lazy, func, args, kwargs, records=False,
        x=state.x.detach(), weight=state.weight.detach(), bias=bias,
    )  # fmt: skip


def _shape(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    """Another number of dimensions of rows; those of the classes must stay one."""
    state = lazy._state
    if any(isinstance(one, torch.dtype) for one in (*args[1:], *kwargs.values())):
        return None  # the same bytes as other numbers
    try:
        shape = func(torch.empty(state.shape, device="meta"), *args[1:], **kwargs).shape
    except (RuntimeError, TypeError, IndexError):
        return None  # torch says so of the logits themselves
    if len(shape) == 0 or shape[-1] != state.weight.shape[0]:
        return None
    return _after(lazy, func, args, kwargs, x=state.x.reshape(*shape[:-1], state.x.shape[-1]))


def _choose(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    """A choice of rows, by an index that leaves the last dimension alone."""
    if len(args) != 2 or kwargs:
        return None
    state, index = lazy._state, args[1]
    parts = list(index) if isinstance(index, tuple) else [index]
    # As they are now: the logits may be computed later.
    parts = [part.clone() if isinstance(part, Tensor) else part for part in parts]
    index = tuple(parts) if isinstance(index, tuple) else parts[0]
    taken = 0
    for part in parts:
        if isinstance(part, Tensor) and is_plain(part):
            if part.dtype not in (torch.bool, torch.int64):
                return None
            taken += part.dim() if part.dtype == torch.bool else 1
        elif isinstance(part, slice) or type(part) is int:
            taken += 1
        elif part is not None and part is not Ellipsis:
            return None
    if any(part is Ellipsis for part in parts):
        behind = parts[-1] is not Ellipsis
        if behind and not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
            return None
        if taken > len(state.shape) - (not behind):
            return None
    elif taken >= len(state.shape):
        last = parts[-1]
        if not (isinstance(last, slice) and last == slice(None)) or taken > len(state.shape):
            return None
    try:
        x = state.x[index]
    except (IndexError, RuntimeError):
        return None
    return _after(lazy, func, (lazy, index), kwargs, x=x)


def _along(place: int) -> Callable[..., Any]:
    """What takes rows along a dimension, which is the argument at this place: one part or many."""

    def along(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
        dim = kwargs.get("dim", args[place] if len(args) > place else 0)
        dims = len(lazy._state.shape)
        if type(dim) is not int or not -dims <= dim < dims or dim % dims == dims - 1:
            return None
        rest = [part.clone() if isinstance(part, Tensor) else part for part in args[1:]]
        try:
            found = func(lazy._state.x, *rest, **kwargs)
        except (RuntimeError, TypeError, IndexError):
            return None  # torch says so of the logits themselves
        if isinstance(found, Tensor):
            return _after(lazy, func, (lazy, *rest), kwargs, x=found)
        return tuple(
            _after(lazy, _part(func, number), (lazy, *rest), kwargs, x=x)
            for number, x in enumerate(found)
        )

    return along


def _part(func: Any, number: int) -> Callable[..., Tensor]:
    def part(*args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = func(*args, **kwargs)[number]
        return found

    return part


def _iterate(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    """`for row in logits`, as of the losses of TRL that go over a batch."""
    if len(lazy._state.shape) < 2:
        return None
    return iter(torch.unbind(lazy))


def _type(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    known = len(args) == 2 and not kwargs and isinstance(args[1], torch.dtype)
    return _to(lazy, func, args, kwargs) if known else None


def _move(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    """Classes as the second of three dimensions."""
    given = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    if kwargs or len(lazy._state.shape) != 3 or not all(type(one) is int for one in given):
        return None
    places = [one % 3 for one in given]
    swaps = sorted(places) == [1, 2] and func not in _PERMUTES
    if swaps or (places == [0, 2, 1] and func in _PERMUTES):
        return _after(lazy, func, args, kwargs, moved=True)
    return None


_PERMUTES = (torch.permute, Tensor.permute)

# ---- losses --------------------------------------------------------------------------------------


def _how(state: Logits) -> dict[str, Any]:
    state.root.check()
    if torch.is_grad_enabled():
        state.root.gave_loss = True
    method, dtype = state.root.method, state.root.dtype
    return {"curve": state.curve, "method": method, "dtype": dtype}


def _result_dtype(state: Logits) -> torch.dtype:
    """The dtype of torch's loss: autocast computes losses in float32."""
    kind = state.x.device.type
    narrow = state.dtype.itemsize < 4
    return torch.float32 if narrow and autocasts(kind) else state.dtype


def _cross_entropy(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    return _loss(lazy._state, *args[1:], **kwargs)


def _loss(
    state: Logits,
    target: Any = None,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    known = (
        isinstance(target, Tensor)
        and is_plain(target)
        and target.dtype == torch.int64
        and target.device == state.x.device
        and target.dim() == (2 if state.moved else 1)
        and target.shape == state.x.shape[:-1]
        and (weight is None or (isinstance(weight, Tensor) and is_plain(weight)))
        and (weight is None or weight.shape == state.weight.shape[:1])
        and not (weight is not None and (label_smoothing or weight.requires_grad))
        and size_average is None
        and reduce is None
        and reduction in ("none", "mean", "sum")
        and 0.0 <= label_smoothing <= 1.0
        and state.weight.shape[0] > 0
    )
    if not known:
        return None
    with torch.set_grad_enabled(state.records and torch.is_grad_enabled()):
        loss = functional.cross_entropy(
            state.x,
            state.weight,
            state.bias,
            target.reshape(-1),
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            **_how(state),
        )
        loss = loss.view(target.shape) if reduction == "none" else loss
        return loss.to(_result_dtype(state))


def _logsumexp(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    return _log_of_sum(lazy._state, *args[1:], **kwargs)


def _log_of_sum(
    state: Logits, dim: Any = None, keepdim: bool = False, **unknown: Any
) -> Tensor | None:
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if unknown or not _is_last(state, dim) or state.shape[-1] == 0:
        return None
    targets = torch.zeros((), dtype=torch.int64, device=state.x.device)
    rows = state.x.shape[:-1]
    with torch.set_grad_enabled(state.records and torch.is_grad_enabled()):
        found = row_losses(
            state.x,
            state.weight,
            state.bias,
            targets.expand(math.prod(rows)).contiguous(),
            shares=Shares(0.0, 0.0),
            **_how(state),
        )
        return found.to(_result_dtype(state)).view(*rows, *((1,) if keepdim else ()))


# ---- logarithms of probabilities -----------------------------------------------------------------


def _is_last(state: Logits, dim: Any) -> bool:
    return type(dim) is int and dim in (-1, len(state.shape) - 1)


def _log_softmax(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    return _logarithms(lazy, func, args, kwargs, *args[1:], **kwargs)


def _logarithms(
    lazy: LazyLogits,
    func: Any,
    args: Any,
    kwargs: Any,
    dim: Any = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    **unknown: Any,
) -> LazyLogits | None:
    state = lazy._state
    if unknown or not isinstance(_stacklevel, int):  # in its place torch.log_softmax has a dtype
        return None
    dtype = _result_dtype(state) if dtype is None else dtype
    # Where autocast widens, the steps would have to be computed under autocast too.
    if not _is_last(state, dim) or (dtype != state.dtype and "dtype" not in kwargs):
        return None
    return _after(lazy, func, args, kwargs, sign=1, dtype=dtype)


def _negate(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    return _after(lazy, func, args, kwargs, sign=-lazy._state.sign)


def _gather(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    at = _logarithms_at if lazy._state.sign else _logits_at
    return at(lazy._state, *args[1:], **kwargs)


def _logarithms_at(
    state: Logits, dim: Any = None, index: Any = None, **unknown: Any
) -> Tensor | None:
    if unknown or not _is_of_rows(state, dim, index):
        return None
    losses = _losses_and_sums(state, index.reshape(-1), Shares())
    return (losses * -state.sign).to(state.dtype).view(index.shape)


def _logits_at(state: Logits, dim: Any = None, index: Any = None, **unknown: Any) -> Tensor | None:
    if unknown or not _is_of_rows(state, dim, index):
        return None
    with torch.set_grad_enabled(state.records and torch.is_grad_enabled()):
        found = logits_at(state.x, state.weight, state.bias, index.reshape(-1), **_how(state))
        return found.to(state.dtype).view(index.shape)


def _is_of_rows(state: Logits, dim: Any, index: Any) -> bool:
    """Whether an index is of one class for each row."""
    return (
        _is_last(state, dim)
        and isinstance(index, Tensor)
        and is_plain(index)
        and index.dtype == torch.int64
        and index.device == state.x.device
        and index.shape == (*state.shape[:-1], 1)
    )


def _sum(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    return _sum_of_logarithms(lazy._state, *args[1:], **kwargs)


def _sum_of_logarithms(
    state: Logits,
    dim: Any = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
    **unknown: Any,
) -> Tensor | None:
    if unknown or not _is_last(state, dim):
        return None
    if state.sums is None or state.sums[0].requires_grad != torch.is_grad_enabled():
        rows = math.prod(state.shape[:-1])
        targets = torch.zeros(rows, dtype=torch.int64, device=state.x.device)
        _losses_and_sums(state, targets, Shares(0.0, 0.0))
    assert state.sums is not None
    logsumexp, total = state.sums
    found = (total - logsumexp * state.shape[-1]) * state.sign
    found = found.to(state.dtype if dtype is None else dtype)
    return found.view(*state.shape[:-1], *((1,) if keepdim else ()))


def _losses_and_sums(state: Logits, targets: Tensor, shares: Shares) -> Tensor:
    with torch.set_grad_enabled(state.records and torch.is_grad_enabled()):
        losses, *sums = row_losses_and_sums(
            state.x, state.weight, state.bias, targets, shares=shares, **_how(state)
        )
    state.sums = sums[0], sums[1]
    return losses


def _nll_loss(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    return _loss(lazy._state, *args[1:], **kwargs) if lazy._state.sign == 1 else None


# ---- the table -----------------------------------------------------------------------------------


def _follow(forms: tuple[Any, ...], *pairs: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
    for function, theirs in pairs:
        FOLLOWED.update(dict.fromkeys(theirs, Follow(function, forms)))


_follow(
    ("logits",),
    (_multiply, (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)),
    (_multiply, (torch.multiply, Tensor.multiply)),
    (_divide, (torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide, Tensor.true_divide)),
    (_tanh, (torch.tanh, Tensor.tanh, F.tanh)),
    (_add, (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)),
    (_move, (torch.transpose, Tensor.transpose, *_PERMUTES)),
    (_logsumexp, (torch.logsumexp, Tensor.logsumexp)),
    (_log_softmax, (F.log_softmax, torch.log_softmax, Tensor.log_softmax)),
)
_follow(("logits", "moved"), (_cross_entropy, (F.cross_entropy,)))
_follow(
    ("logarithms",),
    (_negate, (torch.neg, Tensor.neg, Tensor.__neg__)),
    (_sum, (torch.sum, Tensor.sum)),
    (_nll_loss, (F.nll_loss,)),
)
_follow(
    ("logits", "logarithms"),
    (_cast_to(torch.float32), (Tensor.float,)),
    (_cast_to(torch.float64), (Tensor.double,)),
    (_cast_to(torch.float16), (Tensor.half,)),
    (_cast_to(torch.bfloat16), (Tensor.bfloat16,)),
    (_to, (Tensor.to,)),
    (_same, (Tensor.contiguous, Tensor.clone, torch.clone)),
    (_detach, (Tensor.detach, torch.detach)),
    (_shape, (Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten)),
    (_shape, (Tensor.squeeze, torch.squeeze, Tensor.unsqueeze, torch.unsqueeze)),
    (_gather, (torch.gather, Tensor.gather)),
    (_choose, (Tensor.__getitem__,)),
    (_along(1), (torch.narrow, Tensor.narrow, torch.select, Tensor.select)),
    (_along(1), (torch.index_select, Tensor.index_select, torch.unbind, Tensor.unbind)),
    (_along(2), (torch.chunk, Tensor.chunk, torch.split, Tensor.split)),
    (_iterate, (Tensor.__iter__,)),
    (_type, (Tensor.type,)),
)
