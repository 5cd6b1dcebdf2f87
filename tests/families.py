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

    def started(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model in training, as if it had trained for a while, and its batch."""
        torch.manual_seed(0)
        model, batch = self.make()
        awaken(model)
        return model.train(), batch


def awaken(model: nn.Module) -> None:
    """Gives what begins as nothing a value, and has nothing drawn anew in each pass.

    No gradient goes behind a gain of 0, or a LayerScale of 1e-6, and the error of none is 0.
    """
    draws = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if name.endswith("bias") or values.abs().max() > 0.02 or values.max() > values.min():
            continue
        is_gain = sum(size > 1 for size in values.shape) < 2
        values.fill_(0.5) if is_gain else values.normal_(std=0.02, generator=draws)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


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


def _timm(name: str) -> Family:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        import timm

        model = timm.create_model(name, num_classes=10)
        return model, {"x": _numbers(ROWS, 3, *model.default_cfg["input_size"][1:])}

    return Family("timm", make)


def _diffusers(kind: str, batch: dict[str, Any], **sizes: Any) -> Family:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        import diffusers

        return getattr(diffusers, kind)(**sizes), batch

    return Family("diffusers", make)


_HEADS_OF_32 = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS}
_LATENTS = {**_HEADS_OF_32, "in_channels": 4, "num_layers": 2, "sample_size": 16, "patch_size": 2}
_DOWN = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 32,
    "attention_head_dim": 8,
}  # fmt: skip

_TIMES = {"timestep": torch.tensor([7, 500])}
_TEXT = {"encoder_hidden_states": _numbers(ROWS, 16, 32)}
_IMAGE = _numbers(ROWS, 4, 16, 16)


def _encodec() -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    config = transformers.EncodecConfig(
        num_filters=8, hidden_size=32, codebook_size=64, codebook_dim=32, num_lstm_layers=1,
        upsampling_ratios=[4, 2],
    )  # fmt: skip
    return transformers.EncodecModel(config), {"input_values": _numbers(ROWS, 1, 1024)}


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
    # Diffusion.
    "diffusers/unet": _diffusers(
        "UNet2DConditionModel", {"sample": _IMAGE, **_TIMES, **_TEXT}, **_DOWN, sample_size=16,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "diffusers/controlnet": _diffusers(
        "ControlNetModel",
        {"sample": _IMAGE, **_TIMES, **_TEXT, "controlnet_cond": _numbers(ROWS, 3, 32, 32)},
        **_DOWN, conditioning_embedding_out_channels=(16, 32),
    ),
    "diffusers/dit": _diffusers(
        "DiTTransformer2DModel",
        {"hidden_states": _IMAGE, **_TIMES, "class_labels": torch.tensor([1, 2])},
        **_LATENTS, num_embeds_ada_norm=1000,
    ),
    "diffusers/sd3": _diffusers(
        "SD3Transformer2DModel",
        {"hidden_states": _IMAGE, **_TIMES, **_TEXT, "pooled_projections": _numbers(ROWS, WIDTH)},
        **_LATENTS, joint_attention_dim=32, caption_projection_dim=WIDTH, out_channels=4,
        pooled_projection_dim=WIDTH, qk_norm="rms_norm",
    ),
    "diffusers/flux": _diffusers(
        "FluxTransformer2DModel",
        {
            "hidden_states": _numbers(ROWS, 64, 16), **_TEXT, "timestep": torch.tensor([0.1, 0.5]),
            "pooled_projections": _numbers(ROWS, 32), "img_ids": torch.zeros(64, 3),
            "txt_ids": torch.zeros(16, 3), "guidance": torch.ones(ROWS),
        },
        **_HEADS_OF_32, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12),
        guidance_embeds=True,
    ),
    "diffusers/wan": _diffusers(
        "WanTransformer3DModel",
        {"hidden_states": _numbers(ROWS, 4, 2, 16, 16), **_TIMES, **_TEXT},
        **_HEADS_OF_32, patch_size=(1, 2, 2), in_channels=4, out_channels=4, text_dim=32,
        freq_dim=32, ffn_dim=2 * WIDTH, num_layers=2,
    ),
    "diffusers/pixart": _diffusers(
        "PixArtTransformer2DModel",
        {
            "hidden_states": _IMAGE, **_TIMES, **_TEXT,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        **_LATENTS, out_channels=8, cross_attention_dim=WIDTH, caption_channels=32,
        use_additional_conditions=False,
    ),
    "diffusers/vae": _diffusers(
        "AutoencoderKL", {"sample": _numbers(ROWS, 3, 32, 32)}, block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    ),
    # Sound.
    **{name: _sound(name) for name in ("wav2vec2", "hubert")},
    "whisper": Family("transformers", _whisper),
    "encodec": Family("transformers", _encodec),
}  # fmt: skip
