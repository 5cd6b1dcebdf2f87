"""Residual sums rebuilt from the packs of their terms: bytes, values, gradients, stale notes."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import DEFAULT_METHODS, FixedPoint, GroupQuant, sharing
from packlight.groupquant import fixed_point
from packlight.groupquant.fixed_point import reference, residual, residual_kernels, residual_ops
from packlight.groupquant.fixed_point.method import bin_width
from packlight.groupquant.fixed_point.packs import ResidualRebuild
from packlight.layers import product
from packlight.packing.layout import packed_bytes
from packlight.packing.reference import pack
from tests.helpers import (
    DTYPES,
    dtype_name,
    every_device,
    every_kernel_dtype,
    kept_bytes,
    pack_bytes,
    relative_error,
)
from tests.resnets import KITS, Block, Bottleneck, resnet18, resnet50

EXACT = KITS["exact"]
NEAREST = (FixedPoint(4), GroupQuant(4, rounding="nearest"))
N, C, SIZE = 8, 16, 8
ELEMENTS = N * C * SIZE**2
CODES, MASK, TABLE = packed_bytes(ELEMENTS, 4), packed_bytes(ELEMENTS, 1), 6 * C * 4


class Chain(nn.Module):
    """Blocks one after the other, and a convolution that reads what the last one makes."""

    def __init__(self, *blocks, channels=C):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(channels, 4, 1, bias=False)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)

    def forward(self, x):
        x = x.clone()  # a leaf takes no part
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Tail(nn.Module):
    """The end of a block alone: relu(batch_norm(x) + x), the sum written one way or another."""

    def __init__(self, way, inplace=False):
        super().__init__()
        self.norm, self.relu, self.way = nn.BatchNorm2d(C), nn.ReLU(inplace), way

    def forward(self, x):
        return self.relu(WAYS[self.way](self.norm(x), x))


def _iadd(y, x):
    y += x
    return y


WAYS = {
    "y + x": lambda y, x: y + x,
    "x + y": lambda y, x: x + y,
    "y += x": _iadd,
    "y.add(x)": lambda y, x: y.add(x),
    "y.add_(x)": lambda y, x: y.add_(x),
    "torch.add": lambda y, x: torch.add(y, x),
}
IN_PLACE = ("y += x", "y.add_(x)")


def converted(model, methods=NEAREST, **options):
    model = copy.deepcopy(model)
    packlight.convert(model, methods, **{"functional": True, **options})
    return model


def basic(count):
    return Chain(*(Block(EXACT, C, C, 1) for _ in range(count)))


def images(channels=C, size=SIZE):
    return torch.randn(N, channels, size, size)


def kept(model, x):
    return packlight.profile(model, x.requires_grad_()).activation_bytes


def gradients(model, x, run=None):
    x = x.detach().clone().requires_grad_()
    y = (model if run is None else run)(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return torch.autograd.grad(y, [x, *model.parameters()], dy)


def noted(tensor):
    """The rebuilt tensor, None where there is no note that holds."""
    found = sharing.pack_of(tensor)
    return None if found is None else found.rebuild(tensor.dtype, *found.tensors)


def batch_norm(x, **options):
    return fixed_point.batch_norm(x, None, None, training=True, **options)


def hidden(*shape):
    return torch.randn(shape or (N, C, SIZE, SIZE), requires_grad=True)


# --- Bytes.


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_end_of_a_block_keeps_five_bits_an_element(layout):
    x = images().to(memory_format=layout)
    block = CODES + TABLE + CODES + TABLE + MASK  # two batch norms, and the mask of the sum's ReLU
    for count in (1, 2, 4):
        model = converted(basic(count))
        assert kept(model, x) == pack_bytes(ELEMENTS) + count * block
        assert kept_bytes(lambda m=model: m(x.requires_grad_())) == (
            pack_bytes(ELEMENTS) + count * block + sum(p.numel() * 4 for p in weights(model))
        )


def weights(model):
    return [p for p in model.parameters() if p.dim() > 1]


def test_a_block_that_changes_its_width_keeps_two_codes_and_a_mask():
    model = Chain(Bottleneck(EXACT, C, C, 2), Bottleneck(EXACT, 4 * C, C, 1), channels=4 * C)
    wide = N * 4 * C * SIZE**2 // 4  # at the ends of both blocks
    codes, mask, table = packed_bytes(wide, 4), packed_bytes(wide, 1), 6 * 4 * C * 4
    first = pack_bytes(ELEMENTS) + (CODES + TABLE) + (packed_bytes(wide // 4, 4) + TABLE)
    first += 2 * (codes + table) + mask
    second = 2 * (packed_bytes(wide // 4, 4) + TABLE) + codes + table + mask
    assert kept(converted(model), images()) == first + second


def test_without_calls_covered_nothing_changes():
    x, model = images(), converted(basic(2), functional=False)
    block = 2 * (CODES + TABLE) + MASK
    assert kept(model, x) == 3 * pack_bytes(ELEMENTS) + 2 * block


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_a_sum(way):
    plain = Chain(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(), Tail(way, way in IN_PLACE))
    model, x = converted(plain), images()
    expected = pack_bytes(ELEMENTS) + 2 * (CODES + TABLE) + MASK
    assert kept(model, x) == expected
    assert torch.equal(model(x), plain(x))


def test_a_chain_is_cut_where_it_is_long():
    x = images()
    for count in (8, 9, 17, 18):
        model = converted(basic(count))
        packs = 1 + count // (residual.MAX_LINKS + 1)
        assert kept(model, x) == packs * pack_bytes(ELEMENTS) + count * (2 * (CODES + TABLE) + MASK)


@pytest.mark.parametrize("width", [8, 16])
def test_a_resnet_50_keeps_at_least_six_times_less(width):
    x = torch.randn(8, 3, 64, 64)
    plain = resnet50(EXACT, nn.MaxPool2d(3, 2, 1), width)
    with torch.autocast("cpu", torch.bfloat16):
        assert kept(plain, x) > 6 * kept(converted(plain, DEFAULT_METHODS), x)


def test_a_resnet_50_at_the_sizes_of_training():
    with torch.device("meta"):
        plain = resnet50(EXACT, nn.MaxPool2d(3, 2, 1)).bfloat16()
        x = torch.empty(128, 3, 224, 224, dtype=torch.bfloat16)
    assert kept(plain, x) > 6.6 * kept(converted(plain, DEFAULT_METHODS), x)


# --- What is rebuilt is right.


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_forward_is_torch_s(dtype):
    plain, x = basic(3).to(dtype), images().to(dtype)
    assert torch.equal(converted(plain)(x), plain(x))


def test_what_is_rebuilt_is_the_sum_of_what_the_terms_are():
    terms = [batch_norm(hidden()) for _ in range(4)]
    values = [noted(term) for term in terms]
    y, expected = terms[0], values[0]
    for i, (term, value) in enumerate(zip(terms[1:], values[1:], strict=True)):
        y = residual.add(y, term)
        expected = expected + value
        torch.testing.assert_close(noted(y), expected)
        if i != 1:  # one link without a mask
            y = fixed_point.relu(y, inplace=True)
            expected = torch.where(y > 0, expected, 0)
            torch.testing.assert_close(noted(y), expected)
    found = sharing.pack_of(y)
    assert found.rebuild.start is None  # a batch norm, so that all is one operator
    assert found.rebuild.masked == (False, True, False, True)


def test_the_error_stays_that_of_a_term():
    y = None
    for links in range(1, 8):
        term = batch_norm(hidden(64, C, 8, 8))
        y = term if y is None else fixed_point.relu(residual.add(y, term))
        error = relative_error(noted(y), y)
        assert 0.05 < error < 0.15, links


def test_the_weight_gradient_is_that_of_the_rebuilt_sum():
    model, x = converted(basic(3)), images()
    seen = []
    model.head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    y = model(x)
    rebuilt = noted(seen[0])
    assert isinstance(sharing.pack_of(seen[0]).rebuild, ResidualRebuild)
    assert torch.equal(rebuilt != 0, seen[0] > 0)
    dy = torch.randn_like(y)
    dh, dweight = torch.autograd.grad(y, [seen[0], model.head.weight], dy)
    assert torch.equal(dweight, torch.nn.grad.conv2d_weight(rebuilt, (4, C, 1, 1), dy))
    torch.testing.assert_close(dh, torch.nn.grad.conv2d_input(dh.shape, model.head.weight, dy))


def test_the_gradient_of_a_sum_is_exact():
    a, b = hidden(), hidden()
    y, other = batch_norm(a), fixed_point.relu(batch_norm(b))
    z = fixed_point.relu(residual.add(y, other))
    dz = torch.randn_like(z)
    for gradient in torch.autograd.grad(z, [y, other], dz):
        assert torch.equal(gradient, torch.where(z > 0, dz, 0))


def test_gradients_are_near_the_exact_ones():
    plain, x = basic(3), images()
    # 8 bits, since the errors of all blocks add up in the first.
    model = converted(plain, (FixedPoint(8), GroupQuant(8, rounding="nearest")))
    for ours, exact in zip(gradients(model, x), gradients(plain, x), strict=True):
        assert (ours - exact).norm() < 0.1 * exact.norm()


def test_a_sum_on_the_pack_of_a_convolution_s_input():
    """No batch norm at the start, and stochastic rounding: what the convolution keeps serves."""
    x = hidden()
    h = x * 1.0
    y = batch_norm(packlight.groupquant.conv2d(h, torch.randn(C, C, 1, 1, requires_grad=True)))
    start, code = noted(h), noted(y)
    y = fixed_point.relu(residual.add_(y, h), inplace=True)
    torch.testing.assert_close(noted(y), torch.where(y > 0, start + code, 0))


# --- What has no note.


def test_a_batch_norm_added_to_itself_compiles(fresh_compiler):
    """Its codes would stand twice among what a reader saves, which the tracer refuses."""
    y = batch_norm(hidden())
    assert noted(residual.add(y, y)) is None
    conv = packlight.groupquant.Conv2d(C, C, 1, rounding="nearest")

    def run(x):
        y = batch_norm(x)
        return conv(residual.add(y, y))

    x = hidden()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for leaf in (x, conv.weight):
        (expected,) = torch.autograd.grad(run(x).square().sum(), leaf)
        (actual,) = torch.autograd.grad(compiled(x).square().sum(), leaf)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_sums_that_are_torch_s_and_no_more():
    x = hidden()
    h = fixed_point.relu(batch_norm(hidden()))
    row = torch.randn(C, 1, 1)
    channels_last = batch_norm(x.to(memory_format=torch.channels_last))
    for sum_of in (
        lambda y: (residual.add(y, 1.0), torch.add(y, 1.0)),
        lambda y: (residual.add(y, row), torch.add(y, row)),
        lambda y: (residual.add(y, h, alpha=2), torch.add(y, h, alpha=2)),
        lambda y: (residual.add(y, x), torch.add(y, x)),
        lambda y: (residual.add(y, h.double()), torch.add(y, h.double())),
        lambda y: (residual.add(y, channels_last), torch.add(y, channels_last)),
        lambda y: (residual.add(h, h), torch.add(h, h)),
        lambda y: (residual.add(y, batch_norm(hidden(), bits=8).relu()), None),
    ):
        ours, plain = sum_of(batch_norm(x))
        assert plain is None or torch.equal(ours, plain)
        assert noted(ours) is None
    y = batch_norm(x)
    assert noted(residual.add_(y, 1.0)) is None
    with torch.no_grad():
        assert noted(residual.add(batch_norm(x), h)) is None
    leaf = hidden()
    y = batch_norm(packlight.groupquant.conv2d(leaf, torch.randn(C, C, 1, 1, requires_grad=True)))
    assert noted(leaf) is not None
    assert noted(residual.add(y, leaf)) is None


def test_chains_of_other_bits_or_of_long_packs_are_not_extended():
    y = residual.add(batch_norm(hidden()), batch_norm(hidden()))
    assert noted(residual.add(y, batch_norm(hidden(), bits=8))) is not None  # four tensors: a start
    y = fixed_point.relu(y)
    assert noted(residual.add(y, batch_norm(hidden()))) is not None
    assert noted(residual.add(y, batch_norm(hidden(), bits=8))) is None
    view = y.view(N, C, SIZE**2)
    assert noted(view) is not None
    assert noted(residual.add(view, batch_norm(hidden(N, C, SIZE**2)))) is None


def test_a_view_of_a_batch_norm_is_no_link():
    y = batch_norm(hidden(N, 4 * C, SIZE)).view(N, C, 4 * SIZE)
    z = batch_norm(hidden(N, C, 4 * SIZE))
    expected = noted(y) + noted(z)
    torch.testing.assert_close(noted(residual.add(y, z)), expected)


def test_no_stale_note():
    h = fixed_point.relu(batch_norm(hidden()))
    y = batch_norm(hidden())
    y.mul_(2)
    assert noted(residual.add(y, h)) is None
    y = batch_norm(hidden())
    z = residual.add_(y, h)
    assert z is y
    assert noted(z) is not None
    z.mul_(2)
    assert noted(z) is None
    z = residual.add(batch_norm(hidden()), h)
    expected = noted(z)
    h.mul_(2)  # a term overwritten later: its codes are what they were
    torch.testing.assert_close(noted(z), expected)


def test_an_overwritten_identity_is_noted_anew():
    h, y = fixed_point.relu(batch_norm(hidden())), batch_norm(hidden())
    expected = noted(h) + noted(y)
    torch.testing.assert_close(noted(residual.add_(h, y)), expected)


def test_a_sum_keeps_no_pack_longer_than_the_graph():
    y = fixed_point.relu(residual.add(batch_norm(hidden()), batch_norm(hidden())))
    tensors = [weakref.ref(tensor) for tensor in sharing.pack_of(y).tensors]
    y.sum().backward()
    gc.collect()
    assert [ref() for ref in tensors] == [None] * 5
    assert sharing.pack_of(y) is None


READERS = {
    "dropout": lambda y: packlight.fewbit.dropout(y, 0.5),
    "relu behind dropout": lambda y: fixed_point.relu(packlight.fewbit.dropout(y, 0.5)),
    "product": lambda y: product.mul(y, y.detach().clone().requires_grad_(), method=NEAREST[1]),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_is_made_of_a_sum_keeps_no_pack_longer_than_the_graph(read):
    y = read(residual.add(batch_norm(hidden()), batch_norm(hidden())))
    found = sharing.pack_of(y)  # its readers share the packs as long as the graph is there
    assert (found.rebuild(y.dtype, *found.tensors) - y).norm() < 0.2 * y.norm()
    tensors = [weakref.ref(tensor) for tensor in found.tensors]
    del found
    y.sum().backward()
    gc.collect()
    assert [ref() for ref in tensors] == [None] * len(tensors)
    assert sharing.pack_of(y) is None


# --- Modes.


def test_eval_and_no_grad():
    plain, x = basic(2), images()
    model = converted(plain)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    plain.eval(), model.eval()
    for ours, theirs in zip(gradients(model, x), gradients(plain, x), strict=True):
        assert torch.equal(ours, theirs)


def test_autocast():
    plain, x = basic(2), images()
    model = converted(plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))
        expected = pack_bytes(ELEMENTS) + 2 * (2 * (CODES + TABLE) + MASK)
        assert kept(model, x.bfloat16()) == expected


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("each", [True, False])
def test_checkpoint(reentrant, each):
    model, x = converted(basic(2)), images()
    expected = gradients(model, x)

    def run(x):
        if not each:
            return checkpoint(model, x, use_reentrant=reentrant)
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.head(x)

    x.requires_grad_()
    run(x).backward(torch.randn(N, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(1)))
    actual = [x.grad, *(parameter.grad for parameter in model.parameters())]
    if each:  # the sums were packed afresh, so the weights that read them see another rebuilt value
        for ours, theirs in zip(actual, expected, strict=True):
            assert (ours - theirs).norm() < 0.2 * theirs.norm()
    else:
        torch.testing.assert_close(actual, list(expected))


@pytest.mark.parametrize("way", ["y + x", "y += x"])
def test_compiles_to_the_same_gradients_and_bytes(way, fresh_compiler):
    model = converted(Chain(*(Block(EXACT, C, C, 1) for _ in range(2)), Tail(way, way in IN_PLACE)))
    x = images().requires_grad_()
    expected, bytes_kept = gradients(model, x), kept_bytes(lambda: model(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = gradients(model, x, compiled)
    torch.testing.assert_close(actual, expected)
    assert kept_bytes(lambda: compiled(x)) == bytes_kept


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_compiled_one_by_one_pack_at_their_start(fresh_compiler):
    model, x = converted(basic(2)), images().requires_grad_()
    alone = kept_bytes(lambda: converted(basic(2), functional=False)(x))
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert kept_bytes(lambda: model(x)) <= alone
    for gradient in gradients(model, x):
        assert gradient.isfinite().all()


def test_predictions_see_it_too():
    model, x = converted(basic(2)), images().requires_grad_()
    assert packlight.predict(model, x).activation_bytes == kept(model, x)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_small_resnet_trains_like_exact(bits):
    x = torch.randn(64, 3, 16, 16)
    labels = (x[:, 0, :8].mean((1, 2)) > x[:, 1, 8:].mean((1, 2))).long()

    def losses(methods):
        packlight.manual_seed(1)
        model = resnet18(EXACT, width=8)
        if methods:
            packlight.convert(model, methods, functional=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(25):
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    ours, exact = (list(losses(m)) for m in ((FixedPoint(bits), GroupQuant(bits)), None))
    assert ours[0] == exact[0]
    assert sum(exact[-3:]) < 0.9 * exact[0]
    assert sum(ours[-3:]) < sum(exact[-3:]) + 0.3


# --- Kernels and the operator.


def chain_of(shape, dtype, masked, bits, layout, device="cpu"):
    """The arguments of the operator after the first."""
    tensors, stride = [], None
    for has_mask in masked:
        x = layout(torch.randn(shape, device=device).to(dtype))
        weight, bias = torch.randn(2, shape[1], device=device)
        y, codes, table = reference.batch_norm(
            x, weight, bias, None, None, 0.1, 1e-5, bits, bin_width(bits, None)
        )
        stride = y.stride()
        tensors += (codes, table)
        if has_mask:
            signs = torch.randint(2, (y.numel(),), dtype=torch.uint8, device=device)
            tensors.append(pack(signs, 1))
    codes, table, *more = tensors
    return codes, table, more, list(masked), list(shape), list(stride), bits, dtype


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
}
MASKS = [(True,), (False,), (False, True), (True, False, True), (True,) * 4, (False, True) * 3]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("masked", MASKS, ids=len)
@every_kernel_dtype
@every_device
def test_kernels_equal_the_reference(device, dtype, masked, layout):
    # Batches of 8 have all codes of a word in one channel; others have not.
    for shape, bits in (((8, 16, 4, 4), 4), ((5, 7, 9, 3), 4), ((3, 5, 2, 2), 8)):
        arguments = chain_of(shape, dtype, masked, bits, layout, device)
        start = layout(torch.randn(shape, device=device).to(dtype))
        for x in (None, start, torch.randn(shape, device=device).to(dtype)):
            ours = residual_kernels.residual(x, *arguments)
            theirs = residual_ops._residual(x, *arguments)
            tolerance = {torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 3e-2)
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
            assert ours.stride() == theirs.stride()
            if masked[-1]:
                assert torch.equal(ours == 0, theirs == 0)


def test_an_empty_sum():
    arguments = list(chain_of((8, 4, 3, 3), torch.float32, (True,), 4, LAYOUTS["contiguous"]))
    arguments[4] = [0, 4, 3, 3]
    assert residual_kernels.residual(None, *arguments).shape == (0, 4, 3, 3)


def test_opcheck():
    for layout in LAYOUTS.values():
        arguments = chain_of((5, 4, 3, 3), torch.float32, (False, True), 4, layout)
        operator = torch.ops.packlight.fixed_point_residual.default
        torch.library.opcheck(operator, (None, *arguments))
        torch.library.opcheck(operator, (layout(torch.randn(5, 4, 3, 3)), *arguments))


def test_values_that_are_not_finite_come_back_so():
    x = hidden().detach()
    x[2, 1, 3, 3] = torch.nan
    y = batch_norm(x.requires_grad_())
    z = fixed_point.relu(residual.add(y, batch_norm(hidden())))
    assert z[:, 1].isnan().all()
    assert noted(residual.add(y, batch_norm(hidden())))[:, 1].isnan().all()
    assert F.relu(z)[:, 0].isfinite().all()
