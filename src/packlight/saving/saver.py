"""When a tensor is packed: as soon as the operation that saved it is known.

Torch calls the pack hook in the middle of an operation and does not say which: inputs are saved
before the kernel runs, and the node of the graph cannot be reached yet. So the hook puts the tensor
into a `Holder` that waits. A walk over the graph, back from a result, finds the node that saved it.
The node shows its holders and the name of each ("self", "result"). Meanwhile no more is held than
what one call saves anyway.

- A `TorchFunctionMode` sees the call of a torch function. When the call returns, the walk starts at
  its result, and at its arguments for what the call wrote in place.
- No mode sees a Python `autograd.Function`. Its tensors are found when a later call reads its
  result.
- A compiled region and a checkpoint are recognised by the code that calls the hook.

A tensor whose operation is never found stays exact, as the hook left it.
"""

import contextlib
import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.weak import TensorWeakRef

from packlight import _torch, sharing
from packlight._torch import graph
from packlight.layers.casts import CASTS, noted
from packlight.quantiser import Quantiser
from packlight.saving import activations, lossless, norms, packing, tensors
from packlight.saving.kept import Exact, Holder, Kept, Mask, Packed, Waiting, unpack
from packlight.saving.rules import CHECKPOINT, COMPILED, WORKSPACES, Rules

# Nothing says what the tensors of a Function are for. A tensor with this many times fewer elements
# than another beside it counts as a statistic (of a norm, the logsumexp of attention). A tensor
# with this many times more elements than the Function's outputs counts as the finished gradient of
# a loss. Both stay exact.
_MUCH = 16

# The result of a Function is not looked for after this many further nodes.
_PATIENCE = 1000

# Functions that run a backward pass: nodes that Python code makes in it are not the call's own.
_BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)


class SavingMode(TorchFunctionMode):
    """The mode by which the saver sees which torch function runs."""

    def __init__(self, saver: "Saver") -> None:
        super().__init__()
        self.saver = saver
        _torch.run_as_written(SavingMode.__torch_function__)
        _torch.run_as_written(Saver.call)

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # operations of a compiled region are not seen one by one
            return (torch.unflatten if func is Tensor.unflatten else func)(*args, **kwargs)
        return self.saver.call(func, args, kwargs)


class _RunningCall(NamedTuple):
    """A call of a torch function that is running."""

    name: str
    arguments: tuple[Any, ...]
    start: int  # the number of the first node that it makes
    owners: list[Tensor]  # of saved tensors: notes on tensors that only torch holds would be lost


class _Thread(threading.local):
    """The state of one thread: each numbers its own nodes, and backward passes run in others."""

    def __init__(self) -> None:
        self.is_ours = False  # our own operations run
        self.running: _RunningCall | None = None
        self.waiting: list[weakref.ref[Holder]] = []
        self.visited: set[int] = set()  # numbers of the nodes that were visited for `waiting`
        self.compiled: list[Holder] = []  # of the compiled region that saves
        self.arguments: tuple[Any, ...] = ()  # its arguments
        # Numbers of the next node: at the event before the last, and at the last.
        self.before = self.last = _torch.next_node_number()


