"""No kernel writes outside of its outputs: every one, with whole last blocks and ragged ones."""

import importlib
import pkgutil

import pytest
import torch

import packlight
from packlight._launch import quick
from packlight._seeds import operands
from packlight.fewbit import dropout_kernels, pooling_kernels
from packlight.fewbit import kernels as few_bit
from packlight.groupquant import gated_kernels as group_gated
from packlight.groupquant import kernels as group
from packlight.groupquant import norm_kernels as group_norm
from packlight.groupquant import post_norm_kernels as post_norm
from packlight.groupquant.fixed_point import kernels as fixed
from packlight.groupquant.fixed_point import residual_kernels
from packlight.groupquant.fixed_point.method import bin_width
from packlight.groupquant.grouping import MINMAX, OFFSET, ROTATED
from packlight.head import kernels as head
from packlight.inverted import kernels as inverted
from packlight.inverted import norm_kernels as inverted_norm
from packlight.low_rank import kernels as low_rank
from packlight.packing import kernels as packing
from packlight.rotary import kernels as rotary
from packlight.sketch import kernels as sketch
from tests.guards import BYTES, Guards

FP32 = torch.float32


def seed():
    return torch.tensor([7])


def draw():
    return operands(seed())


def values(guards, *shape, dtype=FP32):
    return guards.of(torch.randn(*shape).to(dtype))


# Each runs the kernels of a module on tensors between guards. Its sizes begin with whole blocks and
# ragged ones.


def masks(guards, n):
    mask = guards.of(torch.rand(n) < 0.5)
    packing.unpack_mask(packing.pack_mask(mask.view(torch.uint8), (1,)), (n,), (1,))


def few_bits(guards, n):
    x, borders = values(guards, n), (-1.0, 0.0, 1.0)
    few_bit.encode(x, 2, borders, "none", 0.0, 1, (1,))
    few_bit.activation_(guards.of(x), "silu", (), 2, borders, "none", 0.0, 1)
    _, codes = few_bit.activation(x, "silu", (), 2, borders, "none", 0.0, 1)
    few_bit.decode_backward(x, codes, 2, (0.0, 0.1, 0.5, 1.0), False, (1,))


def dropouts(guards, n):
    x = values(guards, n)
    dropout_kernels.dropout(x, *draw(), 0.3, True)
    dropout_kernels.dropout_(x, *draw(), 0.3, True)
    dropout_kernels.dropout_mask(seed(), n, 0.3)


def pooling(guards, length):
    x = values(guards, 2, 3, length, 8)
    window = ((2, 2), (2, 2), (0, 0), (1, 1))
    y, codes = pooling_kernels.max_pool(x, *window, False)
    pooling_kernels.max_pool_backward(y, codes, *window, x.shape[2:], x.stride())


def inverses(guards, n):
    x = values(guards, n)
    y, bits = inverted.activation(x, "silu")
    inverted.activation_(guards.of(x), "silu")
    inverted.backward(x, y, bits, "silu", ())


def inverted_norms(guards, rows, width):
    x, weight, bias = (values(guards, *shape) for shape in ((rows, width), (width,), (width,)))
    for channels, cast in ((None, None), (torch.tensor([1, 5]), torch.bfloat16)):
        forward = (x, (width,), weight, bias, channels, 1e-5, True, FP32, cast)
        y, narrow, rstd, exact = inverted_norm.row_norm(*forward)
        y, exact = (y, None) if cast is None else (narrow, exact)
        kept = (weight, bias, channels, rstd, exact)
        inverted_norm.row_norm_backward(x, y, (width,), *kept, True, FP32, True, True)


def wide_inverted_norms(guards, rows, width):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FORWARD_WIDTH", "BACKWARD_WIDTH", "WIDE_BLOCK"):
            patch.setattr(inverted_norm, name, 16)
        inverted_norms(guards, rows, width)


