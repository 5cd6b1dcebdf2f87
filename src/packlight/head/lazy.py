"""`LazyLogits`: logits of which a loss is computed by chunks, and which are computed when asked.

A head gives them in place of its logits. They are a tensor with a shape, a dtype, a device and a
place in the graph, and without memory. Torch shows every function that is called with them
(`__torch_function__`):

- Those between a head and its loss are followed, and losses are computed by chunks
  (`following.py`).
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
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import autocasts
from packlight._overwrite import writable
from packlight._torch.attributes import version
from packlight.errors import InputError, ModifiedWeightError
from packlight.head.rows import Curve
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
        self.members: list[weakref.ref[Logits]] = []
        self.gave_loss = False
        # Where the graph of computed logits begins: before what writes to them in place.
        self.edge: Any = None

    def _versions(self) -> tuple[object, ...]:
        given = (t for t in (self.x, self.weight, self.bias) if t is not None)
        return tuple((version(t), t.dtype, t.device) for t in given)

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

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias

    def logits(self, records: bool) -> Tensor:
        """The logits as the head gives them that is not lazy."""
        self.check()
        with torch.set_grad_enabled(records), self._as_called():
            if self.method is not None and records:
                logits = linear(self.x, self.weight, self.bias, method=self.method)
            else:
                logits = F.linear(self.x, self.weight, self.bias)
            if logits.requires_grad:
                # A view would be written to through what it is a view of, behind the edge.
                logits = writable(logits)
                self.edge = torch.autograd.graph.get_gradient_edge(logits)
            return logits

    def product(self, *inputs: Tensor | None) -> Tensor:
        """The plain head's logits of other inputs."""
        self.check()
        with self._as_called():
            plain: Any = F.linear
            logits: Tensor = plain(*inputs)
            return logits

    def _as_called(self) -> contextlib.AbstractContextManager[Any]:
        kind = self.x.device.type
        if kind == "meta":
            return contextlib.nullcontext()
        return torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None)


@dataclasses.dataclass(eq=False, weakref_slot=True, slots=True)
class Logits:
    """Logits of rows `x` of a head's input, after what was done to them since."""

    root: _Root
    x: Tensor  # [..., width]
    weight: Tensor
    bias: Tensor | None
    curve: Curve
    dtype: torch.dtype
    records: bool
    # What was done to the head's logits, and the logits before the last of it.
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    before: "Logits | None" = None
    # Whether classes are the second dimension, as for torch's loss of rows of several dimensions.
    moved: bool = False
    # 0 for logits; 1 for their logarithms of probabilities, u - logsumexp(u), -1 for minus those.
    sign: int = 0
    sums: tuple[Tensor, Tensor] | None = None  # logsumexp and sum of each row, once known
    values: Tensor | None = None
    version: int = 0  # of the values as they were computed
    bare: Tensor | None = None  # values without a graph, for what runs below autograd

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
        if self.before is None:
            self.values = self.root.logits(self.root.records)
        else:
            self.before._compute()
            assert self.before.values is not None
            with torch.set_grad_enabled(self.records):
                self.values = self.steps[-1](self.before.values)
            self.before = None  # which may hold more logits that nobody has
        self.version = version(self.values)

    def without_graph(self) -> Tensor:
        """The logits for an operation below autograd, where no graph can be made."""
        if self.bare is None:
            if self.values is not None:
                self.bare = self.values.detach()
            elif self.before is None:
                self.bare = self.root.logits(False)
            else:
                with torch.no_grad():
                    self.bare = self.steps[-1](self.before.without_graph())
        return self.bare

    def again(self, *inputs: Tensor | None) -> Tensor:
        """The logits of other inputs of the head, computed anew."""
        logits = self.root.product(*inputs)
        for step in self.steps:
            logits = step(logits)
        return logits


