"""`profile`: which module and which operation keeps how many bytes for the backward pass.

The forward pass runs under saved-tensor hooks. The pack hook gives autograd a small holder object
instead of the tensor, and the profile keeps only a weak reference to it: a holder that is still
alive after the forward pass is a tensor that is kept. The module comes from a stack that forward
hooks maintain, the operation from a walk over the graph, which looks at what each node saved
without unpacking it.
"""

import bisect
import dataclasses
import functools
import gc
import inspect
import os
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils import _pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from packlight import _torch
from packlight._torch.autograd import Hooks
from packlight._torch.hooks import around_hooks
from packlight.errors import InputError
from packlight.report import Holding, KeptTensor, MemoryDifference, MemoryReport

__all__ = ["Holding", "KeptTensor", "MemoryDifference", "MemoryReport", "profile"]

_T = TypeVar("_T")

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PACKLIGHT = os.path.dirname(__file__) + os.sep


def profile(
    model: Callable[..., Any],
    /,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    **kwargs: Any,
) -> MemoryReport:
    """Run `model(*inputs, **kwargs)` once and report what is kept for the backward pass.

    `loss`, if given, is called on the model's output and returns a scalar; what it keeps is counted
    under the path "(loss)". The model may be any callable; modules and tensors that a function
    refers to by name are found and named after its variables.

    What is counted:

    - A storage counts once, whole, however many operations keep it and however small the view they
      keep. It is counted where it was kept first; `KeptTensor.holders` lists every operation.
    - Only what is still kept after the forward pass: nothing of `no_grad` regions, detached
      branches and checkpointed regions (of those, the inputs count, which checkpointing keeps).
    - Parameters, buffers, tensors that modules hold as attributes, and the inputs are counted
      apart and are in no row. Copies of them are activations: autocast's half-precision copy of a
      weight is memory that the forward pass adds.
    - What other saved-tensor hooks keep (`save_on_cpu`, `packlight.saving`), whether they are
      active around this call or inside the model, if it is a tensor or a structure of tensors.
    - What a Python `autograd.Function` keeps as attributes of `ctx`, as fused losses keep finished
      gradients, where its node can be reached from the output.

    The model runs in the mode it is in (`train` or `eval`), with gradients enabled, under the
    caller's autocast. On a CUDA device a backward pass follows, of the loss or else of the sum of
    the floating-point outputs, to measure `peak_bytes`; the peak is None where re-entrant
    checkpointing forbids it or the memory does not suffice. The allocator's peak statistic is
    reset. On the meta device nothing is computed, and the bytes are those of a real device as far
    as PyTorch picks the same kernels there.

    Everything is left as it was: random number generators (of torch, Python and NumPy), buffers,
    `.grad`, plain attributes of the modules, hooks, also if the forward pass raises. Autocast's
    cache of weight copies is emptied, so that each profile counts the copies anew. Exceptions
    are a `torch.Generator` of the model's own, inputs that the model overwrites, and a model that
    itself calls `backward`, which adds to a `.grad` that is there.

    Limits: what hooks keep in files or closures, and what selective checkpointing sets aside, is
    not seen; on a CUDA device `allocated_bytes` has it. An operation whose graph node cannot be
    reached from the output is named "unknown". A module compiled by `torch.compile` is one line.
    Profile the module inside `DistributedDataParallel`, whose backward cannot run apart from
    `.grad`.

    Raises `InputError` for a model or loss that cannot be called, a loss that is no scalar, and
    parameters that a lazy module has not initialised yet.
    """
    _check(model, loss)
    scene = _scene(model, loss, inputs, kwargs)
    with (
        _left_as_found(scene),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        meter = _AllocatorMeter(scene.cuda_devices())
        recorder = _Recorder(scene)
        output, value = recorder.run(lambda: model(*inputs, **kwargs), loss)
        allocated = meter.grown()
        findings = _findings(scene, recorder, (output, value))
        del recorder
        targets = _backward_targets(output if loss is None else value)
        del output, value
        peak = _peak(meter, targets, scene, findings.reentrant)
    return MemoryReport(
        model=_name(model),
        rows=findings.rows,
        parameter_bytes=findings.parameter_bytes,
        buffer_bytes=findings.buffer_bytes,
        input_bytes=findings.input_bytes,
        allocated_bytes=allocated,
        peak_bytes=peak,
        module_types=scene.types_above(findings.rows),
    )


def _check(model: object, loss: object) -> None:
    if not callable(model):
        raise InputError(
            f"model is a {type(model).__name__}, which cannot be called; pass an nn.Module or a "
            "function, and the arguments of the call after it: profile(model, batch)"
        )
    if loss is not None and not callable(loss):
        raise InputError(
            f"loss is a {type(loss).__name__}, which cannot be called; pass a function of the "
            "model's output that returns a scalar: loss=lambda output: output.mean()"
        )


def _name(function: Callable[..., Any]) -> str:
    kind = type(function).__name__
    return kind if isinstance(function, nn.Module) else getattr(function, "__name__", kind)


# ---- tensors inside other things -----------------------------------------------------------------


def tensors_in(value: object, objects: bool = True) -> Iterator[Tensor]:
    """All tensors in nested containers, dataclasses and, if `objects`, attributes of objects."""
    seen: dict[int, object] = {}  # with the objects, since a freed one's id is used again
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            yield item
            continue
        if id(item) in seen:
            continue
        seen[id(item)] = item
        # Reversed, since the last one pushed is looked at first.
        pending.extend(reversed(_parts(item, objects)))


_OPAQUE = (str, bytes, int, float, complex, type, nn.Module, types.ModuleType)


def _parts(item: object, objects: bool) -> list[object]:
    if item is None or isinstance(item, _OPAQUE):
        return []
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, list | tuple | set | frozenset):
        return list(item)
    if dataclasses.is_dataclass(item):
        return _attributes(item)
    leaves = _pytree.tree_leaves(item)
    if len(leaves) != 1 or leaves[0] is not item:
        return list(leaves)
    if not objects or callable(item):
        return []
    return _attributes(item)


