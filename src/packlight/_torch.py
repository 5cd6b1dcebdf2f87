"""All that packlight reads of torch's and Triton's inside, each with what happens without it.

A private name may go away in any release. Each is looked up here once, under the name of what it
makes possible, a `Capability`. Where it is missing the answer is "no": more memory, a feature less
or a clear refusal, and never a wrong gradient or a failed import. `packlight.env` prints the
answers. Nothing here imports the tracer of torch.compile, which takes a second, before it is used.
"""

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_F = TypeVar("_F", bound=Callable[..., Any])

# The releases that the whole test suite has run with: first and last.
TESTED_TORCH = ("2.11", "2.14")
TESTED_TRITON = ("3.6", "3.8")


def warn_if_untested(package: str, version: str, tested: tuple[str, str]) -> None:
    """Warns where a release is outside of those that the tests have run with."""
    release = torch.torch_version.TorchVersion(".".join(version.split(".")[:2]))
    if not tested[0] <= release <= tested[1]:
        warnings.warn(
            f"packlight is tested with {package} {tested[0]} to {tested[1]}, and this is {version}:"
            " what it cannot find costs memory, see `packlight env`",
            stacklevel=2,
        )


warn_if_untested("torch", torch.__version__, TESTED_TORCH)


# ---- capabilities --------------------------------------------------------------------------------


class Capability:
    """What some private names make possible."""

    def __init__(self, name: str, without: str, *paths: str) -> None:
        self.name = name
        self.without = without  # what happens where one of the names is missing
        self.paths = paths

    @functools.cached_property
    def values(self) -> tuple[Any, ...] | None:
        """What the names stand for; None where one is missing."""
        found = tuple(_look_up(path) for path in self.paths)
        return None if None in found else found

    def __bool__(self) -> bool:
        return self.values is not None


def _look_up(path: str) -> Any:
    """The value of a dotted name, None where there is none."""
    module, _, name = path.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError):
        return None
    return value


HOOKS = Capability(
    "sees saved-tensor hooks",
    "layers share no packs, and a profile inside of hooks does not see them",
    "torch._C._autograd:_top_saved_tensors_default_hooks",
)
STORAGES = Capability(
    "tells storages apart",
    "layers share no packs",
    "torch.multiprocessing.reductions:StorageWeakRef",
)
TRACER = Capability(
    "asks the tracer of torch.compile",
    "compiled layers share no packs, compiled attention and compiled calls are torch's own",
    "torch._dynamo.comptime:comptime",
    "torch._dynamo.comptime:ComptimeContext"
    "._i_will_not_complain_if_bc_breaks_InstructionTranslator",
    "torch._dynamo.variables.base:VariableTracker",
)
MODES = Capability(
    "takes a function mode off",
    "layers run their own code with the mode on, which is slower",
    "torch.overrides:_get_current_function_mode",
    "torch.overrides:_pop_mode",
    "torch.overrides:_push_mode",
)
MODE_STACK = Capability(
    "lists function modes",
    "a part in eval() or excluded keeps as the part of the model around it does",
    "torch.overrides:_get_current_function_mode_stack",
)
TRANSFORMS = Capability(
    "sees torch.func and forward-mode derivatives",
    "converted models raise torch's error within them",
    "torch._C:_are_functorch_transforms_active",
    "torch.autograd.forward_ad:_current_level",
)
BACKWARD = Capability(
    "knows that a backward pass runs",
    "what a user holds of a checkpoint's second pass holds packs",
    "torch._C:_current_graph_task_id",
    "torch.autograd:Variable._execution_engine",
)
NODES = Capability(
    "numbers graph nodes",
    "`saving` and `profile` refuse",
    "torch._C._autograd:_get_sequence_nr",
)
CURRENT_DEVICE = Capability(
    "reads the current CUDA device",
    "each kernel switches devices, which is slower",
    "torch._C:_cuda_getDevice",
)
FUSED_ATTENTION = Capability(
    "asks which attention kernel torch takes",
    "attention is torch's own",
    "torch:_fused_sdp_choice",
)
FAKES = Capability(
    "knows tensors without values",
    "`predict` refuses",
    "torch._subclasses.fake_tensor:FakeTensor",
    "torch._subclasses.fake_tensor:FakeTensorMode",
    "torch._subclasses.fake_tensor:unset_fake_temporarily",
)

