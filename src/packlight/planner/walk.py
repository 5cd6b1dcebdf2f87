"""`walk`: a training step on tensors without values, with what is allocated at each point."""

import bisect
import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from packlight import _imagined, _torch
from packlight.errors import InputError
from packlight.parallel import Parallel
from packlight.planner.costs import Costs
from packlight.planner.cutting import cut
from packlight.planner.devices import Device
from packlight.planner.ledger import Ledger
from packlight.planner.planner import Loss, OptimizerOf
from packlight.planner.runs import Run, runs_of, shortened
from packlight.planner.stepping import Stepping
from packlight.planner.timeline import (
    BACKWARD,
    BACKWARD_2,
    FORWARD,
    FORWARD_2,
    LOSS,
    STEP,
    Static,
    added,
)
from packlight.planner.walked import Walked, Weight
from packlight.planner.wires import local_bytes, local_parts
from packlight.predict import copied, copied_inputs, fake_tensors, imagining
from packlight.profile.recording import watchable
from packlight.profile.tensors import tensors_in


class Walker:
    """A copy of a model on fake tensors, on which steps are walked, also after conversions.

    Of runs of alike blocks (`runs.py`) the copy has three.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        loss: Loss | None = None,
        optimizer: OptimizerOf | None = None,
        runs: Sequence[Run] | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        self.parallel = parallel or Parallel()
        self.fakes = fake_tensors()
        self.mode = self.fakes.Fakes()
        self.runs = runs_of(model) if runs is None else list(runs)
        left_out = [name for run in self.runs if run.extra for name in run.names[2:-1]]
        stubs = {id(model.get_submodule(name)): nn.Identity() for name in left_out}
        self.model, self.inputs, self.kwargs = copied(
            self.mode, "cpu", model, inputs, kwargs, stubs
        )
        shortened(self.model, self.runs)
        self.loss = loss
        self.ledger: Ledger | None = None  # of the walk that is under way
        with self.imagined():
            cut(self.model, self.parallel, self.walked_blocks(), self._told)
            self.stepping = Stepping(optimizer, list(self.model.parameters()), self.parallel)

    def walked_blocks(self) -> list[str]:
        return [run.walked(place) for run in self.runs for place in range(run.places)]

    def _told(self, kind: str, size: float) -> None:
        """Of bytes to other ranks that the next operator sends."""
        if self.ledger is not None:
            self.ledger.sent = added(self.ledger.sent, {kind: size})

    def see(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Has another batch."""
        self.inputs, self.kwargs = copied_inputs(self.mode, "cpu", inputs, kwargs)

    def walk(self, device: Device, again: bool = False) -> Walked:
        """A step under the caller's autocast, of CUDA or of the CPU; `again` says whether the
        passes of a second micro-batch are walked, which add to the gradients.
        """
        kinds = (kind for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind))
        dtype = next((torch.get_autocast_dtype(kind) for kind in kinds), None)
        with self.imagined():
            return _Walk(self, device, dtype).run(again)

    @contextlib.contextmanager
    def imagined(self) -> Iterator[None]:
        """Within, the copy can be run and converted."""
        with contextlib.ExitStack() as stack:
            for context in (
                _without_autocast(),
                self.fakes.FakeFunctionMode(),
                _imagined.on_gpu(),
                self.mode,
            ):
                stack.enter_context(context)
            with imagining(self.inputs):
                yield


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """As outside of all contexts of autocast, where its copies of weights end with the context."""
    enabled, depth = torch.is_autocast_enabled("cpu"), 0
    torch.clear_autocast_cache()
    torch.set_autocast_enabled("cpu", False)
    while torch.autocast_decrement_nesting() >= 0:
        depth += 1
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", enabled)
        for _ in range(depth):
            torch.autocast_increment_nesting()
        torch.clear_autocast_cache()


