"""What conv nets share: one code for batch norm, ReLU and convolution; bytes of whole networks."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import fewbit, groupquant
from packlight.groupquant import fixed_point
from packlight.packing.layout import packed_bytes
from tests.helpers import crossing, every_device, kept_bytes, pack_bytes, relative_error
from tests.resnets import KITS, resnet18, resnet50

C, N = 16, 8 * 16 * 12 * 12  # channels and elements of a hidden tensor
CODES = packed_bytes(N, 4)
TABLE = 6 * C * 4
MASK = packed_bytes(N, 1)
WEIGHT = C * C * 9 * 4


PACK = pack_bytes(N)


class Block(nn.Module):
    """conv -> batch norm -> ReLU -> conv, as one wants it."""

    def __init__(self, norm, relu, conv, inplace=False):
        super().__init__()
        self.norm, self.relu, self.conv = norm(C), relu(inplace), conv(C, C, 3, padding=1)
        with torch.no_grad():
            self.norm.weight.copy_(torch.randn(C))
            self.norm.bias.copy_(torch.randn(C))

    def forward(self, x):
        return self.conv(self.relu(self.norm(x)))


class Residual(Block):
    """What ReLU makes is read by the convolution and by the sum."""

    def forward(self, x):
        h = self.relu(self.norm(x))
        return self.conv(h) + h


def fixed(**options):
    return Block(fixed_point.BatchNorm2d, groupquant.ReLU, groupquant.Conv2d, **options)


def hidden():
    return torch.randn(8, C, 12, 12, requires_grad=True)


def gradients(model, x, **options):
    packlight.manual_seed(3)
    dy = torch.randn(8, C, 12, 12).to(x.device)
    packlight.manual_seed(4)
    return torch.autograd.grad(model(x, **options), [x, *model.parameters()], dy)


# --- Bytes.


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_relu_and_conv_keep_one_code(inplace, layout):
    x, model = hidden().detach().to(memory_format=layout).requires_grad_(), fixed(inplace=inplace)
    report = packlight.profile(model, x)
    assert report.activation_bytes == CODES + TABLE
    assert kept_bytes(lambda: model(x)) == CODES + TABLE + WEIGHT


def test_a_residual_sum_keeps_no_more():
    model = Residual(fixed_point.BatchNorm2d, groupquant.ReLU, groupquant.Conv2d)
    assert packlight.profile(model, hidden()).activation_bytes == CODES + TABLE


def test_several_convolutions_behind_one_relu():
    norm, relu = fixed_point.BatchNorm2d(C), groupquant.ReLU()
    convs = [groupquant.Conv2d(C, C, 3, stride=stride) for stride in (1, 2)]

    def run(x):
        h = relu(norm(x))
        return [conv(h) for conv in convs]

    x = hidden()
    assert kept_bytes(lambda: run(x)) == CODES + TABLE + 2 * WEIGHT


def test_the_end_of_a_residual_block():
    """The sum's ReLU keeps a mask; the convolutions behind it share a pack of what it makes."""
    norm, relu = fixed_point.BatchNorm2d(C), groupquant.ReLU(inplace=True)
    convs = [groupquant.Conv2d(C, C, 3, padding=1) for _ in range(2)]

    def run(x):
        y = norm(x)
        y += x
        h = relu(y)
        return convs[0](h) + convs[1](h)

    assert kept_bytes(lambda: run(hidden())) == CODES + TABLE + MASK + PACK + 2 * WEIGHT


def test_group_quantised_batch_norm_relu_and_conv():
    model = Block(groupquant.BatchNorm2d, groupquant.ReLU, groupquant.Conv2d)
    report = packlight.profile(model, hidden())
    assert report.activation_bytes == PACK + 3 * C * 4 + MASK


def test_group_norm_and_conv_share_a_pack():
    norm, conv = groupquant.GroupNorm(4, C), groupquant.Conv2d(C, C, 3)
    x = hidden()
    assert kept_bytes(lambda: conv(norm(x))) == PACK + 2 * C * 4 + 8 * 4 * 4 + WEIGHT


def test_padding_shares_the_pack_of_what_it_pads():
    model = fixed()
    conv = groupquant.Conv2d(C, C, 3, padding=1, padding_mode="reflect")
    x = hidden()
    assert kept_bytes(lambda: conv(model.relu(model.norm(x)))) == CODES + TABLE + WEIGHT


