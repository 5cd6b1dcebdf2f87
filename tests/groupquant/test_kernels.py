"""Fused kernels against their references, in the interpreter or on the device."""

import os

import pytest
import torch
import torch.nn.functional as F

from packlight import _seeds
from packlight._seeds import Drawn, operands
from packlight.fewbit import dropout_kernels
from packlight.groupquant import (
    gated_kernels,
    kernels,
    norm_kernels,
    norm_reference,
    ops,
    reference,
)
from packlight.groupquant.grouping import MINMAX, OFFSET, ROTATED
from tests.groupquant.layers import LAYERS
from tests.helpers import assert_as_near_as_torch, every_device, every_kernel_dtype, many_values
from tests.layers import TRUTH

every_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)
every_bits = pytest.mark.parametrize("bits", [2, 3, 4, 8])
FP32 = torch.float32
# The interpreter truncates fp32 to bf16; a derivative is good to 1e-4.
TOLERANCE = {torch.float32: 3e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(a, b, dtype):
    torch.testing.assert_close(a.float(), b.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def counts(device):
    return (700, 4096) if device == "cpu" else (700, 2**20 + 77, 2**22)


@every_device
@every_layer
@every_kernel_dtype
def test_forward_is_within_an_ulp_of_torch_or_as_near_the_truth(layer, dtype, device):
    x = many_values(dtype, device)
    y, _, _ = kernels.activation(x, layer.name, layer.parameters, (4, 128), *operands(None))
    truth = TRUTH.get(layer.name, layer.plain)(x.double(), *layer.arguments)
    assert_as_near_as_torch(y, layer.torch(x), truth)


@every_device
@every_layer
@every_bits
def test_gradient_and_rebuilt_output_equal_the_reference(layer, bits, device):
    for count in counts(device):
        x = torch.randn(count, device=device) * 3
        dy = torch.randn(count, device=device)
        f = (layer.name, layer.parameters)
        _, codes, scales = reference.activation(x, *f, (bits, 128), *operands(None))
        backward = (dy, codes, scales, *f, (1,), (bits, 128))
        close(
            kernels.activation_backward(*backward), reference.activation_backward(*backward), FP32
        )
        rebuild = (codes, scales, (count,), (1,), count, (bits, 128), FP32, *f, None, None)
        close(kernels.dequantize(*rebuild), reference.dequantize(*rebuild), FP32)


@every_device
@every_kernel_dtype
def test_results_written_over_what_they_are_of_are_those_written_elsewhere(dtype, device):
    for x in (torch.randn(12, 96), torch.randn(96, 12).t(), torch.randn(24, 96)[::2]):
        x = x.to(device, dtype)
        f, seed = ("gelu", (), (4, 32)), operands(5)
        y, *pack = kernels.activation(x, *f, *seed)
        over = x.clone(memory_format=torch.preserve_format)
        assert all(map(torch.equal, kernels.activation_(over, *f, *seed), pack))
        assert torch.equal(over, y)
        dx = kernels.activation_backward(x, *pack, *f[:2], x.contiguous().stride(), f[2])
        over = x.contiguous()
        over = over.clone()
        kernels.activation_backward_(over, *pack, *f)
        assert torch.equal(over, dx)
        _, *packs = gated_kernels.gated(x, x, "silu", (4, 32), *seed)
        settings = ("silu", over.stride(), (4, 32), True)
        dgate, dup = gated_kernels.gated_backward(x, *packs, *settings)
        over = x.contiguous().clone()
        assert torch.equal(gated_kernels.gated_backward_(over, *packs, "silu", (4, 32)), dup)
        assert torch.equal(over, dgate)


@every_device
@every_kernel_dtype
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "sigmoid"])
def test_gated_units_equal_the_reference(name, dtype, device):
    for count in counts(device):
        gate, up, dy = (torch.randn(count, device=device).to(dtype) * 2 for _ in range(3))
        seed = Drawn(torch.tensor([7, 0, 11, 0], device=device), 2)  # one that a graph draws
        ours = gated_kernels.gated(gate, up, name, (4, 128), *operands(seed))
        theirs = reference.gated(
            gate, up, name, (4, 128), *operands(torch.tensor([11], device=device))
        )
        close(ours[0], theirs[0], dtype)
        for i in (1, 3):
            values = [
                reference.dequantize_rows(*pack[i : i + 2], 1, count, (4, 128))
                for pack in (ours, theirs)
            ]
            assert (values[0] != values[1]).float().mean() < 2e-3
        for through in (True, False):
            backward = (dy, *theirs[1:], name, (1,), (4, 128), through)
            for a, b in zip(
                gated_kernels.gated_backward(*backward),
                reference.gated_backward(*backward),
                strict=True,
            ):
                close(a, b, dtype)
        product = (*theirs[1:], name, (count,), (1,), (4, 128), dtype)
        close(gated_kernels.gated_product(*product), reference.gated_product(*product), dtype)