def packs(guards, n, bits, code=MINMAX):
    groups = (bits, 64, code)
    x = values(guards, n)
    pack = group.quantize(x, (1,), groups, *draw())
    _, *inputs = group.activation(x, "silu", (), groups, *operands(None))
    layout = ((n,), (1,), n, groups, FP32)
    group.dequantize(*pack, *layout, "", (), None, None)
    group.dequantize(*inputs, *layout, "silu", (), None, None)
    group.activation_backward(x, *inputs, "silu", (), (1,), groups)
    _, *both = group_gated.gated(x, x, "silu", groups, *draw())
    group_gated.gated_backward(x, *both, "silu", (1,), groups, True)
    group_gated.gated_backward_(x.clone(), *both, "silu", groups)
    group_gated.gated_product(*both, "silu", (n,), (1,), groups, FP32)


def packed_rows(guards, rows, width, bits, code=MINMAX):
    groups = (bits, 64 if code == ROTATED else 32, code)
    x, weight, bias = (values(guards, *shape) for shape in ((rows, width), (width,), (width,)))
    _, *kept = group_norm.norm(x, width, weight, bias, 1e-5, True, groups, *draw())
    group_norm.norm_backward(x, *kept[:3], weight, True, True, True, groups)
    layout = ((rows, width), (width, 1), width, groups, FP32)
    group.dequantize(*kept[:2], *layout, "", (), weight, bias)


def norms_behind_sums(guards, rows, width, code=MINMAX):
    x, residual, weight, bias = (
        values(guards, *shape) for shape in ((rows, width), (rows, width), (width,), (width,))
    )
    groups = (4, 64, code)
    drawn = (*draw(), *draw())
    _, *kept, mask = post_norm.post_norm(x, residual, weight, bias, 0.3, 1e-5, FP32, groups, *drawn)
    given = (*kept[:3], weight, mask, 0.3, FP32, FP32, True, True, groups)
    post_norm.post_norm_backward(x, *given)


def batch_norms(guards, shape, bits, stride):
    x = values(guards, *shape)
    x = guards.of(x.contiguous(memory_format=torch.channels_last)) if stride else x
    weight, bias, mean, var = (values(guards, shape[1]) for _ in range(4))
    y, codes, table = fixed.batch_norm(
        x, weight, bias, mean, var.abs_(), 0.1, 1e-5, bits, bin_width(bits, None)
    )
    layout = (tuple(shape), y.stride(), bits, FP32)
    fixed.batch_norm_backward(x, codes, table, y.stride(), bits)
    fixed.relu_backward(x, codes, table, y.stride(), bits)
    given = (weight, bias, mean, var, 0.1, 1e-5, bits, bin_width(bits, None))
    z = guards.of(x.clone())
    fixed.batch_norm_(z, *given, True)
    *_, signs = fixed.batch_norm_sum_(z, *given, y)
    fixed.batch_norm_backward(x, codes, table, y.stride(), bits, True)
    fixed.batch_norm_backward(x, codes, table, y.stride(), bits, False, signs)
    fixed.rebuild(codes, table, *layout, True)
    mask = packing.pack_mask((y > 0).view(torch.uint8), y.stride())
    kept = [mask, codes, table]
    residual_kernels.residual(None, codes, table, kept, (True, False), *layout)
    residual_kernels.residual(x, codes, table, kept, (True, False), *layout)


def sketches(guards, tokens, features, rows):
    x = values(guards, tokens, features)
    for kind in ("gaussian", "rademacher", "srht"):
        sketch.apply(x, seed(), kind, values(guards, rows, features))
    sketch.row_statistics(x, seed())
    index = torch.arange(rows, dtype=torch.int32)
    sketch.gather(x, index, None, values(guards, rows, features))


def heads(guards, rows, classes):
    z = values(guards, rows, classes)
    logsumexp, _ = head.row_sums(z, 0.5, 4.0)
    targets = torch.arange(rows)
    ons = (values(guards, rows) for _ in range(3))
    head.gradient_(z, logsumexp, targets, *ons, 1, 0.5, 4.0)


