"""IA3 and DoRA: outputs, or inputs, times a vector that is trained.

Its gradient needs what was scaled. Plain autograd keeps that in float32 beside what the next layer
keeps; here it is packed once, and what reads the product shares the pack.

Known are the codes of IA3's `Linear`, and of LoRA's `Linear` and `Linear4bit` with
`DoraLinearVariant`; with a dropout, around a layer of plain weights. Of a bias that is trained, of
several adapters at once and of adapters by sample DoRA is left to its own code.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn

from packlight._checks import is_plain, is_taken, refuse_second_derivative
from packlight._gradients import product
from packlight.calls import is_bare
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations.peft.adapters import Adapter, knows, trains
from packlight.integrations.peft.lora import LoraLayer
from packlight.layers.casts import to
from packlight.layers.product import note_scaled, scale, vector_gradient
from packlight.pack import Pack
from packlight.packing.layout import dense_stride
from packlight.quantiser import KEEPS, Quantiser, Restore, pack_input, worth_packing
from packlight.reading import reader
from packlight.selectors import kind_of

VARIANT_KWARG_KEYS: Any = getattr(lora_layer, "VARIANT_KWARG_KEYS", None)  # since peft 0.18

# --- The code that is known, as PEFT has it. Never run: `is_copy` compares with it.


def _ia3(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    dtype = previous_dtype = x.dtype
    if self.disable_adapters:
        if self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
    elif self.merged:
        result = self.base_layer(x, *args, **kwargs)
    else:
        ia3_scaling = 1
        for active_adapter in self.active_adapters:
            if active_adapter not in self.ia3_l.keys():  # noqa: SIM118
                continue
            dtype = self.ia3_l[active_adapter].dtype
            ia3_scaling *= self.ia3_l[active_adapter].flatten()

        if self.is_feedforward:
            x = x.to(dtype)
            # TODO: weight.dtype can be != self.ia3_l[self.active_adapters].dtype
            # e.g. bf16 vs fp32. Is that okay?
            interm = (x * ia3_scaling).to(previous_dtype)
            result = self.base_layer(interm, *args, **kwargs)
        else:
            result = self.base_layer(x, *args, **kwargs)
            result_dtype = result.dtype
            result = (result * ia3_scaling).to(result_dtype)

    return result


def _lora(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    self._check_forward_args(x, *args, **kwargs)
    adapter_names = kwargs.pop("adapter_names", None)
    variant_kwargs = {k: kwargs.pop(k, None) for k in VARIANT_KWARG_KEYS}

    if self.disable_adapters:
        if self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
    elif adapter_names is not None:
        result = self._mixed_batch_forward(
            x, *args, adapter_names=adapter_names, **variant_kwargs, **kwargs
        )
    elif self.merged:
        result = self.base_layer(x, *args, **kwargs)
    else:
        result = self.base_layer(x, *args, **kwargs)
        torch_result_dtype = result.dtype

        lora_A_keys = self.lora_A.keys()
        for active_adapter in self.active_adapters:
            if active_adapter not in lora_A_keys:
                continue

            lora_A = self.lora_A[active_adapter]
            lora_B = self.lora_B[active_adapter]
            dropout = self.lora_dropout[active_adapter]
            scaling = self.scaling[active_adapter]
            x = self._cast_input_dtype(x, lora_A.weight.dtype)
            if active_adapter not in self.lora_variant:
                result = result + lora_B(lora_A(dropout(x))) * scaling
            else:
                result = self.lora_variant[active_adapter].forward(
                    self,
                    active_adapter=active_adapter,
                    x=x,
                    result=result,
                    **variant_kwargs,
                    **kwargs,
                )

        result = result.to(torch_result_dtype)

    return result


def _lora_four_bits(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    self._check_forward_args(x, *args, **kwargs)
    adapter_names = kwargs.pop("adapter_names", None)
    variant_kwargs = {k: kwargs.pop(k, None) for k in VARIANT_KWARG_KEYS}

    if self.disable_adapters:
        if self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
    elif adapter_names is not None:
        result = self._mixed_batch_forward(
            x, *args, adapter_names=adapter_names, **variant_kwargs, **kwargs
        )
    elif self.merged:
        result = self.base_layer(x, *args, **kwargs)
    else:
        result = self.base_layer(x, *args, **kwargs)
        result = result.clone()

        for active_adapter in self.active_adapters:
            if active_adapter not in self.lora_A.keys():  # noqa: SIM118
                continue
            lora_A = self.lora_A[active_adapter]
            lora_B = self.lora_B[active_adapter]
            dropout = self.lora_dropout[active_adapter]
            scaling = self.scaling[active_adapter]

            requires_conversion = not torch.is_autocast_enabled()
            if requires_conversion:
                expected_dtype = result.dtype
                x = self._cast_input_dtype(x, lora_A.weight.dtype)

            if active_adapter not in self.lora_variant:
                output = lora_B(lora_A(dropout(x))) * scaling
                if requires_conversion:
                    output = output.to(expected_dtype)
                result = result + output
            else:
                result = self.lora_variant[active_adapter].forward(
                    self,
                    active_adapter=active_adapter,
                    x=x,
                    result=result,
                    **variant_kwargs,
                    **kwargs,
                )
                if requires_conversion:
                    result = result.to(expected_dtype)

    return result


def _dora_variant(module: Any, active_adapter: Any, x: Any, result: Any, **kwargs: Any) -> Any:
    lora_A = module.lora_A[active_adapter]
    lora_B = module.lora_B[active_adapter]
    dropout = module.lora_dropout[active_adapter]
    scaling = module.scaling[active_adapter]

    if isinstance(dropout, nn.Identity) or not module.training:
        base_result = result
    else:
        x = dropout(x)
        base_result = None

    result = result + module.lora_magnitude_vector[active_adapter](
        x,
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=scaling,
        base_layer=module.get_base_layer(),
        base_result=base_result,
        adapter_name=active_adapter,
    )
    return result  # noqa: RET504  as it is there


# fmt: off
def _dora(self: Any, x: Any, *, lora_A: Any, lora_B: Any, scaling: Any, base_layer: Any,
          base_result: Any = None, adapter_name: Any = "default") -> Any:
    lora_weight = self.get_lora_weight(lora_A=lora_A, lora_B=lora_B, adapter_name=adapter_name)
    lora_weight = lora_weight.to(x.dtype)

    magnitude = self.weight
    weight: Any = dequantize_module_weight(base_layer)
    weight = weight.to(x.dtype)
    weight_norm = self.get_weight_norm(
        weight=weight, lora_weight=lora_weight.detach(), scaling=scaling, adapter_name=adapter_name
    )
    weight_norm = weight_norm.detach()
    mag_norm_scale = (magnitude / weight_norm).view(1, -1)

    lora_result = lora_B(lora_A(x))

    bias = None
    if base_result is not None:
        bias = base_layer.bias
        if bias is not None:
            base_result = base_result - bias
    else:
        base_result = F.linear(x, transpose(weight, self.fan_in_fan_out))

    result_dora = (mag_norm_scale - 1) * base_result + mag_norm_scale * lora_result * scaling
    return result_dora  # noqa: RET504  as it is there
# fmt: on


# --- IA3.


class ScaledLayer(Adapter):
    """f(x) l, or f(x l) of a feed-forward layer; keeps a pack of what is scaled."""

    method: Quantiser
    ia3_l: nn.ParameterDict
    base_layer: nn.Module
    active_adapters: list[str]
    is_feedforward: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        vectors = [self.ia3_l[name] for name in self.active_adapters if name in self.ia3_l]
        trained = any(vector.requires_grad for vector in vectors)
        if not (trained and trains(self) and is_taken(x) and worth_packing(x, self.method)):
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        vector: Tensor = vectors[0].flatten()
        for other in vectors[1:]:
            vector = vector * other.flatten()
        if self.is_feedforward:
            scaled = scale(to(x, vectors[-1].dtype), vector, method=self.method)
            result: Tensor = self.base_layer(to(scaled, x.dtype), *args, **kwargs)
            return result
        result = self.base_layer(x, *args, **kwargs)
        return to(scale(result, vector, method=self.method), result.dtype)


# --- DoRA.


class _Dora(torch.autograd.Function):
    """y = m (r - b + s l) + b for the layer's result r and LoRA's l, with a pack of r - b + s l.

    In the order of PEFT's own operations: r + ((m - 1) (r - b) + m l s).
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        lora: Tensor,
        magnitude: Tensor,
        values: Tensor,
        bias: Tensor | None,
        scaling: float,
        method: Quantiser,
    ) -> tuple[Tensor, ...]:
        """`values` is the magnitude without its history."""
        base = result if bias is None else result - bias
        scaled = base + lora * scaling
        kept = method.pack(scaled, method.seed(scaled))
        rebuild = Restore(method, tuple(scaled.shape), dense_stride(scaled))
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, *kept, bias)
        ctx.settings = (rebuild, scaling, result.dtype, lora.dtype)
        y = result + ((magnitude - 1) * base + magnitude * lora * scaling)
        return y, *kept

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        if grad_output is None:
            return (None,) * 7
        magnitude, *tensors, _bias = ctx.saved_tensors
        rebuild, scaling, dtype, lora_dtype = ctx.settings
        scaled = grad_output * magnitude
        dlora = (scaled * scaling).to(lora_dtype) if ctx.needs_input_grad[1] else None
        dmagnitude = None
        if ctx.needs_input_grad[2]:
            x = rebuild(grad_output.dtype, *tensors)
            dmagnitude = vector_gradient(grad_output, x, magnitude)
        return scaled.to(dtype), dlora, dmagnitude, *[None] * 4


