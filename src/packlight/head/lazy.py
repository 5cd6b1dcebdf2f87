"""`LazyLogits`: logits of which a loss is computed by chunks, and which are computed when asked.

A head gives them in place of its logits. They are a tensor with a shape, a dtype, a device and a
place in the graph, and without memory. Torch shows every function that is called with them
(`__torch_function__`):

- Those between a head and its loss are followed: views and choices of rows, casts, a factor, a
  softcap, a bias. The result is `LazyLogits` again, of rows of the head's input.
- `cross_entropy` and `logsumexp` of them are computed by chunks (`rows.py`), and of the logarithms of
  probabilities those at given classes, and their sum.
- Anything else computes the logits, as the plain head and torch's own functions do, and goes on
  with those. They are computed once, and from then on the object stands for them, in-place writes
  included. So nothing can be wrong for not being known; it only costs the memory.

What no function shows, such as an argument of someone's `autograd.Function`, gets the values in
`__torch_dispatch__`, and the gradient goes through the node that the object has in the graph.

This follows any model whose loss is a cross-entropy of a linear layer, whatever stands between.
Replacing a model's `loss_function` would not see those that call `CrossEntropyLoss` themselves, as
BERT, T5 and the models of users do, nor what scales or caps logits in between.
"""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import autocasts, is_plain
from packlight._torch.attributes import version
from packlight.errors import InputError, ModifiedWeightError
from packlight.head import functional
from packlight.head.rows import Curve, Shares, row_losses, row_losses_and_sums
from packlight.layers.linear import linear
from packlight.quantiser import Quantiser

# ---- what logits are of --------------------------------------------------------------------------


class _Root:
    """A call of a head: what it was called with, and all that stands for its logits."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, method: Quantiser | None
    ) -> None:
        self.x, self.weight, self.bias, self.method = x, weight, bias, method
        self.versions = self._versions()
        self.records = torch.is_grad_enabled()
        kind = x.device.type
        self.autocast: torch.dtype | None = None
        if autocasts(kind):
            self.autocast = torch.get_autocast_dtype(kind)
        casts = self.autocast is not None and x.dtype != torch.float64
        self.dtype = self.autocast if casts and self.autocast is not None else x.dtype
        self.members: list[weakref.ref[_Logits]] = []
        self.gave_loss = False

    def _versions(self) -> tuple[int, ...]:
        return tuple(version(t) for t in (self.x, self.weight, self.bias) if t is not None)

    def check(self) -> None:
        """Raises where logits computed now would not be those of the head's call."""
        freed = self.weight.numel() > 0 and self.weight.untyped_storage().nbytes() == 0
        if freed or self._versions() != self.versions:
            what = "freed, as FSDP does," if freed else "written to, as by an optimizer's step,"
            raise ModifiedWeightError(
                f"logits of a converted head are computed when they are used, and its weight or"
                f" input was {what} since the head was called; use them before, or leave the head"
                " to torch: convert without head=True"
            )

    def logits(self, records: bool) -> Tensor:
        """The logits as the plain head gives them."""
        self.check()
        with torch.set_grad_enabled(records), self._as_called():
            if self.method is not None and records:
                return linear(self.x, self.weight, self.bias, method=self.method)
            return F.linear(self.x, self.weight, self.bias)

    def _as_called(self) -> contextlib.AbstractContextManager[Any]:
        kind = self.x.device.type
        if kind == "meta":
            return contextlib.nullcontext()
        return torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None)