class _LazyLogits(torch.autograd.Function):
    """The place of lazy logits in the graph, for what no torch function shows.

    The state is an attribute and nothing is saved: hooks would copy the input for every view.
    """

    @staticmethod
    def forward(ctx: Any, state: Logits, *inputs: Tensor | None) -> Tensor:
        ctx.state = state
        lazy = _torch.hollow(LazyLogits, state.shape, state.dtype, state.x.device)
        lazy._state = state
        return lazy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        state: Logits = ctx.state
        root, again = state.root, state.again
        if state.values is not None and version(state.values) != state.version:
            # Back to where the head gave them, and no further: its weight may be tied to what its
            # input is made of.
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                state.values, [root.edge], gradient, retain_graph=True, allow_unused=True
            )
            if found[0] is None:  # all of them were overwritten
                return None, None, None, None
            gradient, again = found[0], root.product
        # In a graph of its own: other uses of the values may have freed theirs.
        inputs = tuple(
            None if one is None else one.detach().requires_grad_(one.requires_grad)
            for one in root.inputs
        )
        with torch.enable_grad():
            logits = again(*inputs)
        wanted = [one for one in inputs if one is not None and one.requires_grad]
        given = iter(torch.autograd.grad(logits, wanted, gradient, allow_unused=True))
        return None, *(
            next(given) if one is not None and one.requires_grad else None for one in inputs
        )


_apply: Callable[..., "LazyLogits"] = _LazyLogits.apply


def made(state: Logits) -> "LazyLogits":
    """The tensor of these logits."""
    state.root.members = [one for one in state.root.members if one() is not None]
    state.root.members.append(weakref.ref(state))
    with torch.set_grad_enabled(state.records), _torch.without_torch_functions():
        return _apply(state, *state.root.inputs)


def lazy_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, method: Quantiser | None = None
) -> "LazyLogits":
    """x W^T + b, x [..., width], W [classes, width]; see `LazyLogits`.

    With a method, its pack of x stands for x where a loss or the logits keep it.
    """
    root = _Root(x, weight, bias, method)
    return made(Logits(root, x, weight, bias, Curve(), root.dtype, root.records))


# ---- the tensor ----------------------------------------------------------------------------------


class LazyLogits(Tensor):
    """Logits x W^T + b of a head that are computed when they are used.

    `F.cross_entropy` and `logsumexp` of them are computed by chunks, without them. They hold the
    head's input for as long as they live. They are what the plain head gives, bit for bit, as long
    as the head's weight and input are not written to: after that, using them raises
    `ModifiedWeightError`. A hook on them after their loss would miss its gradient: `InputError`.
    """

    _state: Logits

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


class Follow(NamedTuple):
    """How a torch function of lazy logits is followed."""

    # Takes the logits, the torch function and its arguments; None where it knows no such call.
    function: Callable[[LazyLogits, Any, tuple[Any, ...], dict[str, Any]], Tensor | None]
    forms: tuple[Literal["logits", "moved", "logarithms"], ...]


# Written by `following.py`.
FOLLOWED: dict[Any, Follow] = {}


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
    follow = FOLLOWED.get(func)
    if follow is not None and isinstance(first, LazyLogits):
        state = first._state
        form = "moved" if state.moved else "logarithms" if state.sign else "logits"
        if state.values is None and form in follow.forms:
            result = follow.function(first, func, args, kwargs)
            if result is not None:
                return result
    if func in _WATCHING and any(lazy._state.root.gave_loss for lazy in found):
        if _watches_for_torch(args):
            with _torch.without_torch_functions():
                return func(*args, **kwargs)
        raise InputError(
            f"{func.__name__} of logits whose loss was computed by chunks: the gradient of the"
            " loss does not go through them; call logits.retain_grad() before the loss, which has"
            " them computed, or convert without head=True"
        )
    return func(*_mapped(_computed, args), **_mapped(_computed, kwargs))


@_torch.always_untraced
def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation below autograd gives: it sees the values."""
    return func(*_mapped(_values, args), **_mapped(_values, kwargs))


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
