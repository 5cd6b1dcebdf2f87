"""Lazy logits stand for the logits: whatever is done with them gives what it gives with those."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packlight
from packlight import GroupQuant
from packlight.head import LazyLogits
from tests.helpers import kept_bytes

ROWS, LENGTH, WIDTH, CLASSES = 3, 7, 16, 61


class Model(nn.Module):
    def __init__(self, dtype=torch.float32, bias=True):
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.head = nn.Linear(WIDTH, CLASSES, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def models(dtype=torch.float32, **options):
    """A plain model and the same with a lazy head."""
    torch.manual_seed(0)
    plain = Model(dtype, **options)
    lazy = copy.deepcopy(plain)
    packlight.convert(lazy, {}, head="head")
    return plain, lazy


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    target = torch.randint(CLASSES, (ROWS, LENGTH))
    target[:, :2] = -100
    return torch.randn(ROWS, LENGTH, WIDTH, dtype=dtype), target


def is_lazy(z: Tensor) -> bool:
    return type(z) is LazyLogits and z._state.values is None and z._state.bare is None


def step(model, use, dtype=torch.float32):
    x, target = inputs(dtype)
    x.requires_grad_()
    z = model(x)
    loss = use(z, target)
    loss.sum().backward()
    grads = [x.grad, *(parameter.grad for parameter in model.parameters())]
    model.zero_grad()
    return z, loss.detach(), grads


def flat(z):
    return z.view(-1, z.shape[-1])


# What is followed: no logits are computed.
LOSSES = {
    "flat": lambda z, t: F.cross_entropy(flat(z), t.view(-1)),
    "module": lambda z, t: nn.CrossEntropyLoss(label_smoothing=0.1)(
        z.reshape(-1, CLASSES), t.flatten()
    ),
    "shifted": lambda z, t: F.cross_entropy(
        z.float()[..., :-1, :].contiguous().view(-1, CLASSES), t[..., 1:].reshape(-1)
    ),
    "masked": lambda z, t: F.cross_entropy(z[t != -100], t[t != -100], reduction="sum"),
    "picked": lambda z, t: F.cross_entropy(
        z[:, torch.tensor([1, 4])].flatten(0, 1), t[:, [1, 4]].flatten()
    ),
    "one": lambda z, t: F.cross_entropy(z[1], t[1], reduction="none"),
    "moved": lambda z, t: F.cross_entropy(z.transpose(1, 2), t),
    "permuted": lambda z, t: F.cross_entropy(z.permute(0, 2, 1), t, reduction="none"),
    "scaled": lambda z, t: F.cross_entropy(flat(z * 0.5 / 3), t.view(-1)),
    "capped": lambda z, t: F.cross_entropy(flat(2.0 * torch.tanh(z / 2.0)), t.view(-1)),
    "capped at one": lambda z, t: F.cross_entropy(flat(z.tanh()), t.view(-1)),
    "biased": lambda z, t: F.cross_entropy(flat(z + torch.linspace(-1, 1, CLASSES)), t.view(-1)),
    "classes weighted": lambda z, t: F.cross_entropy(
        flat(z), t.view(-1), torch.linspace(0.1, 2, CLASSES)
    ),
    "cast": lambda z, t: F.cross_entropy(flat(z).to(torch.float64), t.view(-1)),
    "cast to another": lambda z, t: F.cross_entropy(
        flat(z.to("cpu").to(torch.zeros(1))), t.view(-1)
    ),
    "clone": lambda z, t: F.cross_entropy(flat(z.clone()), t.view(-1)),
    "z loss": lambda z, t: (
        F.cross_entropy(flat(z), t.view(-1)) + z.logsumexp(-1, keepdim=True).square().mean()
    ),
    "two losses": lambda z, t: (
        F.cross_entropy(flat(z), t.view(-1))
        + F.cross_entropy(flat(z[:, 1:].contiguous()), t[:, 1:].flatten())
    ),
    "log-probabilities": lambda z, t: F.nll_loss(F.log_softmax(flat(z), -1), t.view(-1)),
    "at given tokens": lambda z, t: (
        z.log_softmax(-1).gather(-1, t.clamp(min=0).unsqueeze(-1)).squeeze(-1)[t != -100].sum()
    ),
    "iterated": lambda z, t: torch.stack(
        [F.cross_entropy(a, b, reduction="sum") for a, b in zip(z, t, strict=True)]
    ).sum(),
    "in chunks": lambda z, t: sum(
        F.cross_entropy(a, b, reduction="sum")
        for a, b in zip(flat(z).chunk(4), t.view(-1).chunk(4), strict=True)
    ),
    "split and bound again": lambda z, t: sum(
        F.cross_entropy(row, b, reduction="sum")
        for a, c in zip(z.split(2, dim=1), t.split(2, dim=1), strict=True)
        for row, b in zip(torch.unbind(a), c, strict=True)
    ),
    "narrowed": lambda z, t: F.cross_entropy(
        flat(z.narrow(1, 1, 4).select(0, 1).type(torch.float64)), t[1, 1:5]
    ),
    "selected": lambda z, t: F.cross_entropy(
        flat(torch.index_select(z, 1, torch.tensor([2, 5]))), t[:, [2, 5]].flatten()
    ),
    "some logits": lambda z, t: gathered(z, t),
    "some scaled and capped logits": lambda z, t: gathered(torch.tanh(z * 0.5) * 3.0, t),
    "minus logsumexps, as by TRL": lambda z, t: trl(z / 0.7, t),
    "by rows, as by TRL": lambda z, t: trl_by_rows(z / 0.7, t),
    "smoothed as by the Trainer": lambda z, t: transformers_smoothing(z, t),
    "the sum first": lambda z, t: (lambda p: p.sum(-1).mean() + gathered(p, t))(
        torch.log_softmax(z.float() * 0.5, dim=2)
    ),
    "nothing but sizes": lambda z, t: (
        F.cross_entropy(flat(z), t.view(-1).to(z.device))
        * z.size(0)
        * len(z)
        * z.dim()
        * z.ndim
        * z.numel()
        * z.requires_grad
        * z.dtype.itemsize
    ),
}

# What is not: the logits are computed, once.
USES = {
    "sum of squares": lambda z, t: z.square().sum(),
    "probabilities": lambda z, t: z.softmax(-1)[..., 3].sum(),
    "entropy": lambda z, t: (lambda p: -(p.exp() * p).sum())(F.log_softmax(z, -1)),
    "logarithms along rows": lambda z, t: F.log_softmax(z, 1).sum(-1).square().sum(),
    "scaled logarithms": lambda z, t: gathered(F.log_softmax(z, -1) * 2.0, t),
    "all logarithms": lambda z, t: F.log_softmax(z, -1).sum(),
    "logits at several tokens": lambda z, t: z.gather(-1, t[..., :2, None].clamp(min=0)).mean(),
    "parts of the classes": lambda z, t: sum(z.chunk(2, -1)[0].square().sum() for _ in range(2)),
    "a row iterated": lambda z, t: torch.stack(list(z[0, 0])[:3]).sum(),
    "a mask of classes": lambda z, t: z.masked_select(z > 0).sum(),
    "minus logits": lambda z, t: F.cross_entropy(flat(-z), t.view(-1)),
    "other bytes": lambda z, t: z.view(torch.int32).float().sum() * 0 + z.square().sum(),
    "logarithms in a dtype": lambda z, t: torch.log_softmax(z, -1, torch.float64).sum(-1).mean(),
    "an axis": lambda z, t: F.log_softmax(z, -1).sum(axis=-1).mean() + z.logsumexp((0, 1)).sum(),
    "a sum of logits": lambda z, t: z.sum(-1).square().sum(),
    "a loss of minus logarithms": lambda z, t: F.nll_loss(-F.log_softmax(flat(z), -1), t.view(-1)),
    "soft targets": lambda z, t: F.cross_entropy(flat(z), torch.full_like(flat(z), 1 / CLASSES)),
    "a scalar tensor": lambda z, t: F.cross_entropy(flat(z * torch.tensor(0.3)), t.view(-1)),
    "tanh twice": lambda z, t: F.cross_entropy(flat(z.tanh().tanh()), t.view(-1)),
    "bias of a cap": lambda z, t: F.cross_entropy(flat(z.tanh() + torch.ones(CLASSES)), t.view(-1)),
    "fewer classes": lambda z, t: F.cross_entropy(
        z[..., :40].reshape(-1, 40), t.view(-1).clamp(max=39)
    ),
    "another view": lambda z, t: z.view(ROWS, -1).pow(2).mean(),
    "weighted and smoothed": lambda z, t: F.cross_entropy(
        flat(z), t.view(-1), torch.linspace(0.1, 2, CLASSES), label_smoothing=0.1
    ),
    "stacked": lambda z, t: torch.stack([z, z * 2]).pow(2).sum(),
    "einsum": lambda z, t: torch.einsum("btv,btv->", z, z),
    "written in place": lambda z, t: written(z, t),
    "scaled in place": lambda z, t: F.cross_entropy(flat(z.mul_(0.5)), t.view(-1)),
    "loss and values": lambda z, t: F.cross_entropy(flat(z), t.view(-1)) + z.square().mean(),
    "values and loss": lambda z, t: z.square().mean() + F.cross_entropy(flat(z), t.view(-1)),
    "someone's Function": lambda z, t: Square.apply(z).sum(),
    "a view in someone's Function": lambda z, t: Square.apply(flat(z * 0.5)).sum(),
    "values and someone's Function": lambda z, t: z.square().sum() + Square.apply(z * 0.5).sum(),
    "written, then someone's Function": lambda z, t: Square.apply(written_to(z)).sum(),
    "a trained bias": lambda z, t: trained_bias(z, t),
    "a bias changed later": lambda z, t: changed_later(z, t),
    "loss behind someone's Function": lambda z, t: F.cross_entropy(
        flat(Double.apply(z)), t.view(-1)
    ),
    "a kept gradient": lambda z, t: (z.retain_grad(), F.cross_entropy(flat(z), t.view(-1)))[1],
    "a hook": lambda z, t: (z.register_hook(lambda g: 3 * g), F.cross_entropy(flat(z), t.view(-1)))[
        1
    ],
}


def written_to(z):
    z[..., 3:9] = 2.0
    return z


def trained_bias(z, t):
    bias = torch.linspace(-1, 1, CLASSES).requires_grad_()
    loss = F.cross_entropy(flat(z + bias), t.view(-1))
    assert torch.autograd.grad(loss, bias, retain_graph=True)[0].norm() > 0
    return loss


def changed_later(z, t):
    bias, mask = torch.linspace(-1, 1, CLASSES), t != -100
    biased, targets = (z + bias)[mask], t[mask]
    bias.zero_()
    return biased.square().sum() + F.cross_entropy(biased, targets)


def trl(z, t):
    selected = z.gather(-1, t.clamp(min=0)[..., None]).squeeze(-1)
    return (selected - torch.stack([torch.logsumexp(row, dim=-1) for row in z])).mean()


def trl_by_rows(z, t):
    found = [
        F.log_softmax(row, dim=-1).gather(dim=-1, index=at.clamp(min=0)[:, None]).squeeze(-1)
        for row, at in zip(z, t, strict=True)
    ]
    return torch.stack(found).mean()


def gathered(p, t):
    return p.gather(2, t.clamp(min=0)[..., None]).mean()


def transformers_smoothing(z, t):
    from transformers.trainer_pt_utils import LabelSmoother

    return LabelSmoother(epsilon=0.2)({"logits": z}, t, shift_labels=True)


def written(z, t):
    """A view made before a write sees it; a copy does not."""
    view, double = flat(z), z * 2
    z[:, :, :5] = -9.0
    return F.cross_entropy(view, t.view(-1)) + F.cross_entropy(flat(double), t.view(-1))


class InPlaceLoss(torch.autograd.Function):
    """Cross-entropy that leaves its gradient where the logits were, as fused losses do."""

    @staticmethod
    def forward(ctx, logits, target):
        loss = F.cross_entropy(logits, target)
        gradient = logits.softmax(-1)
        gradient[torch.arange(len(target)), target] -= 1.0
        logits.copy_(gradient / len(target))
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0] * g, None


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Double(torch.autograd.Function):
    """Doubles the gradient and copies the values."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize("use", [*LOSSES, *USES])
