"""LoHa, LoKr and OFT: weights that are made of small matrices.

Plain autograd keeps each weight, which is as large as that of the layer, what it is made of, and
the input of each adapter in float32. Here a pack of the input is kept, one for all that read it;
the weight is made again in the backward pass.

Known are the codes of `LoHaLayer` and `LoKrLayer` for Linear, and of `OFTRotationModule`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight._checks import is_taken
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations.peft.adapters import Adapter, knows
from packlight.layers import made
from packlight.quantiser import Quantiser, worth_packing

# --- The code that is known, as PEFT has it. Never run: `is_copy` compares with it.


def _delta(self: Any, adapter_name: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    apply_rank_dropout = self.training and bool(self.rank_dropout[adapter_name])
    delta_weight = self.get_delta_weight(adapter_name, apply_rank_dropout=apply_rank_dropout)
    input = self._cast_input_dtype(input, delta_weight.dtype)
    # don't add bias here, because the bias is already included in the output of the base_layer
    return F.linear(input, delta_weight)


# fmt: off
def _rotation(self: Any, x: Any) -> Any:
    required_dtype = x.dtype
    if required_dtype != self.weight.dtype:
        x = x.to(self.weight.dtype)

    orig_shape = x.shape

    if self.coft:
        with torch.no_grad():
            self.weight.copy_(self._project_batch(self.weight, eps=self.eps))

    orth_rotate = self._cayley_batch(
        self.weight, self.block_size, self.use_cayley_neumann, self.num_cayley_neumann_terms
    )

    # Unfold the input for Conv2d layer
    if len(orig_shape) == 4:
        x = self._unfold(x)

    folded_shape = x.shape
    rank = self.in_features // self.block_size if self.block_share else self.r
    batch_dims = x.shape[:-1]
    x_reshaped = x.reshape(*batch_dims, rank, self.block_size)

    if self.block_share:
        orth_rotate = orth_rotate.repeat(rank, 1, 1)
        x_rotated_reshaped = torch.einsum("...rk,rkc->...rc", x_reshaped, orth_rotate)
    else:
        x_rotated_reshaped = torch.einsum("...rk,rkc->...rc", x_reshaped, orth_rotate)

    x_rotated = x_rotated_reshaped.reshape(*folded_shape)

    if len(orig_shape) == 4:
        x_rotated = self._fold(x_rotated, orig_shape)

    return x_rotated.to(required_dtype)
# fmt: on


# --- The layers.


def _may_be_made_again(module: nn.Module, x: Tensor, method: Quantiser) -> bool:
    return (
        module.training
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and is_taken(x)
        and worth_packing(x, method)
    )


class MadeDelta(Adapter):
    """y + x W^T with W made of small matrices; keeps those and a pack of x."""

    method: Quantiser
    rank_dropout: dict[str, float]
    scaling: dict[str, float]
    adapter_layer_names: tuple[str, ...]

    def _get_delta_activations(
        self, adapter_name: str, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        named = (getattr(self, name) for name in self.adapter_layer_names)
        parameters = [each[adapter_name] for each in named if adapter_name in each]
        drawn = bool(self.rank_dropout[adapter_name])  # another weight each time
        trained = any(parameter.requires_grad for parameter in parameters)
        if drawn or not trained or not _may_be_made_again(self, input, self.method):
            plain: Tensor = super()._get_delta_activations(  # type: ignore[misc]
                adapter_name, input, *args, **kwargs
            )
            return plain

        scale = self.scaling[adapter_name]

        def make() -> Tensor:
            # Whoever scales the adapter after the forward pass means later ones.
            present, self.scaling[adapter_name] = self.scaling[adapter_name], scale
            try:
                weight: Tensor = self.get_delta_weight(adapter_name)  # type: ignore[operator]
            finally:
                self.scaling[adapter_name] = present
            return weight

        with torch.no_grad():
            weight = make()
        x = self._cast_input_dtype(input, weight.dtype)
        return made.product(x, weight, make, parameters, made.LINEAR, method=self.method)


class MadeRotation(nn.Module):
    """x R with orthogonal blocks R made of skew-symmetric ones; keeps those and a pack of x."""

    method: Quantiser
    weight: Tensor
    coft: bool
    block_share: bool
    block_size: int
    in_features: int
    use_cayley_neumann: bool
    num_cayley_neumann_terms: int

    def _blocks(self) -> Tensor:
        settings = (self.block_size, self.use_cayley_neumann, self.num_cayley_neumann_terms)
        blocks: Tensor = self._cayley_batch(self.weight, *settings)  # type: ignore[operator]
        if self.block_share:
            blocks = blocks.repeat(self.in_features // self.block_size, 1, 1)
        return blocks

    def forward(self, x: Tensor) -> Tensor:
        fits = x.dim() != 4 and not self.coft and x.dtype == self.weight.dtype
        if not (fits and self.weight.requires_grad and _may_be_made_again(self, x, self.method)):
            plain: Tensor = super().forward(x)
            return plain
        with torch.no_grad():
            blocks = self._blocks()
        products = made.blocks_of(blocks.shape[0])
        return made.product(x, blocks, self._blocks, [self.weight], products, method=self.method)


# --- The rules.


@knows
@once_a_class
def _form(kind: type[nn.Module]) -> type[nn.Module] | None:
    if is_copy(vars(kind).get("_get_delta_activations"), _delta):
        return MadeDelta
    return MadeRotation if is_copy(vars(kind).get("forward"), _rotation) else None