@every_device
@every_kernel_dtype
@pytest.mark.parametrize("center", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("width", [64, 100, 512, 768])
def test_norms_equal_the_reference(width, center, dtype, device):
    rows = 5 if device == "cpu" else 3000
    x = (torch.randn(rows, width, device=device) * 2 + 1).to(dtype)
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    dy = torch.randn(rows, width, device=device).to(dtype)
    bias = bias if center else None
    seed = torch.tensor([3], device=device)
    for bits in (2, 3, 4, 8):
        forward = (x, width, weight, bias, 1e-5, center, (bits, 64), *operands(seed))
        ours, theirs = norm_kernels.norm(*forward), norm_reference.norm(*forward)
        close(ours[0], theirs[0], dtype)
        close(ours[3], theirs[3], FP32)
        assert torch.equal(ours[4], weight)
        assert torch.equal(ours[5], bias) if center else ours[5].numel() == 0
        values = [
            reference.dequantize_rows(*pack[1:3], rows, width, (bits, 64))
            for pack in (ours, theirs)
        ]
        # Where statistics differ in their last digit a code may too, or a whole group's scale.
        assert (values[0] - values[1]).abs().mean() < 0.02 * 2.0**-bits
        backward = (dy, *theirs[1:4], weight, center, True, center, (bits, 64))
        dx, dweight, dbias = norm_kernels.norm_backward(*backward)
        expected = norm_reference.norm_backward(*backward)
        close(dx, expected[0], dtype)
        scale = rows**0.5
        close(dweight / scale, expected[1] / scale, FP32)
        close(dbias / scale, expected[2] / scale, FP32)


@every_device
@pytest.mark.parametrize("code", [MINMAX, ROTATED, OFFSET], ids=["minmax", "rotated", "offset"])
@pytest.mark.parametrize("width", [100, 512])
def test_rms_norms_round_before_the_weight_as_the_reference(width, code, device):
    rows = 5 if device == "cpu" else 3000
    half, other = torch.bfloat16, torch.float16
    for dtype, of_weight, rounded_to in (
        (half, half, half), (other, other, other), (FP32, FP32, FP32),
        (half, FP32, half), (FP32, half, FP32), (FP32, half, half),
    ):  # fmt: skip
        x = (torch.randn(rows, width, device=device) * 2 + 1).to(dtype)
        weight = torch.randn(width, device=device).to(of_weight)
        groups = (4, 32 if width == 100 else 64, code)
        given = (x, width, weight, None, 1e-5, False, groups, *operands(5), rounded_to)
        ours, theirs = norm_kernels.norm(*given), norm_reference.norm(*given)
        plain = weight * F.rms_norm(x, (width,), None, 1e-5).to(rounded_to)
        assert torch.equal(theirs[0], plain)
        assert ours[0].dtype == plain.dtype == torch.promote_types(of_weight, rounded_to)
        truth = F.rms_norm(x.double(), (width,), None, 1e-5) * weight.double()
        narrow = min(dtype, rounded_to, plain.dtype, key=lambda each: each.itemsize)
        close(ours[0], plain, narrow)
        distance = (ours[0].double() - truth).norm()
        factor = 3 if device == "cpu" else 1.1  # the interpreter truncates to bfloat16
        assert distance <= factor * (plain.double() - truth).norm() + 2e-6 * truth.norm()
        assert torch.equal(ours[4], weight)
        # The pack is that of a norm without a weight.
        bare = norm_kernels.norm(x, width, None, None, 1e-5, False, groups, *operands(5))
        assert all(map(torch.equal, ours[1:4], bare[1:4]))
        # What is added to the gradient is added as torch adds it to what the kernel gives.
        dy, added = (torch.randn(rows, width, device=device).to(plain.dtype) for _ in range(2))
        flags = (False, True, False, groups)
        dx, dweight, _ = norm_kernels.norm_backward(dy, *ours[1:4], weight, *flags)
        both, again, _ = norm_kernels.norm_backward(dy, *ours[1:4], weight, *flags, added)
        expected = norm_reference.norm_backward(dy, *ours[1:4], weight, *flags, added)
        close(both, dx + added, plain.dtype)
        close(both, expected[0], plain.dtype)
        # A rotated group is read as bfloat16 numbers where the gradient's are.
        read = plain.dtype if code == ROTATED else FP32
        close(dweight / rows**0.5, expected[1] / rows**0.5, read)
        assert torch.equal(again, dweight)


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="pointers are no numbers there")
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(
    ("name", "code"),
    [("norm", MINMAX), ("norm", OFFSET), ("norm", ROTATED), ("gated", ROTATED), ("silu", ROTATED)],
)
def test_lines_that_are_asked_for_ahead_are_those_of_later_elements(name, code, bits, monkeypatch):
    """Lines elsewhere are no error: where nothing is mapped they took 20 times a norm's time."""
    asked = []

    def note(pointer, count):
        size = pointer.dtype.element_ty.primitive_bitwidth // 8
        asked.append((pointer.handle.data.item(), int(getattr(count, "value", count)) * size))

    for module in (kernels, gated_kernels, norm_kernels):
        monkeypatch.setattr(module, "ask_for", note)
    x, dy = torch.randn(4, 1024), torch.randn(4, 1024)
    groups, seed = (bits, 128, code), operands(5)
    if name == "norm":
        weight = torch.ones(1024)
        _, *pack, _, _ = norm_kernels.norm(x, 1024, weight, None, 1e-5, False, groups, *seed)
        asked.clear()
        norm_kernels.norm_backward(dy, *pack, weight, False, True, False, groups)
    elif name == "gated":
        _, *pack = gated_kernels.gated(x, x, "silu", groups, *seed)
        gated_kernels.gated_backward(dy, *pack, "silu", dy.stride(), groups, True)
    else:
        _, *pack = kernels.activation(x, name, (), groups, *seed)
        kernels.activation_backward(dy, *pack, name, (), dy.stride(), groups)
    read = [dy, pack[0], pack[2]] if name == "gated" else [dy, pack[0]]
    shares: list[list[tuple[float, float]]] = [[] for _ in read]
    for start, count in asked:
        offsets = [start - tensor.data_ptr() for tensor in read]
        (k,) = (k for k, t in enumerate(read) if 0 <= offsets[k] <= t.nbytes - count)
        shares[k].append((offsets[k] / read[k].nbytes, count / read[k].nbytes))
    assert shares[0]
    assert all(share == shares[0] for share in shares)  # the same part of each


