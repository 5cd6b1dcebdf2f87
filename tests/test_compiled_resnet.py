"""A converted ResNet, compiled whole: its gradients, and what crosses to its backward pass."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import packlight
from packlight import DEFAULT_METHODS, FewBit, FixedPoint, GroupQuant, groupquant
from packlight.groupquant import fixed_point
from packlight.groupquant.fixed_point.residual import add
from tests.helpers import crossing, relative_error

# The default, rounding to nearest, so that two runs compare.
NEAREST = (FixedPoint(bits=4), GroupQuant(bits=4, rounding="nearest"), FewBit(bits=3))


class Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride > 1:
            conv = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.relu(self.norm(self.conv(x)))))
        return self.head(x.mean((2, 3)))


def images() -> Tensor:
    return torch.randn(8, 3, 32, 32)


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    grads = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("functional", [False, True])
def test_gradients_of_a_compiled_resnet(functional):
    plain, x = ResNet(), images()
    model = copy.deepcopy(plain)
    packlight.convert(model, NEAREST, functional=functional)
    eager = gradient(copy.deepcopy(model), x)
    compiled = gradient(torch.compile(model, fullgraph=True), x)
    exact = gradient(plain, x)
    # The two may share their packs otherwise, so round otherwise, where sums are covered too.
    assert relative_error(compiled, eager) < (0.03 if functional else 1e-5)
    assert relative_error(compiled, exact) < 0.06
    torch._dynamo.reset()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("functional", [False, True])
def test_packs_cross_to_the_backward_of_a_compiled_resnet(functional, autocast):
    model, x = ResNet(), images()
    packlight.convert(model, DEFAULT_METHODS, functional=functional)
    with torch.autocast("cpu", torch.bfloat16, autocast):
        kept = packlight.profile(model, x).activation_bytes
        crossed = crossing(model, x)
    # Weights cross as they are, or cast; buffers and the output are handed out.
    own = {tensor.shape for tensor in (*model.parameters(), *model.buffers())}
    packs = [tensor for tensor in crossed if tensor.shape not in own | {(8, 10)}]
    assert sum(tensor.numel() * tensor.element_size() for tensor in packs) <= 1.2 * kept
    # The rest is tables of six numbers a channel.
    assert {tensor.shape[0] for tensor in packs if tensor.dtype.is_floating_point} == {6}


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_a_compiled_block_stay_channels_last(stride, fresh_compiler):
    block = Block(16, 16 * stride, stride).to(memory_format=torch.channels_last)
    packlight.convert(block, DEFAULT_METHODS, functional=True)
    x = torch.randn(8, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    made = []

    def backward(graph, _):
        made.extend(node.meta["val"] for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=backward
    )
    torch.compile(block, fullgraph=True, backend=backend)(x).square().sum().backward()
    maps = [tensor for tensor in made if isinstance(tensor, Tensor) and tensor.dim() == 4]
    assert maps
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in maps)


OVERWRITE = {
    "relu": lambda y: fixed_point.relu(y, inplace=True),
    "silu": groupquant.SiLU(inplace=True, rounding="nearest"),
}


@pytest.mark.parametrize("name", OVERWRITE)
@pytest.mark.parametrize("of", ["norm", "sum", "view", "base"])
def test_what_an_activation_overwrote_has_its_gradient_when_compiled(of, name, fresh_compiler):
    overwrite = OVERWRITE[name]
    norm, weights = fixed_point.BatchNorm2d(4), torch.randn(2, 4, 4, 36)

    def loss(x: Tensor) -> Tensor:
        y = norm(x)
        if of == "sum":
            y = add(y, norm(2 * x))
        flat = y.flatten(2)
        before = flat * weights[0]
        overwrite(flat if of == "view" else y)
        after = flat if of == "base" else y.flatten(2)
        return (before + after * weights[1]).sum()

    x = torch.randn(4, 4, 6, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x), x)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(found, expected)
