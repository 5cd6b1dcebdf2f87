"""Small models of transformers with random weights, and batches for them."""

import copy

import torch
import transformers
from torch import Tensor, nn

BATCH, LENGTH, WIDTH, VOCABULARY = 4, 32, 64, 128

_SIZES = {
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DECODER = {**_SIZES, "intermediate_size": 160, "num_key_value_heads": 2, "use_cache": False}
_ENCODER = {**_SIZES, "intermediate_size": 256, "hidden_dropout_prob": 0.0}

NAMES = (
    "bert", "roberta", "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "t5", "vit",
)  # fmt: skip


def make(name: str, **changes: object) -> nn.Module:
    """A model in training, without dropout, whose attention is "sdpa" as it is by default."""
    torch.manual_seed(0)
    model = _MAKERS[name](changes)
    assert model.config._attn_implementation == "sdpa"
    return model.train()


def _encoder(kind: str):
    def build(changes: dict[str, object]) -> nn.Module:
        config = getattr(transformers, f"{kind}Config")
        sizes = {**_ENCODER, "attention_probs_dropout_prob": 0.0, **changes}
        return getattr(transformers, f"{kind}ForSequenceClassification")(config(**sizes))

    return build


def _decoder(kind: str, **own: object):
    def build(changes: dict[str, object]) -> nn.Module:
        config = getattr(transformers, f"{kind}Config")
        return getattr(transformers, f"{kind}ForCausalLM")(config(**{**_DECODER, **own, **changes}))

    return build


def _gpt2(changes: dict[str, object]) -> nn.Module:
    sizes = {
        "n_embd": WIDTH, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": VOCABULARY,
        "bos_token_id": 1, "eos_token_id": 2, "use_cache": False, "attn_pdrop": 0.0,
        "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **changes}))
    # Which transformers does not infer from its name; the warning breaks a compiled graph.
    model.loss_type = "ForCausalLM"
    return model


def _t5(changes: dict[str, object]) -> nn.Module:
    sizes = {
        "d_model": WIDTH, "d_kv": 16, "d_ff": 160, "num_layers": 2, "num_heads": 4,
        "vocab_size": VOCABULARY, "feed_forward_proj": "gated-silu", "dropout_rate": 0.0,
        "decoder_start_token_id": 0, "use_cache": False, "pad_token_id": 0,
    }  # fmt: skip
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**{**sizes, **changes}))


def _vit(changes: dict[str, object]) -> nn.Module:
    sizes = {
        "hidden_size": WIDTH, "num_attention_heads": 4, "num_hidden_layers": 2,
        "intermediate_size": 256, "image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return transformers.ViTForImageClassification(transformers.ViTConfig(**{**sizes, **changes}))


_MAKERS = {
    "bert": _encoder("Bert"),
    "roberta": _encoder("Roberta"),
    "gpt2": _gpt2,
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral"),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", head_dim=32),
    "gemma": _decoder("Gemma", head_dim=16),
    "phi3": _decoder("Phi3"),
    # The experts by one product of all: the other ways look at how many tokens each gets.
    "mixtral": _decoder("Mixtral", num_local_experts=4, experts_implementation="batched_mm"),
    "t5": _t5,
    "vit": _vit,
}


def batch(name: str, padded: bool = False) -> dict[str, Tensor]:
    """Inputs and labels; `padded` masks the tail of every sequence but the first."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        images = torch.randn(BATCH, 3, 32, 32, generator=generator)
        return {"pixel_values": images, "labels": torch.tensor([0, 1, 0, 1])}
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels = torch.tensor([0, 1, 0, 1]) if name in ("bert", "roberta") else ids
    inputs = {"input_ids": ids, "labels": labels}
    if padded:
        lengths = torch.tensor([LENGTH, 20, 11, 27])
        inputs["attention_mask"] = (torch.arange(LENGTH) < lengths[:, None]).long()
    return inputs


def step(model: nn.Module, inputs: dict[str, Tensor], seed: int = 2):
    """The output, and the gradients by name, of one training step."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return output, gradients


def worst_error(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient.

    One whose norm is below a thousandth of that of all together counts relative to that: the
    gradient of a key's bias is zero but for rounding.
    """
    assert ours.keys() == plain.keys()
    floor = 1e-3 * sum(gradient.double().square().sum() for gradient in plain.values()).sqrt()
    errors = [
        (ours[name].double() - plain[name].double()).norm()
        / torch.maximum(plain[name].double().norm(), floor)
        for name in plain
    ]
    return torch.stack(errors).max().item()


def copy_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
