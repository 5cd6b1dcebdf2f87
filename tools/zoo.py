"""Models of other packages that are looked at for docs/models.md alone: `python -m tools.models`.

The most used models of timm, a size of each family, on small images and with few blocks where the
constructor says how many; and those of torchvision. Tests look at `tests/families.py`, which is
small.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.families import Family

IMAGES, SIDE, CLASSES = 4, 64, 10


def _images(side: int = SIDE) -> Tensor:
    return torch.randn(IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))


# ---- timm ----------------------------------------------------------------------------------------


def _each(names: str, **options: Any) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(names.split(), options)


_TIMM: dict[str, dict[str, Any]] = {
    # Residual networks.
    **_each(
        """resnet50 resnet50d wide_resnet50_2 resnetblur50 ecaresnet50d seresnet50
        resnext50_32x4d seresnext50_32x4d res2net50_26w_4s resnetv2_50""",
        layers=[1, 1, 1, 1],
    ),
    **_each(
        """resnet18 skresnet18 resnest14d resnetv2_50x1_bit tresnet_m cspresnet50 regnetx_002
        regnety_002 regnetz_b16 nf_resnet50 dm_nfnet_f0"""
    ),
    # Other convolutional networks.
    **_each(
        """efficientnet_b0 tf_efficientnet_b0 tf_efficientnetv2_b0 efficientnet_lite0
        mobilenetv1_100 mobilenetv2_100 mobilenetv3_large_100 mobilenetv3_small_100
        mobilenetv4_conv_small mixnet_s rexnet_100 ghostnet_100 repvgg_a0 repvit_m0_9 dla34
        hrnet_w18_small vgg11 vgg11_bn xception41 hgnetv2_b0 convnext_atto convnextv2_atto
        mambaout_femto starnet_s1 fasternet_t0 efficientvit_b0 edgenext_xx_small
        convmixer_768_32 focalnet_tiny_srf inception_v3"""
    ),
    **_each("convnext_tiny inception_next_tiny", depths=(1, 1, 1, 1)),
    "densenet121": {"block_config": (2, 2, 2, 2)},
    # Vision transformers.
    **_each(
        """vit_tiny_patch16_224 vit_small_patch16_224 vit_base_patch16_224
        vit_base_patch16_clip_224 vit_base_patch16_siglip_224 vit_base_patch16_rope_reg1_gap_256
        vit_small_r26_s32_224 vit_small_patch16_dinov3 samvit_base_patch16 deit_tiny_patch16_224
        deit_tiny_distilled_patch16_224 deit3_small_patch16_224 beit_base_patch16_224
        cait_xxs24_224 xcit_nano_12_p16_224 tnt_s_patch16_224""",
        img_size=SIDE, depth=2,
    ),
    **_each(
        """vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 eva02_tiny_patch14_224
        eva_large_patch14_196""",
        img_size=70, depth=2,
    ),
    # Hierarchies, and hybrids.
    **_each(
        """swin_tiny_patch4_window7_224 twins_svt_small davit_tiny""",
        depths=(1, 1, 1, 1),
    ),
    "swinv2_tiny_window8_256": {"img_size": 128, "depths": (1, 1, 1, 1)},
    "vitamin_small_224": {"img_size": SIDE},
    **_each(
        """maxvit_rmlp_pico_rw_256 coatnet_nano_rw_224 pvt_v2_b0 poolformer_s12 convformer_s18
        caformer_s18 mixer_s16_224 resmlp_12_224 efficientformer_l1 efficientformerv2_s0
        fastvit_t8 levit_128s crossvit_tiny_240 volo_d1_224 nest_tiny mobilevit_xxs
        mobilevitv2_050 gcvit_xxtiny hiera_tiny_224 mvitv2_tiny tiny_vit_5m_224"""
    ),
}  # fmt: skip

# Sides of images, of networks that take no other.
_SIDES = {
    name: side
    for side, names in {
        224: """mixer_s16_224 resmlp_12_224 efficientformer_l1 efficientformerv2_s0 levit_128s
            volo_d1_224 nest_tiny gcvit_xxtiny hiera_tiny_224 swin_tiny_patch4_window7_224
            coatnet_nano_rw_224""",
        256: "maxvit_rmlp_pico_rw_256",
        96: "inception_v3",
    }.items()
    for name in names.split()
}


def _of_timm(name: str, options: dict[str, Any]) -> Family:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        import timm

        model = timm.create_model(name, num_classes=CLASSES, **options)
        side = options.get("img_size", _SIDES.get(name, SIDE))
        return model, {"x": _images(side)}

    return Family("timm", make)


# ---- torchvision ---------------------------------------------------------------------------------


def _of_torchvision(make: Callable[[], nn.Module], argument: str = "x") -> Family:
    return Family("torchvision", lambda: (make(), {argument: _images()}))


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(SIDE, 16, 2, 4, 128, 256, num_classes=CLASSES)


def _swin(version: int) -> nn.Module:
    from torchvision.models import SwinTransformer, swin_transformer

    blocks = {} if version == 1 else {
        "block": swin_transformer.SwinTransformerBlockV2,
        "downsample_layer": swin_transformer.PatchMergingV2,
    }  # fmt: skip
    return SwinTransformer(
        [4, 4], 64, [1, 1], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES, **blocks
    )


def _model(name: str, **options: Any) -> nn.Module:
    """A network of torchvision with new weights."""
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)


class _Detector(nn.Module):
    """The parts of a two-stage detector that train, without what lies between them.

    `nms` and `roi_align` have no kernels beside a CPU build of torch, so that pooled features stand
    for those of boxes.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        import torchvision

        make = getattr(torchvision.models.detection, name)
        whole = make(weights=None, weights_backbone=None, num_classes=CLASSES)
        self.backbone, self.rpn, heads = whole.backbone, whole.rpn.head, whole.roi_heads
        self.box_head, self.box_predictor = heads.box_head, heads.box_predictor
        parts = (heads.mask_head, heads.mask_predictor) if heads.has_mask() else ()
        self.mask = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.backbone(x)
        scores, boxes = self.rpn(list(features.values()))
        regions = nn.functional.adaptive_avg_pool2d(features["0"], 7)
        found = [*scores, *boxes, *self.box_predictor(self.box_head(regions))]
        return [*found, self.mask(regions)] if len(self.mask) else found