@every_device
def test_parts_of_sums_are_added_up(device):
    limits = {"rtol": 1e-5, "atol": 1e-4}
    for programs, width in ((1, 8), (300, 100), (7, 33)):
        parts = torch.randn(2, programs, width, device=device)
        first, second = parts.new_empty(2, width)
        norm_kernels.sums_launch(programs, width, 2)(*parts, first, second)
        torch.testing.assert_close(torch.stack((first, second)), parts.sum(1), **limits)
        norm_kernels.sums_launch(programs, width, 1)(parts[1], parts[1], first, first)
        torch.testing.assert_close(first, parts[1].sum(0), **limits)


@every_device
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (2, 0, 64)])
def test_norms_take_any_shape_of_rows(shape, device):
    x = torch.randn(shape, device=device)
    rest = (64, torch.ones(64, device=device), None, 1e-5, True, (4, 32), None, 5)
    for backend in (norm_kernels, norm_reference):
        y, *others = backend.norm(x, *rest)
        flat, *expected = backend.norm(x.view(-1, 64), *rest)
        assert y.shape == x.shape
        assert torch.equal(y.view(-1, 64), flat)
        assert all(map(torch.equal, others, expected))


@every_device
@every_bits
@pytest.mark.parametrize("width", [32, 40, 96, 768])  # 40: a ragged group ends each row
@pytest.mark.parametrize("has_bias", [True, False])
def test_rebuilt_rows_equal_the_reference(width, has_bias, bits, device):
    """Tiles go on from row to row, and begin anywhere in one."""
    rows = 12 if width == 40 else 5000 // width  # more than a tile
    x = torch.randn(rows * width, device=device)
    codes, scales = reference.quantize_rows(x, width, (bits, 32), None)
    weight, bias = (torch.randn(width, device=device) for _ in range(2))
    layout = ((rows, width), (width, 1), width, (bits, 32))
    kept = (codes, scales, *layout, FP32, "", (), weight, bias if has_bias else None)
    close(kernels.dequantize(*kept), reference.dequantize(*kept), FP32)


