"""Recording the forward pass: each tensor that is saved, and where."""

import bisect
import dataclasses
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from packlight import _torch
from packlight._torch.attributes import CALL_MODULE, base, inside_compiled
from packlight._torch.autograd import Hooks
from packlight._torch.hooks import around_hooks
from packlight.errors import InputError
from packlight.profile.lines import is_internal, short_path
from packlight.profile.scene import Place, Scene


class Kept:
    """What autograd holds in place of a saved tensor. Alive exactly as long as it is kept."""

    __slots__ = ("__weakref__", "index", "packed", "unpack_with")

    def __init__(self, tensor: Tensor, hooks: Hooks | None) -> None:
        """Packed by other hooks, if there are any."""
        packed = tensor if hooks is None else hooks[0](tensor)
        if packed is tensor and tensor.grad_fn is not None:
            # Detached, since an operation's own output would hold the graph that holds it. Others
            # stay the objects that a graph would hold: notes of packs tell them by identity.
            packed = tensor.detach()
        self.packed: Any = packed
        self.unpack_with = None if hooks is None else hooks[1]
        self.index = -1


def unpack(kept: Kept) -> Tensor:
    # Not a method of the recorder: the graph, which the caller may hold for long, holds the hook.
    if kept.unpack_with is None:
        tensor: Tensor = kept.packed
        return tensor
    return kept.unpack_with(kept.packed)


@dataclasses.dataclass(slots=True)
class _Record:
    """One call of the pack hook."""

    kept: "weakref.ref[Kept]"
    place: Place
    source: str | None
    checkpointed: bool
    sequence: int


class Recorder:
    """Runs the forward pass and notes each tensor that is saved, and where."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.records: list[_Record] = []
        # Parameters that are saved, for those that belong to no module found in the scene.
        self.loose_parameters: list[nn.Parameter] = []
        self.start = _sequence()
        self.stack: list[tuple[nn.Module | None, Place]] = [(None, scene.root)]
        # From which sequence number of graph nodes on the forward pass was where.
        self.moves: list[tuple[int, Place]] = [(self.start, scene.root)]

    def run(
        self, forward: Callable[[], Any], loss: Callable[[Any], object] | None
    ) -> tuple[Any, Tensor | None]:
        with self._watching_modules(), around_hooks(self.pack, unpack):
            output = forward()
            if loss is None:
                return output, None
            self._move(None, self.scene.loss_place)
            value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value)
            raise InputError(
                f"loss returned {what}; expected a tensor of one element, as a backward pass "
                "starts from; reduce it, with .mean() or .sum()"
            )
        return output, value

    def pack(self, tensor: Tensor, hooks: Hooks | None) -> Kept:
        kept = Kept(tensor, hooks)
        kept.index = len(self.records)
        source, checkpointed = _caller()
        owners = (tensor, base(tensor))
        self.loose_parameters += [p for p in owners if isinstance(p, nn.Parameter)]
        record = _Record(
            kept=weakref.ref(kept),
            place=self.stack[-1][1],
            source=source,
            checkpointed=checkpointed,
            sequence=_sequence() - 1,
        )
        self.records.append(record)
        return kept

    def place_of(self, sequence: int) -> Place:
        """Where the forward pass stood when it made the graph node of this number."""
        index = bisect.bisect_right(self.moves, sequence, key=lambda move: move[0])
        return self.moves[max(index - 1, 0)][1]

    def _move(self, module: nn.Module | None, place: Place) -> None:
        self.stack.append((module, place))
        self.moves.append((_sequence(), place))

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._move(module, self.scene.places[module])

    _enter.only_looks_on = True  # type: ignore[attr-defined]  # see `calls.is_bare`

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # Down to the module, not by one: a module above it may have been left by an exception.
        for depth in range(len(self.stack) - 1, 0, -1):
            if self.stack[depth][0] is module:
                del self.stack[depth:]
                break
        self.moves.append((_sequence(), self.stack[-1][1]))

    _leave.only_looks_on = True  # type: ignore[attr-defined]

    @contextmanager
    def _watching_modules(self) -> Iterator[None]:
        with ExitStack() as handles:
            for module in watchable(self.scene.modules()):
                before = module.register_forward_pre_hook(self._enter, prepend=True)
                handles.callback(before.remove)
                after = module.register_forward_hook(self._leave, always_call=True)
                handles.callback(after.remove)
            yield


def watchable(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that take hooks: none inside `torch.compile`, which would compile anew for them,
    and no TorchScript, which refuses them.
    """
    modules = list(modules)
    inside: set[nn.Module] = set()
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            inside.add(module)
        else:
            inside.update(inside_compiled(module))
    return [module for module in modules if module not in inside]


def _sequence() -> int:
    """The number that the next graph node of this thread gets."""
    if not _torch.NODES:
        raise InputError(
            f"torch {torch.__version__} does not number graph nodes as packlight knows it, so what"
            " an operation keeps cannot be told; use an older torch for this"
        )
    return _torch.next_node_number()


def _caller() -> tuple[str | None, bool]:
    """The line of the innermost frame outside torch and packlight, within the running module.

    Also whether checkpointing is what saves. The search ends where a module of torch's or
    packlight's own was called: its caller's line would not say more than the module's path.
    """
    checkpointed = False
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code is CALL_MODULE or code is _RUN:
            break
        if not is_internal(code.co_filename):
            return f"{short_path(code.co_filename)}:{frame.f_lineno}", checkpointed
        checkpointed = checkpointed or code.co_filename == torch.utils.checkpoint.__file__
        frame = frame.f_back
    return None, checkpointed


_RUN = _torch.code_of(Recorder.run)
