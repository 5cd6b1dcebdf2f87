"""Models of transformers, PEFT and timm at random weights, with head, loss and a batch."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight.planner.adapted import in_4_bits

Loss = Callable[[nn.Module], Tensor]  # of the model, or of what a compiler made of it


class Size(NamedTuple):
    """How much a step sees: sequences of tokens, or images, whose length is nothing."""

    batch: int
    length: int
    tiny: bool = False

    @property
    def items(self) -> int:
        return self.batch * (self.length or 1)


class Scenario(NamedTuple):
    """Something to train; made on the default device, by the default generator."""

    title: str
    model: Callable[[Size], nn.Module]
    batch: Callable[[Size], Loss]  # the loss of a batch of random data
    size: Size
    gib: float  # more than the eager step takes of a GPU
    autocast: bool = True
    # "transformers"; "head": logits over a vocabulary; "liger": a model that Liger-Kernel knows;
    # "long": takes sequences of any length.
    kinds: frozenset[str] = frozenset()
    # By what share a norm of gradients may differ from eager's. A method at 4 bits errs by 0.15 of
    # a gradient, at random, so its norm grows by one percent; the rest is rounding in 16 bits.
    tolerance: float = 0.1
    needs: tuple[str, ...] = ()  # packages

    @property
    def unit(self) -> str:
        return "tokens" if self.size.length else "images"

    @property
    def tiny(self) -> "Scenario":
        """Of the same kind, for a CPU in a second."""
        size = Size(min(self.size.batch, 4), min(self.size.length, 32), tiny=True)
        return self._replace(size=size, gib=0.0)


def _tokens(size: Size, vocabulary: int) -> Tensor:
    return torch.randint(5, 256 if size.tiny else vocabulary, (size.batch, size.length))


def text(size: Size, vocabulary: int) -> Loss:
    ids = _tokens(size, vocabulary)
    return lambda model: model(input_ids=ids, labels=ids).loss


_TINY = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256, "hidden_size": 64}


def _llama(size: Size, **shape: int) -> nn.Module:
    import transformers

    if size.tiny:
        shape |= {**_TINY, "num_key_value_heads": 2, "intermediate_size": 128}
    # As a Trainer has it: no cache of keys and values.
    config = transformers.LlamaConfig(**shape, max_position_embeddings=131072, use_cache=False)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def llama(size: Size) -> nn.Module:
    return _llama(
        size,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
    )


def lora(size: Size, bits: int = 16) -> nn.Module:
    import peft

    model = _llama(
        size,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    if bits < 16:
        _BASES[bits](model)
    # Both halves of an adapter at random: of a half that is zero the other has no gradient.
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


def _in_4_bits(model: Any) -> None:
    """NormalFloat weights of bitsandbytes in all Linears but the head, as QLoRA has them."""
    if model.lm_head.weight.is_meta:  # for a plan, of what such layers hold
        in_4_bits(model)
        return
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and name != "lm_head":
                twin = bnb.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                    device="meta",
                )
                weight = layer.weight.detach()
                packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
                twin.weight = packed.to(weight.device)
                setattr(parent, name, twin)
    model.is_loaded_in_4bit = True


def _in_8_bits(model: nn.Module) -> None:
    """Weights of torchao in 8 bits, a scale a row, which each pass decodes."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def is_inner(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name != "lm_head"

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_inner)


_BASES = {4: _in_4_bits, 8: _in_8_bits}
_PACKAGES = {4: ("bitsandbytes",), 8: ("torchao",)}


def roberta(size: Size) -> nn.Module:
    import transformers

    shape = {"vocab_size": 50265, **(_TINY | {"intermediate_size": 128} if size.tiny else {})}
    config = transformers.RobertaConfig(
        **shape, max_position_embeddings=514, type_vocab_size=1, num_labels=2
    )
    return transformers.RobertaForSequenceClassification(config)


def classified_text(size: Size) -> Loss:
    ids, labels = _tokens(size, 50265), torch.randint(0, 2, (size.batch,))
    mask = torch.ones_like(ids)
    return lambda model: model(input_ids=ids, attention_mask=mask, labels=labels).loss