def test_pooled_tensors_are_packed_afresh():
    model, pool = fixed(), fewbit.MaxPool2d(2)
    x = hidden()
    kept = kept_bytes(lambda: model.conv(pool(model.relu(model.norm(x)))))
    offsets = packed_bytes(N // 4, 2)
    assert kept == CODES + TABLE + offsets + pack_bytes(N // 4) + WEIGHT


# --- What is rebuilt is right.


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["fixed", "group"])
@every_device
def test_gradients_are_near_the_exact_ones(device, kind, bits, inplace):
    norms = {"fixed": fixed_point.BatchNorm2d, "group": groupquant.BatchNorm2d}
    model = Residual(
        lambda c: norms[kind](c, bits=bits), groupquant.ReLU, groupquant.Conv2d, inplace
    )
    plain = Residual(nn.BatchNorm2d, nn.ReLU, nn.Conv2d, inplace)
    plain.load_state_dict(model.state_dict())
    model.to(device), plain.to(device)
    x = hidden().detach().to(device).requires_grad_()
    if device == "cpu":
        assert torch.equal(model(x), plain(x))
    torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-3)
    ours, exact = gradients(model, x), gradients(plain, x)
    names = ["input", *dict(model.named_parameters())]
    errors = {n: relative_error(a, b) for n, a, b in zip(names, ours, exact, strict=True)}
    limit = {("fixed", 4): 0.32, ("group", 4): 0.25}.get((kind, bits), 0.04)
    assert errors["conv.weight"] < limit
    assert errors["norm.weight"] < limit
    assert errors["input"] < limit
    torch.testing.assert_close(ours[2], exact[2], rtol=1e-3, atol=1e-3)  # norm.bias
    torch.testing.assert_close(ours[4], exact[4], rtol=1e-4, atol=1e-3)  # conv.bias


def test_the_weight_gradient_is_that_of_the_rebuilt_input():
    model = fixed()
    kept = []
    h = model.relu(model.norm(hidden()))
    pack = packlight.sharing.pack_of(h)
    rebuilt = pack.rebuild(torch.float32, *pack.tensors)
    kept.append(rebuilt)
    y = model.conv(h)
    dy = torch.randn_like(y)
    (dweight,) = torch.autograd.grad(y, model.conv.weight, dy)
    expected = torch.nn.grad.conv2d_weight(rebuilt, model.conv.weight.shape, dy, padding=1)
    torch.testing.assert_close(dweight, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(rebuilt > 0, h > 0)


def test_an_overwritten_output_is_packed_afresh():
    model, x = fixed(), hidden()
    h = model.relu(model.norm(x))
    h.mul_(2)
    kept = kept_bytes(lambda: model.conv(h))
    assert kept == PACK + WEIGHT


def test_inplace_relu_overwrites_what_nobody_keeps():
    model, plain = fixed(inplace=True), Block(nn.BatchNorm2d, nn.ReLU, nn.Conv2d, inplace=True)
    plain.load_state_dict(model.state_dict())
    x = hidden()
    y = model.norm(x)
    assert model.relu(y) is y
    assert torch.equal(y, plain.relu(plain.norm(x)))


# --- torch.compile, checkpoint, autocast, random use.


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("norm", [fixed_point.BatchNorm2d, groupquant.BatchNorm2d])
def test_compiles_to_the_same_gradients(norm, inplace, fresh_compiler):
    model = Residual(norm, groupquant.ReLU, groupquant.Conv2d, inplace)
    twin = copy.deepcopy(model)
    x = hidden()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    expected = gradients(model, x)
    packlight.manual_seed(3)
    dy = torch.randn(8, C, 12, 12)
    packlight.manual_seed(4)
    actual = torch.autograd.grad(compiled(x), [x, *twin.parameters()], dy)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


def test_every_layer_compiles(fresh_compiler):
    model = nn.Sequential(
        groupquant.Conv2d(C, C, 4, padding="same", padding_mode="circular", rounding="nearest"),
        groupquant.GroupNorm(4, C, rounding="nearest"),
        groupquant.ConvTranspose2d(C, C, 3, padding=1, rounding="nearest"),
        fixed_point.BatchNorm2d(C, momentum=0.2),
    )
    x = hidden()
    expected = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    packlight.manual_seed(3)
    dy = torch.randn(8, C, 12, 12)
    packlight.manual_seed(4)
    actual = torch.autograd.grad(compiled(x), [x, *model.parameters()], dy)
    torch.testing.assert_close(actual, expected)


def test_one_code_crosses_to_the_compiled_backward(fresh_compiler):
    model, w = fixed(), torch.randn(C, requires_grad=True)
    tensors = crossing(lambda x: model(x * w.view(-1, 1, 1)), hidden())
    assert sum(t.numel() for t in tensors if t.dtype == torch.uint8) == CODES
    # The output, the input, which the product keeps, and nothing else of that size.
    assert sum(t.shape == (8, C, 12, 12) and t.dtype == torch.float32 for t in tensors) <= 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_noted_tensor_may_enter_a_compiled_region(fresh_compiler):
    model = fixed()
    compiled = torch.compile(model.conv, fullgraph=True, backend="aot_eager")
    h = model.relu(model.norm(hidden()))
    y = compiled(h)
    assert torch.equal(y, model.conv(h))
    y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    model, x = fixed(), hidden()
    expected = gradients(model, x)

    def run(x):
        return checkpoint(model, x, use_reentrant=reentrant)

    packlight.manual_seed(3)
    dy = torch.randn(8, C, 12, 12)
    packlight.manual_seed(4)
    run(x).backward(dy)
    actual = [x.grad, *(p.grad for p in model.parameters())]
    torch.testing.assert_close(actual, list(expected))


def test_autocast_keeps_codes_only():
    x, model = hidden(), fixed()
    plain = Block(nn.BatchNorm2d, nn.ReLU, nn.Conv2d)
    plain.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))
        assert packlight.profile(model, x).activation_bytes == CODES + TABLE