class _Walk:
    def __init__(self, walker: Walker, device: Device, autocast: torch.dtype | None) -> None:
        self.walker, self.model, self.autocast = walker, walker.model, autocast
        self.device = device
        self.paths = {module: name for name, module in self.model.named_modules()}
        self.ledger = Ledger(Costs(device), self.where, walker.parallel)
        walker.ledger, self.rates = self.ledger, device.rates
        self.phase = FORWARD
        self.passed = self.returned = 0  # bytes from one block to the next, and of results
        self.lets_go = False
        self._input: weakref.ref[Any] | None = None
        self.stack: list[str] = [""]
        # From which number of graph nodes on the forward pass was where.
        self.moves: list[tuple[int, str]] = [(_torch.next_node_number(), "")]

    def run(self, again: bool) -> Walked:
        walker, ledger = self.walker, self.ledger
        parameters = list(self.model.parameters())
        states = walker.stepping.states
        weights = tuple(self._weights(states))
        trained = self._owned(lambda module: [p for p in module.parameters() if p.requires_grad])
        static = Static(
            trained + self._owned(lambda module: module.parameters()),
            self._owned(lambda module: module.buffers()),
            self._owned(lambda module: [t for p in module.parameters() for t in states(p)]),
            ledger.owns(*tensors_in((walker.inputs, walker.kwargs))),
            self.rates.workspace,
            trained,
        )
        with self._watched(), _imagined.told_of_copies(ledger):
            copies = self._passes(FORWARD, BACKWARD)
            if again:
                self._passes(FORWARD_2, BACKWARD_2)
        passes, self.phase = tuple(ledger.segments), STEP
        segments = (*passes, *walker.stepping.segments(ledger, self.device))
        for parameter in parameters:
            parameter.grad = None
        here = sum(local_bytes(p) for p in parameters if p.requires_grad)
        return Walked(
            static, tuple(walker.runs), segments, copies, weights, here, self.passed,
            self.returned, self.lets_go,
        )  # fmt: skip

    def _passes(self, forward: str, backward: str) -> dict[str, int]:
        """Of a micro-batch; returns the copies of weights that autocast lets go of between them."""
        walker, ledger, dtype = self.walker, self.ledger, self.autocast
        self.phase, self.stack = forward, [""]
        self.moves = [(_torch.next_node_number(), "")]
        with ledger, torch.autocast("cpu", dtype, enabled=dtype is not None):
            output = self.model(*walker.inputs, **walker.kwargs)
            self._move(LOSS)
            loss = _loss_of(output, walker.loss)
            # As the context ends autocast lets go of its copies of weights.
            copies: dict[str, int] = {}
            ledger.freed = copies
        ledger.freed = None
        self.returned = sum(map(local_bytes, returned_by(output)))
        del output
        self.phase, self.last, self.end = backward, LOSS, _torch.next_node_number()
        with ledger, torch.autograd.set_multithreading_enabled(False):
            _torch.run_backward(loss)
        return copies

    def _weights(self, states: Callable[[nn.Parameter], list[Tensor]]) -> Iterator[Weight]:
        """The parameters of the copy, each once."""
        places: dict[nn.Parameter, list[str]] = {}
        experts = set()
        for path, module in self.model.named_modules():
            for parameter in module.parameters(recurse=False):
                places.setdefault(parameter, []).append(path)
                if isinstance(getattr(module, "num_experts", None), int) and parameter.dim() > 2:
                    experts.add(parameter)
        for parameter, paths in places.items():
            size = local_bytes(parameter)
            yield Weight(
                tuple(paths),
                size,
                size if parameter.requires_grad else 0,
                sum(map(local_bytes, states(parameter))),
                parameter.element_size() if parameter.is_floating_point() else 0,
                parameter in experts,
            )

    def _owned(self, tensors: Callable[[nn.Module], Iterable[Tensor]]) -> int:
        """Bytes that are there before all: of the copy, and of the blocks that it lacks."""
        repeated = 0
        for run in self.walker.runs:
            if not run.extra:
                continue
            block = self.model.get_submodule(run.walked(1))
            repeated += (run.extra + 1) * self.ledger.owns(*tensors(block))
        return repeated + self.ledger.owns(*tensors(self.model))

    # ---- where the step is -------------------------------------------------------------------

    def where(self) -> tuple[str, str]:
        if self.phase in (FORWARD, FORWARD_2):
            return self.phase, self.stack[-1]
        if self.phase == STEP:
            return STEP, ""
        number = _torch.running_node_number()
        # A node of a nested backward pass, of what runs again, belongs to what runs it.
        if number is not None and number < self.end:
            self.last = self.place_of(number)
        return self.phase, self.last

    def place_of(self, number: int) -> str:
        """Where the forward pass stood when it made the graph node of this number."""
        index = bisect.bisect_right(self.moves, number, key=lambda move: move[0])
        return self.moves[max(index - 1, 0)][1]

    def _move(self, place: str) -> None:
        self.stack.append(place)
        self.moves.append((_torch.next_node_number(), place))

    def _note_passed(self, args: Any) -> None:
        """What a block reads of the one before it, and whether that one still has its input."""
        passed = next((x for x in tensors_in(args) if x.is_floating_point()), None)
        if passed is None or self.phase != FORWARD:
            return
        self.lets_go = self._input is not None and self._input() is None
        (part,) = local_parts([passed])
        self.passed, self._input = local_bytes(part), weakref.ref(part.untyped_storage())

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        blocks = set(self.walker.walked_blocks()[1:])

        def enter(module: nn.Module, args: Any) -> None:
            self.ledger.host_ms += 1e-3 * self.rates.module_us
            if self.phase in (FORWARD, FORWARD_2):
                self._move(self.paths[module])
                if self.paths[module] in blocks:
                    self._note_passed(args)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self.phase in (FORWARD, FORWARD_2):
                self.stack.pop()
                self.moves.append((_torch.next_node_number(), self.stack[-1]))

        enter.only_looks_on = leave.only_looks_on = True  # type: ignore[attr-defined]
        with contextlib.ExitStack() as handles:
            for module in watchable(self.model.modules()):
                before = module.register_forward_pre_hook(enter, prepend=True)
                handles.callback(before.remove)
                after = module.register_forward_hook(leave)
                handles.callback(after.remove)
            yield


def returned_by(output: Any) -> list[Tensor]:
    """What a loss is computed of: the floating results with a gradient, but for losses."""
    found = (x for x in tensors_in(output) if x.requires_grad and x.is_floating_point())
    return [x for x in found if x.numel() > 1]


def _loss_of(output: Any, loss: Loss | None) -> Tensor:
    value: Any
    if loss is not None:
        value = loss(output)
    elif isinstance(getattr(output, "loss", None), Tensor):
        value = output.loss
    else:
        found = [x for x in tensors_in(output) if x.requires_grad and x.is_floating_point()]
        if not found:
            raise InputError("the model's output has no gradient to start from; give a loss")
        value = sum((x.float().mean() for x in found[1:]), found[0].float().mean())
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise InputError("loss is no tensor of one element, as a backward pass starts from")
    return value
