"""One sketch a tensor: who shares, in bytes and in expectation, in eager mode and compiled."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
import packlight.groupquant as group_quant
from packlight import profile, sharing, sketch
from packlight.sketch.method import KINDS, ROW_KINDS
from tests.helpers import kept_bytes

WIDTH, TOKENS, ROWS = 16, 64, 16
every_kind = pytest.mark.parametrize("kind", KINDS)


class QKV(nn.Module):
    def __init__(self, make=sketch.Linear, **options):
        super().__init__()
        self.q, self.k, self.v = (make(WIDTH, WIDTH, **options) for _ in range(3))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


def input_of():
    return torch.randn(2, TOKENS // 2, WIDTH, requires_grad=True)


def sketch_bytes(kind, itemsize=4):
    return ROWS * WIDTH * itemsize + (8 * ROWS if kind in ROW_KINDS else 8)


@every_kind
@pytest.mark.parametrize("mode", ["fp32", "autocast"])
def test_q_k_and_v_keep_one_sketch(kind, mode):
    model, x = QKV(rows=ROWS, kind=kind), input_of()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        kept = profile(model, x).activation_bytes
    assert kept == sketch_bytes(kind, 2 if mode == "autocast" else 4)


@every_kind
def test_a_shared_sketch_is_unbiased_and_one_draw(kind):
    model, x = QKV(rows=ROWS, kind=kind), input_of()
    dy = torch.randn(2, TOKENS // 2, WIDTH)
    exact = dy.view(-1, WIDTH).t() @ x.detach().view(-1, WIDTH)
    draws = []
    for _ in range(200):
        outputs = model(x)
        weights = [model.q.weight, model.k.weight, model.v.weight]
        three = torch.autograd.grad(outputs, weights, [dy, dy, dy])
        assert torch.equal(three[0], three[1])
        assert torch.equal(three[0], three[2])
        draws.append(three[0])
        del outputs
    draws = torch.stack(draws)
    error = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
    assert error.square().mean() < 1.5
    assert error.abs().max() < 5


def test_views_with_rows_of_one_width_share_and_others_do_not():
    layer = sketch.Linear(WIDTH, WIDTH, rows=ROWS, kind="srht")
    x = input_of() * 1.0
    one = sketch_bytes("srht") + WIDTH * WIDTH * 4
    for view, sketches in (
        (x.view(TOKENS, WIDTH), 1),
        (x.view(4, TOKENS // 4, WIDTH), 1),
        (x.view(TOKENS // 2, 2 * WIDTH)[:, :WIDTH], 2),
        (x.transpose(0, 1), 2),
        (x[:1], 2),
    ):

        def run(view=view):
            return layer(x), layer(view)

        kept = one + (sketches - 1) * sketch_bytes("srht")
        assert kept_bytes(run) == kept, view.shape


def test_a_convolution_and_a_linear_layer_do_not_share():
    """Both see rows in one tensor, but not the same ones."""
    x = torch.randn(WIDTH, WIDTH, 4, WIDTH, requires_grad=True)
    linear = sketch.Linear(WIDTH, WIDTH, kind="srht")
    conv = sketch.Conv2d(WIDTH, WIDTH, 1, kind="srht")
    y = linear(x).sum(), conv(x).sum()
    packlight.manual_seed(0)
    exact = torch.ones(WIDTH, x.numel() // WIDTH) @ x.detach().movedim(1, -1).reshape(-1, WIDTH)
    (dweight,) = torch.autograd.grad(y[1], conv.weight)
    # Rows of ones are a constant, which a sketch with its own rows sees up to its noise.
    noise = sketch.variance(x.movedim(1, -1), torch.ones(WIDTH, 4, WIDTH, WIDTH), "srht", 0.2)
    assert (dweight.view(WIDTH, WIDTH) - exact).norm().square() < 2 * noise
    two = kept_bytes(lambda: (conv(x), conv(x)))
    assert two == kept_bytes(lambda: conv(x))


def test_packs_and_sketches_are_apart():
    """A pack may be biased, so a sketch does not use it; from a sketch no tensor can be rebuilt."""
    x = input_of()
    packed = group_quant.Linear(WIDTH, WIDTH, group_size=32)
    sketched = sketch.Linear(WIDTH, WIDTH, rows=ROWS)
    for first, second in ((packed, sketched), (sketched, packed)):

        def run(first=first, second=second):
            return first(x), second(x)

        alone = sum(kept_bytes(lambda layer=layer: layer(x)) for layer in (first, second))
        assert kept_bytes(run) == alone
        y = run()
        (dweight,) = torch.autograd.grad(y[0].sum() + y[1].sum(), packed.weight)
        exact = x.detach().sum((0, 1)).expand(WIDTH, WIDTH)
        assert (dweight - exact).norm() < 0.3 * exact.norm()


def test_a_tensor_modified_in_place_is_sketched_afresh():
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    x = torch.zeros(TOKENS, WIDTH)
    x[3] = 1.0  # one row and its gradient: signs give them back exactly, whatever the draw
    first = sketch.linear(x, weight, rows=ROWS)
    x.mul_(100.0)
    second = sketch.linear(x, weight, rows=ROWS)
    (dweight,) = torch.autograd.grad(second[3].sum(), weight)
    torch.testing.assert_close(dweight, torch.full((WIDTH, WIDTH), 100.0))
    (dweight,) = torch.autograd.grad(first[3].sum(), weight)
    torch.testing.assert_close(dweight, torch.ones(WIDTH, WIDTH))


def test_the_sketch_goes_with_the_graph():
    x, weight = torch.randn(TOKENS, WIDTH), torch.randn(8, WIDTH, requires_grad=True)
    y = sketch.linear(x, weight, rows=ROWS)
    kept = weakref.ref(sharing.sketch_of(x).tensors[0])
    assert kept() is not None
    y.sum().backward()
    del y
    gc.collect()
    assert kept() is None
    assert sharing.sketch_of(x) is None


def test_hooks_that_take_sketches_away_do_no_harm():
    model, leaf = QKV(rows=ROWS, kind="srht"), input_of()

    def weights_of(x):
        packlight.manual_seed(1)
        loss = sum(y.square().sum() for y in model(x))
        return torch.autograd.grad(loss, list(model.parameters()))

    expected = weights_of(leaf * 1.0)
    with torch.autograd.graph.save_on_cpu():
        actual = weights_of(leaf * 1.0)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_shared_sketches_in_a_checkpoint(reentrant):
    model, x = QKV(rows=ROWS, kind="srht"), input_of()

    def gradients(function, passes_before=0):
        model.zero_grad()
        packlight.manual_seed(1)
        for _ in range(passes_before):
            model(x * 1.0)
        sum(y.square().sum() for y in function(x * 1.0)).backward()
        return [p.grad for p in model.parameters()]

    # The second pass draws anew; the first one, where it is without gradients, does not draw.
    expected = gradients(model, passes_before=0 if reentrant else 1)
    actual = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    torch.testing.assert_close(actual, expected)


@every_kind
def test_compiled_layers_share(kind, fresh_compiler):
    model = QKV(rows=ROWS, kind=kind)

    def run(x):
        return sum(y.square().sum() for y in model(x * 1.0))  # an input takes no note

    x = input_of()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    weights = [model.q.weight, model.k.weight, model.v.weight]
    packlight.manual_seed(1)
    expected = torch.autograd.grad(run(x), weights)
    packlight.manual_seed(1)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), weights), expected)
    plain = QKV(nn.Linear)
    exact = torch.compile(
        lambda x: sum(y.square().sum() for y in plain(x * 1.0)), backend="aot_eager"
    )
    fewer = kept_bytes(lambda: exact(x)) - kept_bytes(lambda: compiled(x))
    assert fewer >= TOKENS * WIDTH * 4 - sketch_bytes(kind)


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("kind", ["srht", "top_rows"])
def test_a_sketch_and_its_draw_do_not_come_apart(kind, budget, fresh_compiler):
    """Partitioners recompute draws. One row and its gradient come back exactly, if by one draw."""
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    x = torch.zeros(TOKENS, WIDTH)
    x[3] = torch.randn(WIDTH)

    def loss(x, weight):
        y = sketch.linear(x.sin(), weight, rows=ROWS, kind=kind)
        return sketch.linear(y.cos() * 0 + x.sin(), weight, rows=ROWS, kind=kind)[3].sum()

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph),
        bw_compiler=lambda graph, _: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
    )
    with torch._functorch.config.patch(activation_memory_budget=budget):
        compiled = torch.compile(loss, fullgraph=True, backend=backend)
        (dweight,) = torch.autograd.grad(compiled(x, weight), weight)
    torch.testing.assert_close(dweight, x.sin().sum(0).expand(WIDTH, WIDTH))