def rotations(guards, batch, heads, groups, length, size):
    q, k = (values(guards, batch, length, n, size) for n in (heads, groups))
    angles = [values(guards, 1, length, size) for _ in range(2)]
    for back in (False, True):
        rotary.rotary(q.transpose(1, 2), k.transpose(1, 2), *angles, back)


def low_ranks(guards, rows, width, rank):
    x = values(guards, rows, width, dtype=torch.bfloat16)
    low, factor = values(guards, rows, rank), values(guards, rank, width)
    low_rank.narrowed(x, factor.t())
    low_rank.add_widened_(x, low, factor, 2.0, False)
    low_rank.outer(x, low)


RUNS = {
    "masks": (masks, [(4096,), (4173,), (1,)]),
    "few bits": (few_bits, [(4096,), (4173,)]),
    "dropout": (dropouts, [(4096,), (4173,)]),
    "max pooling": (pooling, [(128,), (22,)]),
    "inverses": (inverses, [(4096,), (4173,)]),
    "inverted norms": (inverted_norms, [(4, 64), (3, 50)]),
    "wide inverted norms": (wide_inverted_norms, [(4, 64), (3, 50)]),
    "packs": (
        packs,
        [
            (4096, 4),
            (4173, 4),
            (1050, 8),
            (1050, 2),
            (1050, 3, OFFSET),
            (1050, 3, ROTATED),
        ],
    ),
    "rows of packs": (
        packed_rows,
        [(4, 128, 4), (3, 72, 4), (3, 72, 8)],
    ),
    "rows of rotated packs": (packed_rows, [(3, 72, 4, ROTATED), (8, 192, 4, ROTATED)]),
    "norms behind sums": (norms_behind_sums, [(8, 128), (8, 72), (16, 72, ROTATED)]),
    "batch norms": (
        batch_norms,
        [((4, 8, 8, 16), 4, False), ((3, 5, 7, 3), 4, False), ((3, 5, 7, 3), 8, True)],
    ),
    "rotations": (rotations, [(2, 4, 2, 4, 64), (1, 3, 1, 3, 18)]),
    "heads": (heads, [(4, 2048), (3, 2050), (1, 1)]),
    "factors of low rank": (low_ranks, [(1024, 128, 16), (1030, 50, 5)]),
    "sketches": (sketches, [(128, 32, 32), (101, 33, 30), (20, 5, 4)]),
}
CASES = [
    pytest.param(run, size, id=f"{name} {size}")
    for name, (run, sizes) in RUNS.items()
    for size in sizes
]


@pytest.mark.parametrize(("run", "size"), CASES)
def test_kernels_write_nothing_outside_of_their_outputs(run, size):
    with Guards() as guards:
        run(guards, *size)
    assert guards.intact()


def test_what_is_written_outside_is_seen():
    for place in (-1, 10):
        with Guards() as guards:
            x = torch.empty(10, dtype=torch.uint8)
        assert guards.intact()
        x.as_strided((1,), (1,), BYTES + place).fill_(0)
        assert not guards.intact()


def test_every_kernel_is_among_the_runs(monkeypatch):
    """Found in the package's modules, launched by the runs of the ragged sizes."""
    known, launched = {}, set()
    for module in pkgutil.walk_packages(packlight.__path__, "packlight."):
        if module.name.endswith("kernels"):
            for name, value in vars(importlib.import_module(module.name)).items():
                if isinstance(value, quick):
                    known[id(value)] = f"{module.name}.{name}"

    def launch(self, *_):
        launched.add(id(self))

    monkeypatch.setattr(quick, "launch", launch)
    for run, sizes in RUNS.values():
        with Guards() as guards:
            run(guards, *sizes[1])
    assert not {name for key, name in known.items() if key not in launched}