@dataclasses.dataclass(eq=False, weakref_slot=True, slots=True)
class _Logits:
    """Logits of rows `x` of a head's input, after what was done to them since."""

    root: _Root
    x: Tensor  # [..., width]
    weight: Tensor
    bias: Tensor | None
    curve: Curve
    dtype: torch.dtype
    records: bool
    before: "_Logits | None" = None
    step: Callable[[Tensor], Tensor] | None = None  # from the logits before to these
    added: tuple[Tensor, ...] = ()  # biases from outside of the head
    # Whether classes are the second dimension, as for torch's loss of rows of several dimensions.
    moved: bool = False
    # 0 for logits; 1 for their logarithms of probabilities, u - logsumexp(u), -1 for minus those.
    sign: int = 0
    sums: tuple[Tensor, Tensor] | None = None  # logsumexp and sum of each row, once known
    values: Tensor | None = None
    bare: Tensor | None = None  # values without a graph, for what runs below autograd

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Where the gradient of these logits goes."""
        root = self.root
        return tuple(t for t in (root.x, root.weight, root.bias, *self.added) if t is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        rows, classes = tuple(self.x.shape[:-1]), self.weight.shape[0]
        return (rows[0], classes, *rows[1:]) if self.moved else (*rows, classes)

    def computed(self) -> Tensor:
        """The logits, computed once. With them, all that stand for logits of the same head.

        Else those that come after a write in place would be computed of what was written.
        """
        if self.values is None:
            for reference in list(self.root.members):
                member = reference()
                if member is not None:
                    member._compute()
            self._compute()
        assert self.values is not None
        return self.values

    def _compute(self) -> None:
        if self.values is not None:
            return
        if self.before is None or self.step is None:
            self.values = self.root.logits(self.root.records)
        else:
            self.before._compute()
            assert self.before.values is not None
            with torch.set_grad_enabled(self.records):
                self.values = self.step(self.before.values)
            self.before = self.step = None  # which may hold more logits that nobody has

    def without_graph(self) -> Tensor:
        """The logits for an operation below autograd, where no graph can be made."""
        if self.bare is None:
            if self.values is not None:
                self.bare = self.values.detach()
            elif self.before is None or self.step is None:
                self.bare = self.root.logits(False)
            else:
                with torch.no_grad():
                    self.bare = self.step(self.before.without_graph())
        return self.bare


class _LazyLogits(torch.autograd.Function):
    """The place of lazy logits in the graph, for what no torch function shows.

    The state is an attribute and nothing is saved: hooks would copy the input for every view.
    """

    @staticmethod
    def forward(ctx: Any, state: _Logits, *inputs: Tensor) -> Tensor:
        ctx.state = state
        made = _torch.hollow(LazyLogits, state.shape, state.dtype, state.x.device)
        made._state = state
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        state: _Logits = ctx.state
        places = [place for place, tensor in enumerate(state.inputs) if tensor.requires_grad]
        wanted = [state.inputs[place] for place in places]
        found: list[Tensor | None] = [None] * len(state.inputs)
        with torch.enable_grad():
            logits = state.computed()
        given = torch.autograd.grad(logits, wanted, gradient, retain_graph=True, allow_unused=True)
        for place, part in zip(places, given, strict=True):
            found[place] = part
        return None, *found


_apply: Callable[..., "LazyLogits"] = _LazyLogits.apply


def _made(state: _Logits) -> "LazyLogits":
    state.root.members = [one for one in state.root.members if one() is not None]
    state.root.members.append(weakref.ref(state))
    with torch.set_grad_enabled(state.records), _torch.without_torch_functions():
        return _apply(state, *state.inputs)


def lazy_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, method: Quantiser | None = None
) -> "LazyLogits":
    """x W^T + b, x [..., width], W [classes, width]; see `LazyLogits`.

    With a method, its pack of x stands for x where a loss or the logits keep it.
    """
    root = _Root(x, weight, bias, method)
    return _made(_Logits(root, x, weight, bias, Curve(), root.dtype, root.records))


# ---- the tensor ----------------------------------------------------------------------------------


class LazyLogits(Tensor):
    """Logits x W^T + b of a head that are computed when they are used.

    `F.cross_entropy` and `logsumexp` of them are computed by chunks, without them. They hold the
    head's input for as long as they live. They are what the plain head gives, bit for bit, as long
    as the head's weight and input are not written to: after that, using them raises
    `ModifiedWeightError`. A hook on them after their loss would miss its gradient: `InputError`.
    """

    _state: _Logits

    @classmethod
    def __torch_function__(
        cls, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _call(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # of a function of C
        cls, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


@_torch.always_untraced
def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """What `func` gives for arguments with lazy logits among them."""
    kwargs = kwargs or {}
    is_fact = func in _FACTS and isinstance(args[0], LazyLogits) and args[0]._state.values is None
    if is_fact or func is Tensor.__hash__:
        with _torch.without_torch_functions():
            return func(*args, **kwargs)
    found = list(_lazy_in(args)) + list(_lazy_in(kwargs))
    if not all(map(_is_own, found)):
        # Someone's Function has had them in its hands: the graph goes through that one.
        with _torch.without_torch_functions():
            return func(*args, **kwargs)
    first = args[0] if args else None
    follow = _FOLLOWED.get(func)
    if follow is not None and isinstance(first, LazyLogits) and _may_follow(first._state, follow):
        result = follow(first, func, args, kwargs)
        if result is not None:
            return result
    if func in _WATCHING and any(lazy._state.root.gave_loss for lazy in found):
        if _watches_for_torch(args):
            with _torch.without_torch_functions():
                return func(*args, **kwargs)
        raise InputError(
            f"{func.__name__} of logits whose loss was computed by chunks: the gradient of the"
            " loss does not go through them; call it before the loss, or convert without"
            " head=True"
        )
    return func(*_mapped(_computed, args), **_mapped(_computed, kwargs))


@_torch.always_untraced
def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation below autograd gives: it sees the values."""
    return func(*_mapped(_values, args), **_mapped(_values, kwargs))