def _attributes(item: object) -> list[object]:
    """What an object holds, past its own `__getattr__`, which may compute, or raise anything."""
    found = list(_dictionary(item).values())
    for kind in type(item).__mro__:
        slots = vars(kind).values() if "__slots__" in vars(kind) else ()
        for slot in slots:
            if isinstance(slot, types.MemberDescriptorType):
                with suppress(AttributeError):  # it has no value yet
                    found.append(slot.__get__(item))
    return found


def _dictionary(item: object) -> dict[str, Any]:
    try:
        attributes: dict[str, Any] = object.__getattribute__(item, "__dict__")
    except AttributeError:  # it has slots only
        return {}
    return attributes


class _Storage(NamedTuple):
    key: object
    bytes: int
    tensor: Tensor


def storages(tensor: Tensor) -> Iterator[_Storage]:
    """The storages behind a tensor: its own, or those of the tensors a wrapper is made of.

    Keys are addresses of storage objects, so they tell storages apart only while both are alive.
    """
    inner = _inner_tensors(tensor)
    if inner:
        for part in inner:
            yield from storages(part)
        return
    try:
        storage = tensor.untyped_storage()
        yield _Storage(storage._cdata, storage.nbytes(), tensor)
    except (NotImplementedError, RuntimeError):
        # No storage to ask (oneDNN's own layouts): the elements are what can be counted.
        yield _Storage(("tensor", id(tensor)), tensor.numel() * tensor.element_size(), tensor)


def _inner_tensors(tensor: Any) -> list[Tensor]:
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [getattr(tensor, name) for name in names]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if type(tensor) in (Tensor, nn.Parameter) or _torch.is_fake(tensor):
        return []
    if _is_hollow(tensor):
        return [part for part in tensors_in(vars(tensor)) if part is not tensor]
    return []