TRITON = Capability(
    "launches compiled Triton kernels directly",
    "Triton launches them itself, which takes the CPU longer",
    "triton:knobs.runtime",
    "triton.runtime.driver:driver",
)

CAPABILITIES = (
    HOOKS,
    BACKWARD,
    STORAGES,
    TRACER,
    MODES,
    MODE_STACK,
    TRANSFORMS,
    NODES,
    CURRENT_DEVICE,
    FUSED_ATTENTION,
    FAKES,
    TRITON,
)


# ---- autograd ------------------------------------------------------------------------------------


def saved_tensor_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The pack and unpack hook that are active, None where there are none; needs `HOOKS`."""
    if HOOKS.values is None:
        return None
    hooks: Any = HOOKS.values[0](True)
    return None if hooks is None else tuple(hooks)


def next_node_number() -> int:
    """The number that the next graph node of this thread gets; needs `NODES`."""
    assert NODES.values is not None
    number: int = NODES.values[0]()
    return number


def at_end_of_backward(function: Callable[[], Any]) -> None:
    """Calls the function when the backward pass that runs has ended; not at all where none runs."""
    if BACKWARD.values is not None:
        running, engine = BACKWARD.values
        if running() != -1:
            engine.queue_callback(function)


def storage_reference(tensor: Tensor) -> Any:
    """A weak reference to the storage that the tensor has now; needs `STORAGES`."""
    assert STORAGES.values is not None
    return STORAGES.values[0](tensor.untyped_storage())


def has_storage(tensor: Tensor, reference: Any) -> bool:
    """Whether the tensor still has the storage that `storage_reference` was made of.

    A weak reference keeps the storage's address from being used again.
    """
    return bool(tensor.untyped_storage()._cdata == reference.cdata)


# ---- function modes ------------------------------------------------------------------------------


def without_mode(
    kind: type[TorchFunctionMode], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Calls the function with the innermost function mode off, if it is of this very kind."""
    # Traced, a look costs nothing; and no other mode may be taken off the stack.
    if torch.compiler.is_compiling() or MODES.values is None:
        return function(*args, **kwargs)
    current, pop, push = MODES.values
    if type(current()) is not kind:
        return function(*args, **kwargs)
    mode = pop()
    try:
        return function(*args, **kwargs)
    finally:
        push(mode)


def current_mode() -> TorchFunctionMode | None:
    """The innermost function mode, None where there is none or where torch does not say."""
    if MODES.values is None:
        return None
    mode: TorchFunctionMode | None = MODES.values[0]()
    return mode


# Looked up here, since the tracer of torch.compile follows it under its own name only.
_mode_stack: Callable[[], list[TorchFunctionMode]] = (
    list if MODE_STACK.values is None else MODE_STACK.values[0]
)


def function_modes() -> list[TorchFunctionMode]:
    """The function modes that are on, the innermost last; none where torch does not say."""
    return _mode_stack()


def in_transform() -> bool:
    """Whether a transform of torch.func or forward-mode derivatives are on, if torch says so."""
    if TRANSFORMS.values is None:
        return False
    level: int = torch.autograd.forward_ad._current_level
    return level >= 0 or bool(TRANSFORMS.values[0]())


# ---- tensors without values ----------------------------------------------------------------------


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor has a shape and no values."""
    return type(tensor) not in (Tensor, nn.Parameter) and (
        FAKES.values is not None and isinstance(tensor, FAKES.values[0])
    )


def with_values() -> contextlib.AbstractContextManager[Any]:
    """A context in which tensors have values, also while a model without values is run."""
    if FAKES.values is None:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = FAKES.values[2]()
    return context


# ---- layouts and norms ---------------------------------------------------------------------------

_suggested_format = _look_up("torch._prims_common:suggest_memory_format")
_batch_norm = _look_up("torch:_batch_norm_impl_index")


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that torch reads off the strides; contiguous where it does not say."""
    if _suggested_format is None:
        return torch.contiguous_format
    found: torch.memory_format = _suggested_format(x)
    return found


