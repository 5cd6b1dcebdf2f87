"""Models as people fine-tune them: with adapters, on weights of 4 bits."""

from typing import Any

import torch
from torch import Tensor, nn

from packlight.errors import InputError, MissingDependencyError
from packlight.head.modules import heads_of

_BLOCK = 64  # weights to a scale of float32


class FourBits(nn.Linear):
    """A Linear with frozen weights of 4 bits, as bitsandbytes has it, for what it holds.

    Forward and backward pass each make the weight in 16 bits and let it go. Values are not those of
    any weight.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        count = linear.weight.numel()
        packed = linear.weight.new_empty((count + 1) // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer(
            "absmax", linear.weight.new_empty(-(-count // _BLOCK), dtype=torch.float32)
        )
        self.bias = linear.bias
        self.compute_dtype = linear.weight.dtype

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input.to(self.compute_dtype), self
        )
        bias: Tensor | None = self.bias
        return product if bias is None else product + bias

    def dequantized(self) -> Tensor:
        return self.weight.new_empty(self.out_features, self.in_features, dtype=self.compute_dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FourBits) -> Tensor:
        ctx.layer = layer
        return x @ layer.dequantized().t()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return grad_output @ ctx.layer.dequantized(), None


def in_4_bits(model: nn.Module) -> None:
    """Has all Linears of a model but its heads hold 4 bits a weight."""
    heads = {id(head) for head in heads_of(model)}
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and id(layer) not in heads:
                setattr(parent, name, FourBits(layer))
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def with_lora(model: nn.Module, settings: dict[str, str]) -> nn.Module:
    """The model with adapters by PEFT: `r`, `alpha`, `dropout`, and `targets`, which are names with
    plus signs between them, or "all-linear".
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            "adapters are those of PEFT; install it with: pip install peft"
        ) from error
    if unknown := set(settings) - {"r", "alpha", "dropout", "targets"}:
        raise InputError(
            f"--lora has no {', '.join(sorted(unknown))}; expected r=16,targets=all-linear,alpha=32"
        )
    targets = settings.get("targets", "all-linear")
    try:
        rank = int(settings.get("r", 16))
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=int(settings.get("alpha", 2 * rank)),
            lora_dropout=float(settings.get("dropout", 0.0)),
            target_modules=targets if targets == "all-linear" else targets.split("+"),
        )
        with torch.device("meta"):
            adapted: nn.Module = peft.get_peft_model(model, config)
    except ValueError as error:
        given = ",".join(f"{name}={value}" for name, value in settings.items())
        raise InputError(f"--lora {given}: {error}") from error
    return adapted.train()