every_coded = pytest.mark.parametrize(
    "groups",
    [(3, 64, MINMAX), (4, 64, OFFSET), (3, 64, OFFSET), (2, 128, OFFSET), (8, 64, OFFSET)]
    + [(4, 64, ROTATED), (4, 128, ROTATED), (3, 64, ROTATED), (2, 256, ROTATED), (1, 64, ROTATED)],
)


def close_by(groups, a, b, dtype):
    """A rotated pack is read in float16, whose products a device adds to without rounding them."""
    if groups[2] != ROTATED:
        close(a, b, dtype)
    else:
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02)


def agree(ours, theirs, rows, width, groups):
    """Packs stand for the same values, but where the last digit decides on a code or a scale."""
    given, expected = (
        reference.dequantize_rows(*pack, rows, width, groups) for pack in (ours, theirs)
    )
    # Of a rotated pack one code, of which one in 500 differs, moves a whole group.
    limit = 0.1 if groups[2] == ROTATED else 0.02
    assert (given - expected).norm() <= limit * expected.norm()
    if groups[2] == ROTATED:
        assert (ours[0] != theirs[0]).float().mean() <= 0.02
    assert torch.equal(ours[1][:2], theirs[1][:2]) or groups[2] == MINMAX  # the seed


@every_device
@every_coded
@every_kernel_dtype
def test_packs_of_every_code_equal_the_reference(groups, dtype, device):
    count = 700 if device == "cpu" else 2**20 + 77
    x, dy = ((torch.randn(count, device=device) * 2 + 0.3).to(dtype) for _ in range(2))
    x[: count // 3] = x[: count // 3].relu()
    seed = operands(torch.tensor([2**61 + 12345], device=device))
    layout = ((count,), (1,), count, groups)
    pack = reference.quantize(x, (1,), groups, *seed)
    agree(kernels.quantize(x, (1,), groups, *seed), pack, 1, count, groups)
    rebuild = (*pack, *layout, dtype, "", (), None, None)
    close_by(groups, kernels.dequantize(*rebuild), reference.dequantize(*rebuild), dtype)
    f = ("gelu", ())
    pack = reference.activation(x, *f, groups, *seed)[1:]
    agree(kernels.activation(x, *f, groups, *seed)[1:], pack, 1, count, groups)
    backward = (dy, *pack, *f, (1,), groups)
    close_by(
        groups,
        kernels.activation_backward(*backward),
        reference.activation_backward(*backward),
        dtype,
    )


@every_device
@every_coded
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("covered", [256, 768])
def test_packs_less_a_shift_equal_the_reference(groups, dtype, covered, device):
    """Of whole tiles and of others; of all columns, and of the first alone."""
    width = 768
    for rows in (1, 32) if device == "cpu" else (1, 2731, 4096):
        # In eighths, whose differences bfloat16 has: the interpreter would truncate them.
        x, shift = (
            ((torch.randn(*shape, device=device) * 16 + 3).round() / 8).to(dtype)
            for shape in ((rows, width), (covered,))
        )
        seed = operands(torch.tensor([2**61 + 12345], device=device))
        given = (x, (width, 1), shift, width, groups, *seed)
        pack = reference.quantize_less(*given)
        agree(kernels.quantize_less(*given), pack, 1, x.numel(), groups)
        layout = ((rows, width), (width, 1), width, groups)
        rebuild = (*pack, *layout, dtype, "", (), None, shift)
        theirs = reference.dequantize(*rebuild)
        # What is unpacked is rounded before the shift is added to it, by a rotated code twice.
        within = 2.0**-7 * (x.abs().max() + shift.abs().max()).item()
        ours = kernels.dequantize(*rebuild)
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=within)