def test_gradients_are_those_of_the_plain_head(use):
    plain, lazy = models()
    function = {**LOSSES, **USES}[use]
    expected, true_loss, true_grads = step(plain, function)
    z, loss, grads = step(lazy, function)
    torch.testing.assert_close(loss, true_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, true_grads, rtol=1e-4, atol=1e-6)
    assert is_lazy(z) == (use in LOSSES)
    assert torch.equal(z.detach().clone() + 0, expected)


@pytest.mark.parametrize("write", [lambda z: z, written_to], ids=["as it is", "written to"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_head_and_a_loss_that_writes_into_the_logits(write, bias):
    """The input of the head is made of its weight, too."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(CLASSES, WIDTH)
            self.head = nn.Linear(WIDTH, CLASSES, bias=bias)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(torch.tanh(self.embedding(x)))

    torch.manual_seed(0)
    plain = Tied()
    lazy = copy.deepcopy(plain)
    packlight.convert(lazy, {}, head="head")
    tokens = torch.randint(CLASSES, (ROWS, LENGTH))
    for model in (plain, lazy):
        z = flat(write(model(tokens)) * 0.5)
        InPlaceLoss.apply(z, tokens.flatten()).backward()
    for ours, theirs in zip(lazy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "use", ["flat", "shifted", "capped", "z loss", "minus logsumexps, as by TRL"]
)
def test_dtypes_are_those_of_the_plain_head(use, dtype):
    plain, lazy = models(dtype)
    _, true_loss, true_grads = step(plain, LOSSES[use], dtype)
    z, loss, grads = step(lazy, LOSSES[use], dtype)
    assert is_lazy(z)
    assert loss.dtype == true_loss.dtype
    close = {"rtol": 1e-6, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 0.1, "atol": 5e-3}
    torch.testing.assert_close(loss, true_loss, **close)
    for mine, true in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(mine, true, **close)


@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
def test_autocast_is_that_of_the_heads_call(inside):
    plain, lazy = models()
    x, target = inputs()
    results = []
    for model in (plain, lazy):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = model(x)
            loss = F.cross_entropy(flat(z), target.view(-1)) if inside else None
        loss = F.cross_entropy(flat(z).float(), target.view(-1)) if loss is None else loss
        loss.backward()
        results.append((z, loss, model.head.weight.grad))
    (z, loss, grad), (lazy_z, lazy_loss, lazy_grad) = results
    assert lazy_loss.dtype == loss.dtype
    torch.testing.assert_close(lazy_loss, loss, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lazy_grad, grad, rtol=2e-2, atol=2e-4)
    assert is_lazy(lazy_z)
    assert torch.equal(lazy_z + 0, z)


@pytest.mark.parametrize(
    "use", ["flat", "in chunks", "minus logsumexps, as by TRL", "by rows, as by TRL"]
)
def test_nothing_of_the_vocabulary_is_kept(use):
    plain, lazy = models()
    x, target = inputs()
    logits = 4 * ROWS * LENGTH * CLASSES
    loss = LOSSES[use]
    bytes_of = [kept_bytes(lambda m=m: loss(m(x), target)) for m in (plain, lazy)]
    assert bytes_of[0] - bytes_of[1] > 0.8 * logits


def test_without_gradients_and_in_eval():
    plain, lazy = models()
    x, target = inputs()
    with torch.no_grad():
        z = lazy(x)
        assert is_lazy(z)
        assert not z.requires_grad
        loss = F.cross_entropy(flat(z), target.view(-1))
        assert is_lazy(z)
        torch.testing.assert_close(loss, F.cross_entropy(flat(plain(x)), target.view(-1)))
        assert torch.equal(z + 0, plain(x))
    assert type(lazy.eval()(x)) is Tensor


def test_a_frozen_head_keeps_the_gradient_of_its_input():
    plain, lazy = models()
    for model in (plain, lazy):
        model.head.requires_grad_(False)
    _, true_loss, true_grads = step(plain, LOSSES["shifted"])
    z, loss, grads = step(lazy, LOSSES["shifted"])
    assert is_lazy(z)
    torch.testing.assert_close(loss, true_loss)
    torch.testing.assert_close(grads, true_grads, rtol=1e-4, atol=1e-6)
    x, target = inputs()
    kept = kept_bytes(lambda: LOSSES["shifted"](lazy(x), target))
    held = x.nbytes + sum(p.nbytes for p in lazy.body.parameters())  # of the body
    held += 4 * ROWS * LENGTH * WIDTH  # the result of tanh
    assert kept - held <= 4 * ROWS * LENGTH * (WIDTH + 4) + 64


def test_a_detached_copy_has_no_gradient_and_a_loss():
    _, lazy = models()
    x, target = inputs()
    z = lazy(x)
    apart = z.detach()
    assert not apart.requires_grad
    assert not F.cross_entropy(flat(apart), target.view(-1)).requires_grad
    assert is_lazy(z)
    assert apart.numpy().shape == (ROWS, LENGTH, CLASSES)


def test_what_comes_too_late_is_told():
    _, lazy = models()
    x, target = inputs()
    z = lazy(x)
    loss = F.cross_entropy(flat(z), target.view(-1))
    for watch in (z.retain_grad, lambda: z.register_hook(print)):
        with pytest.raises(packlight.InputError, match="before the loss"):
            watch()
    with pytest.raises(packlight.InputError, match="before the loss"):
        torch.autograd.grad(loss, z)
    loss.backward()
    torch.optim.SGD(lazy.parameters(), 0.1).step()
    with pytest.raises(packlight.ModifiedWeightError, match="use them before"):
        z.sum()
    with pytest.raises(packlight.ModifiedWeightError):
        F.cross_entropy(flat(z), target.view(-1))


def test_logits_of_a_head_of_another_dtype_since():
    layer = nn.Linear(8, 4)
    packlight.convert(layer, {nn.Linear: packlight.GroupQuant(8)}, head="*")
    logits = layer(torch.randn(3, 8))
    layer.to(torch.float64)
    with pytest.raises(packlight.ModifiedWeightError, match="use them before"):
        logits.sum()


def test_a_loss_that_nothing_records_lets_hooks_be_set():
    layer = nn.Linear(8, 4)
    packlight.convert(layer, {nn.Linear: packlight.GroupQuant(8)}, head="*")
    logits, seen = layer(torch.randn(3, 8)), []
    with torch.no_grad():
        F.cross_entropy(logits, torch.zeros(3, dtype=torch.long))
    logits.register_hook(seen.append)
    logits.square().mean().backward()
    assert len(seen) == 1


def test_the_input_written_to_is_told():
    _, lazy = models()
    h = torch.randn(ROWS, WIDTH)
    z = lazy.head(h)
    h.add_(1)
    with pytest.raises(packlight.ModifiedWeightError):
        z.sum()


def test_copies_files_and_words_are_of_the_values():
    plain, lazy = models()
    x, _ = inputs()
    with torch.no_grad():
        z, true = lazy(x), plain(x)
    assert repr(z) == repr(true)
    assert torch.equal(copy.deepcopy(z), true)
    file = io.BytesIO()
    torch.save(z, file)
    file.seek(0)
    again = torch.load(file)
    assert type(again) is Tensor
    assert torch.equal(again, true)
    assert z.tolist() == true.tolist()


def test_a_reentrant_checkpoint_around_head_and_loss():
    from torch.utils.checkpoint import checkpoint

    def around(model, t):
        return lambda x: LOSSES["shifted"](model(x), t)

    plain, lazy = models()
    for reentrant in (True, False):
        results = []
        for model in (plain, lazy):
            x, target = inputs()
            x.requires_grad_()
            model.zero_grad()
            checkpoint(around(model, target), x, use_reentrant=reentrant).backward()
            results.append([x.grad, *(parameter.grad for parameter in model.parameters())])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning",  # the tracer looks at it, of any tensor
    "ignore:Dynamo does not know how to trace:UserWarning",
)
def test_compiled_functions_take_the_values_and_compiled_heads_are_plain():
    plain, lazy = models()
    x, target = inputs()
    square = torch.compile(lambda z: z.float().pow(2).mean(), backend="aot_eager")
    whole = torch.compile(lazy, backend="aot_eager", fullgraph=True)
    for run in (
        lambda m: square(m(x)),
        lambda m: LOSSES["flat"]((whole if m is lazy else m)(x), target),
    ):
        grads = []
        for model in (plain, lazy):
            model.zero_grad()
            run(model).backward()
            grads.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_inside_saving_the_loss_is_exact():
    plain, lazy = models()
    with packlight.saving(GroupQuant(bits=2, group_size=32), min_bytes=0):
        _, target = inputs()
        h = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
        loss = F.cross_entropy(flat(lazy.head(h)), target.view(-1))
    exact = F.cross_entropy(flat(plain.head(h)), target.view(-1))
    found = torch.autograd.grad(loss, (h, lazy.head.weight))
    true = torch.autograd.grad(exact, (h, plain.head.weight))
    torch.testing.assert_close(found, true)


def test_torch_func_sees_torchs_functions():
    plain, lazy = models()
    x, target = inputs()
    found = torch.func.grad(lambda x: LOSSES["flat"](lazy(x), target))(x)
    torch.testing.assert_close(
        found, torch.func.grad(lambda x: LOSSES["flat"](plain(x), target))(x)
    )


def test_without_tensors_without_memory_heads_are_plain(monkeypatch):
    from packlight import _torch

    _, lazy = models()
    monkeypatch.setitem(vars(_torch.HOLLOW), "values", None)
    assert type(lazy(inputs()[0])) is Tensor


# ---- conversion ----------------------------------------------------------------------------------


def test_a_conversion_and_back():
    _, lazy = models()
    names = set(lazy.state_dict())
    assert isinstance(lazy.head, nn.Linear)
    assert copy.deepcopy(lazy).head.__class__ is lazy.head.__class__
    file = io.BytesIO()
    torch.save(lazy, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again.head) is type(lazy.head)
    assert set(again.state_dict()) == names
    assert packlight.revert(lazy) == 1
    assert type(lazy.head) is nn.Linear
    assert set(lazy.state_dict()) == names


def test_a_quantiser_keeps_the_input_of_the_head():
    torch.manual_seed(0)
    model = Model()
    method = GroupQuant(bits=4, group_size=32)
    conversion = packlight.convert(model, {nn.Linear: method}, head="head", functional=False)
    assert conversion.heads == ("head",)
    assert "losses of head are computed by chunks" in str(conversion)
    assert conversion.to_dict()["heads"] == ["head"]
    assert [row.names for row in conversion.replaced] == [("body",), ("head",)]
    assert model.head.method is method
    x, target = inputs()
    z = model(x)
    assert is_lazy(z)
    packlight.profile(lambda: LOSSES["flat"](model(x), target))
    assert packlight.revert(model) == 2
    # Converted anew without a head, it is a plain converted layer.
    packlight.convert(model, method, head="head")
    packlight.convert(model, method)
    assert type(model.head) is packlight.groupquant.Linear


@pytest.mark.parametrize("methods", [packlight.Sketch(rows=0.5), packlight.Inverted()], ids=str)
def test_a_head_of_another_method_keeps_its_input(methods):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))
    packlight.convert(model, methods, head="1", strict=False)
    x, target = inputs()
    z = model(x)
    assert is_lazy(z)
    loss = F.cross_entropy(flat(z), target.view(-1))
    found = torch.autograd.grad(loss, model[1].weight)
    packlight.revert(model)
    true = torch.autograd.grad(F.cross_entropy(flat(model(x)), target.view(-1)), model[1].weight)
    torch.testing.assert_close(found, true)


def test_what_is_no_head_is_told():
    model = Model()
    with pytest.raises(packlight.NothingMatchedError, match="give a selector"):
        packlight.convert(model, GroupQuant(), head=True)
    with pytest.raises(packlight.NothingMatchedError, match="near: head"):
        packlight.convert(model, GroupQuant(), head="heed")
    with pytest.raises(packlight.CannotConvertError, match=r"no torch\.nn\.Linear"):
        packlight.convert(model, GroupQuant(), head=lambda name, module: name == "")
    with pytest.raises(packlight.InputError, match="neither True"):
        packlight.convert(model, GroupQuant(), head=3)
    assert type(model.head) is nn.Linear
    conversion = packlight.convert(model, {nn.Linear: GroupQuant()}, head=True, strict=False)
    assert conversion.heads == ()


def test_nothing_outlives_the_logits():
    """Without the collector: no cycle holds the input, and no step holds logits that are gone."""
    _, lazy = models()
    x, target = inputs()
    gc.collect()
    gc.disable()
    try:
        h = lazy.body(x)
        z = lazy.head(h)
        loss = F.cross_entropy(flat(z.float()), target.view(-1))
        alive = [weakref.ref(one) for one in (h, z, z._state)]
        del h, z
        loss.backward()
        del loss
        assert [one() for one in alive] == [None, None, None]

        z = lazy.head(lazy.body(x))
        state = weakref.ref(z._state)
        z = z / 2.0
        z.sum()
        assert state() is None
    finally:
        gc.enable()


def test_in_inference_mode():
    plain, lazy = models()
    x, target = inputs()
    with torch.inference_mode():
        z = lazy(x)
        loss = F.cross_entropy(flat(z), target.view(-1))
        assert torch.equal(z + 0, plain(x))
    torch.testing.assert_close(loss, F.cross_entropy(flat(plain(x)), target.view(-1)).detach())
