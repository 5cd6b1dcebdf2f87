"""Megatron-LM: a layer specification whose layers are converted as they are built.

    # specs.py
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from packlight.integrations.megatron import converted

    layer = converted(get_gpt_layer_local_spec(normalization="RMSNorm"), methods="GroupQuant(4)")

and `--spec specs layer` on the command line, or `GPTModel(config, layer, ...)`. Its layers of
Megatron-Core's own are meant: what Transformer Engine's layers keep is decided in their kernels.

Megatron's parallel linear layers stay as they are, with their ways to reduce and to accumulate
gradients. What they save is packed as it is saved.
"""

import dataclasses
from typing import Any

import packlight
from packlight.integrations._options import imported, read_options


def converted(spec: Any, **options: Any) -> Any:
    """A `ModuleSpec` of a layer like this one, of which each layer that is built is converted.

    Options are those of `packlight.convert` by name: `methods` (a text, or the path of a file),
    `rest`, `functional`, `exact_ends` and `strict`. Patterns in a file are of names within a layer,
    "mlp.linear_fc1".

    Raises `InputError`, naming the option, for one that is unknown or has a wrong value.
    """
    arguments = read_options(options, "megatron", trains=False)
    kind = imported("megatron.core.transformer.spec_utils").get_module(spec)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        packlight.convert(self, **arguments)

    body = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__init__": __init__}
    return dataclasses.replace(spec, module=type(kind.__name__, (kind,), body))