@every_device
@every_coded
def test_gated_units_of_every_code_equal_the_reference(groups, device):
    count = 300 if device == "cpu" else 2**20 + 77
    gate, up, dy = (torch.randn(count, device=device) * 2 for _ in range(3))
    seed = operands(torch.tensor([11], device=device))
    ours, theirs = (
        f(gate, up, "silu", groups, *seed) for f in (gated_kernels.gated, reference.gated)
    )
    for i in (1, 3):
        agree(ours[i : i + 2], theirs[i : i + 2], 1, count, groups)
    backward = (dy, *theirs[1:], "silu", (1,), groups, True)
    for a, b in zip(
        gated_kernels.gated_backward(*backward), reference.gated_backward(*backward), strict=True
    ):
        close_by(groups, a, b, FP32)


@every_device
@every_coded
@pytest.mark.parametrize("width", [64, 100, 768])
def test_norms_of_every_code_equal_the_reference(groups, width, device):
    rows = 3 if device == "cpu" else 3000
    x = torch.randn(rows, width, device=device) * 2 + 1
    weight, bias = (torch.randn(width, device=device) for _ in range(2))
    dy = torch.randn(rows, width, device=device)
    forward = (x, width, weight, bias, 1e-5, True, groups)
    seed = operands(torch.tensor([3], device=device))
    ours, theirs = norm_kernels.norm(*forward, *seed), norm_reference.norm(*forward, *seed)
    close(ours[0], theirs[0], FP32)
    agree(ours[1:3], theirs[1:3], rows, width, groups)
    backward = (dy, *theirs[1:4], weight, True, True, True, groups)
    scale = rows**0.5
    for a, b, by in zip(
        norm_kernels.norm_backward(*backward), norm_reference.norm_backward(*backward),
        (1, scale, scale), strict=True,
    ):  # fmt: skip
        close_by(groups, a / by, b / by, FP32)
    layout = ((rows, width), (width, 1), width, groups)
    rebuild = (*theirs[1:3], *layout, FP32, "", (), weight, bias)
    close_by(groups, kernels.dequantize(*rebuild), reference.dequantize(*rebuild), FP32)


@every_device
def test_a_seed_that_is_a_number_draws_what_the_same_seed_in_memory_draws(device):
    x, up = torch.randn(3, 640, device=device), torch.randn(3, 640, device=device)
    number = 2**62 + 987654321
    in_memory = torch.tensor([number], device=device)
    forms = [(None, number), (in_memory, 0)]
    for run in (
        lambda seed: kernels.quantize(x, (640, 1), (4, 64), *seed),
        lambda seed: kernels.activation(x, "gelu", (), (4, 64), *seed),
        lambda seed: gated_kernels.gated(x, up, "silu", (4, 64), *seed),
        lambda seed: norm_kernels.norm(x, 640, None, None, 1e-5, True, (4, 64), *seed),
        lambda seed: dropout_kernels.dropout(x, *seed, 0.5, True),
    ):
        a, b = map(run, forms)
        assert all(map(torch.equal, a, b))
        nearest = run((None, _seeds.NEAREST))
        assert not all(map(torch.equal, a, nearest))