def _may_follow(state: _Logits, follow: Any) -> bool:
    """Whether logits, or what else the state is of, are followed through such a function."""
    if state.values is not None:
        return False
    if state.moved:
        return follow is _cross_entropy
    return follow not in (_OF_LOGITS if state.sign else _OF_LOGARITHMS)


def _is_own(lazy: LazyLogits) -> bool:
    """Whether the object is in the graph where we put it."""
    with _torch.without_torch_functions():
        node = lazy.grad_fn
    return getattr(node, "state", None) is (lazy._state if node is not None else None)


def _lazy_in(value: Any) -> Iterator[LazyLogits]:
    """Lazy logits among the arguments of a function."""
    if isinstance(value, LazyLogits):
        yield value
    elif type(value) in (tuple, list):
        for item in value:
            yield from _lazy_in(item)
    elif type(value) is dict:
        yield from _lazy_in(list(value.values()))


def _mapped(function: Callable[[LazyLogits], Tensor], value: Any) -> Any:
    """Arguments with the lazy logits among them replaced."""
    if isinstance(value, LazyLogits):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(function, item) for item in value)
    if type(value) is dict:
        return {name: _mapped(function, item) for name, item in value.items()}
    return value


def _computed(lazy: LazyLogits) -> Tensor:
    return lazy._state.computed()


def _values(lazy: LazyLogits) -> Tensor:
    return lazy._state.without_graph()


# What is known of logits without computing them.
_ATTRIBUTES = (
    "_backward_hooks", "_base", "_version", "device", "dtype", "grad", "grad_fn", "is_cpu",
    "is_cuda", "is_leaf", "is_meta", "is_mkldnn", "is_mps", "is_nested", "is_quantized",
    "is_sparse", "is_xpu", "itemsize", "layout", "ndim", "output_nr", "requires_grad", "shape",
)  # fmt: skip
_METHODS = (
    "__len__", "_is_view", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
    "is_floating_point", "is_inference", "is_signed", "ndimension", "nelement", "numel", "size",
    "storage_offset", "stride",
)  # fmt: skip
_FACTS = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(Tensor, name)),
        *(getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)),
        *(torch.is_floating_point, torch.is_complex, torch.numel),
    )
)

# ---- what watches the gradient of logits ---------------------------------------------------------

_WATCHING = (Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad)


def _watches_for_torch(args: tuple[Any, ...]) -> bool:
    """Whether it is a hook by which FSDP learns that a backward pass begins: the loss has one."""
    hook = args[1] if len(args) > 1 else None
    hook = getattr(hook, "func", hook)
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


# ---- what is followed ----------------------------------------------------------------------------
#
# Each takes the logits, the function, and its arguments, and returns the result; None where the
# call is none that is followed.


def _after(
    lazy: LazyLogits, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], **changes: Any
) -> LazyLogits:
    """The logits after a call, which is the step to them where they are computed."""
    state, rest = lazy._state, args[1:]
    made = dataclasses.replace(
        state,
        before=state,
        step=lambda logits: func(logits, *rest, **kwargs),
        values=None,
        bare=None,
        sums=None,
        **{"records": state.records and torch.is_grad_enabled(), **changes},
    )
    return _made(made)


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
    """A bias for each class, as the `final_logits_bias` of BART."""
    state = lazy._state
    other = args[1] if len(args) == 2 and not kwargs else None
    if not isinstance(other, Tensor) or not is_plain(other) or state.curve != Curve():
        return None
    same = other.dtype == state.dtype == state.root.dtype and other.device == state.x.device
    classes = state.weight.shape[0]
    if not same or other.dim() > len(state.shape) or other.shape[-1:] != (classes,):
        return None
    if other.numel() != classes:
        return None
    flat = other.reshape(classes)
    bias = flat if state.bias is None else state.bias.to(flat.dtype) + flat
    return _after(lazy, func, args, kwargs, bias=bias, added=(*state.added, other))


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
    return _after(lazy, func, args, kwargs, x=x)


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


