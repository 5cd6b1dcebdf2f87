"""torchtitan: a line of its command converts the model that it builds.

    --override.imports 'packlight.integrations.torchtitan.convert={"methods": "GroupQuant(4)"}'

The model is converted as soon as it is built, on the meta device. So whatever torchtitan does with
a model is done with the converted one: tensor and pipeline parallel, activation checkpoints,
`torch.compile`, FSDP2, and the initialisation of weights. Layers of torchtitan that run the forward
of the layer of torch that they are derived from (its `Linear`, `RMSNorm`, `LayerNorm`, ...) have
that layer's rules.
"""

import importlib.util
from typing import Any

from torch import nn

import packlight
from packlight._classes import joined
from packlight.integrations._options import imported, read_options
from packlight.method import Method, Rule, Swap, registered_rule, rule_finder

_ENGINE = "torchtitan"


def convert(config: Any, **options: Any) -> Any:
    """The same configuration of a model, which builds the model converted.

    Torchtitan calls it with the options that stand behind its name in `--override.imports`:
    `methods` (a text, or the path of a file, also one that `Plan.save` wrote), `rest`,
    `functional`, `exact_ends` and `strict`, as for `packlight.convert`. The first line of what was
    converted goes to torchtitan's log.

    The configuration stays the same object, as the trainer has a name for it already.

    Raises `InputError`, naming the option, for one that is unknown or has a wrong value.
    """
    arguments = read_options(options, _ENGINE, trains=False)
    kind = type(config)

    def build(self: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = kind.build(self, **kwargs)
        conversion = packlight.convert(model, **arguments)
        imported("torchtitan.tools.logging").logger.info(
            f"packlight: {str(conversion).partition(chr(10))[0]}"
        )
        return model

    body = {"__slots__": (), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    config.__class__ = type(kind.__name__, (kind,), {**body, "build": build})
    return config


imported(_ENGINE)
if importlib.util.find_spec("torchtitan.config.override") is not None:  # not in older ones
    imported("torchtitan.config.override").override(
        target=imported("torchtitan.protocols.model").BaseModel.Config,
        description="Trains with packs of packlight in place of activations",
    )(convert)


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    """The rule of the layer of torch whose forward a layer of torchtitan runs."""
    bases = (base for base in kind.__mro__ if base.__module__.startswith("torch.nn."))
    plain: Any = next(bases, None)
    if plain is None or plain is nn.Module or not kind.__module__.startswith("torchtitan."):
        return None
    rule = registered_rule(method, plain)
    if rule is None or kind.forward is not plain.forward:
        return None

    def joined_with_it(method: Method, module: nn.Module) -> Swap:
        swap = rule(method, module)
        return swap._replace(kind=joined(swap.kind, kind))

    return joined_with_it