class Saver:
    """Packs what is saved in one context."""

    def __init__(
        self,
        rules: Rules,
        min_bytes: int,
        skip: Callable[[Tensor], bool] | None,
        least: float = 0.0,
    ) -> None:
        # The share of all that was saved so far from which on packs by methods are worth it.
        self.least = least
        self.rules = rules
        self.min_bytes = min_bytes
        self.skip = skip
        self.has_saved = False
        # Of all tensors that were saved, and of those that something else stands for.
        self.seen_bytes = self.replaced_bytes = 0
        self.asked_bytes = 0  # of those for which there is a method
        self.has_packed = False  # by a method: gradients are others, and seeds may be drawn
        self.thread = _Thread()
        self.hook = _torch.untraced(lambda tensor: self.pack(tensor))
        # `torch.compile` would compile these where they run between two graphs.
        self.find = _torch.untraced(self._find)
        self.settle = _torch.untraced(self._settle)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within this context what is saved is packed."""
        with saved_tensors_hooks(self.hook, _torch.untraced(unpack)), SavingMode(self):
            try:
                yield
            finally:
                self.settle()

    # ---- events ----------------------------------------------------------------------------------

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a torch function, and packs what it saved."""
        thread = self.thread
        name = getattr(func, "__name__", "")
        # Reading an attribute is no call: another hook may read one between two hooks of ours.
        # Nor is writing one: torch does so while it gives a view that was written to a node, and
        # whoever asks the view for its node then waits without end.
        if thread.is_ours or name in ("__get__", "__set__"):
            return func(*args, **kwargs)
        arguments = (*args, *kwargs.values())
        if thread.compiled or thread.waiting:
            self.find(arguments)
        if func in _BACKWARD:
            return func(*args, **kwargs)
        around = thread.running
        call = thread.running = _RunningCall(name, arguments, _torch.next_node_number(), [])
        result = None
        try:
            result = func(*args, **kwargs)
        finally:
            if thread.compiled or thread.waiting:
                self.find((result,), arguments)
            thread.running = around
            if torch.is_grad_enabled():
                thread.before, thread.last = call.start, _torch.next_node_number()
        tensors.note_filling(name, arguments, result)
        if func in CASTS and tensors.is_of_torch(result) and tensors.is_of_torch(arguments[0]):
            noted(result, arguments[0])
        return result

    def pack(self, tensor: Tensor) -> Holder:
        """The pack hook."""
        thread = self.thread
        number = (
            _torch.next_node_number()
        )  # before anything below makes torch renew the node of a view
        around, thread.is_ours = thread.is_ours, True
        try:
            # Our own operations are not calls of the user's, and are not differentiated.
            with graph.unseen(), torch.no_grad():
                return self._pack(tensor, number, sys._getframe(1))
        finally:
            thread.is_ours = around

    def _settle(self) -> None:
        """Packs what can be packed now; the rest stays exact."""
        self.find(())
        for reference in self.thread.waiting:
            holder = reference()
            if holder is not None:
                holder.waiting = None
        self.thread.waiting = []

    # ---- the hook --------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor, number: int, frame: types.FrameType) -> Holder:
        thread = self.thread
        self.has_saved = True
        self.seen_bytes += tensor.numel() * tensor.element_size()  # sparse ones have no nbytes
        holder = hold_exactly(tensor)
        if not self._may_pack(tensor):
            return holder
        if tensor.dtype == torch.bool:
            self._replace(holder, Mask.of(tensor))
            return holder
        call = thread.running
        owner, is_cast = tensors.owner_of(tensor, () if call is None else call.arguments)
        source = sharing.source_of(owner)
        if source is not owner:
            owner, is_cast = source, True
        is_new = call is None and number > thread.last
        if is_new:
            self._find((tensor,))  # what was saved before, and may have led to this tensor
            thread.before, thread.last = thread.last, number
        if call is not None:
            call.owners.append(owner)
        holder.waiting = Waiting(
            owner=TensorWeakRef(owner),
            is_cast=is_cast,
            has_history=tensor.requires_grad,
            function="" if call is None else call.name,
            start=thread.before if call is None else call.start,
            hook=graph.active_hook(),
        )
        if graph.is_checkpoint(frame):
            # At once: a note would serve the first pass of the block and not the second, which gets
            # another tensor and has to save it itself.
            self._decide(CHECKPOINT, "", {"": [holder]})
            return holder
        arguments = graph.compiled_arguments(frame)
        if arguments is not None:
            thread.compiled.append(holder)
            thread.arguments = arguments
        elif graph.is_in_function(frame):
            # The Function differentiates within itself, and saves finished gradients.
            holder.waiting = None
        else:
            thread.waiting.append(weakref.ref(holder))
        return holder

    def _may_pack(self, tensor: Tensor) -> bool:
        if not tensors.is_plain(tensor) or tensor.nbytes < self.min_bytes:
            return False
        if tensor.dtype in tensors.FLOATING and tensors.is_weight(tensor):
            return False
        return self.skip is None or not self.skip(tensor)

    # ---- finding the operation -------------------------------------------------------------------

    def _find(self, *roots: Iterable[object]) -> None:
        """Decides the waiting holders that are saved behind the roots, one root after the other."""
        thread = self.thread
        around, thread.is_ours = thread.is_ours, True
        try:
            with graph.unseen(), torch.no_grad():
                self._decide_compiled()
                for values in roots:
                    self._walk(values)
        finally:
            thread.is_ours = around

    def _walk(self, roots: Iterable[object]) -> None:
        thread = self.thread
        alive = [holder for reference in thread.waiting if (holder := reference()) is not None]
        oldest = _torch.next_node_number() - _PATIENCE
        starts = [one.waiting.start for one in alive if one.waiting and one.waiting.start > oldest]
        if not starts:
            thread.waiting = []
            thread.visited.clear()
            return
        nodes = graph.behind(tensors.tensors_in(roots), min(starts), thread.visited)
        for node in nodes:
            self._decide_node(node)
        if thread.running is not None and any(map(graph.hides_node, nodes)):
            self._decide_write(thread.running, alive)
        thread.waiting = [ref for ref in thread.waiting if (one := ref()) and one.waiting]

    # ---- deciding --------------------------------------------------------------------------------

    def _decide_node(self, node: Node) -> None:
        slots = _held(node)
        holders = [holder for held in slots.values() for holder in held]
        functions = [holder.waiting.function for holder in holders if holder.waiting is not None]
        if not functions:
            return
        if graph.is_python(node):
            self._decide_function(node, holders)
        elif lossless.compares(lossless.operation_of(node.name())):
            self._decide_comparison(node, functions[0], slots)
        else:
            self._decide(node.name(), functions[0], slots, node)

    def _decide(
        self, name: str, function: str, slots: dict[str, list[Holder]], node: Node | None = None
    ) -> None:
        """Decides how the tensors that an operation of torch saved are kept."""
        may_be_masks = not name.startswith(WORKSPACES)
        for slot, holders in slots.items():
            method = self.rules.method(name, function, slot, node)
            for holder in holders:
                if holder.waiting is None or not isinstance(holder.kept, Exact):
                    continue
                tensor = holder.kept.tensor
                if tensor.dtype == torch.uint8 and may_be_masks and _is_mask(tensor):
                    self._replace(holder, Mask.of(tensor))
                else:
                    packs = tensor.dtype != torch.uint8 and holder.waiting.has_history
                    self._keep(holder, method if packs else None, name, slot, node)

    def _decide_comparison(self, node: Node, function: str, slots: dict[str, list[Holder]]) -> None:
        """Decides about two tensors that the backward pass of an operation compares."""
        held = {slot: holders[0] for slot, holders in slots.items()}
        found: dict[str, Kept] = {}
        if self.rules.method(node.name(), function) is not None:
            found = lossless.comparison(node, held)
        for slot, holder in held.items():
            if slot in found:
                self._replace(holder, found[slot])
            else:
                _keep_exactly(holder)

    def _decide_write(self, call: _RunningCall, holders: list[Holder]) -> None:
        """Decides about a call that wrote to a view in place, whose node cannot be seen."""
        name = lossless.node_of(call.name)
        if lossless.is_known_by_name(name) and not self.rules.asks_for_slots(name):
            mine = [one for one in holders if one.waiting and one.waiting.start == call.start]
            self._decide(name, call.name, {"result": mine})

    def _decide_function(self, node: Node, holders: list[Holder]) -> None:
        """Decides how the tensors of an `autograd.Function` are kept."""
        function = graph.function_of(node)
        if function is None or function.__module__.startswith("packlight."):
            for holder in holders:
                _keep_exactly(holder)
            return
        self._decide_made(node.name(), holders, graph.leaves(node), graph.output_elements(node))

    def _decide_compiled(self) -> None:
        """Decides how the tensors of a compiled region are kept."""
        thread = self.thread
        holders, arguments = thread.compiled, thread.arguments
        thread.compiled, thread.arguments = [], ()
        if holders:
            self._decide_made(COMPILED, holders, arguments, None)

    def _decide_made(
        self, name: str, holders: list[Holder], inputs: Iterable[Any], outputs: int | None
    ) -> None:
        """Decides about tensors without history that Python code saved for an unknown purpose.

        `outputs` is the number of elements of its largest output; None if that says nothing.
        """
        exact = [holder.kept for holder in holders if isinstance(holder.kept, Exact)]
        largest = max((one.tensor.numel() for one in exact), default=0)
        several = sum(_is_large(holder, largest) for holder in holders) > 1
        for holder in holders:
            if holder.waiting is None or not isinstance(holder.kept, Exact):
                continue
            tensor = holder.kept.tensor
            method = self.rules.method_of_code(name, holder.waiting.function, several)
            is_made = not holder.waiting.has_history
            if (
                tensor.dtype == torch.uint8  # codes
                or tensor.numel() * _MUCH <= largest
                or (is_made and tensors.comes_from_weight(tensor, inputs))
                or (is_made and outputs is not None and outputs * _MUCH <= tensor.numel())
                or (name == COMPILED and tensors.may_be_a_mask(tensor))
            ):
                method = None
            self._keep(holder, method, name)

    # ---- keeping ---------------------------------------------------------------------------------

    def _keep(
        self,
        holder: Holder,
        method: Quantiser | None,
        name: str,
        slot: str = "",
        node: Node | None = None,
    ) -> None:
        """Has a holder keep its tensor by a method; exactly if the method is None."""
        exact = holder.kept
        assert isinstance(exact, Exact)
        found = None
        # A tensor that the operation itself has overwritten since can no longer be packed.
        if method is not None and exact.is_unchanged():
            found = self._stand_in(holder, exact.tensor, method, name, slot, node)
        if found is None:
            _keep_exactly(holder)
        else:
            self._replace(holder, found)

    def _replace(self, holder: Holder, kept: Kept) -> None:
        """Has something else stand for a tensor."""
        assert isinstance(holder.kept, Exact)
        self.replaced_bytes += holder.kept.tensor.nbytes
        holder.kept, holder.waiting = kept, None

    def _stand_in(
        self,
        holder: Holder,
        tensor: Tensor,
        method: Quantiser,
        name: str,
        slot: str,
        node: Node | None,
    ) -> Kept | None:
        """What stands for a tensor; None if the tensor is better saved exactly."""
        assert holder.waiting is not None
        owner = holder.waiting.owner()
        if owner is not None and not holder.waiting.is_cast and sharing.is_kept_exactly(owner):
            return None
        if graph.active_hook() is not holder.waiting.hook:
            owner = None  # a note would be valid under other hooks than those that save this tensor
        operation = lossless.operation_of(name)
        is_spread = any(tensors.repeats(tensor))  # fewer elements are in memory
        if lossless.needs_no_values(operation, slot, node):
            return None if is_spread else lossless.without_values(operation, tensor, node)
        if tensors.is_extreme(tensor, owner):
            return None
        within = activations.within_limits(operation, slot, node, method.grade.bits)
        pack = functools.partial(
            self._packed, method=method, within=within, is_compiled=name == COMPILED
        )
        if lossless.needs_one_side(operation, slot, node):
            return None if is_spread else lossless.one_side(tensor, pack)
        function = holder.waiting.function
        if norms.mixes_rows(function, operation, tensor, node, method.grade.group_size):
            return None
        if norms.normalises(operation, slot):
            call = self.thread.running
            eps = norms.eps_of_call(call.name, call.arguments) if call is not None else 0.0
            if norms.has_few_values(operation, tensor):
                return None
            found = norms.statistics(operation, tensor, node, _held(node), eps)
            if found is not None:
                return None if is_spread else norms.Normalised.of(tensor, found, pack)
        return pack(tensor, owner=owner)

    def _packed(self, tensor: Tensor, **options: Any) -> Packed | None:
        """A pack of a tensor; None where packs are not worth it, and for less than a group."""
        self.asked_bytes += tensor.nbytes
        if self.asked_bytes <= self.least * self.seen_bytes:
            return None
        pack = packing.pack(tensor, **options)
        self.has_packed |= pack is not None
        return pack