def _is_hollow(tensor: Tensor) -> bool:
    """Whether a subclass has no memory of its own, so that its attributes have to hold it."""
    try:
        return tensor.untyped_storage().data_ptr() == 0 and tensor.device.type != "meta"
    except (NotImplementedError, RuntimeError):
        return True  # asked for its storage, torch raises for a tensor that has none


# ---- what is there before the forward pass -------------------------------------------------------


class _Place(NamedTuple):
    """Where in the model the forward pass stands."""

    path: str
    kind: str


@dataclasses.dataclass
class _Scene:
    """The modules with their names, and the tensors that are no activations."""

    places: dict[nn.Module, _Place]
    root: _Place
    loss_place: _Place
    # References, not lists made when needed: while these live, no activation can take the address
    # of one of their storages.
    arguments: list[Tensor]
    parameters: list[nn.Parameter]
    buffers: list[Tensor]

    def modules(self) -> Iterable[nn.Module]:
        return self.places.keys()

    def cuda_devices(self) -> list[torch.device]:
        return [device for device in self.devices() if device.type == "cuda"]

    def devices(self) -> list[torch.device]:
        tensors = (*self.parameters, *self.buffers, *self.arguments)
        return sorted({tensor.device for tensor in tensors if _has_values(tensor)}, key=str)

    def types_above(self, rows: Iterable[KeptTensor]) -> dict[str, str]:
        """Class names of the modules on the way to each row."""
        kinds = {place.path: place.kind for place in self.places.values()}
        found: dict[str, str] = {}
        for row in rows:
            parts = row.module.split(".")
            for depth in range(1, len(parts) + 1):
                path = ".".join(parts[:depth])
                if path and path in kinds:
                    found[path] = kinds[path]
        return found


# What nn.Module keeps in registries of its own; all else in its `__dict__` is a plain attribute.
_REGISTRIES = ("_parameters", "_buffers", "_modules")


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _REGISTRIES}


