"""Residual blocks of other packages whose convolutions run with their batch norms."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import DoubleBackwardError, FixedPoint, GroupQuant
from tests.helpers import kept_bytes, relative_error

torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
timm = pytest.importorskip("timm", reason="needs timm")
transformers = pytest.importorskip("transformers", reason="needs transformers")
from timm.models import resnet as of_timm  # noqa: E402
from torchvision.models import resnet as of_torchvision  # noqa: E402
from transformers.models.resnet import modeling_resnet as of_transformers  # noqa: E402

METHODS = (FixedPoint(4), GroupQuant(bits=4, group_size=32, rounding="nearest"))
WIDTH = 16
NODE = "_ConvNormBackward"


def _down(inner: int, outer: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inner, outer, 1, 2, bias=False), nn.BatchNorm2d(outer))


def torchvision_block(kind: type, down: bool) -> nn.Module:
    outer = WIDTH * (2 if down else 1)
    width = outer // kind.expansion
    return kind(WIDTH, width, 2 if down else 1, _down(WIDTH, outer) if down else None)


def timm_block(kind: type, down: bool, **options) -> nn.Module:
    outer = WIDTH * (2 if down else 1)
    downsample = _down(WIDTH, outer) if down else None
    return kind(WIDTH, outer // kind.expansion, 2 if down else 1, downsample, **options)


def transformers_block(kind: type, down: bool) -> nn.Module:
    return kind(WIDTH, WIDTH * (2 if down else 1), 2 if down else 1)


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "torchvision basic": lambda down: torchvision_block(of_torchvision.BasicBlock, down),
    "torchvision bottleneck": lambda down: torchvision_block(of_torchvision.Bottleneck, down),
    "timm basic": lambda down: timm_block(of_timm.BasicBlock, down),
    "timm bottleneck": lambda down: timm_block(of_timm.Bottleneck, down),
    "transformers basic": lambda down: transformers_block(of_transformers.ResNetBasicLayer, down),
    "transformers bottleneck": lambda down: transformers_block(
        of_transformers.ResNetBottleNeckLayer, down
    ),
}
every_block = pytest.mark.parametrize("name", BLOCKS)
with_numbers = pytest.mark.parametrize("name", [n for n in BLOCKS if "transformers" not in n])
every_shortcut = pytest.mark.parametrize("down", [False, True], ids=["identity", "downsample"])


class Net(nn.Module):
    """Two blocks, and a convolution that reads what the last one makes."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        channels = [m.num_features for m in blocks[-1].modules() if isinstance(m, nn.BatchNorm2d)]
        self.head = nn.Conv2d(max(channels), 4, 1, bias=False)
        torch.manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()  # a leaf takes no part
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(name: str, down: bool) -> Net:
    return Net(BLOCKS[name](False), BLOCKS[name](down))


def converted(model: nn.Module, **options) -> nn.Module:
    model = copy.deepcopy(model)
    packlight.convert(model, METHODS, functional=True, **options)
    return model


def part_by_part(model: nn.Module) -> nn.Module:
    """A hook on a part has the parts run by themselves."""
    return part_by_part_of(model, nn.BatchNorm2d)


def part_by_part_of(model: nn.Module, kind: type) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda *_: None)
    return model


def images(dtype=torch.float32, layout=torch.contiguous_format):
    x = torch.randn(8, WIDTH, 8, 8, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).to(memory_format=layout)


def step(model, x, autocast=False, run=None):
    """The output, gradients of input and parameters, and what batch norms have counted.

    Of a copy, which stays without them.
    """
    if run is None:
        run = model = copy.deepcopy(model)
    packlight.manual_seed(2)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    y.backward(dy)
    found = [each.grad for each in (x, *model.parameters()) if each.requires_grad]
    model.zero_grad()
    return y.detach(), found, [buffer.clone() for buffer in model.buffers()]


