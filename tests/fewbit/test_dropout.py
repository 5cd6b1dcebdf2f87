"""Dropout with a packed mask: its law, its gradient, its bytes, its randomness."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import packlight
import packlight.fewbit as few_bit
from packlight._seeds import operands
from packlight.errors import DoubleBackwardError, InputError
from packlight.fewbit.dropout import dropout_as_torch
from packlight.packing.layout import packed_bytes
from tests.helpers import kept_bytes


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_kept_values_are_torch_values_and_the_rest_zero(p, dtype):
    x = torch.randn(4000).to(dtype)
    y = few_bit.dropout(x, p)
    kept = y != 0
    # torch scales by 1 / (1 - p) rounded to the dtype; its own dropout shows the product.
    scaled = x * torch.ones((), dtype=dtype).div(1 - p)
    assert torch.equal(y, torch.where(kept, scaled, 0))
    deviation = math.sqrt(p * (1 - p) / 4000)
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * deviation


def test_gradient_belongs_to_the_mask_of_the_forward():
    x = torch.randn(64, 65, requires_grad=True)
    dy = torch.randn(64, 65)
    y = few_bit.dropout(x, 0.25)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, torch.where(y != 0, dy / 0.75, 0.0))


def test_keeps_one_bit_an_element():
    for shape in [(1,), (3, 41), (64, 64)]:
        x = torch.randn(shape, requires_grad=True)
        kept = kept_bytes(lambda x=x: few_bit.dropout(x, 0.3))
        assert kept == packed_bytes(x.numel(), 1) <= x.numel() / 8 + 64


def test_masks_are_new_each_time_and_repeat_with_the_seed():
    x = torch.ones(1000)
    packlight.manual_seed(3)
    first, second = few_bit.dropout(x), few_bit.dropout(x)
    assert not torch.equal(first, second)
    packlight.manual_seed(3)
    assert torch.equal(few_bit.dropout(x), first)


def test_masks_of_neighbours_are_independent():
    kept = (few_bit.dropout(torch.ones(1 << 16), 0.5) != 0).double() - 0.5
    for shift in (1, 2, 7, 8, 1 << 13):
        correlation = (kept * kept.roll(shift)).mean().item() / 0.25
        assert abs(correlation) < 5 / math.sqrt(1 << 16)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_sees_the_same_mask(reentrant):
    x = torch.randn(500, requires_grad=True)
    y = checkpoint(few_bit.dropout, x, 0.5, use_reentrant=reentrant)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


LAYOUTS = {
    "odd": lambda: torch.randn(3, 41),
    "transposed": lambda: torch.randn(8, 6, 5).transpose(0, 2),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "sliced": lambda: torch.randn(6, 10)[:, ::3],
    "expanded": lambda: torch.randn(5, 1).expand(5, 7),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
    "infinite": lambda: torch.tensor([math.inf, -math.inf, math.nan, 1.0]).repeat(20),
}


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_call_is_torch_s_own_bit_for_bit(layout, dtype, inplace):
    """Its output, its draws and its gradient, with and without gradients."""
    x = LAYOUTS[layout]().to(dtype)
    if inplace and layout == "expanded":
        return  # torch writes to no such tensor
    results = []
    for function in (F.dropout, dropout_as_torch):
        for wanted in (True, False):
            packlight.manual_seed(5)
            leaf = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x) if inplace else x
            leaf = leaf.detach().requires_grad_(wanted)
            y = function(leaf * 1.0 if inplace else leaf, 0.3, True, inplace)
            state = torch.get_rng_state()
            dx = torch.autograd.grad(y.sum(), leaf)[0] if wanted else None
            results.append((y.detach(), state, dx))
    (y, state, dx), *others = results
    for other, other_state, other_dx in others:
        torch.testing.assert_close(other, y, rtol=0, atol=0, equal_nan=True)
        assert other.stride() == y.stride()
        assert torch.equal(other_state, state)
        if other_dx is not None:
            torch.testing.assert_close(other_dx, dx)


def test_a_call_keeps_one_bit_an_element(monkeypatch):
    x = torch.randn(64, 65, requires_grad=True)
    assert kept_bytes(lambda: dropout_as_torch(x, 0.3)) == packed_bytes(x.numel(), 1)

    # On a CUDA device torch's dropout is this operator, which gives the mask as well.
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr("packlight._torch.is_watched", lambda: True)  # and operators are dispatched
    packlight.manual_seed(5)
    y = dropout_as_torch(x, 0.3)
    packlight.manual_seed(5)
    assert torch.equal(y, torch.native_dropout(x, 0.3, True)[0])
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx != 0, y != 0)


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_call_is_torch_s_own_on_the_device(dtype, inplace):
    x = torch.randn(33, 65, device="cuda", dtype=dtype, requires_grad=True)
    results = []
    for function in (F.dropout, dropout_as_torch):
        packlight.manual_seed(5)
        y = function(x * 1.0, 0.3, True, inplace)
        results.append((y.detach(), torch.cuda.get_rng_state()))
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx != 0, y != 0)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_certain_probabilities_keep_nothing(p):
    x = torch.randn(100, requires_grad=True)
    assert kept_bytes(lambda: few_bit.dropout(x, p)) <= 8
    y = few_bit.dropout(x, p)
    y.sum().backward()
    assert torch.equal(y, F.dropout(x, p))
    assert torch.equal(x.grad, torch.full_like(x, 1 - p))


def test_inplace():
    leaf = torch.randn(6, 10, requires_grad=True)
    packlight.manual_seed(1)
    expected = few_bit.dropout(leaf[:, ::3], 0.5)
    packlight.manual_seed(1)
    x = leaf * 1.0
    y = few_bit.dropout(x[:, ::3], 0.5, inplace=True)
    assert torch.equal(y, expected)
    assert torch.equal(x[:, ::3], expected)
    assert torch.equal(*(torch.autograd.grad(out.sum(), leaf)[0] for out in (y, expected)))
    with torch.no_grad():
        z = torch.ones(50)
        assert few_bit.dropout(z, 0.5, inplace=True) is z
        assert (z == 0).any()


def test_module_trains_and_evaluates():
    module = few_bit.Dropout(0.4, inplace=True)
    assert repr(module) == repr(nn.Dropout(0.4, inplace=True))
    x = torch.ones(100)
    assert torch.equal(module.eval()(x.clone()), x)
    assert not torch.equal(module.train()(x.clone()), x)


def test_compiles():
    torch._dynamo.reset()

    def loss(x):
        return (few_bit.dropout(x * 1.0, 0.5) ** 2).sum()

    x = torch.ones(256, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (dx,) = torch.autograd.grad(compiled(x), x)
    assert set(dx.tolist()) == {0.0, 8.0}


@pytest.mark.parametrize("shape", [(8, 64), (3, 7), (5,), (), (0, 4), (7, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_compiled_dropout_has_the_mask_of_its_seed(shape, dtype, monkeypatch, fresh_compiler):
    """Operations there, which a compiler fuses; the operator, which says what is true, here."""
    seed = torch.tensor([2**62 + 12345])
    module = sys.modules["packlight.fewbit.dropout"]  # its package has the function by that name
    monkeypatch.setattr(module, "mask_seed", lambda x: seed)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)

    def run(x):
        return few_bit.dropout(x * 1.0, 0.25)

    expected = run(x)
    (expected_dx,) = torch.autograd.grad(expected.sum(), x)
    for backend in ("aot_eager", "inductor"):
        compiled = torch.compile(run, fullgraph=True, backend=backend)
        y = compiled(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-6  # of the factor, in bfloat16 here
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=0)
        torch.testing.assert_close(dx, expected_dx, rtol=tolerance, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), y, rtol=0, atol=0)


def test_compiled_dropout_keeps_a_bit_at_most(fresh_compiler):
    x = torch.randn(64, 64, requires_grad=True)
    compiled = torch.compile(
        lambda x: few_bit.dropout(x * 1.0, 0.25), fullgraph=True, backend="aot_eager"
    )
    assert kept_bytes(lambda: compiled(x)) <= 64 * 64 // 8


def test_opcheck():
    seed = torch.randint(2**63 - 1, (1,))
    for x in (torch.randn(3, 7), torch.randn(4, 6).t()):
        for keep in (True, False):
            arguments = (x, *operands(seed), 0.5, keep)
            torch.library.opcheck(torch.ops.packlight.few_bit_dropout.default, arguments)
            torch.library.opcheck(torch.ops.packlight.few_bit_dropout_.default, arguments)
    torch.library.opcheck(torch.ops.packlight.few_bit_dropout_mask.default, (seed, 77, 0.5))


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_wrong_probability_raises(p):
    with pytest.raises(InputError, match="not a probability"):
        few_bit.dropout(torch.ones(3), p)


def test_second_derivative_raises():
    x = torch.ones(5, requires_grad=True)
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(few_bit.dropout(x).sum(), x, create_graph=True)
