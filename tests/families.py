"""Small models of many families of other packages, and a batch for each, to see what a conversion
makes of them. `python -m tools.models` makes docs/models.md of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WIDTH, HEADS, TOKENS, ROWS, WORDS = 64, 2, 64, 2, 128

# Sizes by the names that configurations of transformers have for them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim"), 2 * WIDTH),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 2 * WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 1),
    **dict.fromkeys(("head_dim", "d_kv"), WIDTH // HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 2 * TOKENS),
    "num_experts_per_tok": 2,
    "vocab_size": WORDS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "image_size": 32,
    "patch_size": 8,
    "use_cache": False,
}


class Family(NamedTuple):
    """How to make a small model, and the keywords that it is called with."""

    package: str
    make: Callable[[], tuple[nn.Module, dict[str, Any]]]


def _config(key: str, **own: Any) -> Any:
    """A configuration of transformers with our sizes, without dropout, and with its own values."""
    import transformers

    kind = transformers.CONFIG_MAPPING[key]
    values = {}
    for name, value in kind().to_dict().items():
        is_rate = isinstance(value, float) and any(part in name for part in ("drop", "_prob"))
        if name in _SIZES and not isinstance(value, list | dict):
            values[name] = _SIZES[name]
        elif is_rate:
            values[name] = 0.0
    config = kind(**{**values, **own})
    config.decoder_start_token_id = getattr(config, "decoder_start_token_id", None) or 0
    return config


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _words() -> Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(3, WORDS, (ROWS, TOKENS), generator=draws)


def _text(task: str, key: str, **own: Any) -> Family:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        import transformers

        config = _config(key, **own)
        model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
        return model, {"input_ids": _words(), "labels": _words()}

    return Family("transformers", make)


def _images(key: str, **own: Any) -> Family:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        import transformers

        config = _config(key, **own)
        model = transformers.AutoModelForImageClassification.from_config(config)
        return model, {"pixel_values": _numbers(ROWS, 3, 32, 32), "labels": torch.tensor([0, 1])}

    return Family("transformers", make)


def _sound(key: str) -> Family:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        import transformers

        config = _config(
            key, conv_dim=[WIDTH] * 2, conv_stride=[5, 4], conv_kernel=[10, 4],
            num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
            apply_spec_augment=False, ctc_zero_infinity=True,
        )  # fmt: skip
        model = transformers.AutoModelForCTC.from_config(config)
        return model, {"input_values": _numbers(ROWS, 1600), "labels": _words()[:, :8]}

    return Family("transformers", make)


def _whisper() -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    config = _config("whisper", max_source_positions=64, max_target_positions=TOKENS,
                     num_mel_bins=16)  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": _numbers(ROWS, 16, 128), "labels": _words()}


def _timm(name: str, **own: Any) -> Family:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        import timm

        model = timm.create_model(name, num_classes=10, **own)
        return model, {"x": _numbers(ROWS, 3, *model.default_cfg["input_size"][1:])}

    return Family("timm", make)


_STAGES = {"depths": [1, 1], "num_stages": 2, "hidden_sizes": [32, 64]}
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 32, "num_key_value_heads": HEADS, "head_dim": 16, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    # Language models.
    **{
        name: _text("CausalLM", name)
        for name in (
            "gpt2", "gpt_neox", "opt", "bloom", "llama", "qwen3", "gemma2", "phi3", "olmo2",
            "cohere", "starcoder2", "mixtral", "qwen3_moe",
        )
    },
    "falcon": _text("CausalLM", "falcon", num_kv_heads=1),
    "gpt_oss": _text(
        "CausalLM", "gpt_oss", layer_types=["sliding_attention", "full_attention"],
        rope_scaling=None,
    ),
    "deepseek_v3": _text("CausalLM", "deepseek_v3", **_LATENT),
    "mamba": _text("CausalLM", "mamba", state_size=4, time_step_rank=4),
    "mamba2": _text(
        "CausalLM", "mamba2", state_size=8, head_dim=32, num_heads=4, n_groups=1, chunk_size=32
    ),
    "rwkv": _text(
        "CausalLM", "rwkv", context_length=TOKENS, hidden_size=256, attention_hidden_size=256
    ),
    # Encoders, and encoders with decoders.
    **{
        name: _text("MaskedLM", name)
        for name in ("bert", "distilbert", "albert", "electra", "deberta", "fnet")
    },
    "modernbert": _text(
        "MaskedLM", "modernbert", local_attention=16, global_attn_every_n_layers=2,
        cls_token_id=1, sep_token_id=2,
    ),
    **{name: _text("Seq2SeqLM", name) for name in ("bart", "marian", "pegasus", "t5")},
    # Images.
    **{name: _images(name) for name in ("vit", "beit", "dinov2")},
    "swin": _images(
        "swin", embed_dim=32, depths=[1, 1], num_heads=[1, 2], window_size=4, patch_size=4
    ),
    "convnext": _images("convnext", patch_size=4, **_STAGES),
    "resnet": _images("resnet", embedding_size=32, layer_type="bottleneck", **_STAGES),
    "segformer": _images(
        "segformer", num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[32, 64],
        num_attention_heads=[1, 2], sr_ratios=[2, 1], patch_sizes=[4, 3], strides=[4, 2],
        mlp_ratios=[2, 2],
    ),
    "timm/vit": _timm("test_vit"),
    "timm/efficientnet": _timm("test_efficientnet"),
    "timm/convnext": _timm("test_convnext"),
    "timm/resnet": _timm("test_resnet"),
    # Sound.
    **{name: _sound(name) for name in ("wav2vec2", "hubert")},
    "whisper": Family("transformers", _whisper),
}  # fmt: skip
