"""Layers and models of timm and torchvision; skipped where they are not installed."""

import copy

import pytest
import torch
from torch import nn

import packlight
from packlight import FewBit, FixedPoint, GroupQuant, Inverted
from tests.helpers import dtype_name, relative_error

EIGHT = GroupQuant(bits=8, group_size=32, rounding="nearest")
ALL = (FixedPoint(bits=8), EIGHT, FewBit(bits=8))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
EPSILON = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="needs timm")


@pytest.fixture(scope="module")
def torchvision():
    return pytest.importorskip("torchvision", reason="needs torchvision")


def pair(layer, method):
    """The layer with weights as in training, and a converted copy."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.2)
    converted = copy.deepcopy(layer)
    packlight.convert(converted, method)
    return layer, converted


def gradients(layer, x):
    """Output, and gradients of the input and the parameters, by name."""
    x = x.clone().requires_grad_()
    y = layer(x * 1)  # an activation may work in place
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    parameters = dict(layer.named_parameters())
    found = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return y.detach(), dict(zip(["input", *parameters], found, strict=True))


def check(plain, converted, x, bound):
    y, expected = gradients(plain, x)
    ours, actual = gradients(converted, x)
    assert torch.equal(ours, y)
    for key, gradient in expected.items():
        assert relative_error(actual[key], gradient) < bound, key
    assert torch.equal(converted.eval()(x.clone()), plain.eval()(x.clone()))
    packlight.revert(converted)
    assert type(converted) is type(plain)


# ---- timm: layers --------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("method", [EIGHT, FewBit(bits=8), Inverted()], ids=str)
@pytest.mark.parametrize("name", ["GELU", "GELUTanh", "QuickGELU"])
def test_activations(timm, name, method, dtype):
    plain, converted = pair(getattr(timm.layers, name)(), method)
    x = (torch.randn(16, 64) * 2).to(dtype)
    check(plain, converted, x, 0.02 + EPSILON[dtype])


@pytest.mark.parametrize("method", [FixedPoint(bits=8), EIGHT], ids=str)
@pytest.mark.parametrize("act", ["ReLU", "SiLU", "Identity"])
def test_a_batch_norm_with_its_activation(timm, act, method):
    layer = timm.layers.BatchNormAct2d(16, act_layer=getattr(nn, act), inplace=act != "Identity")
    plain, converted = pair(layer, (method, EIGHT))
    x = torch.randn(4, 16, 8, 8)
    check(plain, converted, x, 0.05)
    assert torch.equal(converted.running_mean, plain.running_mean)
    assert torch.equal(converted.running_var, plain.running_var)
    assert torch.equal(converted.num_batches_tracked, plain.num_batches_tracked)


def test_a_batch_norm_its_relu_and_the_next_convolution_keep_one_code(timm):
    model = nn.Sequential(timm.layers.BatchNormAct2d(16), nn.Conv2d(16, 8, 3))
    packlight.convert(model, (FixedPoint(bits=4), GroupQuant(bits=4)))
    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    rows = packlight.profile(model, x * 1).rows
    large = [row for row in rows if row.bytes > 512]
    assert [row.bytes for row in large] == [x.numel() // 2]


@every_dtype
@pytest.mark.parametrize("name", ["LayerNorm", "LayerNorm2d", "RmsNorm"])
def test_norms(timm, name, dtype):
    plain, converted = pair(getattr(timm.layers, name)(64).to(dtype), EIGHT)
    shape = (2, 64, 4, 4) if name == "LayerNorm2d" else (2, 16, 64)
    x = (torch.randn(shape) * 3).to(dtype)
    check(plain, converted, x, 0.01 + EPSILON[dtype])


@every_dtype
@pytest.mark.parametrize("name", ["LayerNorm", "RmsNorm"])
def test_inverted_norms(timm, name, dtype):
    plain, converted = pair(getattr(timm.layers, name)(64).to(dtype), Inverted())
    x = (torch.randn(2, 16, 64) * 3).to(dtype)
    check(plain, converted, x, 10 * EPSILON[dtype])


def test_a_layer_norm_of_channels_and_the_next_convolution_share_a_pack(timm):
    model = nn.Sequential(timm.layers.LayerNorm2d(64), nn.Conv2d(64, 8, 2, stride=2))
    packlight.convert(model, GroupQuant(bits=4))
    x = torch.randn(4, 64, 8, 8, requires_grad=True)
    rows = packlight.profile(model, x * 1).rows
    assert sum(row.bytes for row in rows if row.dtype == "uint8") == x.numel() // 2


def test_fast_norms_are_left_alone(timm):
    timm.layers.set_fast_norm(True)
    try:
        layer = timm.layers.LayerNorm(64)
    finally:
        timm.layers.set_fast_norm(False)
    with pytest.raises(packlight.NothingMatchedError, match="fast norm"):
        packlight.convert(layer, GroupQuant(), functional=False)


# ---- models --------------------------------------------------------------------------------------

# Times less that is kept at 8 bits, in float32.
TIMES_LESS = 2.5


def check_model(model, x, attention=False, times_less=TIMES_LESS):
    model.train()
    plain, converted = model, copy.deepcopy(model)
    packlight.convert(converted, ALL, functional=attention)

    def step(model):
        model.zero_grad()
        y = model(x)
        nn.functional.cross_entropy(y, torch.arange(len(x)) % y.shape[1]).backward()
        return y.detach(), {name: p.grad for name, p in model.named_parameters()}

    y, expected = step(plain)
    ours, actual = step(converted)
    torch.testing.assert_close(ours, y, rtol=1e-4, atol=1e-5)
    total = sum(gradient.double().square().sum() for gradient in expected.values()).sqrt()
    for key, gradient in expected.items():
        distance = (actual[key].double() - gradient.double()).norm()
        # Some are zero but for rounding: of a scale before another batch norm.
        assert distance < 0.1 * gradient.double().norm() + 0.01 * total, key
    kept = [packlight.profile(m, x).activation_bytes for m in (plain, converted)]
    assert kept[0] > times_less * kept[1]
    packlight.revert(converted)
    assert [type(m) for m in converted.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("name", ["vit", "resnet", "convnext", "efficientnet"])
def test_models_of_timm(timm, name):
    packlight.manual_seed(0)
    models = timm.models
    makers = {
        "vit": lambda: models.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=8
        ),
        "resnet": lambda: models.ResNet(
            models.resnet.BasicBlock, (1, 1, 1, 1), channels=(16, 32, 32, 32), num_classes=8
        ),
        "convnext": lambda: models.ConvNeXt(
            depths=(1, 1, 1, 1), dims=(32, 64, 64, 64), num_classes=8
        ),
        "efficientnet": lambda: timm.create_model(
            "efficientnet_lite0", num_classes=8, drop_rate=0.0, drop_path_rate=0.0
        ),
    }
    size = 32 if name == "vit" else 64
    check_model(makers[name](), torch.randn(4, 3, size, size), attention=name == "vit")


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "efficientnet_b0", "vit_b_16"])
def test_models_of_torchvision(torchvision, name):
    packlight.manual_seed(0)
    models = torchvision.models
    makers = {
        "resnet18": lambda: models.resnet18(num_classes=8),
        "convnext_tiny": lambda: models.convnext_tiny(num_classes=8, stochastic_depth_prob=0.0),
        "efficientnet_b0": lambda: models.efficientnet_b0(
            num_classes=8, dropout=0.0, stochastic_depth_prob=0.0
        ),
        "vit_b_16": lambda: models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=256,
            num_classes=8,
        ),
    }  # fmt: skip
    size, times_less = 64, TIMES_LESS
    if name == "vit_b_16":
        # nn.MultiheadAttention calls kernels of torch's that keep what they keep: exact.
        size, times_less = 32, 2.2
    check_model(makers[name](), torch.randn(4, 3, size, size), times_less=times_less)


def test_transitions_of_a_densenet_keep_nothing(torchvision):
    """They pool the output of a convolution, which torch keeps for its shape."""
    x = torch.randn(2, 3, 64, 64)
    kept, pooled = [], []
    for excluded in ({nn.AvgPool2d: None}, {}):
        packlight.manual_seed(0)
        model = torchvision.models.DenseNet(12, (4, 4, 4), 24, num_classes=8)
        for module in model.modules():
            if isinstance(module, nn.AvgPool2d):
                module.register_forward_hook(lambda _, args, y: pooled.append(args[0].nbytes))
        packlight.convert(model, {**excluded, "*": packlight.DEFAULT_METHODS}, strict=False)
        kept.append(packlight.profile(model, x).activation_bytes)
    assert kept[0] - kept[1] == sum(pooled[:2]) > 0
    assert kept[0] > 1.35 * kept[1]