def batch_norm(*arguments: Any) -> tuple[Tensor, ...]:
    """Output, mean and rstd, first of its results, by the kernel that `F.batch_norm` takes.

    The last argument is whether cuDNN may be taken, which torch's public function does not do.
    """
    found: tuple[Tensor, ...]
    if _batch_norm is None:
        found = torch.native_batch_norm(*arguments[:-1])
    else:
        found = _batch_norm(*arguments)
    return found


# ---- Triton --------------------------------------------------------------------------------------


def triton_version() -> str | None:
    """The release of Triton, None where it is not installed."""
    version: str | None = _look_up("triton:__version__")
    return version


@functools.cache
def launches_directly() -> bool:
    """Whether the launchers of this release of Triton take what `_launch.py` hands them."""
    version = triton_version()
    if version is None or not TRITON:
        return False
    warn_if_untested("Triton", version, TESTED_TRITON)
    release = torch.torch_version.TorchVersion(".".join(version.split(".")[:2]))
    return bool(TESTED_TRITON[0] <= release <= TESTED_TRITON[1])


# ---- attention -----------------------------------------------------------------------------------


def attention_backend(*arguments: Any, **options: Any) -> int:
    """Which of torch's attention kernels torch would take; its composition where it cannot say."""
    if FUSED_ATTENTION.values is None:
        return int(torch.nn.attention.SDPBackend.MATH.value)
    return int(FUSED_ATTENTION.values[0](*arguments, **options))


# ---- CUDA ----------------------------------------------------------------------------------------


def is_current_device(tensor: Tensor) -> bool:
    """Whether a CUDA tensor is on the current device; False where torch does not say.

    `torch.cuda.current_device` without its check that CUDA is there.
    """
    if CURRENT_DEVICE.values is None:
        return False
    return bool(tensor.get_device() == CURRENT_DEVICE.values[0]())


# ---- the tracer of torch.compile -----------------------------------------------------------------

# What the tracer can be asked: by name, a function of the tracer and its variables, which returns a
# variable or a constant.
_questions: dict[str, Callable[..., Any]] = {}


def constant_while_traced(function: _F) -> _F:
    """`torch.compiler.assume_constant_result`, whose import of the tracer takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def question(function: _F) -> _F:
    """Registers the decorated function as a question to the tracer, under its name."""
    _questions[function.__name__] = function
    return function


def ask(question: str, default: Any, *values: Any) -> Any:
    """What a question to the tracer gives for traced values, `default` where it cannot be asked.

    Only in code that is traced. Constants become constants of the compiled code.
    """
    answer = default
    if can_ask():
        from torch._dynamo.comptime import comptime  # an import of a second, so only here

        comptime(_answer)
    return answer


@question
def is_exported(tracer: Any) -> bool:
    return bool(tracer.output.export)


@constant_while_traced
def can_ask() -> bool:
    """Whether questions to the tracer are answered."""
    return bool(TRACER)


def _answer(context: Any) -> None:
    """Puts the answer into the local `answer` of `ask`."""
    assert TRACER.values is not None
    variable = TRACER.values[-1]
    tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    local = tracer.symbolic_locals
    name = local["question"].as_python_constant()
    try:
        found = _questions[name](tracer, *(value.realize() for value in local["values"].items))
    except (AttributeError, ImportError) as error:
        # A name of the tracer's inside has gone: the default stands.
        warnings.warn(
            f"torch {torch.__version__}: the tracer of torch.compile does not say {name!r}"
            f" ({error}); compiled layers may keep more",
            stacklevel=2,
        )
        return
    local["answer"] = found if isinstance(found, variable) else variable.build(tracer, found)


def is_traced_or_between() -> bool:
    """Whether a region is traced, or runs between two graphs where tracing gave up."""
    if torch.compiler.is_compiling():
        return True
    if "torch._dynamo" not in sys.modules:
        return False
    get = _look_up("torch._C._dynamo.eval_frame:get_eval_frame_callback")
    callback = None if get is None else get()
    return callback is not None and callback is not False
