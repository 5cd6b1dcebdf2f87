"""All that packlight reads of torch's and Triton's inside, each with what happens without it.

A private name may go away in any release. Each is looked up once, under the name of what it makes
possible (`capabilities.py`). Where it is missing the answer is "no": more memory, a feature less or
a clear refusal, and never a wrong gradient or a failed import. `packlight.env` prints the answers.

`fakes.py` is imported by `predict` when it is called, and `graph.py` by `saving`.
"""

from packlight._torch.autograd import (
    at_end_of_backward,
    has_storage,
    next_node_number,
    saved_tensor_hooks,
    storage_reference,
)
from packlight._torch.backends import (
    attention_backend,
    batch_norm,
    hollow,
    is_current_device,
    is_fake,
    launches_directly,
    memory_format,
    with_values,
)
from packlight._torch.capabilities import (
    BACKWARD,
    CAPABILITIES,
    CURRENT_DEVICE,
    FAKES,
    FUSED_ATTENTION,
    HOLLOW,
    HOOK_STACK,
    HOOKS,
    MODE_STACK,
    MODES,
    NODES,
    SAVED,
    STORAGES,
    TRACER,
    TRANSFORMS,
    TRITON,
    warn_if_untested,
)
from packlight._torch.code import code_of, give_own_code, variable_of
from packlight._torch.modes import (
    function_modes,
    in_transform,
    without_mode,
    without_torch_functions,
)
from packlight._torch.tracer import (
    always_untraced,
    ask,
    can_ask,
    constant_while_traced,
    is_traced_or_between,
    question,
    run_as_written,
    untraced,
)

__all__ = [
    "BACKWARD",
    "CAPABILITIES",
    "CURRENT_DEVICE",
    "FAKES",
    "FUSED_ATTENTION",
    "HOLLOW",
    "HOOKS",
    "HOOK_STACK",
    "MODES",
    "MODE_STACK",
    "NODES",
    "SAVED",
    "STORAGES",
    "TRACER",
    "TRANSFORMS",
    "TRITON",
    "always_untraced",
    "ask",
    "at_end_of_backward",
    "attention_backend",
    "batch_norm",
    "can_ask",
    "code_of",
    "constant_while_traced",
    "function_modes",
    "give_own_code",
    "has_storage",
    "hollow",
    "in_transform",
    "is_current_device",
    "is_fake",
    "is_traced_or_between",
    "launches_directly",
    "memory_format",
    "next_node_number",
    "question",
    "run_as_written",
    "saved_tensor_hooks",
    "storage_reference",
    "untraced",
    "variable_of",
    "warn_if_untested",
    "with_values",
    "without_mode",
    "without_torch_functions",
]
