"""Self-attention of BERT and its kin, whose query, key and value are three Linears of one input.

Where the three are converted as by default, without hooks, one function computes them, one pack
keeps them and one gradient comes back (`layers/self_attention.py`); elsewhere they run one by one.
With the projection behind attention and the norm behind the sum it is one function of all
(`layers/post_norm.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from packlight._classes import joined
from packlight.calls import is_bare, uncovered
from packlight.groupquant.modules import Linear
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations._parts import parameters_of, takes
from packlight.integrations.transformers.masks import kind_of_traced
from packlight.integrations.transformers.outputs import GroupQuantOutput
from packlight.layers.attention_backends import Flags
from packlight.layers.linear import Parameters
from packlight.layers.post_norm import attention
from packlight.layers.self_attention import fits, linear_dtype, projections, self_attention
from packlight.method import Method, Rule, Swap, rule_finder
from packlight.quantiser import Quantiser

# --- The code that is known, as transformers has it. Never run: `is_copy` compares with it.

# Of each module its own; it runs only where a config says "eager".
_OWN = ("eager_attention_forward",)
eager_attention_forward: Any = None


def _bert(
    self: Any, hidden_states: Any, attention_mask: Any, past_key_values: Any, **kwargs: Any
) -> Any:
    input_shape = hidden_states.shape[:-1]
    hidden_shape = (*input_shape, -1, self.attention_head_size)

    query_layer = self.query(hidden_states).view(*hidden_shape).transpose(1, 2)
    key_layer = self.key(hidden_states).view(*hidden_shape).transpose(1, 2)
    value_layer = self.value(hidden_states).view(*hidden_shape).transpose(1, 2)

    if past_key_values is not None:
        current_past_key_values = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            current_past_key_values = past_key_values.self_attention_cache

        key_layer, value_layer = current_past_key_values.update(
            key_layer, value_layer, self.layer_idx
        )

    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, eager_attention_forward
    )

    attn_output, attn_weights = attention_interface(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask,
        dropout=0.0 if not self.training else self.dropout.p,
        scaling=self.scaling,
        **kwargs,
    )
    attn_output = attn_output.reshape(*input_shape, -1).contiguous()
    return attn_output, attn_weights


def _attention(
    self: Any,
    hidden_states: Any,
    attention_mask: Any,
    encoder_hidden_states: Any,
    encoder_attention_mask: Any,
    past_key_values: Any,
    **kwargs: Any,
) -> Any:
    attention_mask = attention_mask if not self.is_cross_attention else encoder_attention_mask
    attention_output, attn_weights = self.self(
        hidden_states,
        encoder_hidden_states=encoder_hidden_states,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        **kwargs,
    )
    attention_output = self.output(attention_output, hidden_states)
    return attention_output, attn_weights


@once_a_class
def is_known(kind: type[nn.Module]) -> bool:
    """Whether a class has this code."""
    return is_copy(vars(kind).get("forward"), _bert, _OWN)


def implementation_of(config: Any) -> str | None:
    """`config._attn_implementation`; a config looks five times for what it is asked for."""
    name, found = "_attn_implementation_internal", None  # that of today's releases
    if not torch.compiler.is_dynamo_compiling():
        found = object.__getattribute__(config, "__dict__").get(name)
    known: str | None = config._attn_implementation if found is None else found
    return known


def sdpa_is_replaced() -> bool:
    """Whether something stands in the place of "sdpa", as sequence parallelism of an engine does.

    DeepSpeed's (Ulysses) puts attention of the tokens of all ranks there.
    """
    return ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward


# --- The layers.


class AtOnce(nn.Module):
    """Self-attention by one function for query, key and value, where all three train alike."""

    may_run_plain_code = True
    attention_method: Quantiser
    implementations: tuple[str, ...]  # of attention, in whose place ours is
    model_config: Any
    query: nn.Module
    key: nn.Module
    value: nn.Module
    num_attention_heads: int
    attention_head_size: int
    scaling: float
    is_causal: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if self.training and past_key_values is None:
            out = uncovered(self._at_once, hidden_states, attention_mask, kwargs)
            if out is not None:
                return out, None
        plain: tuple[Tensor, Tensor | None] = super().forward(
            hidden_states, attention_mask, past_key_values, **kwargs
        )
        return plain

    def _at_once(self, x: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor | None:
        """The output by two functions; None where the parts are to run one by one."""
        given = self.given(x, mask, options)
        if given is None:
            return None
        parameters, mask, flags, method = given
        whole = projections(x, parameters, method)
        return self_attention(whole, self.num_attention_heads, mask, flags, self.attention_method)

    def given(
        self, x: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[list[Parameters], Tensor | None, Flags, Quantiser] | None:
        """The projections, mask and flags of attention, and the method by which x is kept.

        None where the parts are to run one by one.
        """
        query = self._modules["query"]
        if not isinstance(query, Linear) or options.get("position_bias") is not None:
            return None
        if implementation_of(self.model_config) not in self.implementations or sdpa_is_replaced():
            return None
        method = query.method
        parts: Any = (query, self._modules["key"], self._modules["value"])
        parameters = parameters_of(parts, method)
        if parameters is None or x.dim() != 3 or not takes(x, method):
            return None
        shape = (self.num_attention_heads * self.attention_head_size, x.shape[2])
        (weight, bias), *_ = parameters
        for other, another in parameters:
            if other.shape != shape or other.dtype != weight.dtype:
                return None
            if another is None or bias is None:
                if another is not bias:
                    return None
            elif not another.requires_grad or another.dtype != bias.dtype:
                return None
        is_causal = options.get("is_causal")
        if is_causal is None:
            is_causal = self.is_causal
        kind = kind_of_traced(mask)
        if kind is not None:
            mask, is_causal = None, kind == "causal"
        if is_causal and (mask is not None or x.shape[1] < 2):  # no symbol, as `and` would give
            is_causal = False
        dropout: Any = self._modules["dropout"]
        flags = (dropout.p, is_causal, self.scaling)
        return parameters, mask, flags, method


class WithNorm(nn.Module):
    """Self-attention, its projection and the norm behind the sum by one function."""

    may_run_plain_code = True
    is_cross_attention: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        alone = encoder_hidden_states is None and past_key_values is None
        if self.training and alone:
            out = uncovered(self._at_once, hidden_states, attention_mask, kwargs)
            if out is not None:
                return out, None
        others = (encoder_hidden_states, encoder_attention_mask, past_key_values)
        plain: tuple[Tensor, Tensor | None] = super().forward(
            hidden_states, attention_mask, *others, **kwargs
        )
        return plain

    def _at_once(self, x: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor | None:
        """The result by one function; None where the parts are to run one by one."""
        inner, output = self._modules["self"], self._modules["output"]
        if not isinstance(inner, AtOnce) or not isinstance(output, GroupQuantOutput):
            return None
        if not (inner.training and output.training and is_bare(inner, output)):
            return None
        start, end = inner.given(x, mask, options), output.given(x)
        if start is None or end is None:
            return None
        parameters, mask, flags, method = start
        last, norm, p, of_last, of_norm = end
        of_attention, heads = inner.attention_method, inner.num_attention_heads
        dtype, width = linear_dtype(x, parameters[0][0]), parameters[0][0].shape[0]
        if of_last != method or not fits(x, dtype, heads, width, mask, flags[0], of_attention):
            return None
        methods = (method, of_attention, of_norm)
        return attention(x, parameters, last, norm, p, heads, mask, flags, methods)


# --- The rule of the sub-layer.


@once_a_class
def _is_sub_layer(kind: type[nn.Module]) -> bool:
    return is_copy(vars(kind).get("forward"), _attention)


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    return _whole if issubclass(method, Quantiser) and _is_sub_layer(kind) else None


def _whole(method: Quantiser, module: nn.Module) -> Swap:
    return Swap(joined(WithNorm, type(module)), parts=("self", "output"))
