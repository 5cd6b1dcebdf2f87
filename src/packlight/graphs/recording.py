"""One forward and one backward pass of a module, recorded, and how they are replayed."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from packlight import _torch
from packlight.errors import CannotGraphError
from packlight.graphs.state import (
    PLAIN,
    Attributes,
    Key,
    autocast,
    draws_on_cpu,
    refuse_foreign_leaves,
    refuse_hooks,
)
from packlight.head.lazy import LazyLogits

# What other packages need while a pass of a module is recorded.
_contexts: list[Callable[..., contextlib.AbstractContextManager[None]]] = []


def while_recording(
    context: Callable[..., contextlib.AbstractContextManager[None]],
) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """Registers the decorated context, made of the module and the call's `args` and `kwargs`."""
    _contexts.append(context)
    return context


@contextlib.contextmanager
def _surroundings(module: nn.Module, args: Any, kwargs: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in _contexts:
            stack.enter_context(context(module, args, kwargs))
        yield


class Recording:
    """What is replayed for calls of one key.

    `inputs`, `outputs`, `grad_outputs` and `gradients` are the memory that the graphs read and
    write. Gradients are those of the inputs that require one, then those of the parameters.
    """

    def __init__(
        self,
        key: Key,
        module: nn.Module,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        recorder: Any,
    ) -> None:
        self.key = key
        leaves, structure = _torch.flatten((args, kwargs))
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.inputs = [_copy(leaves[i]) for i in self.places]
        for place, static in zip(self.places, self.inputs, strict=True):
            leaves[place] = static
        self.parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        everything = [*self.inputs, *module.parameters()]
        modules = list(module.modules())
        recorder.refuse(everything)
        refuse_hooks(module)
        stand_ins = {p: _stand_in(p) for p in self.parameters}
        self.wanted = [x for x in self.inputs if x.requires_grad] + list(stand_ins.values())

        def run_forward() -> list[Tensor | None]:
            statics, named = _torch.unflatten(leaves, structure)
            self.seeds.used = 0
            with _without_autocast_cache(), _in_place_of(stand_ins, modules):
                self.result = forward(module, *statics, **named)
            return list(_tensors(self.result))

        def run_backward() -> list[Tensor | None]:
            found = _tensors(self.result)
            differentiated = [found[i] for i in self.differentiated]
            gradients = torch.autograd.grad(
                differentiated, self.wanted, self.grad_outputs, allow_unused=True
            )
            return list(gradients)

        def run_both() -> None:
            run_forward()
            self._choose()
            run_backward()
            self.result = None  # on whose nodes this stream lies

        with (
            _surroundings(module, args, kwargs),
            recorder.recording(everything[0].device) as self.seeds,
        ):
            buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
            attributes = [Attributes(part) for part in modules]
            try:
                recorder.warm_up(run_both)
                drawn = draws_on_cpu()
                self.outputs, self.replay_forward = recorder.record(run_forward)
                if draws_on_cpu() != drawn:
                    raise CannotGraphError(
                        "the forward pass draws random numbers on the CPU, which a graph would"
                        " repeat; draw them on the device, or turn that part off (layer drop?)"
                    )
                self._choose()
                differentiated = [self.outputs[i] for i in self.differentiated]
                refuse_foreign_leaves(differentiated, self.wanted)
                self.gradients, self.replay_backward = recorder.record(run_backward)
            finally:
                with torch.no_grad():
                    for buffer, was in buffers:
                        buffer.copy_(was)
            changed = {type(part.module).__name__ for part in attributes if part.changed()}
            if changed:
                raise CannotGraphError(
                    f"the forward pass changes attributes of {', '.join(sorted(changed))}, which a"
                    " replay would not do"
                )
        results, self.structure = _torch.flatten(self.result)
        self.constants = [NotComputed() if isinstance(x, LazyLogits) else x for x in results]
        self.output_places = [i for i, x in enumerate(self.constants) if isinstance(x, Tensor)]
        for place in self.output_places:
            self.constants[place] = None
        self.outputs = [x.detach() for x in self.outputs if x is not None]
        if not recorder.runs_again:
            del self.result  # the graph of autograd; the memory of what it saves is the pool's
        self.uses = self._uses()
        self.is_out = False  # whether gradients may be referred to

    def _choose(self) -> None:
        """Which outputs a backward pass starts from: scalars, if there are some; else all."""
        found = _tensors(self.result)
        able = [i for i, x in enumerate(found) if x.requires_grad]
        if not able:
            raise CannotGraphError("no result of the pass requires a gradient")
        self.differentiated = [i for i in able if found[i].numel() == 1] or able
        self.able = able
        if not hasattr(self, "grad_outputs"):
            self.grad_outputs = [torch.ones_like(found[i]) for i in self.differentiated]

    # ---- replays ---------------------------------------------------------------------------------

    def replay(self, owner: Any, args: Any, kwargs: Any) -> Any:
        """The result of a call of this key. `owner.pending` lives until its backward pass."""
        leaves, _ = _torch.flatten((args, kwargs))
        given = [leaves[i] for i in self.places]
        with torch.no_grad():
            for static, x in zip(self.inputs, given, strict=True):
                static.copy_(x)
        turn = _Turn()
        owner.pending = weakref.ref(turn)
        differentiable = [x for x in given if x.requires_grad]
        found = _apply(self, turn, *differentiable, *self.parameters)
        result = list(self.constants)
        for place, x in zip(self.output_places, found, strict=True):
            result[place] = x
        return _torch.unflatten(result, self.structure)

    def is_held(self) -> bool:
        """Whether gradients that a replay overwrites are referred to; copies `p.grad` if it is."""
        if not self.is_out:
            return False
        for parameter, gradient in zip(self.parameters, self._of_parameters(), strict=True):
            if gradient is not None and _is_at(parameter.grad, gradient):
                assert parameter.grad is not None
                parameter.grad = parameter.grad.clone()
        self.is_out = self._uses() != self.uses
        return self.is_out

    def _of_parameters(self) -> list[Tensor | None]:
        gradients: list[Tensor | None] = self.gradients[-len(self.parameters) :]
        return gradients if self.parameters else []

    def _uses(self) -> list[int]:
        return [_torch.storage_uses(x) for x in self._of_parameters() if x is not None]

    def handed_out(self) -> list[Tensor | None]:
        """The gradients as a backward pass returns them.

        Those of parameters become `p.grad` as they are, if torch says who else refers to them.
        """
        self.is_out = True
        every = len(self.gradients)
        copied = every - len(self.parameters) if _torch.STORAGE_USES else every
        return [
            None if x is None else x.clone() if i < copied else x.detach()
            for i, x in enumerate(self.gradients)
        ]


class NotComputed:
    """Stands for the logits that a head has not computed, in the results of a replayed pass."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            "a replayed pass of a model with head=True gives no logits, as what they are computed"
            " of is overwritten; packlight.launched(model) gives them, and so does eval()"
        )


class _Turn:
    """Lives as long as the graph of a replayed pass, or until its backward pass has run."""

    __slots__ = ("__weakref__",)


class _Replay(torch.autograd.Function):
    """The outputs of a recorded pass; the parameters are arguments for their gradients."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, turn: _Turn, *_: Tensor) -> tuple[Tensor, ...]:
        ctx.recording, ctx.turn = recording, turn
        ctx.set_materialize_grads(False)
        recording.seeds.draw()
        recording.replay_forward()
        outputs = tuple(x.clone() for x in recording.outputs)
        fixed = [x for i, x in enumerate(outputs) if i not in recording.able]
        ctx.mark_non_differentiable(*fixed)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        recording = ctx.recording
        if ctx.turn is None:
            raise RuntimeError(
                "the backward pass of a graphed model ran already, and its memory was used since;"
                " packlight.launched(model) allows a second one"
            )
        for i, gradient in enumerate(grads):
            if gradient is not None and i not in recording.differentiated:
                raise RuntimeError(
                    "this graph goes backward from the scalar results of the model (its loss), and"
                    " another result is differentiated too; packlight.launched(model) allows it"
                )
        if all(grads[i] is None for i in recording.differentiated):
            return (None,) * (2 + len(recording.gradients))
        for i, static in zip(recording.differentiated, recording.grad_outputs, strict=True):
            gradient = grads[i]
            static.zero_() if gradient is None else static.copy_(gradient)
        recording.replay_backward()
        ctx.turn = None
        return None, None, *recording.handed_out()


_apply: Callable[..., tuple[Tensor, ...]] = _torch.applied(_Replay)


def _is_at(x: Tensor | None, place: Tensor) -> bool:
    return x is not None and x.data_ptr() == place.data_ptr()


def _stand_in(parameter: Tensor) -> nn.Parameter:
    """Another parameter in the same memory.

    Autograd's node for a parameter keeps the stream on which it was made, for as long as any graph
    refers to it, as a loss of an earlier step may. On that stream nothing can be recorded.
    """
    found = nn.Parameter(parameter.detach())
    vars(found).update(vars(parameter))
    return found


@contextlib.contextmanager
def _in_place_of(
    stand_ins: Mapping[Tensor, nn.Parameter], modules: Iterable[nn.Module]
) -> Iterator[None]:
    """Modules have the stand-ins for parameters within."""
    places = [
        (registry, name, tensor)
        for registry in map(_torch.parameters, modules)
        for name, tensor in registry.items()
        if tensor is not None and tensor in stand_ins
    ]
    try:
        for registry, name, tensor in places:
            registry[name] = stand_ins[tensor]
        yield
    finally:
        for registry, name, tensor in places:
            registry[name] = tensor


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def _tensors(result: Any) -> list[Tensor]:
    """The tensors in a result. Raises `CannotGraphError` for what a graph cannot give again."""
    leaves, _ = _torch.flatten(result)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *PLAIN)):
            raise CannotGraphError(
                f"the result has a {type(leaf).__name__}, neither a tensor nor a plain value"
                + ("; set use_cache=False" if "Cache" in type(leaf).__name__ else "")
            )
    return [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, LazyLogits)]


def _without_autocast_cache() -> Any:
    """Autocast as it is, but each pass casts parameters anew: a cast of before is not recorded."""
    on = [
        (kind, dtype) for kind, dtype in zip(("cuda", "cpu"), autocast(), strict=True)
        if dtype is not None
    ]  # fmt: skip
    kind, dtype = on[0] if on else ("cpu", None)
    enabled = bool(on)
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
