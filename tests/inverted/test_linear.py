"""What norms and the layers behind them keep together: one tensor, with and without autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
import packlight.inverted as inverted
from packlight import profile, sharing
from packlight.inverted import norms
from tests.helpers import crossing
from tests.inverted.test_norms import assert_near, gradients

CONSUMERS = {
    "linear": (inverted.Linear, nn.Linear, (6, 4), (5, 6)),
    "conv1d": (inverted.Conv1d, nn.Conv1d, (6, 4, 3), (2, 6, 8)),
    "conv2d": (inverted.Conv2d, nn.Conv2d, (6, 4, 3), (2, 6, 8, 7)),
    "conv3d": (inverted.Conv3d, nn.Conv3d, (6, 4, 2), (2, 6, 3, 4, 5)),
}


def autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


class Attention(nn.Module):
    """Three readers of one norm, and a residual sum."""

    def __init__(self, linear):
        super().__init__()
        self.norm = inverted.LayerNorm(16)
        self.q, self.k, self.v = (linear(16, 16) for _ in range(3))

    def forward(self, x):
        h = self.norm(x)
        return F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)) + h


def without_cast(model, x):
    """Gradients as they are where no cast is shared: torch's Linear casts for itself."""
    for module in model.modules():
        if isinstance(module, inverted.Linear):
            module.__class__ = nn.Linear
    with autocast():
        return gradients(model, x)


# --- Bytes.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("amp", [False, True], ids=["", "autocast"])
def test_norm_and_linear_keep_one_tensor(dtype, amp):
    model = nn.Sequential(inverted.LayerNorm(64), inverted.Linear(64, 8))
    x = torch.randn(32, 64, dtype=dtype).requires_grad_()
    if not amp:
        model = model.to(dtype)
    size = 2 if amp or dtype == torch.bfloat16 else 4
    with autocast(amp):
        report = profile(model, x)
    weight = 64 * 8 * 2 if amp else 0  # autocast's copy of the Linear's, as with torch's norm
    assert report.activation_bytes == 32 * 64 * size + 32 * 4 + weight
    (output,) = [row for row in report.rows if row.shape == (32, 64)]
    operations = {holder.operation for holder in output.holders}
    assert "_InvertedRowNormBackward" in operations
    assert len(operations) == 2
    assert "Inverted saves nothing here" not in str(report)


@pytest.mark.parametrize("norm", [inverted.BatchNorm2d(6), inverted.GroupNorm(2, 6)], ids=repr)
@pytest.mark.parametrize("amp", [False, True], ids=["", "autocast"])
def test_norm_and_conv_keep_one_tensor(norm, amp):
    model = nn.Sequential(norm, inverted.Conv2d(6, 4, 3))
    x = torch.randn(2, 6, 8, 7, requires_grad=True)
    with autocast(amp):
        report = profile(model, x)
    statistics = 6 if isinstance(norm, nn.BatchNorm2d) else 4
    weight = 6 * 4 * 9 * 2 if amp else 0  # autocast's copy of the Conv2d's
    assert report.activation_bytes == x.numel() * (2 if amp else 4) + 4 * statistics + weight


def test_without_autocast_torch_s_linear_shares_too():
    model = nn.Sequential(inverted.LayerNorm(64), nn.Linear(64, 8))
    report = profile(model, torch.randn(32, 64, requires_grad=True))
    assert report.activation_bytes == 32 * 64 * 4 + 32 * 4


def test_three_readers_keep_one_cast():
    x = torch.randn(2, 8, 16, requires_grad=True)
    with autocast():
        ours, plain = (profile(Attention(kind), x) for kind in (inverted.Linear, nn.Linear))
    cast = x.numel() * 2
    own = [row for row in ours.rows if row.shape == (2, 8, 16) and row.module == "norm"]
    assert [row.bytes for row in own] == [cast]
    assert len(own[0].holders) == 4
    # Torch's Linear makes a cast each, which the norm does not keep.
    assert plain.activation_bytes - ours.activation_bytes == 3 * cast


# --- Gradients and results.


@pytest.mark.parametrize("name", CONSUMERS)
def test_under_autocast_results_are_torch_s_bit_for_bit(name):
    ours, theirs, arguments, shape = CONSUMERS[name]
    packlight.manual_seed(1)
    consumer, plain = ours(*arguments), theirs(*arguments)
    consumer.load_state_dict(plain.state_dict())
    assert repr(consumer) == repr(plain)
    norm = inverted.LayerNorm(6) if name == "linear" else inverted.GroupNorm(2, 6)
    torch_s = nn.LayerNorm(6) if name == "linear" else nn.GroupNorm(2, 6)
    x = torch.randn(shape)
    with autocast():
        y, actual = gradients(nn.Sequential(norm, consumer), x)
        expected_y, expected = gradients(nn.Sequential(torch_s, plain), x)
    assert torch.equal(y, expected_y)
    assert_near(actual, expected, 0.02)
    y, actual = gradients(consumer, x)
    expected_y, expected = gradients(plain, x)
    assert torch.equal(y, expected_y)
    assert_near(actual, expected, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_through_the_output_and_its_cast_add_up(dtype, monkeypatch):
    """A residual sum reads float32, three projections the cast; torch sums them the same way."""
    monkeypatch.setattr(norms, "autocast_dtype", lambda *_: torch.float32)  # as on CUDA
    packlight.manual_seed(2)
    model, x = Attention(inverted.Linear), torch.randn(2, 8, 16).to(dtype)
    with autocast():
        y, actual = gradients(model, x)
    expected_y, expected = without_cast(model, x)
    assert torch.equal(y, expected_y)
    assert_near(actual, expected, 0.01)


def test_only_the_cast_or_only_the_output_is_used():
    norm, linear = inverted.LayerNorm(16), inverted.Linear(16, 4)
    x = torch.randn(8, 16)
    with autocast():
        _, through_cast = gradients(nn.Sequential(norm, linear), x)
        _, through_output = gradients(nn.Sequential(norm, nn.Softmax(-1)), x)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in through_cast)
    assert_near(through_output, gradients(nn.Sequential(norm, nn.Softmax(-1)), x)[1], 2.0)