def _one_stage(name: str) -> Family:
    """A detector whose losses need neither operator."""

    def make() -> tuple[nn.Module, dict[str, Any]]:
        import torchvision

        model = getattr(torchvision.models.detection, name)(
            weights=None, weights_backbone=None, num_classes=CLASSES, min_size=SIDE, max_size=SIDE
        )
        boxes = torch.tensor([[4.0, 8.0, 40.0, 48.0], [16.0, 10.0, 60.0, 50.0]])
        target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
        return model, {"images": list(_images().sigmoid()), "targets": [target] * IMAGES}

    return Family("torchvision", make)


_TORCHVISION: dict[str, Family] = {
    "vit": _of_torchvision(_vit),
    "swin": _of_torchvision(lambda: _swin(1)),
    "swin_v2": _of_torchvision(lambda: _swin(2)),
    **{
        name: _of_torchvision(lambda name=name: _model(name))
        for name in (
            "resnet50", "resnext50_32x4d", "efficientnet_b0", "efficientnet_v2_s",
            "mobilenet_v3_large", "convnext_tiny", "densenet121", "regnet_y_400mf", "squeezenet1_1",
            "shufflenet_v2_x1_0", "mnasnet1_0",
        )
    },
    **{
        name: _of_torchvision(lambda name=name: _model(name, weights_backbone=None))
        for name in ("deeplabv3_resnet50", "fcn_resnet50")
    },
    "lraspp_mobilenet_v3_large": _of_torchvision(
        lambda: _model("lraspp_mobilenet_v3_large", weights_backbone=None), "input"
    ),
    **{name: _one_stage(name) for name in ("retinanet_resnet50_fpn", "fcos_resnet50_fpn")},
    **{
        f"{name}, parts": _of_torchvision(lambda name=name: _Detector(name))
        for name in ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn")
    },
}  # fmt: skip

ZOO: dict[str, Family] = {
    **{f"timm/{name}": _of_timm(name, options) for name, options in _TIMM.items()},
    **{f"torchvision/{name}": family for name, family in _TORCHVISION.items()},
}
