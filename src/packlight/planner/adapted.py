"""Models as people fine-tune them: with adapters, on weights of 4 bits."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from packlight._checks import autocasts
from packlight.errors import InputError
from packlight.groupquant.modules import Linear
from packlight.head.modules import heads_of
from packlight.low_rank.functional import adapted
from packlight.quantiser import pack_input, worth_packing
from packlight.reading import reader

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

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        shape, dtype = (self.out_features, self.in_features), dtype or self.compute_dtype
        return self.weight.new_full(shape, 0, dtype=dtype)  # written, as decoding does


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


class Adapted(nn.Module):
    """A frozen layer and an adapter of a low rank, as PEFT has it, for what it holds and keeps.

    y = f(x) + s B A dropout(x),   A [r, in] and B [out, r] trained, in float32 as PEFT has them
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: int, dropout: float) -> None:
        super().__init__()
        given: Any = {"bias": False, "device": layer.weight.device, "dtype": torch.float32}
        self.base_layer = layer
        self.lora_A = nn.Linear(layer.in_features, rank, **given)
        self.lora_B = nn.Linear(rank, layer.out_features, **given)
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        if self._is_one_function(x):
            return self._at_once(x)
        y: Tensor = self.base_layer(x)
        low = self.lora_A(self.lora_dropout(x.float()))
        both: Tensor = y + self.lora_B(low) * self.scaling
        return both.to(y.dtype)

    def _is_one_function(self, x: Tensor) -> bool:
        """Whether a converted layer of PEFT runs as one (`integrations/peft/lora.py`)."""
        packs = isinstance(self.lora_A, Linear) and worth_packing(x, self.lora_A.method)
        is_plain = type(self.lora_dropout) is nn.Identity and not autocasts(x.device.type)
        return packs and is_plain and self.training

    def _at_once(self, x: Tensor) -> Tensor:
        first: Any = self.lora_A
        base, second = self.base_layer, self.lora_B
        kept = pack_input(x, first.method)
        has_4_bits = isinstance(base, FourBits)
        layers = (None, None, base) if has_4_bits else (base.weight, base.bias, None)
        rebuild, decoded = reader(kept.reading, kept.rebuild), FourBits.dequantized
        factors = (x, first.weight, second.weight)
        return adapted(*factors, *layers, decoded, self.scaling, rebuild, *kept.tensors)


class Settings(NamedTuple):
    """Of adapters; `targets` are names of layers, and nothing means all Linears but heads."""

    rank: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]


def lora_settings(given: Mapping[str, str]) -> Settings:
    """By `r`, `alpha`, `dropout`, and `targets`: names with plus signs between, or "all-linear"."""
    if unknown := set(given) - {"r", "alpha", "dropout", "targets"}:
        raise InputError(
            f"--lora has no {', '.join(sorted(unknown))}; expected r=16,targets=all-linear,alpha=32"
        )
    text = ",".join(f"{name}={value}" for name, value in given.items())
    targets = given.get("targets", "all-linear")
    try:
        rank = int(given.get("r", 16))
        alpha, dropout = int(given.get("alpha", 2 * rank)), float(given.get("dropout", 0.0))
    except ValueError as error:
        raise InputError(
            f"--lora {text}: r and alpha are whole numbers, and dropout is a number"
        ) from error
    if rank < 1 or not 0 <= dropout < 1:
        raise InputError(f"--lora {text}: r is at least 1, and dropout from 0 up to 1")
    names = () if targets == "all-linear" else tuple(targets.split("+"))
    return Settings(rank, alpha, dropout, names)


def with_lora(model: nn.Module, settings: Settings, device: str = "meta") -> nn.Module:
    """The model with adapters: PEFT's, as they are trained, or where there is no PEFT `Adapted`."""
    try:
        import peft
    except ImportError:
        return _adapted(model, settings)
    rank, alpha, dropout, targets = settings
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets) or "all-linear",
    )
    try:
        with torch.device(device):
            adapted: nn.Module = peft.get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"--lora targets={'+'.join(targets)}: {error}") from error
    return adapted.train()


def _adapted(model: nn.Module, settings: Settings) -> nn.Module:
    heads = {id(head) for head in heads_of(model)}
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
        and (name in settings.targets if settings.targets else id(layer) not in heads)
    ]
    if not found:
        raise InputError(f"--lora targets={'+'.join(settings.targets)}: no Linear has such a name")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parent, name, layer in found:
        setattr(parent, name, Adapted(layer, settings.rank, settings.alpha, settings.dropout))
    return model.train()