@pytest.mark.parametrize("amp", [False, True], ids=["", "autocast"])
def test_compiles_to_the_same_gradients(amp, fresh_compiler):
    packlight.manual_seed(3)
    model, x = Attention(inverted.Linear), torch.randn(2, 8, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with autocast(amp):
        y, expected = gradients(model, x)
        x.requires_grad_()
        actual_y = compiled(x)
        actual = torch.autograd.grad(actual_y.sum(), [x, *model.parameters()])
    torch.testing.assert_close(actual_y, y)
    assert_near(actual, expected, 0.01 if amp else 1e-5)


def test_the_cast_crosses_to_the_compiled_backward(fresh_compiler):
    norm, linear = inverted.LayerNorm(32), inverted.Linear(32, 8)

    def function(x):
        with autocast():
            return linear(norm(x * 2))

    tensors = crossing(function, torch.randn(64, 32, requires_grad=True))
    whole = [t for t in tensors if t.shape == (64, 32)]
    assert [t.dtype for t in whole] == [torch.bfloat16]


# --- Where the cast is not taken.


def reads_cast(y, amp=True):
    """Whether an aware Linear takes the cast noted on `y`."""
    with autocast(amp):
        out = inverted.Linear(16, 4)(y)
    return any(
        node.name() == "_InvertedRowNormBackward" and index == 1  # the second output
        for node, index in out.grad_fn.next_functions
        if node is not None
    )


def output(x=None):
    x = torch.randn(8, 16, requires_grad=True) if x is None else x
    with autocast():
        return inverted.LayerNorm(16)(x)


def test_the_cast_is_taken_only_where_it_stands_for_the_output():
    assert reads_cast(output())
    assert not reads_cast(output(), amp=False)
    assert not reads_cast(output() * 1.0)
    assert not reads_cast(output().add_(1.0))
    with_hook = output()
    with_hook.register_hook(lambda grad: grad)
    assert not reads_cast(with_hook)
    retained = output()
    retained.retain_grad()
    assert not reads_cast(retained)
    with autocast(), torch.no_grad():
        assert inverted.Linear(16, 4)(output()).grad_fn is None


def test_output_modified_in_place_under_autocast_gives_the_right_gradient():
    """The cast is what is kept, so the output in float32 may change."""
    norm, x, dy = inverted.LayerNorm(16), torch.randn(8, 16), torch.randn(8, 16)
    _, expected = gradients(norm, x, dy)
    norm.register_forward_hook(lambda _, __, y: y.add_(1.0))
    with autocast():
        _, actual = gradients(norm, x, dy)
    assert_near(actual, expected, 0.02)


def test_the_cast_modified_in_place_raises():
    y = output()
    sharing.cast_of(y, torch.bfloat16).detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- The report.


def test_report_names_outputs_that_nobody_else_keeps(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.alone = inverted.LayerNorm(64), inverted.LayerNorm(64)
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            return self.alone(self.fc(self.shared(x)) + x) + x

    report = profile(Model(), torch.randn(32, 64, requires_grad=True))
    (row,) = report.unshared_outputs()
    assert (row.module, row.bytes) == ("alone", 32 * 64 * 4)
    text = " ".join(str(report).split())
    assert "Inverted saves nothing here: no other operation keeps the output of" in text
    assert "alone (LayerNorm) (8.00 KiB)" in text
    assert "shared (LayerNorm) (8" not in text
    assert type(report).from_json(report.to_json()).unshared_outputs() == (row,)


def test_report_counts_many_unshared_outputs():
    model = nn.Sequential(*(inverted.RMSNorm(8) for _ in range(7)))
    # Each output is read by the next norm alone, which keeps its own output.
    report = profile(model, torch.randn(4, 8, requires_grad=True))
    assert len(report.unshared_outputs()) == 7
    assert "3 (RMSNorm), 3 more" in " ".join(str(report).split())


@pytest.mark.parametrize("compiled", [False, True])
def test_no_gradient_goes_through_detach(compiled, fresh_compiler):
    """The cast is another tensor with the same numbers, and has a gradient."""
    norm, linear = inverted.LayerNorm(32), inverted.Linear(32, 8)
    x = torch.randn(6, 32, requires_grad=True)

    def run(x):
        return linear(norm(x).detach()).square().sum() + x.sum()

    run = torch.compile(run, backend="aot_eager") if compiled else run
    with torch.autocast("cpu", torch.bfloat16):
        (dx,) = torch.autograd.grad(run(x), x)
    assert torch.equal(dx, torch.ones_like(x))
