"""What only runs its parts together counts as converted where its parts are, and not else."""

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import packlight
from packlight import CannotConvertError, Checkpoint, FixedPoint, GroupQuant, Method

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 64,
}  # fmt: skip
CLIP = {**SMALL, "projection_dim": 32}
RESNET = {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 16}


def llama() -> nn.Module:
    return transformers.LlamaModel(transformers.LlamaConfig(**SMALL))


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=2)


MODELS = {
    "LlamaDecoderLayer": llama,
    "BertLayer": bert,
    "BertAttention": bert,
    "BertIntermediate": bert,
    "BertOutput": bert,
    "BertSelfOutput": bert,
    "CLIPMLP": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
    "Block": vit,
    "Mlp": vit,
    "Attention": vit,
    "BasicBlock": torchvision.models.resnet18,
    "Bottleneck": lambda: timm.create_model("resnet26"),
    "ResNetBasicLayer": lambda: transformers.ResNetModel(
        transformers.ResNetConfig(**RESNET, layer_type="basic")
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_block_alone_is_not_converted(kind: str) -> None:
    with torch.device("meta"):
        model = MODELS[kind]().train()
    residual = kind in ("BasicBlock", "Bottleneck", "ResNetBasicLayer")
    method: Method = FixedPoint(bits=4) if residual else GroupQuant(bits=4)
    before = [type(module) for module in model.modules()]
    with pytest.raises(CannotConvertError, match="it keeps nothing itself, and"):
        packlight.convert(model, {kind: method}, functional=False)
    assert before == [type(module) for module in model.modules()]

    conversion = packlight.convert(model, {kind: method}, strict=True, functional=True)
    assert not conversion.replaced
    assert {row.kind for row in conversion.skipped if "nothing itself" in row.reason} == {kind}
    printed = " ".join(str(conversion).split())
    assert "Checkpoint() and Offload() are methods of a whole block" in printed
    packlight.revert(model)

    for choice in ({kind: method, "*": packlight.DEFAULT_METHODS}, packlight.DEFAULT_METHODS):
        conversion = packlight.convert(model, choice)
        assert kind in {row.kind for row in conversion.replaced}
        assert not [row for row in conversion.skipped if "nothing itself" in row.reason]
        packlight.revert(model)


def test_parts_that_an_earlier_call_converted_count() -> None:
    model = llama()
    packlight.convert(model, {"LlamaRMSNorm": GroupQuant(bits=4)})
    conversion = packlight.convert(model, {"LlamaDecoderLayer": GroupQuant(bits=4)})
    assert {row.kind for row in conversion.replaced} == {"LlamaDecoderLayer"}


def test_a_whole_block_takes_a_checkpoint() -> None:
    conversion = packlight.convert(llama(), {"LlamaDecoderLayer": Checkpoint()})
    assert {row.kind for row in conversion.replaced} == {"LlamaDecoderLayer"}