def _scene(
    model: Callable[..., Any],
    loss: Callable[[Any], Tensor] | None,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> _Scene:
    places: dict[nn.Module, _Place] = {}
    arguments = list(tensors_in((inputs, kwargs)))
    _discover(model, "", places, arguments)
    loss_kind = "" if loss is None else _name(loss)
    if loss is not None:
        _discover(loss, "(loss)", places, arguments)
    for module, place in places.items():
        for name, parameter in module.named_parameters(recurse=False):
            if nn.parameter.is_lazy(parameter):
                raise InputError(
                    f"parameter {name} of module {place.path!r} is not initialised yet, and "
                    "profile leaves a model as it is; run one forward pass first"
                )
    root = _Place("", type(model).__name__ if isinstance(model, nn.Module) else "")
    return _Scene(
        places,
        root,
        _Place("(loss)", loss_kind),
        arguments,
        _unique(p for module in places for p in module.parameters(recurse=False)),
        _unique(t for module in places for t in _buffers_of(module)),
    )


def _unique(values: Iterable[_T]) -> list[_T]:
    return list({id(value): value for value in values}.values())


def _buffers_of(module: nn.Module) -> Iterator[Tensor]:
    """Registered buffers, and tensors that the module holds as plain attributes."""
    yield from module.buffers(recurse=False)
    yield from tensors_in(plain_attributes(module), objects=False)


def _discover(
    function: object, prefix: str, places: dict[nn.Module, _Place], arguments: list[Tensor]
) -> None:
    """Name the modules of a model or loss, and find the tensors a function brings along."""
    for name, value in _reachable(function).items():
        path = ".".join(part for part in (prefix, name) if part)
        if isinstance(value, nn.Module):
            for inner, module in value.named_modules(prefix=path):
                places.setdefault(module, _Place(inner, type(module).__name__))
        else:
            arguments.extend(tensors_in(value, objects=False))


def _reachable(function: object) -> dict[str, object]:
    """What a callable refers to: itself if it is a module, else its variables by their names."""
    found: dict[str, object] = {}
    pending, seen = [function], set[int]()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[""] = item
        elif isinstance(item, functools.partial):
            found.update({str(index): value for index, value in enumerate(item.args)})
            found.update(item.keywords)
            pending.append(item.func)
        elif inspect.ismethod(item):
            pending.append(item.__self__)
        elif inspect.isfunction(item):
            variables = {} if is_internal(item.__code__.co_filename) else _variables(item)
            found.update(variables)
            # A function that it calls may be the one that names the model.
            pending.extend(value for value in variables.values() if inspect.isfunction(value))
            for name, value in variables.items():
                found.update(_attributes_of(value, f"{name}."))
        else:
            found.update(_attributes_of(item, ""))
    return found


def _variables(function: types.FunctionType) -> dict[str, object]:
    """Closure cells and the globals that the code names."""
    code = function.__code__
    found = {name: function.__globals__.get(name) for name in code.co_names}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # the variable has no value yet
            continue
    return found


def _attributes_of(value: object, prefix: str) -> dict[str, object]:
    """One level into an object, such as a trainer that holds the model."""
    if isinstance(value, nn.Module | Tensor | type | types.ModuleType) or inspect.isroutine(value):
        return {}
    return {f"{prefix}{name}": part for name, part in _dictionary(value).items()}


# ---- leaving everything as it was ----------------------------------------------------------------


@contextmanager
def _left_as_found(scene: _Scene) -> Iterator[None]:
    """Restore generators, buffers, attributes of modules and `.grad`, also after an exception."""
    leaves = [*scene.parameters, *(tensor for tensor in scene.arguments if tensor.is_leaf)]
    grads = [(leaf, leaf.grad) for leaf in leaves]
    modules = [_ModuleState(module) for module in scene.modules()]
    torch.clear_autocast_cache()
    with _generators(scene.devices()):
        try:
            yield
        finally:
            torch.clear_autocast_cache()
            for state in modules:
                state.restore()
            for leaf, grad in grads:
                if leaf.grad is not grad:
                    leaf.grad = grad


@contextmanager
def _generators(devices: list[torch.device]) -> Iterator[None]:
    kinds = {device.type for device in devices} - {"cpu"}
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in kinds:
            indices = [device.index or 0 for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


class _ModuleState:
    """A module's buffers and plain attributes, to be put back.

    Attributes go with the buffers: a module that grows a cached buffer notes its size beside it.
    Parameters stay out: FSDP swaps them during the forward pass and needs them as it leaves them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = plain_attributes(module)
        self.buffers = dict(module._buffers)
        self.contents = {
            name: (_version(buffer), buffer.detach().clone())
            for name, buffer in self.buffers.items()
            if buffer is not None and _has_values(buffer)
        }

    def restore(self) -> None:
        present = vars(self.module)
        for name in plain_attributes(self.module).keys() - self.attributes.keys():
            del present[name]
        for name, value in self.attributes.items():
            if name not in present or present[name] is not value:
                present[name] = value
        if not _same_entries(self.module._buffers, self.buffers):
            self.module._buffers.clear()
            self.module._buffers.update(self.buffers)
        for name, (version, content) in self.contents.items():
            buffer = self.buffers[name]
            assert buffer is not None
            # Untouched buffers are not written: a graph of the caller's may have saved them.
            if _version(buffer) != version or not torch.equal(buffer, content):
                with torch.no_grad(), torch.inference_mode(buffer.is_inference()):
                    buffer.copy_(content)


def _has_values(tensor: Any) -> bool:
    if is_traceable_wrapper_subclass(tensor):
        return all(map(_has_values, _inner_tensors(tensor)))
    is_meta: bool = tensor.device.type == "meta"
    return not is_meta and not _torch.is_fake(tensor)


def _same_entries(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """The same names with the very same objects, in the same order."""
    return [(k, id(v)) for k, v in one.items()] == [(k, id(v)) for k, v in other.items()]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


# ---- recording the forward pass ------------------------------------------------------------------


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
    place: _Place
    source: str | None
    checkpointed: bool
    sequence: int


class _Recorder:
    """Runs the forward pass and notes each tensor that is saved, and where."""

    def __init__(self, scene: _Scene) -> None:
        self.scene = scene
        self.records: list[_Record] = []
        # Parameters that are saved, for those that belong to no module found in the scene.
        self.loose_parameters: list[nn.Parameter] = []
        self.start = _sequence()
        self.stack: list[tuple[nn.Module | None, _Place]] = [(None, scene.root)]
        # From which sequence number of graph nodes on the forward pass was where.
        self.moves: list[tuple[int, _Place]] = [(self.start, scene.root)]

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
        owners = (tensor, tensor._base)
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

    def place_of(self, sequence: int) -> _Place:
        """Where the forward pass stood when it made the graph node of this number."""
        index = bisect.bisect_right(self.moves, sequence, key=lambda move: move[0])
        return self.moves[max(index - 1, 0)][1]

    def _move(self, module: nn.Module | None, place: _Place) -> None:
        self.stack.append((module, place))
        self.moves.append((_sequence(), place))

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._move(module, self.scene.places[module])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # Down to the module, not by one: a module above it may have been left by an exception.
        for depth in range(len(self.stack) - 1, 0, -1):
            if self.stack[depth][0] is module:
                del self.stack[depth:]
                break
        self.moves.append((_sequence(), self.stack[-1][1]))

    @contextmanager
    def _watching_modules(self) -> Iterator[None]:
        with ExitStack() as handles:
            for module in _watchable(self.scene.modules()):
                before = module.register_forward_pre_hook(self._enter, prepend=True)
                handles.callback(before.remove)
                after = module.register_forward_hook(self._leave, always_call=True)
                handles.callback(after.remove)
            yield


def _watchable(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that take hooks: none inside `torch.compile`, which would compile anew for them,
    and no TorchScript, which refuses them.
    """
    modules = list(modules)
    inside: set[nn.Module] = set()
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            inside.add(module)
        elif "_orig_mod" in module._modules:
            inside.update(inner for inner in module.modules() if inner is not module)
        elif getattr(module, "_compiled_call_impl", None) is not None:
            inside.update(module.modules())
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
        if code is _CALL_MODULE or code is _RUN:
            break
        if not is_internal(code.co_filename):
            return f"{short_path(code.co_filename)}:{frame.f_lineno}", checkpointed
        checkpointed = checkpointed or code.co_filename == torch.utils.checkpoint.__file__
        frame = frame.f_back
    return None, checkpointed


_CALL_MODULE = nn.Module._call_impl.__code__
_RUN = _Recorder.run.__code__


def is_internal(filename: str) -> bool:
    return filename.startswith((_TORCH, _PACKLIGHT))


def _cell(filename: str) -> str | None:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    named = None if shell is None else shell.compile.format_code_name(filename)
    return None if named is None else str(named[1])


@functools.cache
def short_path(filename: str) -> str:
    """A file's path below the working directory or below the import path that it comes from.

    A cell of a notebook has a file of a made-up name, and is called "In[5]", as it is there.
    """
    if cell := _cell(filename):
        return cell
    roots = [Path.cwd(), *(Path(entry) for entry in sys.path if entry)]
    inside = [root for root in roots if Path(filename).is_relative_to(root)]
    if not inside:
        return filename
    return Path(filename).relative_to(max(inside, key=lambda root: len(root.parts))).as_posix()


# ---- reading the graph ---------------------------------------------------------------------------


class _Foreign(NamedTuple):
    """What a node keeps without our hooks."""

    node: Node
    packed: object


@dataclasses.dataclass
class _Graph:
    """What the nodes of the graph keep."""

    nodes: dict[int, Node] = dataclasses.field(default_factory=dict)  # by index of the record
    by_sequence: dict[int, Node] = dataclasses.field(default_factory=dict)
    foreign: list[_Foreign] = dataclasses.field(default_factory=list)


def _read_graph(roots: Iterable[Tensor], recorder: _Recorder) -> _Graph:
    graph = _Graph()
    for node in _nodes(roots, recorder.start):
        graph.by_sequence[node._sequence_nr()] = node
        for packed in (*_saved_by(node), *_attributes_of_context(node)):
            if isinstance(packed, Kept) and recorder.records[packed.index].kept() is packed:
                graph.nodes[packed.index] = node
            else:
                graph.foreign.append(_Foreign(node, packed))
    graph.foreign.sort(key=lambda entry: entry.node._sequence_nr())
    return graph


def _nodes(roots: Iterable[Tensor], start: int) -> Iterator[Node]:
    """All nodes behind the roots that the forward pass made: none of the inputs' own graph."""
    pending = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in seen or node._sequence_nr() < start:
            continue
        seen.add(node)
        yield node
        pending.extend(next_node for next_node, _ in node.next_functions if next_node is not None)


@functools.cache
def _saved_names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def _saved_by(node: Node) -> Iterator[object]:
    """What the node holds, as hooks packed it. Nothing is unpacked: a checkpoint would rerun."""
    if not _SHOWS_SAVED:
        return
    for name in _saved_names(type(node)):
        try:
            saved = getattr(node, name)
        except RuntimeError:  # a backward pass inside the model has freed it
            continue
        for variable in saved if isinstance(saved, list | tuple) else (saved,):
            if variable is not None and variable.data is not None:
                yield variable.data


def _attributes_of_context(node: Any) -> list[object]:
    """What a Python function keeps as attributes of `ctx`, which is the node: fused losses do.

    Of re-entrant checkpoints these are states of generators and no activations.
    """
    if node.name() == _REENTRANT or not isinstance(node, BackwardCFunction):
        return []
    return list(vars(node).values())


_SHOWS_SAVED = bool(_torch.SAVED)


# ---- counting ------------------------------------------------------------------------------------


class _Findings(NamedTuple):
    rows: tuple[KeptTensor, ...]
    parameter_bytes: int
    buffer_bytes: int
    input_bytes: int
    reentrant: bool  # the graph holds a re-entrant checkpoint


class _Held(NamedTuple):
    """One operation's hold on one packed object."""

    packed: object
    place: _Place
    operation: str
    source: str | None
    node: object  # what tells operations apart


def _findings(scene: _Scene, recorder: _Recorder, outputs: object) -> _Findings:
    # Auxiliary losses are often left on a module, so attributes are roots beside the outputs.
    left = (tensor for module in scene.modules() for tensor in _buffers_of(module))
    roots = [*tensors_in(outputs), *left]
    graph = _read_graph(roots, recorder)
    held = [*_held_by_us(recorder, graph), *_held_by_others(recorder, graph)]

    owned: dict[object, str] = {}
    sizes: dict[object, int] = {}
    # Parameters last: where one is also an input or a buffer, it is a parameter.
    groups: dict[str, Sequence[Tensor]] = {
        "input": scene.arguments,
        "buffer": scene.buffers,
        "parameter": [*scene.parameters, *recorder.loose_parameters],
    }
    for owner, tensors in groups.items():
        for tensor in tensors:
            for storage in storages(tensor):
                owned[storage.key] = owner
                sizes[storage.key] = storage.bytes

    rows: dict[object, _Row] = {}
    kept_inputs: dict[object, int] = {}
    for hold in held:
        for tensor in tensors_in(hold.packed):
            for storage in storages(tensor):
                owner = owned.get(storage.key, "")
                if owner == "input":
                    kept_inputs[storage.key] = storage.bytes
                elif not owner and storage.bytes:
                    rows.setdefault(storage.key, _Row(storage)).add(hold)

    def total(owner: str) -> int:
        return sum(sizes[key] for key, name in owned.items() if name == owner)

    return _Findings(
        rows=tuple(row.finished() for row in rows.values()),
        parameter_bytes=total("parameter"),
        buffer_bytes=total("buffer"),
        input_bytes=sum(kept_inputs.values()),
        reentrant=any(node.name() == _REENTRANT for node in graph.by_sequence.values()),
    )


_REENTRANT = "CheckpointFunctionBackward"


def _held_by_us(recorder: _Recorder, graph: _Graph) -> Iterator[_Held]:
    for index, record in enumerate(recorder.records):
        kept = record.kept()
        if kept is None:
            continue
        node = graph.nodes.get(index)
        if node is None and not _SHOWS_SAVED:
            # A node saves right after it is made, so the last one made is the one that saves.
            node = graph.by_sequence.get(record.sequence)
        fallback = "checkpoint" if record.checkpointed else "unknown"
        yield _Held(
            packed=kept.packed,
            place=record.place,
            operation=fallback if node is None else node.name(),
            source=record.source,
            node=(record.place, record.source) if node is None else node,
        )


def _held_by_others(recorder: _Recorder, graph: _Graph) -> Iterator[_Held]:
    for node, packed in graph.foreign:
        place = recorder.place_of(node._sequence_nr())
        yield _Held(packed, place, node.name(), None, node)


class _Row:
    """A storage that is kept, and its holders so far."""

    def __init__(self, storage: _Storage) -> None:
        self.storage = storage
        self.holds: dict[object, _Held] = {}

    def add(self, hold: _Held) -> None:
        # Once a node, which saves x twice for x * x.
        self.holds.setdefault(hold.node, hold)

    def finished(self) -> KeptTensor:
        holders = tuple(
            Holding(hold.place.path, hold.operation, hold.source) for hold in self.holds.values()
        )
        first = holders[0]
        tensor = self.storage.tensor
        return KeptTensor(
            bytes=self.storage.bytes,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            device=str(tensor.device),
            module=first.module,
            module_type=next(iter(self.holds.values())).place.kind,
            operation=first.operation,
            source=first.source,
            holders=holders,
        )


# ---- the CUDA allocator --------------------------------------------------------------------------


class _AllocatorMeter:
    """Reads the CUDA allocator of the devices in use; None for all readings where there is none."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.devices = devices
        if devices:
            gc.collect()  # what dies during the pass would hide as much that is kept
        self.before = [torch.cuda.memory_allocated(device) for device in devices]
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)

    def grown(self) -> int | None:
        now = [torch.cuda.memory_allocated(device) for device in self.devices]
        return sum(now) - sum(self.before) if self.devices else None

    def peak(self) -> int | None:
        highest = [torch.cuda.max_memory_allocated(device) for device in self.devices]
        return sum(highest) - sum(self.before) if self.devices else None


def _backward_targets(value: object) -> list[Tensor]:
    """Where the backward pass starts: the loss, or each output that has a gradient."""
    return [
        tensor
        for tensor in tensors_in(value)
        if tensor.requires_grad and tensor.is_floating_point() and tensor.grad_fn is not None
    ]


def _peak(
    meter: _AllocatorMeter, targets: list[Tensor], scene: _Scene, reentrant: bool
) -> int | None:
    """The allocator's peak after a backward pass that touches no `.grad`."""
    if not meter.devices or reentrant:
        return None
    leaves = [
        tensor
        for tensor in (*scene.parameters, *scene.arguments)
        if tensor.requires_grad and tensor.is_leaf
    ]
    sums = [target.sum() for target in targets]
    targets.clear()
    if sums and leaves:
        try:
            torch.autograd.grad(
                sums, list({id(leaf): leaf for leaf in leaves}.values()), allow_unused=True
            )
        except torch.OutOfMemoryError:
            return None
    return meter.peak()
