"""CUDA graphs of training passes: recorded once for each kind of input, replayed from then on.

- `state.py`: what a recording holds for, and what says that a module is not to be recorded.
- `recording.py`: one forward and one backward pass, and the `autograd.Function` that replays them.
- `recorder.py`: how CUDA records and replays.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from packlight import _torch, integrations
from packlight._classes import derivation, origin
from packlight.errors import CannotConvertError, CannotGraphError, InputError
from packlight.graphs.recorder import CudaRecorder
from packlight.graphs.recording import Recording
from packlight.graphs.state import Key, key_of

__all__ = ["graphed", "launched"]

_ATTRIBUTE = "_packlight_graphs"

_Module = TypeVar("_Module", bound=nn.Module)


def graphed(model: _Module, *sample: Any, shapes: int = 8, **named: Any) -> _Module:
    """Have training passes of a model replayed as CUDA graphs; returns the model.

    Launching a step's thousands of kernels from Python often takes longer than they run. The first
    training pass with a kind of input records its forward and its backward pass; further passes
    copy their inputs and launch two graphs. Outputs, gradients, buffers, dropout masks and the
    random numbers of rounding are those of a launched pass. A pass in `eval()` or without gradients
    is launched as ever, as is a second pass that starts before the backward pass of the first.

    A *kind of input* is the shapes, dtypes and devices of all tensors among the arguments, all
    other arguments, autocast, and the state of the model: training flags, parameters and what
    requires a gradient, classes of modules and forwards of their own, their attributes that are
    tensors or plain values, such as the `p` of a dropout. Each kind has a recording of its own. Pad
    batches to a few lengths.

    **What cannot be recorded** is what a graph cannot do again: decisions and numbers made of
    values on the device (`.item()`, boolean indices), draws from the CPU's generators, changes of a
    module's attributes, module hooks within the model or of all modules, results that are neither
    tensors nor plain values (a key-value cache: set `use_cache=False`). The reason is raised or
    warned of. What only Python sees is not: an attribute that is an object (a `config`), a global
    variable, printing.

    **Memory.** The graphs' activations lie in a pool of their own, of the size of a launched pass's
    peak; `torch.cuda.max_memory_reserved` sees it, `max_memory_allocated` does not. Gradients lie
    there too, once for each kind of input, and `p.grad` refers to them until the next pass; where a
    gradient is kept longer, as in accumulation, the next pass copies it first. Outputs are copies.

    Args:
        model: any module; convert it first. When it trains it must be on one CUDA device: on
            another its passes are launched, with a warning.
        *sample: arguments of a call to record now. Without them the first pass records.
        shapes: kinds of inputs that are recorded; passes of further kinds are launched.
        **named: of the call to record now, those by keyword.

    Raises:
        CannotGraphError: the pass of the sample cannot be recorded. Without a sample a warning
            names the reason, and passes of that kind are launched.
        InputError: arguments of the wrong kind.

    `launched(model)` undoes it, as `revert` does. `convert` drops what was recorded.

    >>> import torch, packlight
    >>> model = packlight.graphed(torch.nn.Linear(8, 8))
    >>> packlight.launched(model)
    1
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected an nn.Module")
    if type(shapes) is not int or shapes < 1:
        raise InputError(f"shapes={shapes!r} is not a whole number above 0")
    if not _torch.TREES:
        raise CannotGraphError("this release of torch does not take arguments apart")
    integrations.load()
    graphs = replay(model, Graphs(shapes, CudaRecorder()))
    if sample or named:
        if not model.training:
            raise CannotGraphError("the model is in eval(); graphs are of training passes")
        graphs.find(model, _kind_of(model).forward, sample, named)
    return model


def launched(model: nn.Module) -> int:
    """Undo `graphed`: passes of the model and of its parts are launched; how many were graphed."""
    found = _graphed_in(model)
    kinds = [_kind_of(module) for module in found]
    for module, kind in zip(found, kinds, strict=True):
        del vars(module)[_ATTRIBUTE]
        module.__class__ = kind
    return len(found)