STEPS = ["relu", "relu in place", "add in place", "view", "no_grad", "conv", "norm", "fixed"]
LAYERS = {
    "conv": (groupquant.Conv2d, nn.Conv2d, (C, C, 1)),
    "norm": (groupquant.BatchNorm2d, nn.BatchNorm2d, (C,)),
    "fixed": (fixed_point.BatchNorm2d, nn.BatchNorm2d, (C,)),
}


@settings(max_examples=40)
@given(st.lists(st.sampled_from(STEPS), max_size=7))
@example(["norm", "view", "relu in place"])
def test_no_stale_pack_is_ever_used(steps):
    """Layers and overwriting at random: gradients are near the exact ones, so packs were right."""
    packlight.manual_seed(0)
    ours, exact = [], []
    for step in steps:
        packed, plain, arguments = LAYERS.get(step, (nn.Identity, nn.Identity, ()))
        ours.append(packed(*arguments, bits=8) if step in LAYERS else packed())
        exact.append(plain(*arguments))
        exact[-1].load_state_dict(ours[-1].state_dict())

    def run(layers, relu, overwrite, x):
        h = x * 1.0
        for step, layer in zip(steps, layers, strict=True):
            if step in ("relu", "relu in place"):
                h = relu(h, overwrite and step == "relu in place")
            elif step == "add in place":
                h = h.add_(0.25) if overwrite else h + 0.25
            elif step == "no_grad":
                with torch.no_grad():
                    relu(h)
            elif step == "view":
                h = h.view(8, C, 36, 4).view(8, C, 12, 12)
            else:
                h = layer(h)
        return h

    x = hidden()
    y = run(ours, groupquant.relu, True, x)
    expected = run(exact, nn.functional.relu, False, x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    pairs = []
    for output, layers in ((y, ours), (expected, exact)):
        parameters = [p for layer in layers for p in layer.parameters()]
        pairs.append(torch.autograd.grad(output, [x, *parameters], dy))
    # Behind a ReLU the fixed window cuts off what lies beyond three deviations.
    limit = 0.25 if "fixed" in steps else 0.05
    scale = max(gradient.norm() for gradient in pairs[1])
    for a, b in zip(*pairs, strict=True):
        assert (a - b).norm() <= limit * scale


# --- Whole networks.


@pytest.mark.parametrize(
    ("network", "bits", "fp32", "bf16"),
    [("resnet18", 4, 9.9, 5.0), ("resnet50", 4, 9.0, 4.6), ("resnet50", 8, 4.7, 2.4)],
)
def test_how_many_times_less_a_resnet_keeps(network, bits, fp32, bf16):
    """On the meta device, at the sizes of training."""
    for dtype, times in ((torch.float32, fp32), (torch.bfloat16, bf16)):
        kept = []
        for method in ("exact", f"fixed{bits}"):
            with torch.device("meta"):
                if network == "resnet18":
                    model, x = resnet18(KITS[method]), torch.empty(512, 3, 32, 32)
                else:
                    pool = nn.MaxPool2d if method == "exact" else fewbit.MaxPool2d
                    model = resnet50(KITS[method], pool(3, 2, 1))
                    x = torch.empty(128, 3, 224, 224)
                report = packlight.profile(model.to(dtype), x.to(dtype))
            kept.append(report.activation_bytes)
        assert kept[0] > times * kept[1]


@pytest.mark.parametrize("method", ["fixed8", "fixed4", "group8", "group4"])
def test_a_small_resnet_trains_like_exact(method):
    images = torch.randn(64, 3, 16, 16)
    labels = (images[:, 0, :8].mean((1, 2)) > images[:, 1, 8:].mean((1, 2))).long()

    def final_loss(name):
        packlight.manual_seed(1)
        model = resnet18(KITS[name], width=8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(25):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], sum(losses[-3:]) / 3

    (start, ours), (exact_start, exact) = final_loss(method), final_loss("exact")
    assert start == exact_start
    assert exact < 0.3 * exact_start
    assert ours < exact + 0.1
