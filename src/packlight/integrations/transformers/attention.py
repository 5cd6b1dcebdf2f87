"""Attention modules of transformers that keep packs of query, key and value.

Every attention module of transformers asks its config which implementation to call. A converted one
is told "packlight" where the config says "sdpa"; the config itself, which all layers share, stays
as it is, and so do the masks that are made by it. Registered for all of transformers:

- `AttentionInterface`: "packlight", which does what "sdpa" does, by
  `packlight.groupquant.scaled_dot_product_attention`;
- `AttentionMaskInterface`: "packlight", the masks of "sdpa".

So `model.set_attn_implementation("packlight")` works as well, at 8 bits for all layers.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from packlight import _torch
from packlight._classes import joined
from packlight.calls import uncovered
from packlight.groupquant.method import GroupQuant
from packlight.integrations._copies import once_a_class
from packlight.integrations.transformers import self_attention
from packlight.integrations.transformers.masks import kind_of_traced
from packlight.integrations.transformers.rotary import use_one_kernel
from packlight.layers.attention import attend
from packlight.method import Method, NotConverted, Rule, Swap, rule_finder
from packlight.quantiser import Quantiser

NAME = "packlight"
_REPLACES = "sdpa"

_DEFAULT = GroupQuant().for_attention()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `sdpa_attention_forward` of transformers does, keeping packs in training.

    That function itself runs where nothing can be packed, with a position bias, and where a causal
    call has more keys than queries, as with a static cache. What stands in its place under "sdpa",
    as sequence parallelism of an engine does, always runs.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    kind = kind_of_traced(attention_mask)
    if kind is not None:
        attention_mask, is_causal = None, kind == "causal"
    plain: Callable[..., tuple[Tensor, None]] = ALL_ATTENTION_FUNCTIONS[_REPLACES]
    causal = query.shape[2] > 1 and attention_mask is None and is_causal
    biased = kwargs.get("position_bias") is not None
    output = None
    packs = module.training and plain is sdpa_attention_forward
    if packs and not biased and not (causal and key.shape[2] > query.shape[2]):
        method = getattr(module, "attention_method", _DEFAULT)
        grouped = getattr(module, "num_key_value_groups", 1) > 1
        inputs, flags = (query, key, value, attention_mask), (dropout, causal, scaling)
        output = uncovered(attend, inputs, flags, grouped, method)
    if output is None:
        flags_by_name = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return plain(module, query, key, value, attention_mask, **flags_by_name, **kwargs)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


class _Config:
    """A config as a converted attention module reads it: the implementation is ours."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class GroupQuantAttention(nn.Module):
    """An attention module; keeps packs of query, key and value in training.

    By `Quantiser.for_attention`, see `packlight.groupquant.scaled_dot_product_attention`.
    Where the model's attention implementation is not "sdpa" it does as ever.
    """

    attention_method: Quantiser
    model_config: (
        Any  # a second name: the tracer of torch 2.11 reads no attribute behind a property
    )

    @property
    def config(self) -> Any:
        config = self.model_config
        if self.training and config._attn_implementation == _REPLACES:
            return _Config(config)
        return config

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = self.model_config = value


class GroupQuantSelfAttention(self_attention.AtOnce, GroupQuantAttention):
    """`GroupQuantAttention` whose query, key and value have one pack."""

    implementations = (_REPLACES, NAME)


# --- The rule.


@once_a_class
def _asks_its_config(kind: type[nn.Module]) -> bool:
    """Whether a class calls the implementation that its config names, and looks no further.

    Some have a way of their own for "sdpa"; they are left alone.
    """
    # Later versions decorate them, for arguments of another name.
    own = {name: inspect.unwrap(value) for name, value in vars(kind).items() if callable(value)}
    forward = own.get("forward")
    code = _torch.code_of(forward)
    if forward is None or code is None:
        return False
    interfaces = forward.__globals__.get("ALL_ATTENTION_FUNCTIONS")
    asks = {"ALL_ATTENTION_FUNCTIONS", "config", "_attn_implementation"}
    codes = [found for value in own.values() if (found := _torch.code_of(value)) is not None]
    return (
        isinstance(interfaces, AttentionInterface)
        and asks <= set(code.co_names)
        and not any(_mentions(each.co_consts) for each in codes)
    )


def _mentions(constants: Iterable[object]) -> bool:
    return any(
        _mentions(value) if isinstance(value, (tuple, frozenset)) else value == _REPLACES
        for value in constants
    )


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    return _attention if issubclass(method, Quantiser) and _asks_its_config(kind) else None


def _attention(method: Quantiser, module: nn.Module) -> Swap:
    implementation = module.config._attn_implementation  # type: ignore[union-attr]
    if implementation not in (_REPLACES, NAME):
        raise NotConverted(
            f"its attention implementation is {implementation!r}; what packs query, key and value"
            f' takes the place of "{_REPLACES}": model.set_attn_implementation("sdpa")'
        )
    code: Any = _torch.code_of(inspect.unwrap(type(module).forward))
    if "position_bias" in code.co_varnames:
        raise NotConverted(
            "it adds a learned position bias to its scores; the calls of its code keep packs where"
            " they are covered, as with functional=True"
        )
    use_one_kernel(type(module))
    attributes = {"attention_method": method.for_attention(), "model_config": module.config}
    known = self_attention.is_known(type(module))
    ours = GroupQuantSelfAttention if known else GroupQuantAttention
    return Swap(joined(ours, type(module)), attributes)