_dora_result: Callable[..., tuple[Tensor, ...]] = _Dora.apply


class _DroppedDora(torch.autograd.Function):
    """y = r + (m - 1) W d + m s B A d for the layer's result r, d a dropout's; keeps a pack of d.

    LoRA's matrix A keeps that pack too. The magnitude's gradient comes of it by one product more,
    dm_o = sum_i (g^T d)_oi (W + s B A)_oi, where what m scales would be a tensor more to keep.
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        dropped: Tensor,
        lora: Tensor,
        magnitude: Tensor,
        values: Tensor,
        scaling: float,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor,  # W, A and B, and the pack of d
    ) -> Tensor:
        """`values` is the magnitude without its history."""
        base = F.linear(dropped, tensors[0].to(dropped.dtype))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, *tensors)
        ctx.settings = (rebuild, scaling, base.dtype, result.dtype, dropped.dtype, lora.dtype)
        return result + ((magnitude - 1) * base + magnitude * lora * scaling)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> Any:
        refuse_second_derivative(KEEPS)
        values, weight, first, second, *tensors = ctx.saved_tensors
        rebuild, scaling, base_dtype, dtype, dropped_dtype, lora_dtype = ctx.settings
        unused = [None] * (6 + len(tensors))
        if grad_output is None:
            return None, None, None, None, *unused
        needs = ctx.needs_input_grad
        shape = grad_output.shape
        rows = grad_output.reshape(-1, shape[-1])
        ddropped = dlora = dmagnitude = None
        if needs[3]:
            x = rebuild(base_dtype, *tensors).reshape(-1, weight.shape[1])
            outer = product(rows.to(base_dtype).t(), x, torch.float32)
            matrix = torch.addmm(weight.float(), second.float(), first.float(), alpha=scaling)
            dmagnitude = matrix.mul_(outer).sum(1).view_as(values).to(values.dtype)
        if needs[2]:
            dlora = (grad_output * values * scaling).to(lora_dtype)
        if needs[1]:
            of_base = (rows * (values - 1)).to(base_dtype)
            ddropped = product(of_base, weight.to(base_dtype), dropped_dtype)
            ddropped = ddropped.view(*shape[:-1], -1)
        return grad_output.to(dtype), ddropped, dlora, dmagnitude, *unused


_dropped_dora: Callable[..., Tensor] = _DroppedDora.apply


class DoraLayer(LoraLayer):
    """LoRA's layer, with DoRA's magnitude; keeps a pack of what the magnitude scales.

    With a dropout it keeps a pack of what that gives.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if kwargs.get("adapter_names") else self._alone()
        fits = name is not None and trains(self) and is_taken(x) and worth_packing(x, self.method)
        if not fits or torch.compiler.is_compiling():
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        lora: Any = self
        first, second, scaling = lora.lora_A[name], lora.lora_B[name], lora.scaling[name]
        layer, base = lora.lora_magnitude_vector[name], lora.get_base_layer()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        x = self._cast_input_dtype(x, first.weight.dtype)
        with torch.no_grad():  # the norm is a constant
            matrix = layer.get_lora_weight(lora_A=first, lora_B=second, adapter_name=name)
            norm = layer.get_weight_norm(
                weight=dequantize_module_weight(base).to(x.dtype),
                lora_weight=matrix.to(x.dtype),
                scaling=scaling,
                adapter_name=name,
            )
        magnitude = (layer.weight / norm).view(1, -1)
        values = magnitude.detach()
        if not isinstance(dropout := lora.lora_dropout[name], nn.Identity):
            dropped = dropout(x)
            low = second(first(dropped))
            kept = pack_input(dropped, self.method)
            factors = (magnitude, values, scaling, reader(kept.reading, kept.rebuild))
            weights = (base.weight, first.weight, second.weight)
            y = _dropped_dora(result, dropped, low, *factors, *weights, *kept.tensors)
            return to(y, result.dtype)
        settings = (base.bias, scaling, self.method)
        y, *tensors = _dora_result(result, second(first(x)), magnitude, values, *settings)
        rebuild = Restore(self.method, tuple(y.shape), dense_stride(y))
        pack = Pack(rebuild, tuple(y.shape), tuple(tensors), self.method.grade)
        note_scaled(y, pack, values, base.bias)
        return to(y, result.dtype)

    def _alone(self) -> str | None:
        """The adapter at work, if it is one, of DoRA, whose code is known, without a trained bias.

        With a dropout, if weights are plain ones, that of the layer does not train, and no matrix
        of LoRA has a bias.
        """
        lora: Any = self
        names = [name for name in self.active_adapters if name in lora.lora_A]
        if len(names) != 1 or type(lora.lora_variant.get(names[0])) is not DoraLinearVariant:
            return None
        base, (name,) = lora.get_base_layer(), names
        layer, dropout = lora.lora_magnitude_vector[name], lora.lora_dropout[name]
        fits = (
            is_bare(layer, dropout)
            and (base.bias is None or not base.bias.requires_grad)
            and is_copy(vars(kind_of(layer)).get("forward"), _dora)
        )
        if fits and not isinstance(dropout, nn.Identity):
            matrices = lora.lora_A[name], lora.lora_B[name]
            fits = (
                not layer.fan_in_fan_out
                and not base.weight.requires_grad
                and all(kind_of(each) is nn.Linear for each in (base, *matrices))
                and all(is_plain(each.weight) for each in (base, *matrices))
                and all(each.bias is None for each in matrices)
            )
        return name if fits else None


class FourBitLayer(DoraLayer):
    """The same around a layer of 4 bits, where PEFT rounds what an adapter adds before the sum."""

    rounds = True


# --- The rules.


@knows
@once_a_class
def _form(kind: type[nn.Module]) -> type[nn.Module] | None:
    forward = vars(kind).get("forward")
    if is_copy(forward, _ia3):
        return ScaledLayer
    if not is_copy(DoraLinearVariant.forward, _dora_variant):
        return None
    if is_copy(forward, _lora_four_bits):
        return FourBitLayer
    return DoraLayer if is_copy(forward, _lora) else None
