"""All that packlight reads of torch's and Triton's inside, each with what happens without it.

A private name may go away in any release. Each is looked up here once, under the name of what it
makes possible, a `Capability`. Where it is missing the answer is "no": more memory, a feature less
or a clear refusal, and never a wrong gradient or a failed import. `packlight.env` prints the
answers. Nothing here imports the tracer of torch.compile, which takes a second, before it is used.
"""

import functools
import importlib
import warnings
from typing import Any

import torch

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
        found = tuple(look_up(path) for path in self.paths)
        return None if None in found else found

    def __bool__(self) -> bool:
        return self.values is not None


def look_up(path: str) -> Any:
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
MODULE_HOOKS = Capability(
    "sees hooks that torch has for all modules",
    "no layer does the work of others, which is slower, and `graphed` refuses",
    "torch.nn.modules.module:_global_forward_hooks",
    "torch.nn.modules.module:_global_forward_pre_hooks",
    "torch.nn.modules.module:_global_backward_hooks",
    "torch.nn.modules.module:_global_backward_pre_hooks",
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
TRACING = Capability(
    "knows that a region is compiled",
    "compiled backward passes fuse less",
    "torch._guards:_TLS",
)
FRAME_CALLBACK = Capability(
    "knows that frames are compiled",
    "code between two compiled regions runs as uncompiled code does",
    "torch._C._dynamo.eval_frame:get_eval_frame_callback",
)
FRAMES = Capability(
    "has torch.compile leave frames alone",
    "where a graph breaks, it breaks once more for each converted module around",
    "torch._C._dynamo.eval_frame:set_code_exec_strategy",
    "torch._C._dynamo.eval_frame:_FrameExecStrategy",
    "torch._C._dynamo.eval_frame:_FrameAction",
)
GRAPH_NODES = Capability(
    "puts calls into the graph of torch.compile",
    "the tracer follows every layer's backward pass, and compiling takes longer",
    "torch._dynamo.variables.builder:wrap_fx_proxy",
    "torch._dynamo.exc:Unsupported",
    "torch._dynamo.variables.tensor:TensorVariable",
    "torch._dynamo.variables.tensor:SymNodeVariable",
    "torch._dynamo.guards:install_guard",
    "torch._dynamo.guards:GuardBuilder",
    "torch._dynamo.source:AttrSource",
    "torch.fx.experimental.symbolic_shapes:guard_scalar",
)
LOWERINGS = Capability(
    "tells Inductor what operators are made of",
    "compiled backward passes call an operator for each cast of a weight, which is slower",
    "torch._inductor.lowering:register_lowering",
    "torch._inductor.lowering:lowerings",
)
MODES = Capability(
    "takes a function mode off",
    "layers run their own code with the mode on, which is slower",
    "torch._C:_len_torch_function_stack",
    "torch._C:_get_function_stack_at",
    "torch._C:_pop_torch_function_stack",
    "torch._C:_push_on_torch_function_stack",
)
MODE_VARIABLE = Capability(
    "answers for a function mode in traced code",
    "torch.compile follows the code that covers calls, and compiling takes longer",
    "torch._dynamo.variables.torch_function:TorchFunctionModeVariable",
    "torch._dynamo.variables.torch_function:TorchFunctionModeVariable.call_torch_function",
)
DISPATCH = Capability(
    "sees who looks at operators",
    "operators always go through the dispatcher, which takes the CPU longer",
    "torch._C:_len_torch_dispatch_stack",
    "torch.autograd:_profiler_enabled",
)
MODES_OFF = Capability(
    "asks without modes of the dispatcher",
    "what is foretold of packed attention counts its forward pass twice",
    "torch.utils._python_dispatch:_disable_current_modes",
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
FREEING = Capability(
    "frees what a graph node saved before its backward pass ends",
    "packs of a gated feed-forward layer take memory until its gradients are made",
    "torch._C:_FunctionBase.maybe_clear_saved_tensors",
)
BACKWARD = Capability(
    "knows that a backward pass runs",
    "what a user holds of a checkpoint's second pass holds packs",
    "torch._C:_current_graph_task_id",
    "torch.autograd:Variable._execution_engine",
)
HOOK_STACK = Capability(
    "sees saved-tensor hooks that are entered later",
    "`profile` does not see what hooks inside the function keep",
    "torch._C._autograd:_push_saved_tensors_default_hooks",
    "torch._C._autograd:_pop_saved_tensors_default_hooks",
)
SAVED = Capability(
    "sees what a graph node saved",
    "`saving` refuses, and `profile` does not see what foreign graphs hold",
    "torch._C._autograd:SavedTensor.data",
)
NODES = Capability(
    "numbers graph nodes",
    "`saving` and `profile` refuse",
    "torch._C._autograd:_get_sequence_nr",
    "torch.autograd.graph:Node._sequence_nr",
)
RUNNING_NODE = Capability(
    "knows which graph node runs",
    "a planned backward pass is one line",
    "torch._C:_current_autograd_node",
    "torch.autograd.graph:Node._sequence_nr",
)
NEEDED = Capability(
    "knows which gradients a backward pass is for",
    "layers make gradients of input and weight in both passes of a backward pass that is split",
    "torch._C:_will_engine_execute_node",
)
CURRENT_DEVICE = Capability(
    "reads the current CUDA device",
    "each kernel switches devices, which is slower",
    "torch._C:_cuda_getDevice",
)
WORKSPACES = Capability(
    "frees what matrix products set aside",
    "`graphed` models take 0.1 GiB more on a large GPU",
    "torch._C:_cuda_clearCublasWorkspaces",
)
EMPTY = Capability(
    "makes tensors without the dispatcher",
    "results of kernels take the CPU longer",
    "torch._C._dynamo.guards:_empty_strided_cuda",
    "torch._C._dynamo.guards:_empty_strided_cpu",
)
CURRENT_STREAM = Capability(
    "reads the current CUDA stream",
    "layers that read one tensor rebuild it each, and each bias gradient makes a row of ones",
    "torch._C:_cuda_getCurrentRawStream",
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

TREES = Capability(
    "takes containers apart",
    "`graphed` refuses",
    "torch.utils._pytree:tree_flatten",
    "torch.utils._pytree:tree_unflatten",
)
STORAGE_USES = Capability(
    "counts what refers to a storage",
    "graphed models copy their gradients",
    "torch._C:_storage_Use_Count",
)
HOLLOW = Capability(
    "makes tensors without memory",
    "heads give all logits, as plain ones do",
    "torch:Tensor._make_wrapper_subclass",
)

TRITON = Capability(
    "launches compiled Triton kernels directly",
    "Triton launches them itself, which takes the CPU longer",
    "triton:knobs.runtime",
    "triton.runtime.driver:driver",
)

RANKS = Capability(
    "imagines ranks",
    "tensor parallel cannot be foretold",
    "torch.distributed:HashStore",
    # Its import tells torch of the backend "fake".
    "torch.testing._internal.distributed.fake_pg:FakeStore",
)
SHAPES = Capability(
    "hides how DTensors find shapes",
    "transients of tensor parallel are foretold too large",
    "torch.distributed.tensor._sharding_prop:ShardingPropagator",
    "torch.distributed.tensor._sharding_prop:ShardingPropagator._propagate_tensor_meta_non_cached",
)

CAPABILITIES = (
    HOOKS,
    MODULE_HOOKS,
    HOOK_STACK,
    SAVED,
    FREEING,
    BACKWARD,
    STORAGES,
    TRACER,
    TRACING,
    FRAME_CALLBACK,
    FRAMES,
    GRAPH_NODES,
    LOWERINGS,
    MODES,
    MODE_STACK,
    MODE_VARIABLE,
    DISPATCH,
    MODES_OFF,
    TRANSFORMS,
    NODES,
    RUNNING_NODE,
    NEEDED,
    CURRENT_DEVICE,
    EMPTY,
    CURRENT_STREAM,
    WORKSPACES,
    FUSED_ATTENTION,
    FAKES,
    TREES,
    STORAGE_USES,
    HOLLOW,
    RANKS,
    SHAPES,
    TRITON,
)