def gpt2(size: Size) -> nn.Module:
    import transformers

    shape = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
    if size.tiny:
        shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, use_cache=False))


def vit(size: Size) -> nn.Module:
    import timm

    if size.tiny:
        return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    return timm.create_model("vit_base_patch16_224")


def resnet(size: Size) -> nn.Module:
    import timm

    model = timm.create_model("resnet26" if size.tiny else "resnet50")
    return model.to(memory_format=torch.channels_last)


def images(size: Size, memory_format: torch.memory_format = torch.contiguous_format) -> Loss:
    pixels = 64 if size.tiny else 224
    x = torch.randn(size.batch, 3, pixels, pixels).to(memory_format=memory_format)
    y = torch.randint(0, 1000, (size.batch,))
    return lambda model: F.cross_entropy(model(x), y)


def dit(size: Size) -> nn.Module:
    from benchmarks.user.dit import DiT

    return DiT(64, 2, 4) if size.tiny else DiT(1152, 28, 16)


def noisy_latents(size: Size) -> Loss:
    x, noise = torch.randn(2, size.batch, 4, 32, 32)
    time, label = torch.rand(size.batch), torch.randint(0, 1000, (size.batch,))
    return lambda model: F.mse_loss(model(x, time, label).float(), noise)


_LANGUAGE = frozenset({"transformers", "head"})
_LLAMA = _LANGUAGE | {"liger", "long"}


def _lora(length: int, gib: float, bits: int = 16) -> Scenario:
    base = f", {bits}-bit base" if bits < 16 else ""
    return Scenario(
        f"Llama-8B shape{base}, LoRA r=16, 1 x {length}",
        functools.partial(lora, bits=bits),
        functools.partial(text, vocabulary=128256),
        Size(1, length),
        gib,
        autocast=False,
        kinds=_LLAMA,
        needs=("peft", *_PACKAGES.get(bits, ())),
    )


def _roberta(batch: int, gib: float) -> Scenario:
    title, kinds = f"RoBERTa-base classifier, {batch} x 128", frozenset({"transformers"})
    return Scenario(title, roberta, classified_text, Size(batch, 128), gib, kinds=kinds)


SCENARIOS = {
    "llama1b": Scenario(
        "Llama 1.1B, all weights, 4 x 2048",
        llama,
        functools.partial(text, vocabulary=32000),
        Size(4, 2048),
        28,
        autocast=False,
        kinds=_LLAMA,
    ),
    "lora8b-4k": _lora(4096, 62),
    "lora8b-8k": _lora(8192, 105),
    "lora8b-32k": _lora(32768, 140),
    "lora8b-110k": _lora(112640, 140),
    "lora8b-4bit-4k": _lora(4096, 55, bits=4),
    "lora8b-4bit-8k": _lora(8192, 100, bits=4),
    "lora8b-4bit-32k": _lora(32000, 30, bits=4),
    "lora8b-8bit-4k": _lora(4096, 58, bits=8),
    "roberta-32": _roberta(32, 5),
    "roberta-128": _roberta(128, 10),
    "gpt2m": Scenario(
        "GPT-2 medium, 8 x 1024",
        gpt2,
        functools.partial(text, vocabulary=50257),
        Size(8, 1024),
        40,
        kinds=_LANGUAGE,
    ),
    "vitb": Scenario("ViT-B/16, 128 images", vit, images, Size(128, 0), 12, needs=("timm",)),
    # A deep batch-normalised network at random weights magnifies rounding.
    "resnet50": Scenario(
        "ResNet-50, 128 images",
        resnet,
        functools.partial(images, memory_format=torch.channels_last),
        Size(128, 0),
        8,
        tolerance=0.3,
        needs=("timm",),
    ),
    "dit": Scenario("DiT-XL/2, 64 latents of 32 x 32", dit, noisy_latents, Size(64, 0), 60),
}


def missing(scenario: Scenario) -> list[str]:
    """Packages that a scenario needs and that are not here."""
    return [name for name in scenario.needs if importlib.util.find_spec(name) is None]
