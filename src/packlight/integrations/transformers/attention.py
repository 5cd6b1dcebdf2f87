"""Attention modules of transformers that keep packs of query, key and value.

Every attention module of transformers asks its config which implementation to call. A converted one
is told "packlight" where the config says "sdpa"; the config itself, which all layers share, stays
as it is, and so do the masks that are made by it. Registered for all of transformers:

- `AttentionInterface`: "packlight", which does what "sdpa" does, by
  `packlight.groupquant.scaled_dot_product_attention`;
- `AttentionMaskInterface`: "packlight", the masks of "sdpa".

So `model.set_attn_implementation("packlight")` works as well, at 8 bits for all layers.
"""

import dis
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from packlight import _torch
from packlight._classes import joined
from packlight.calls import covers_now, uncovered
from packlight.groupquant.method import GroupQuant
from packlight.groupquant.modules import Linear
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations._parts import parameters_of, takes
from packlight.integrations.transformers import masks, rotary, self_attention
from packlight.layers.attention import attend
from packlight.layers.linear import linears
from packlight.method import Method, NotConverted, Rule, Swap, rule_finder
from packlight.quantiser import Quantiser
from packlight.selectors import kind_of

NAME = "packlight"
_REPLACES = "sdpa"

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")

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
    kind = masks.kind_of_traced(attention_mask)
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


class GroupQuantSplitAttention(GroupQuantAttention):
    """`GroupQuantAttention` whose query, key and value are three Linears of its input.

    One function computes them, where all three train alike, so that one gradient comes back. Code
    that is Llama's is known, and what it does behind them done here; any other runs as ever: each
    Linear, when it is called, has its result ready.
    """

    may_run_plain_code = True
    head_dim: int
    attention_dropout: float
    layer_idx: int
    scaling: float

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        results = None
        parts: Any = [self._modules[name] for name in _PROJECTIONS]
        if self.training and not torch.compiler.is_dynamo_compiling():
            results = uncovered(self._projected, hidden_states)
            if not args and covers_now() and self._runs_known_code(kwargs):
                return self._behind(results or [part(hidden_states) for part in parts], kwargs)
        if results is None:
            return super().forward(hidden_states, *args, **kwargs)
        for part, y in zip(parts, results, strict=True):
            part.__dict__["ready"] = (hidden_states, hidden_states._version, y)
        del results, y
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            for part in parts:
                part.__dict__.pop("ready", None)

    def _projected(self, x: Tensor) -> list[Tensor] | None:
        """Results of the three projections; None where they are to run one by one."""
        parts: Any = [self._modules[name] for name in _PROJECTIONS]
        if not isinstance(parts[0], Linear) or x.dim() != 3:
            return None
        method = parts[0].method
        parameters = parameters_of(parts, method)
        if parameters is None or not takes(x, method):
            return None
        return [*linears(x, parameters, method)]

    def _runs_known_code(self, given: dict[str, Any]) -> bool:
        """Whether the module's code is Llama's, and its attention ours."""
        if not _is_llama(kind_of(self)) or given.get("position_embeddings") is None:
            return False
        return self_attention.implementation_of(self.model_config) in (_REPLACES, NAME)

    def _behind(self, results: list[Tensor], given: dict[str, Any]) -> tuple[Tensor, None]:
        """What the module's code does behind the projections, without a look at each of its calls.

        The list of results is emptied, so that each goes when it has been read.
        """
        heads: list[Tensor] = uncovered(_heads, results, self.head_dim)
        heads[:2] = rotary.function_of(self)(*heads[:2], *given["position_embeddings"])
        cache, last = given.get("past_key_values"), self._modules["o_proj"]
        if cache is not None:
            heads[1:] = cache.update(*heads[1:], self.layer_idx)
        assert last is not None
        out = uncovered(self._attended, heads, given)
        heads.clear()
        return last(out), None

    def _attended(self, heads: list[Tensor], given: dict[str, Any]) -> Tensor:
        """The input of the projection behind attention, of query, key and value by heads."""
        others = {name: value for name, value in given.items() if name not in _OF_LLAMA}
        query, key, value = heads
        mask, dropout = given.get("attention_mask"), self.attention_dropout
        out, _ = attention_forward(
            self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **others
        )
        return out.reshape(*out.shape[:-2], -1)


def _heads(results: list[Tensor], size: int) -> list[Tensor]:
    """Results [batch, length, heads * size] as [batch, heads, length, size]; empties the list."""
    shape = (*results[0].shape[:-1], -1, size)
    heads = [x.view(shape).transpose(1, 2) for x in results]
    results.clear()
    return heads


class GroupQuantSelfAttention(self_attention.AtOnce, GroupQuantAttention):
    """`GroupQuantAttention` whose query, key and value have one pack."""

    implementations = (_REPLACES, NAME)


# --- The code that is known, as transformers has it. Never run: `is_copy` compares with it.

# Of each module its own; the first runs only where a config says "eager".
_OWN = ("eager_attention_forward", rotary.NAME)
# Arguments that its code has a name for.
_OF_LLAMA = ("position_embeddings", "attention_mask", "past_key_values")
eager_attention_forward: Any = None
apply_rotary_pos_emb: Any = None


def _llama(
    self: Any,
    hidden_states: Any,
    position_embeddings: Any,
    attention_mask: Any,
    past_key_values: Any,
    **kwargs: Any,
) -> Any:
    input_shape = hidden_states.shape[:-1]
    hidden_shape = (*input_shape, -1, self.head_dim)

    query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

    cos, sin = position_embeddings
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

    if past_key_values is not None:
        key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, eager_attention_forward
    )

    attn_output, attn_weights = attention_interface(
        self,
        query_states,
        key_states,
        value_states,
        attention_mask,
        dropout=0.0 if not self.training else self.attention_dropout,
        scaling=self.scaling,
        **kwargs,
    )

    attn_output = attn_output.reshape(*input_shape, -1).contiguous()
    attn_output = self.o_proj(attn_output)
    return attn_output, attn_weights


@once_a_class
def _is_llama(kind: type[nn.Module]) -> bool:
    return is_copy(inspect.unwrap(vars(kind).get("forward", _is_llama)), _llama, _OWN)


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


@once_a_class
def _projects_its_input(kind: type[nn.Module]) -> bool:
    """Whether a class's code calls its three projections with its first argument, each once."""
    forward = inspect.unwrap(kind.forward)
    code = _torch.code_of(forward)
    if code is None or code.co_varnames[1:2] != ("hidden_states",):
        return False
    reads = []
    for step, after in itertools.pairwise(dis.get_instructions(code)):
        if step.argval in _PROJECTIONS:
            reads.append((step.argval, after.argval))
        elif len(reads) < len(_PROJECTIONS) and (
            "JUMP" in step.opname  # it may not come to the next
            or (step.opname.startswith("STORE") and step.argval == "hidden_states")
        ):
            return False
    return sorted(reads) == sorted((name, "hidden_states") for name in _PROJECTIONS)


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
    rotary.use_one_kernel(type(module))
    attributes: dict[str, Any] = {"attention_method": method.for_attention()}
    attributes["model_config"] = module.config
    kind = type(module)
    ours: type[nn.Module] = GroupQuantAttention
    if self_attention.is_known(kind):
        ours = GroupQuantSelfAttention
    elif _projects_its_input(kind):
        ours = GroupQuantSplitAttention
    return Swap(joined(ours, type(module)), attributes)