def hold_exactly(tensor: Tensor) -> Holder:
    """Holds the tensor itself.

    Detached, since an operation's own output would hold the node that holds the output.
    """
    return Holder(Exact(tensor.detach() if tensor.requires_grad else tensor, tensor._version))


def _held(node: Node | None) -> dict[str, list[Holder]]:
    """Our holders in a node, by torch's names for the saved tensors."""
    slots: dict[str, list[Holder]] = {}
    for slot, data in () if node is None else graph.slots(node):
        holder = getattr(data, "packed", data)  # a profile holds what our hook gave
        if isinstance(holder, Holder):
            slots.setdefault(slot, []).append(holder)
    return slots


def _is_mask(tensor: Tensor) -> bool:
    """Whether all bytes are 0 or 1; False on a GPU, which would have to wait for the answer.

    Without values a tensor is taken for a mask, as most are.
    """
    if tensor.device.type != "cpu":
        return False
    return _torch.is_fake(tensor) or bool(tensor.max() <= 1)


def _is_large(holder: Holder, largest: int) -> bool:
    """Whether a holder may pack a tensor of numbers, of about as many elements as the largest."""
    if holder.waiting is None or not isinstance(holder.kept, Exact):
        return False
    tensor = holder.kept.tensor
    return tensor.dtype in tensors.FLOATING and tensor.numel() * _MUCH > largest


def _keep_exactly(holder: Holder) -> None:
    """Has a holder keep its tensor exactly; other operations then save it at no cost."""
    if holder.waiting is not None and isinstance(holder.kept, Exact):
        owner = holder.waiting.owner()
        if owner is not None and not holder.waiting.is_cast:
            sharing.note_exact(owner, holder.kept)
    holder.waiting = None