@contextlib.contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Within, no module is graphed; after it those that were are, without what was recorded."""
    found = [(module, vars(module)[_ATTRIBUTE]) for module in _graphed_in(model)]
    launched(model)
    try:
        yield
    finally:
        for module, graphs in found:
            graphs.forget()
            replay(module, graphs)


def _graphed_in(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _ATTRIBUTE in vars(module)]


def _kind_of(module: nn.Module) -> Any:
    """The class of a graphed module before it was graphed."""
    made = origin(type(module))
    if made is None or made[0] is not _replayed:
        raise CannotConvertError(
            f"the class of a graphed module has become {type(module).__name__} since (a"
            " parametrization or fully_shard?); undo that first"
        )
    return made[1][0]


def replay(model: nn.Module, graphs: "Graphs") -> "Graphs":
    """Gives a module the class whose training passes are replayed."""
    launched(model)
    vars(model)[_ATTRIBUTE] = graphs
    model.__class__ = _replayed(type(model))
    return graphs


@derivation
def _replayed(kind: type[nn.Module]) -> dict[str, Any]:
    """The subclass of a module class whose training passes are replayed."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        graphs: Graphs | None = vars(self).get(_ATTRIBUTE)
        if graphs is None or not graphs.may_replay(self):
            return kind.forward(self, *args, **kwargs)
        return graphs.run(self, kind.forward, args, kwargs)

    forward.__wrapped__ = kind.forward  # type: ignore[attr-defined]  # its arguments are the model's
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return {**names, "forward": forward}


class Graphs:
    """The recordings of one module."""

    def __init__(self, shapes: int, recorder: Any) -> None:
        self.shapes = shapes
        self.recorder = recorder
        self.forget()

    def forget(self) -> None:
        self.recordings: list[Recording] = []
        self.refused: list[tuple[Key, str]] = []
        self.modules: list[nn.Module] = []
        self.pending: Any = None  # a weak reference to what lives until a backward pass has run
        self.warned: set[str] = set()
        self.recorder.restart()

    def __deepcopy__(self, memo: Any) -> "Graphs":
        return Graphs(self.shapes, self.recorder.anew())

    def __reduce__(self) -> Any:  # graphs are of this process
        return Graphs, (self.shapes, self.recorder.anew())

    def may_replay(self, module: nn.Module) -> bool:
        """Whether a pass of the module is one that is recorded and replayed."""
        return (
            module.training
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not self.recorder.is_recording()
            and _torch.saved_tensor_hooks() is None
        )

    def run(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A training pass of the module: replayed, recorded and replayed, or launched."""
        recording = None
        if self.pending is None or self.pending() is None:
            try:
                recording = self.find(module, forward, args, kwargs)
            except CannotGraphError as error:
                self.warn_once(str(error))
            # Each recording writes where those before it have let memory go, gradients or not.
            if recording is not None and any(each.is_held() for each in self.recordings):
                self.warn_once(
                    "gradients of an earlier pass are still referred to, and a replay would"
                    " overwrite them: this pass is launched; copy what you keep"
                )
                recording = None
        if recording is None:
            return forward(module, *args, **kwargs)
        return recording.replay(self, args, kwargs)

    def find(
        self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Recording | None:
        """The recording of such a pass, made now if it is the first; None if there are enough."""
        known = self._known(key_of(self.modules or [module], args, kwargs))
        if known is not None:
            return known
        self.modules = list(module.modules())  # some may be others since
        key = key_of(self.modules, args, kwargs)
        known = self._known(key)
        if known is not None:
            return known
        for refused, reason in self.refused:
            if refused == key:
                raise CannotGraphError(reason)
        if len(self.recordings) + len(self.refused) >= self.shapes:
            self.warn_once(
                f"{self.shapes} kinds of inputs are recorded, and this is one more: it is"
                " launched; pad inputs to fewer shapes, or raise shapes="
            )
            return None
        try:
            recording = Recording(key, module, forward, args, kwargs, self.recorder)
        except CannotGraphError as error:
            self.refused.append((key, str(error)))
            if not self.recordings:
                self.recorder.restart()
            raise
        self.recordings.append(recording)
        return recording

    def _known(self, key: Key) -> Recording | None:
        return next((recording for recording in self.recordings if recording.key == key), None)

    def warn_once(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(f"packlight.graphed: {text}", stacklevel=5)