def _how(state: _Logits) -> dict[str, Any]:
    state.root.check()
    state.root.gave_loss = True
    method, dtype = state.root.method, state.root.dtype
    return {"curve": state.curve, "method": method, "dtype": dtype}


def _result_dtype(state: _Logits) -> torch.dtype:
    """The dtype of torch's loss: autocast computes losses in float32."""
    kind = state.x.device.type
    narrow = state.dtype.itemsize < 4
    return torch.float32 if narrow and autocasts(kind) else state.dtype


def _cross_entropy(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    return _loss(lazy._state, *args[1:], **kwargs)


def _loss(
    state: _Logits,
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


def _log_of_sum(state: _Logits, dim: Any = None, keepdim: bool = False) -> Tensor | None:
    if dim not in (-1, len(state.shape) - 1, (-1,), [-1]) or state.shape[-1] == 0:
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


def _is_last(state: _Logits, dim: Any) -> bool:
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
) -> LazyLogits | None:
    state = lazy._state
    dtype = _result_dtype(state) if dtype is None else dtype
    # Where autocast widens, the steps would have to be computed under autocast too.
    if not _is_last(state, dim) or (dtype != state.dtype and "dtype" not in kwargs):
        return None
    return _after(lazy, func, args, kwargs, sign=1, dtype=dtype)


def _negate(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    return _after(lazy, func, args, kwargs, sign=-lazy._state.sign)


def _gather(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    return _logarithms_at(lazy._state, *args[1:], **kwargs)


def _logarithms_at(state: _Logits, dim: Any = None, index: Any = None) -> Tensor | None:
    known = (
        _is_last(state, dim)
        and isinstance(index, Tensor)
        and is_plain(index)
        and index.dtype == torch.int64
        and index.device == state.x.device
        and index.shape == (*state.shape[:-1], 1)
    )
    if not known:
        return None
    losses = _losses_and_sums(state, index.reshape(-1), Shares())
    return (losses * -state.sign).to(state.dtype).view(index.shape)


def _sum(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    return _sum_of_logarithms(lazy._state, *args[1:], **kwargs)


def _sum_of_logarithms(
    state: _Logits, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Tensor | None:
    if not _is_last(state, dim):
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


def _losses_and_sums(state: _Logits, targets: Tensor, shares: Shares) -> Tensor:
    how = _how(state)
    with torch.set_grad_enabled(state.records and torch.is_grad_enabled()):
        losses, *sums = row_losses_and_sums(
            state.x, state.weight, state.bias, targets,
            how["curve"], shares, how["method"], how["dtype"],
        )  # fmt: skip
    state.sums = sums[0], sums[1]
    return losses


def _nll_loss(lazy: LazyLogits, func: Any, args: Any, kwargs: Any) -> Tensor | None:
    return _loss(lazy._state, *args[1:], **kwargs) if lazy._state.sign == 1 else None


# What is followed of the one alone.
_OF_LOGITS = (
    _cross_entropy, _logsumexp, _multiply, _divide, _tanh, _add, _move, _log_softmax
)  # fmt: skip
_OF_LOGARITHMS = (_negate, _gather, _sum, _nll_loss)

_FOLLOWED: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll_loss,
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), _log_softmax),
    **dict.fromkeys((torch.neg, Tensor.neg, Tensor.__neg__), _negate),
    **dict.fromkeys((torch.gather, Tensor.gather), _gather),
    **dict.fromkeys((torch.sum, Tensor.sum), _sum),
    **dict.fromkeys((torch.logsumexp, Tensor.logsumexp), _logsumexp),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiply),
    **dict.fromkeys((torch.multiply, Tensor.multiply), _multiply),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _divide),
    **dict.fromkeys((torch.true_divide, Tensor.true_divide), _divide),
    **dict.fromkeys((torch.tanh, Tensor.tanh, F.tanh), _tanh),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    Tensor.float: _cast_to(torch.float32),
    Tensor.double: _cast_to(torch.float64),
    Tensor.half: _cast_to(torch.float16),
    Tensor.bfloat16: _cast_to(torch.bfloat16),
    Tensor.to: _to,
    **dict.fromkeys((Tensor.contiguous, Tensor.clone, torch.clone), _same),
    **dict.fromkeys((Tensor.detach, torch.detach), _detach),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _shape),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _shape),
    **dict.fromkeys((Tensor.squeeze, torch.squeeze), _shape),
    **dict.fromkeys((Tensor.unsqueeze, torch.unsqueeze), _shape),
    **dict.fromkeys((torch.transpose, Tensor.transpose, *_PERMUTES), _move),
    Tensor.__getitem__: _choose,
}