def test_operators_pass_opcheck():
    check = torch.library.opcheck
    namespace = torch.ops.packlight
    x = torch.randn(4, 96)
    seed = torch.tensor([1])
    for given in (seed, 2**62 + 1, None):
        draw = operands(given)
        check(namespace.group_quantize.default, (x, [96, 1], (4, 32), *draw))
        check(namespace.group_quantize_less.default, (x, [96, 1], x[0], 96, (4, 32), *draw))
        check(namespace.group_quant_activation.default, (x, "silu", [], (4, 32), *draw))
        check(namespace.group_quant_gated.default, (x, x + 1, "silu", (4, 32), *draw))
        norm = (x, 96, torch.ones(96), None, 1e-5)
        check(namespace.group_quant_norm.default, (*norm, True, (4, 32), *draw, None))
        half = (*norm, False, (4, 32), *draw, torch.bfloat16)
        check(namespace.group_quant_norm.default, half)
    codes, scales = ops.quantize(x, (96, 1), (4, 32), *operands(None))
    layout = ([4, 96], [96, 1], 96, (4, 32), FP32)
    for arguments in ((*layout, "", [], torch.ones(96), None), (*layout, "gelu", [], None, None)):
        check(namespace.group_dequantize.default, (codes, scales, *arguments))
    backward = (x, codes, scales, "gelu", [], [96, 1], (4, 32))
    check(namespace.group_quant_activation_backward.default, backward)
    packs = (codes, scales, codes, scales)
    for through in (True, False):
        gated = (x, *packs, "silu", [96, 1], (4, 32), through)
        check(namespace.group_quant_gated_backward.default, gated)
    over = (x.contiguous(), *packs, "silu", (4, 32))
    check(namespace.group_quant_gated_backward_.default, over)
    product = (*packs, "silu", [4, 96], [96, 1], (4, 32), FP32)
    check(namespace.group_quant_gated_product.default, product)
    norm = (x, 96, None, None, 1e-5, True, (4, 32), *operands(None), None)
    _, codes, scales, rstd, *_ = ops.norm(*norm)
    norm_backward = (x, codes, scales, rstd, torch.ones(96), True, True, True, (4, 32))
    for added in (None, x):
        check(namespace.group_quant_norm_backward.default, (*norm_backward, added))


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_whole_tiles_of_rotated_groups_equal_the_reference(dtype):
    """They are loaded and stored by whole groups, where others are by parts."""
    count, groups, seed = 4096, (4, 128, ROTATED), operands(torch.tensor([9]))
    gate, up, dy = ((torch.randn(count) * 2 + 0.3).to(dtype) for _ in range(3))
    layout = ((count,), (1,), count, groups)
    pack = reference.quantize(gate, (1,), groups, *seed)
    agree(kernels.quantize(gate, (1,), groups, *seed), pack, 1, count, groups)
    rebuild = (*pack, *layout, dtype, "", (), None, None)
    close_by(groups, kernels.dequantize(*rebuild), reference.dequantize(*rebuild), dtype)
    backward = (dy, *pack, "gelu", (), (1,), groups)
    runs = (kernels.activation_backward, reference.activation_backward)
    close_by(groups, *(run(*backward) for run in runs), dtype)
    runs = (gated_kernels.gated, reference.gated)
    ours, theirs = (run(gate, up, "silu", groups, *seed) for run in runs)
    close(ours[0], theirs[0], dtype)
    backward = (dy, *theirs[1:], "silu", (1,), groups, True)
    for a, b in zip(
        gated_kernels.gated_backward(*backward), reference.gated_backward(*backward), strict=True
    ):
        close_by(groups, a, b, dtype)


@pytest.mark.parametrize(("rows", "width"), [(4, 1024), (11, 768)])
def test_norms_of_whole_groups_equal_the_reference(rows, width):
    """One tile a row; three, of eight rows, the last of which are those of two tiles."""
    groups = (4, 128, ROTATED)
    x, dy = torch.randn(rows, width) * 2 + 1, torch.randn(rows, width)
    weight, bias = torch.randn(2, width)
    seed = operands(torch.tensor([3]))
    forward = (x, width, weight, bias, 1e-5, True, groups)
    ours, theirs = norm_kernels.norm(*forward, *seed), norm_reference.norm(*forward, *seed)
    close(ours[0], theirs[0], FP32)
    agree(ours[1:3], theirs[1:3], rows, width, groups)
    backward = (dy, *theirs[1:4], weight, True, True, True, groups)
    runs = (norm_kernels.norm_backward, norm_reference.norm_backward)
    for a, b in zip(*(run(*backward) for run in runs), strict=True):
        close_by(groups, a, b, FP32)
