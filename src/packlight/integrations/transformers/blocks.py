"""Blocks of decoders with the code of LlamaDecoderLayer, of which there are more than sixty copies.

What goes on beside a norm comes back with the norm's gradient, by one kernel. All parts are called
as ever; where the norms are not converted the block's own code runs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from packlight import _torch
from packlight._classes import joined
from packlight.calls import is_bare, uncovered
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations.transformers.norms import GroupQuantRMSNorm
from packlight.method import Method, Rule, Swap, rule_finder
from packlight.quantiser import Quantiser
from packlight.selectors import kind_of

# --- The code that is known, as transformers has it. Never run: `is_copy` compares with it.


def _llama(
    self: Any,
    hidden_states: Any,
    attention_mask: Any,
    position_ids: Any,
    past_key_values: Any,
    use_cache: Any,
    position_embeddings: Any,
    **kwargs: Any,
) -> Any:
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    # Self Attention
    hidden_states, _ = self.self_attn(
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden_states = residual + hidden_states

    # Fully Connected
    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states = self.mlp(hidden_states)
    hidden_states = residual + hidden_states
    return hidden_states  # noqa: RET504  as it is there


_ARGUMENTS = _torch.code_of(_llama).co_varnames[1:7]  # type: ignore[union-attr]


@once_a_class
def _is_known(kind: type[nn.Module]) -> bool:
    forward = vars(kind).get("forward")
    code = _torch.code_of(forward)
    # Arguments are given by name, which a copy need not have.
    named = code is not None and set(_ARGUMENTS) <= set(code.co_varnames)
    return named and is_copy(forward, _llama)


# --- The layer.


class GroupQuantDecoderLayer(nn.Module):
    """A block whose residuals come back with the gradients of its norms."""

    may_run_plain_code = True
    self_attn: nn.Module
    mlp: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        given = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "position_embeddings": position_embeddings,
            **kwargs,
        }
        norms: Any = (self._modules["input_layernorm"], self._modules["post_attention_layernorm"])
        x = hidden_states
        found = uncovered(self._first, norms[0], x)
        if found is None:
            plain: Tensor = super().forward(x, **given)
            return plain
        h, x = found
        del found, hidden_states  # here and below: what is not read again makes room
        h, _ = self.self_attn(hidden_states=h, **given)
        # Not covered: what looks at a call for others looks at this frame, which then holds h.
        x = uncovered(torch.add, x, h)
        del h
        h, x = uncovered(_beside, norms[1], x) or (norms[1](x), x)
        h = self.mlp(h)
        out: Tensor = uncovered(torch.add, x, h)
        return out

    def _first(self, norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """As `_beside`; None also where someone has given the block's class another forward."""
        if torch.compiler.is_dynamo_compiling() or not _is_known(kind_of(self)):
            return None
        return _beside(norm, x)


def _beside(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """What `norm.beside` gives; None where a call of the norm is to run."""
    if not isinstance(norm, GroupQuantRMSNorm) or not is_bare(norm):
        return None
    return norm.beside(x)


# --- The rule.


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    return _block if issubclass(method, Quantiser) and _is_known(kind) else None


def _block(method: Quantiser, module: nn.Module) -> Swap:
    return Swap(joined(GroupQuantDecoderLayer, type(module)), parts=("input_layernorm",))
