"""What torch tells of the autograd graph and of the code that runs.

For `saving`. Where something is missing the answer is a safe "no": `saving` refuses in one sentence
(`is_readable`), or keeps a tensor exactly.
"""

import contextlib
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from packlight._torch.autograd import saved_tensor_hooks
from packlight._torch.capabilities import NODES, SAVED

_LEAF = "torch::autograd::AccumulateGrad"


# ---- nodes ---------------------------------------------------------------------------------------


def is_readable() -> bool:
    """Whether torch numbers graph nodes and shows what they hold; else `saving` refuses."""
    return bool(NODES and SAVED)


def behind(roots: Iterable[Tensor], start: int, visited: set[int]) -> list[Node]:
    """The nodes behind the roots with numbers from `start` on, the oldest first.

    Those in `visited` are left out, with what is behind them; the others are added to it.
    """
    found: dict[int, Node] = {}
    pending = [tensor.grad_fn for tensor in roots]
    while pending:
        node = pending.pop()
        if node is None or node.name() == _LEAF:
            continue
        number = node._sequence_nr()
        if number < start or number in visited:
            continue
        visited.add(number)
        found[number] = node
        pending.extend(next_node for next_node, _ in node.next_functions)
    return [node for _, node in sorted(found.items())]


@functools.cache
def _slot_names(kind: type[Node]) -> tuple[str, ...]:
    prefix = "_raw_saved_"
    return tuple(name.removeprefix(prefix) for name in dir(kind) if name.startswith(prefix))


def slots(node: Node) -> Iterator[tuple[str, Any]]:
    """The tensors that a node saved, as hooks packed them, by the names that torch has for them."""
    for name in _slot_names(type(node)):
        try:
            saved = getattr(node, f"_raw_saved_{name}")
        except RuntimeError:  # a backward pass has freed it
            continue
        for variable in saved if isinstance(saved, list | tuple) else (saved,):
            if variable is not None and variable.data is not None:
                yield name, variable.data


def saves_tensor(node: Node | None, name: str) -> bool:
    """Whether a node saves a tensor under this name, and not a number."""
    return node is not None and name in _slot_names(type(node))


def saved_number(node: Node | None, name: str) -> Any:
    """A number that a node saved, such as `threshold`; None where there is none."""
    return None if saves_tensor(node, name) else getattr(node, f"_saved_{name}", None)


def saved_dims(node: Node) -> list[int]:
    """The dimensions that a reduction saved: torch shows negative ones as unsigned numbers."""
    dims = saved_number(node, "dim")
    dims = dims if isinstance(dims, list | tuple) else [dims]
    return [dim - 2**64 if dim >= 2**63 else dim for dim in dims if dim is not None]


def gradient(node: Any, of_output: Tensor) -> Tensor | None:
    """The first gradient that a node makes of that of its output; None where torch runs no node."""
    try:
        found = node(of_output)
    except (NotImplementedError, TypeError):
        return None
    first: Tensor | None = found[0] if isinstance(found, tuple) else found
    return first


def function_of(node: Node) -> type | None:
    """The `autograd.Function` of a node; None where torch does not say."""
    function: type | None = getattr(type(node), "_forward_cls", None)
    return function


def hides_node(node: Node) -> bool:
    """Whether the node of a write to a view in place is inside this one, where nothing shows it."""
    return node.name().endswith("CopySlices")


def is_python(node: Node) -> bool:
    """Whether the node belongs to an `autograd.Function` that is written in Python."""
    return isinstance(node, BackwardCFunction)


def output_elements(node: Node) -> int:
    """Elements of the largest output of a node's operation; 0 where torch does not say."""
    outputs = getattr(node, "_input_metadata", ())  # the inputs of the backward pass
    return max((torch.Size(output.shape).numel() for output in outputs), default=0)


def leaves(node: Node) -> list[Tensor]:
    """The leaves that require gradients among the inputs of a node's operation."""
    inputs = (getattr(next_node, "variable", None) for next_node, _ in node.next_functions)
    return [leaf for leaf in inputs if leaf is not None]


@functools.cache
def node_names() -> frozenset[str]:
    """Names of all nodes of torch's own operations; empty where torch does not list them."""
    return frozenset(dir(getattr(torch._C, "_functions", None))) - set(dir(None))


# ---- hooks and modes -----------------------------------------------------------------------------


def active_hook() -> Any:
    """The pack hook that is active; None where there is none, or torch does not say."""
    hooks = saved_tensor_hooks()
    return None if hooks is None else hooks[0]


def unseen() -> contextlib.AbstractContextManager[Any]:
    """Within this context no `TorchFunctionMode` sees a call.

    Without it a saver ignores its own calls by a flag.
    """
    make: Any = getattr(torch._C, "DisableTorchFunction", contextlib.nullcontext)
    context: contextlib.AbstractContextManager[Any] = make()
    return context


# ---- who saves -----------------------------------------------------------------------------------

_CHECKPOINTS = torch.utils.checkpoint.__name__

# Modules whose frames stand between a pack hook and the code that saves: a measurement calls the
# hook around its own, and up to torch 2.13 `Function.apply` is written in Python.
_BETWEEN = (
    "packlight.profile",
    "packlight.integrations._measure",
    "packlight._torch",
    "packlight.saving",
    "torch._dynamo.eval_frame",
    BackwardCFunction.__module__,
)


def _code_that_saves(frame: types.FrameType | None) -> types.FrameType | None:
    while frame is not None and _module(frame).startswith(_BETWEEN):
        frame = frame.f_back
    return frame


def _module(frame: types.FrameType) -> str:
    name: str | None = frame.f_globals.get("__name__")
    return name or ""


def is_checkpoint(frame: types.FrameType | None) -> bool:
    """Whether one of torch's checkpoints saves its inputs."""
    caller = _code_that_saves(frame)
    return caller is not None and _module(caller) == _CHECKPOINTS


def compiled_arguments(frame: types.FrameType | None) -> tuple[Any, ...] | None:
    """The arguments of the compiled region that saves; None where none does."""
    caller = _code_that_saves(frame)
    if caller is None or not _module(caller).startswith("torch._functorch."):
        return None
    arguments = caller.f_locals.get("args")
    return tuple(arguments) if isinstance(arguments, list | tuple) else ()


def is_in_function(frame: types.FrameType | None) -> bool:
    """Whether the forward pass of an `autograd.Function` runs."""
    while frame is not None:
        if frame.f_code.co_name == "forward" and _is_forward(frame.f_code):
            return True
        frame = frame.f_back
    return False


_known_forwards: dict[types.CodeType, bool] = {}


def _is_forward(code: types.CodeType) -> bool:
    if code not in _known_forwards:
        forwards = (getattr(function, "forward", None) for function in functions())
        _known_forwards[code] = any(
            getattr(forward, "__code__", None) is code for forward in forwards
        )
    return _known_forwards[code]


def functions() -> Iterator[type]:
    """All classes of `autograd.Function` that there are."""
    pending: list[type] = [torch.autograd.Function]
    while pending:
        function = pending.pop()
        yield function
        pending.extend(function.__subclasses__())