def nodes(y):
    """Names of the nodes of the graph behind a tensor, as often as they are there."""
    found, stack, seen = [], [y.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.append(node.name())
            stack.extend(before for before, _ in node.next_functions)
    return found


def convolutions(model):
    blocks = model.blocks if isinstance(model, Net) else [model]
    return sum(isinstance(m, nn.Conv2d) for block in blocks for m in block.modules())


# ---- the same as part by part --------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@every_shortcut
@every_block
def test_the_same_as_part_by_part(name, down, autocast, layout):
    plain = net(name, down).to(memory_format=layout)
    model = converted(plain)
    x = images(layout=layout)
    y, gradients, statistics = step(model, x, autocast)
    expected, others, counted = step(part_by_part(model), x, autocast)
    assert nodes(model(x.requires_grad_())).count(NODE) == convolutions(model)
    assert torch.equal(y, expected)
    for a, b in zip(statistics, counted, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients, others, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < (2e-2 if autocast else 1e-5)
    theirs, _, of_plain = step(plain, x, autocast)
    assert torch.equal(y, theirs)
    for a, b in zip(statistics, of_plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@every_block
def test_in_other_precisions(name, dtype):
    plain = net(name, True).to(dtype)
    model = converted(plain)
    y, gradients, _ = step(model, images(dtype))
    expected, others, _ = step(part_by_part(model), images(dtype))
    assert torch.equal(y, expected)
    assert torch.equal(y, step(plain, images(dtype))[0])
    for a, b in zip(gradients, others, strict=True):
        assert relative_error(a, b) < (1e-10 if dtype == torch.float64 else 3e-2)


@every_shortcut
@every_block
def test_bytes_are_those_of_the_parts(name, down):
    model = converted(net(name, down))
    parts = part_by_part(model)
    x = images().requires_grad_()
    assert kept_bytes(lambda: model(x)) == kept_bytes(lambda: parts(x))
    rows = packlight.profile(model, x).rows
    assert sum(row.bytes for row in rows) == sum(r.bytes for r in packlight.profile(parts, x).rows)


@every_block
def test_a_prediction_is_what_a_run_keeps(name):
    model, x = converted(net(name, True)), images()
    predicted = packlight.predict(model, x).activation_bytes
    assert predicted == packlight.profile(model, x).activation_bytes


@every_block
def test_without_functional_a_sum_is_packed_as_it_was(name):
    model = copy.deepcopy(net(name, True))
    packlight.convert(model, METHODS)
    x = images().requires_grad_()
    parts = part_by_part(model)
    assert NODE in nodes(model(x))
    assert kept_bytes(lambda: model(x)) == kept_bytes(lambda: parts(x))
    y, gradients, _ = step(model, x)
    expected, others, _ = step(parts, x)
    assert torch.equal(y, expected)
    for a, b in zip(gradients, others, strict=True):
        assert relative_error(a, b) < 1e-5


# ---- where parts run one by one ------------------------------------------------------------------


def frozen_convolution(block):
    block.conv1.weight.requires_grad_(False)


def frozen_statistics(block):
    block.bn1.eval()


def frozen_norm(block):
    block.bn1 = torchvision.ops.FrozenBatchNorm2d(block.bn1.num_features)


def hook_on_a_convolution(block):
    block.conv2.register_full_backward_hook(lambda *_: None)


CHANGES = [frozen_convolution, frozen_statistics, frozen_norm, hook_on_a_convolution]


@pytest.mark.parametrize("change", CHANGES)
@with_numbers
def test_a_part_that_is_something_else_runs_by_itself(name, change):
    model = net(name, True)
    change(model.blocks[0])
    plain = copy.deepcopy(model)
    model = converted(model)
    x = images()
    found = nodes(model(x.clone().requires_grad_()))
    assert 0 < found.count(NODE) < convolutions(model)
    y, gradients, _ = step(model, x)
    expected, others, _ = step(part_by_part(model), x)
    assert torch.equal(y, expected)
    assert torch.equal(y, step(plain, x)[0])
    for a, b in zip(gradients, others, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("what", ["activation", "hook", "shortcut"])
def test_what_differs_in_a_block_of_transformers(what):
    plain = net("transformers bottleneck", True)
    block = plain.blocks[1]
    if what == "activation":
        block.layer[1].activation = nn.Tanh()
    elif what == "hook":
        block.layer[0].register_forward_hook(lambda *_: None)
    else:
        block.shortcut = _down(WIDTH, 2 * WIDTH)
    model = converted(plain)
    y, gradients, _ = step(model, images())
    expected, others, _ = step(part_by_part(model), images())
    assert torch.equal(y, expected)
    assert torch.equal(y, step(plain, images())[0])
    for a, b in zip(gradients, others, strict=True):
        assert relative_error(a, b) < 1e-4


def test_synchronised_batch_norms_stay_theirs():
    model = net("torchvision basic", False)
    model.blocks[0].bn2 = nn.SyncBatchNorm(WIDTH)
    model = converted(model)
    assert type(model.blocks[0].bn2) is nn.SyncBatchNorm
    # Of the two blocks one has a convolution before the synchronised norm.
    assert nodes(model(images().requires_grad_())).count(NODE) == convolutions(model) - 1


def test_a_reflected_convolution():
    model = net("torchvision bottleneck", False)
    for block in model.blocks:
        block.conv2.padding_mode = "circular"
        block.conv2._reversed_padding_repeated_twice = [1] * 4
    plain = copy.deepcopy(model)
    model = converted(model)
    assert nodes(model(images().requires_grad_())).count(NODE) == convolutions(model) - 2
    assert torch.equal(step(model, images())[0], step(plain, images())[0])


@pytest.mark.parametrize(
    "options",
    [
        {"attn_layer": "se"},
        {"drop_path": nn.Dropout(0.3)},
        {"aa_layer": nn.AvgPool2d},
        {"act_layer": nn.SiLU},
        {"drop_block": lambda: nn.Dropout2d(0.3)},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("kind", [of_timm.BasicBlock, of_timm.Bottleneck])
def test_what_stands_between_the_parts_of_timm(kind, options):
    plain = Net(timm_block(kind, False, **options), timm_block(kind, True, **options))
    model = copy.deepcopy(plain)
    packlight.convert(model, METHODS, functional=True)
    y, gradients, _ = step(model, images())
    expected, others, _ = step(part_by_part(model), images())
    assert torch.equal(y, expected)
    assert torch.equal(y, step(plain, images())[0])
    if "act_layer" not in options:
        assert NODE in nodes(model(images().requires_grad_()))
    for a, b in zip(gradients, others, strict=True):
        assert relative_error(a, b) < 1e-4


@every_block
def test_evaluation_and_passes_without_gradients(name):
    plain = net(name, True)
    model = converted(plain)
    x = images()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert NODE not in nodes(model.eval()(x.requires_grad_()))
    assert torch.equal(model(x), plain.eval()(x))
    assert model(x).sum() == plain(x).sum()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(dx.sum(), x)[0].isfinite().all()  # torch's own second derivative


def test_too_few_values_for_a_code():
    plain = net("torchvision basic", True)
    model = converted(plain)
    x = torch.randn(2, WIDTH, 2, 2)
    assert torch.equal(step(model, x)[0], step(plain, x)[0])
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        model(torch.randn(1, WIDTH, 1, 1, requires_grad=True))


@pytest.mark.parametrize("shape", [(8, WIDTH + 1, 8, 8), (WIDTH, 8, 8, 8)])
def test_an_input_that_does_not_fit_raises_what_torch_raises(shape):
    model = converted(net("torchvision basic", False))
    with pytest.raises((RuntimeError, packlight.InputError), match="channels"):
        model(torch.randn(shape, requires_grad=True))


# ---- as any layer --------------------------------------------------------------------------------


@every_block
def test_second_derivatives_raise(name):
    model = converted(net(name, False))
    x = images().requires_grad_()
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
@every_shortcut
@every_block
def test_within_a_checkpoint(name, down, reentrant):
    model = converted(net(name, down))
    y, gradients, _ = step(model, images())

    def run(x):
        for block in model.blocks:
            x = checkpoint(block, x.clone(), use_reentrant=reentrant)
        return model.head(x)

    again, others, _ = step(model, images(), run=run)
    assert torch.equal(y, again)
    for a, b in zip(gradients, others, strict=True):
        # Sums begin anew at each checkpoint, with packs of inputs.
        assert relative_error(a, b) < 0.2


@pytest.mark.parametrize("reentrant", [False, True])
@every_block
def test_several_blocks_within_one_checkpoint_keep_alike_in_both_passes(name, reentrant):
    """The second pass has no forward of the model around it, which would cover the calls."""
    model = converted(Net(*(BLOCKS[name](False) for _ in range(3))))
    y, gradients, _ = step(model, images())

    def run(x):
        whole = nn.Sequential(*model.blocks)
        return model.head(checkpoint(whole, x.clone(), use_reentrant=reentrant))

    again, others, _ = step(model, images(), run=run)
    assert torch.equal(y, again)
    for a, b in zip(gradients, others, strict=True):
        assert relative_error(a, b) < 0.2


@every_block
def test_compiled_blocks_run_part_by_part(name):
    model = converted(net(name, True))
    expected, gradients, _ = step(model, images())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y, others, _ = step(model, images(), run=compiled)
    torch._dynamo.reset()
    torch.testing.assert_close(y, expected)
    for a, b in zip(gradients, others, strict=True):
        assert relative_error(a, b) < 0.2


@every_block
def test_copies_files_and_back(name):
    plain = net(name, True)
    model = converted(plain)
    x = images()
    y, gradients, _ = step(model, x)
    for other in (copy.deepcopy(converted(plain)), pickle.loads(pickle.dumps(converted(plain)))):
        again, others, _ = step(other, x)
        assert torch.equal(y, again)
        for a, b in zip(gradients, others, strict=True):
            assert torch.equal(a, b)
    packlight.revert(model)
    for a, b in zip(model.modules(), plain.modules(), strict=True):
        assert type(a) is type(b)


def test_a_block_whose_code_differs_is_left_alone():
    class Other(of_torchvision.BasicBlock):
        def forward(self, x):
            return self.relu(self.bn1(self.conv1(x)) - x)

    model = converted(Net(Other(WIDTH, WIDTH)))
    assert NODE not in nodes(model(images().requires_grad_()))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_copy_of_the_code_is_known(axes):
    conv, norm = getattr(nn, f"Conv{axes}d"), getattr(nn, f"BatchNorm{axes}d")

    class Mine(nn.Module):
        forward = of_torchvision.BasicBlock.forward

        def __init__(self):
            super().__init__()
            self.conv1 = conv(WIDTH, WIDTH, 3, padding=1)
            self.conv2 = conv(WIDTH, WIDTH, 3, padding=1)
            self.bn1, self.bn2 = norm(WIDTH), norm(WIDTH)
            self.relu, self.downsample = nn.ReLU(), None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Mine()

        def forward(self, x):
            y = self.block(x * 1)
            y += 1  # which a view that a function made would not allow
            return y

    plain = Model()
    model = converted(plain)
    x = torch.randn(8, WIDTH, *(4,) * axes)
    assert nodes(copy.deepcopy(model)(x)).count(NODE) == 2
    y, gradients, _ = step(model, x)
    with torch.no_grad():  # torch's own ReLU keeps what is written to
        assert torch.equal(y, plain(x))
    others = step(part_by_part_of(model, norm), x)[1]
    for a, b in zip(gradients, others, strict=True):
        assert relative_error(a, b) < 1e-4


def test_gradients_that_are_not_asked_for():
    model = converted(net("torchvision bottleneck", True))
    every = step(model, images())[1]
    names = [name for name, _ in model.named_parameters()]
    for part in ("bn1.weight", "bn2.bias", "bn3"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part not in name)
        _, found, _ = step(model, images())
        assert NODE in nodes(model(images()))
        wanted = [g for name, g in zip(["x", *names], every, strict=True) if part not in name]
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)


def test_gradients_add_up_over_two_passes():
    model = converted(net("timm bottleneck", True))
    x, total = images(), {}
    for _ in range(2):
        packlight.manual_seed(2)
        model(x).square().sum().backward()
        if not total:
            total = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, 2 * total[name]) < 1e-6


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@every_block
def test_data_parallel(name, process_group):
    model = converted(net(name, True))
    y, gradients, _ = step(model, images())
    parallel = nn.parallel.DistributedDataParallel(model)
    again, others, _ = step(model, images(), run=parallel)
    assert NODE in nodes(parallel(images()))
    assert torch.equal(y, again)
    for a, b in zip(gradients, others, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("part", ["block", "convolution"])
def test_fully_sharded(part, process_group):
    """A convolution that is sharded by itself gathers its weight in a hook, and runs alone."""
    model = converted(net("timm bottleneck", True))
    y, gradients, _ = step(model, images())
    for block in model.blocks:
        torch.distributed.fsdp.fully_shard(block if part == "block" else block.conv2)
    packlight.manual_seed(2)
    x = images().requires_grad_()
    again = model(x)
    found = nodes(again).count(NODE)
    assert found == convolutions(model) - (0 if part == "block" else 2)
    again.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(y, again)
    of_parameters = [p.grad for p in model.parameters()]
    for a, b in zip(gradients, [x.grad, *of_parameters], strict=True):
        whole = b.full_tensor() if hasattr(b, "full_tensor") else b
        assert relative_error(whole, a) < 1e-5


def test_every_pass_keeps_the_same_where_hooks_are_not_worth_it():
    """The first pass of a network says that they are not; a gate within a block, the outermost that
    a later pass enters with calls uncovered, would write notes that the block does not read."""
    layers = of_timm.ResNet(of_timm.Bottleneck, [1] * 4, 10, channels=(WIDTH,) * 4, stem_width=8,
                            block_args={"attn_layer": "se"})  # fmt: skip
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    packlight.convert(layers)
    first, *later = [packlight.profile(layers, images).activation_bytes for _ in range(3)]
    assert later == [first, first]
