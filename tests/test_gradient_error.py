"""Errors of gradients: the numbers by hand in float64, what is left alone, what is said."""

import copy
import dataclasses
import gc
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import packlight
from packlight import FewBit, GradientReport, GroupQuant, InputError, gradient_error
from packlight._seeds import rounding_state
from packlight.cli import main
from packlight.gradient_error import passes
from packlight.gradient_error.sums import _Sums
from packlight.report.gradients import Deviation, LayerGradients

NEAREST = GroupQuant(4, rounding="nearest")


def mean_loss(model, batch):
    x, target = batch
    return (model(x) - target).square().mean()


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
    return model, (torch.randn(33, 64), torch.randn(33, 32))


def by_name(report):
    return {row.layer: row for row in report.rows}


# ---- the numbers ---------------------------------------------------------------------------------


def weight_gradient(x, target, weight):
    """Of mean((x W^T - target)^2), and with another x in its last product."""
    slope = 2 * (x @ weight.T - target) / target.numel()
    return slope, slope.T @ x


def test_one_linear_layer_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 16, bias=False))
    x, target = torch.randn(33, 128), torch.randn(33, 16)
    report = gradient_error(model, (x, target), NEAREST, loss=mean_loss)
    (row,) = report.rows
    (found,) = row.weights

    weight = model[0].weight.detach().double()
    wide = x.double(), target.double()
    slope, exact = weight_gradient(*wide, weight)
    packed = NEAREST.unpack(torch.float32, x.shape, x.stride(), *NEAREST.pack(x, None)).double()
    converted = slope.T @ packed
    error = (converted - exact).norm() / exact.norm()
    assert found.error == pytest.approx(error.item(), rel=1e-4)
    assert found.bias == pytest.approx(error.item(), rel=1e-4)  # nothing is drawn
    cosine = F.cosine_similarity(converted.flatten(), exact.flatten(), 0)
    assert found.cosine == pytest.approx(cosine.item(), abs=1e-6)
    assert found.exact == pytest.approx(exact.square().sum().item(), rel=1e-5)

    a, b = (
        weight_gradient(*(t[rows] for t in wide), weight)[1] for rows in (slice(16), slice(16, 33))
    )
    noise = math.sqrt(16 * 17) / 33 * (a - b).norm()
    assert row.noise == pytest.approx((noise / exact.norm()).item(), rel=1e-4)
    assert row.of_noise() == pytest.approx((error * exact.norm() / noise).item(), rel=1e-4)
    assert report.batch == 33


def test_error_and_bias_of_stochastic_rounding():
    """Of a weight gradient that is unbiased, with a variance that the codes imply."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 16, bias=False))
    method = GroupQuant(2, code="minmax")
    x, target = torch.randn(64, 128), torch.randn(64, 16)
    (row,) = gradient_error(model, (x, target), method, loss=mean_loss, draws=64).rows
    (found,) = row.weights
    wide = x.double()
    slope, exact = weight_gradient(wide, target.double(), model[0].weight.detach().double())
    # A row is a group: a value a share f of the way to the next level has variance s^2 f (1 - f).
    low, high = wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)
    step = (high - low) / 3
    share = ((wide - low) / step) % 1
    variance = step.square() * share * (1 - share)
    expected = (slope.square().T @ variance).sum().sqrt() / exact.norm()
    assert found.error == pytest.approx(expected.item(), rel=0.05)
    assert found.bias < 0.1 * found.error


def test_the_batch_s_noise_is_that_over_batches():
    """Of many batches drawn anew; each estimate is one sample, and their mean has no bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8, bias=False))
    weight = model[0].weight.detach().double()
    gradients, squares = [], []
    for _ in range(100):
        batch = torch.randn(16, 32), torch.randn(16, 8)
        report = gradient_error(model, batch, NEAREST, loss=mean_loss, draws=1)
        squares.append(report.rows[0].squared_noise)
        gradients.append(weight_gradient(*(t.double() for t in batch), weight)[1])
    drawn = torch.stack(gradients)
    expected = (drawn - drawn.mean(0)).square().sum().item() / 99
    assert sum(squares) / 100 == pytest.approx(expected, rel=0.1)


def test_gradients_of_inputs_by_hand():
    model, batch = net()
    report = gradient_error(model, batch, {"1": NEAREST}, loss=mean_loss)
    made = copy.deepcopy(model)
    x = made[0](batch[0]).detach()
    slopes = []
    for each in (made, copy.deepcopy(model)):
        if each is not made:
            packlight.convert(each, {"1": NEAREST})
        leaf = x.clone().requires_grad_()
        value = (each[2](each[1](leaf)) - batch[1]).square().mean()
        slopes.append(torch.autograd.grad(value, leaf)[0].double())
    error = (slopes[1] - slopes[0]).norm() / slopes[0].norm()
    rows = by_name(report)
    assert rows["1"].inputs[0].error == pytest.approx(error.item(), rel=1e-4)
    assert rows["2"].inputs[0].error == 0  # nothing behind it is converted
    assert not rows["0"].inputs  # the batch needs no gradient
    assert rows["2"].weights[0].error == 0
    assert rows["0"].weights[0].error > 0


def test_a_large_input_is_sampled(monkeypatch):
    model, batch = net()
    full = gradient_error(model, batch, {"1": NEAREST}, loss=mean_loss)
    monkeypatch.setattr(passes, "_SAMPLED", 1024)
    part = gradient_error(model, batch, {"1": NEAREST}, loss=mean_loss)
    one, other = (by_name(report)["1"].inputs[0] for report in (full, part))
    assert one != other
    assert one.error == pytest.approx(other.error, rel=0.3)
    assert one.exact == pytest.approx(other.exact, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model, batch = net()
    batch = tuple(t.to(dtype) for t in batch)
    report = gradient_error(model.to(dtype), batch, NEAREST, loss=mean_loss)
    assert 0.03 < report.whole.weights[0].error < 0.3


def test_under_autocast():
    model, batch = net()
    with torch.autocast("cpu", torch.bfloat16):
        report = gradient_error(model, batch, FewBit(8), loss=mean_loss)
    assert 0 < report.whole.weights[0].error < 0.02


def test_a_row_is_the_sum_of_its_parameters_and_the_whole_that_of_its_rows():
    one, other = Deviation(4.0, 1.0, 0.5, 3.0, 4.0), Deviation(5.0, 0.44, None, 3.0, 5.0)
    both = one + other
    assert (both.error, both.bias, both.cosine) == (0.4, None, pytest.approx(6 / 9))
    assert (one.error, one.bias) == (0.5, pytest.approx(math.sqrt(0.125)))
    assert dataclasses.replace(one, squared_bias=-0.1).bias == 0
    rows = [LayerGradients("a", "A", (one,), 9.0, ()), LayerGradients("b", "B", (other,), 7.0, ())]
    whole = LayerGradients.together("", "Net", rows)
    assert whole.of_noise() == pytest.approx(0.3)
    assert whole.noise == pytest.approx(4 / 3)
    nothing = Deviation(0.0, 0.0, 0.0, 0.0, 0.0)
    assert (nothing.error, nothing.cosine) == (0, None)
    assert dataclasses.replace(nothing, squared_error=1.0).error == math.inf


# ---- what is left alone --------------------------------------------------------------------------


def test_the_model_stays_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 4)
    )
    model[1].eval()
    calls = []
    for parameter in model.parameters():
        parameter.register_hook(lambda g: calls.append("gradient"))
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    batch = torch.randn(8, 32, requires_grad=True), torch.randn(8, 4)
    grads = [torch.ones_like(p) for p in model.parameters()]
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad
    values = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    rounding, generator = rounding_state(), torch.get_rng_state()
    others = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    gradient_error(model, batch, loss=mean_loss)
    assert not calls
    assert [type(module) for module in model.modules()] == kinds
    assert [dict(vars(module)) for module in model.modules()] == attributes
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.grad is grad
        assert bool((grad == 1).all())
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])
    assert batch[0].grad is None
    assert rounding_state() == rounding
    assert torch.equal(torch.get_rng_state(), generator)
    assert (random.getstate(), str(np.random.get_state())) == others  # noqa: NPY002
    assert [module.training for module in model] == [True, False, True, True, True]


def test_the_model_stays_as_it_is_where_a_pass_fails():
    model, batch = net()
    generator = torch.get_rng_state()

    def fails(model, batch):
        torch.randn(3)
        raise ValueError("of the user's")

    with pytest.raises(ValueError, match="of the user's"):
        gradient_error(model, batch, loss=fails)
    assert torch.equal(torch.get_rng_state(), generator)
    assert type(model[0]) is nn.Linear


def test_a_converted_model_is_measured_as_it_is_and_stays_so():
    model, batch = net()
    packlight.convert(model, {"0": NEAREST})
    kinds = [type(module) for module in model]
    report = gradient_error(model, batch, loss=mean_loss)
    assert report.methods == ("as converted",)
    assert [type(module) for module in model] == kinds
    rows = by_name(report)
    assert rows["0"].weights[0].error > 0
    assert rows["2"].weights[0].error == 0
    packlight.revert(model)
    expected = gradient_error(model, batch, {"0": NEAREST}, loss=mean_loss)
    assert expected.rows[0].weights == report.rows[0].weights


def test_two_copies_of_gradients_are_kept(monkeypatch):
    """Between passes and while one runs: the exact one, and a half's or the sum over draws."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(53, 37, bias=False))
    batch = torch.randn(8, 53), torch.randn(8, 37)
    alive = []
    loss_of = passes._loss_of

    def counted(*arguments):
        gc.collect()
        found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        found = [x for x in found if x.shape == (37, 53)]
        storages = {x.data_ptr() for x in found} - {model[0].weight.data_ptr()}
        alive.append(len(storages))
        return loss_of(*arguments)

    monkeypatch.setattr(passes, "_loss_of", counted)
    gradient_error(model, batch, GroupQuant(4), GroupQuant(2), loss=mean_loss, draws=2)
    assert len(alive) == 7
    assert max(alive) == 2


def test_the_same_seed_gives_the_same_report():
    model, batch = net()
    reports = []
    for _ in range(2):
        torch.manual_seed(3)
        reports.append(gradient_error(model, batch, GroupQuant(4), loss=mean_loss))
    assert reports[0] == reports[1]


# ---- batches and models --------------------------------------------------------------------------


class Model(nn.Module):
    """As models of transformers are: keywords in, an object or a mapping with a loss out."""

    def __init__(self, returns=dict):
        super().__init__()
        self.linear = nn.Linear(32, 4)
        self.returns = returns

    def forward(self, x, labels=None, scale=None):
        loss = F.cross_entropy(self.linear(x) * (1 if scale is None else scale), labels)
        return {"loss": loss, "logits": x} if self.returns is dict else self.returns(loss)


@pytest.mark.parametrize("returns", [dict, lambda x: x, lambda x: (x, None)])
def test_what_a_model_returns(returns):
    batch = {"x": torch.randn(6, 32), "labels": torch.arange(6) % 4, "scale": torch.tensor(2.0)}
    report = gradient_error(Model(returns), batch, NEAREST)
    assert report.batch == 6
    assert 0 < report.whole.of_noise() < 1


def test_a_batch_may_be_a_tensor_or_a_function():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(64, 32), nn.Flatten(0), nn.Linear(32 * 6, 1)),
        torch.randn(6, 64),
    )
    assert gradient_error(model[0:1], x, NEAREST, loss=lambda m, b: m(b).mean()).batch == 6
    report = gradient_error(model, lambda model: model(x), NEAREST)
    assert report.batch is None
    assert report.rows[0].noise is None
    assert report.whole.of_noise() is None
    assert "noise is not known" in report.sentence()
    assert "noise is not known" in str(report)


def test_a_batch_of_one_row_has_no_noise_that_is_known():
    model, batch = net()
    report = gradient_error(model, tuple(t[:1] for t in batch), NEAREST, loss=mean_loss)
    assert report.batch is None
    assert report.whole.noise is None


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 32)
        self.body = nn.Linear(32, 32)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.unused = nn.Linear(32, 32)
        self.head = nn.Linear(32, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        hidden = self.frozen(self.body(self.embedding(x)).tanh())
        return F.cross_entropy(self.head(hidden), x)


def test_weights_that_are_tied_frozen_or_unused_are_said(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # a narrow terminal folds notes
    torch.manual_seed(0)
    report = gradient_error(Tied(), torch.arange(16), GroupQuant(8, 32))
    rows = by_name(report)
    assert rows["head"].note == "tied to embedding"
    assert rows["frozen"].note == "frozen"
    assert rows["unused"].note == "no gradient"
    for name in ("head", "frozen", "unused"):
        assert not rows[name].weights
    assert rows["frozen"].inputs[0].error == 0
    assert rows["embedding"].weights[0].error > 0  # by the head's pack
    printed = str(report)
    for note in ("tied to embedding", "frozen", "no gradient"):
        assert note in printed
    assert "has no weight gradient, frozen" in report.sentence("frozen")
    total = sum(row.weights[0].exact for row in report.rows if row.weights)
    assert report.whole.weights[0].exact == total


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.drop = nn.Dropout(0.5)
        self.other = self.linear

    def forward(self, x):
        x = F.dropout(F.relu(self.linear(x)), 0.5, self.training)
        return self.drop(self.other(x)).square().mean()


def test_exact_methods_have_no_error_whatever_is_dropped_out():
    """Layers are off, functions draw the same masks; a layer that is called twice is one row."""
    torch.manual_seed(0)
    report = gradient_error(Twice(), torch.randn(8, 64), FewBit(1), functional=True)
    (row,) = report.rows
    assert row.layer == "linear"
    assert row.weights[0].squared_error == 0
    assert row.inputs[0].squared_error == 0
    assert row.noise > 0


def test_a_checkpointed_block_and_a_recurrent_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(16, 64, batch_first=True)
            self.block = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 4))

        def forward(self, x):
            y, _ = self.rnn(x)
            y = torch.utils.checkpoint.checkpoint(self.block, y, use_reentrant=False)
            return y.square().mean()

    torch.manual_seed(0)
    report = gradient_error(Net(), torch.randn(6, 5, 16), NEAREST)
    rows = by_name(report)
    assert rows["block.2"].inputs[0].error == 0
    assert 0.02 < rows["block.0"].weights[0].error < 0.3
    assert 0 < rows["rnn"].weights[0].error < 0.3


class Routed(nn.Module):
    """A layer that only large batches reach."""

    def __init__(self):
        super().__init__()
        self.linear, self.other = nn.Linear(64, 8), nn.Linear(64, 8)

    def forward(self, x):
        y = self.linear(x).square().mean()
        return y + (self.other(x).square().mean() if len(x) > 4 else 0.0)


def test_the_noise_of_a_layer_that_no_half_reaches_is_not_known():
    torch.manual_seed(0)
    report = gradient_error(Routed(), torch.randn(8, 64), NEAREST)
    rows = by_name(report)
    assert rows["other"].squared_noise is None
    assert rows["other"].of_noise() is None
    assert rows["other"].weights[0].error > 0
    assert report.whole.squared_noise == rows["linear"].squared_noise > 0


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(10, 64, sparse=True), nn.Linear(64, 4))
    x = torch.arange(10)
    report = gradient_error(model, x, NEAREST, loss=lambda m, b: m(b).square().mean())
    assert report.rows[0].weights[0].exact > 0


def test_lengths_are_cut_with_the_rows():
    """A tensor of another first dimension stays whole, and so does what is no tensor."""
    from collections import namedtuple

    from packlight.gradient_error.halves import _cut, _length

    pair = namedtuple("pair", "x options")
    x = pad_sequence([torch.ones(3), torch.ones(5)], batch_first=True)
    batch = pair({"x": x, "positions": torch.arange(5)[None]}, ["text", torch.tensor(2)])
    assert _length(batch) == 2
    half = _cut(batch, 2, slice(1))
    assert type(half) is pair
    assert half.x["x"].shape == (1, 5)
    assert half.x["positions"].shape == (1, 5)
    assert half.options == ["text", torch.tensor(2)]


# ---- what is refused -----------------------------------------------------------------------------


def test_refusals():
    model, batch = net()
    cases = {
        "eval": lambda: gradient_error(copy.deepcopy(model).eval(), batch, loss=mean_loss),
        "expected an nn.Module": lambda: gradient_error(mean_loss, batch),
        "no parameter of the model": lambda: gradient_error(
            copy.deepcopy(model).requires_grad_(False), batch, loss=mean_loss
        ),
        "of one element": lambda: gradient_error(model, batch[0]),
        "has no gradient": lambda: gradient_error(
            model, batch, loss=lambda m, b: m(b[0]).detach().mean()
        ),
        "which is a copy": lambda: gradient_error(
            model, batch, loss=lambda _, b: model(b[0]).mean()
        ),
        "a sum over rows": lambda: gradient_error(
            model, batch, loss=lambda m, b: (m(b[0]) - b[1]).square().sum()
        ),
        "the loss is inf": lambda: gradient_error(
            model, batch, loss=lambda m, b: m(b[0]).mean() + math.inf
        ),
        "draws=0": lambda: gradient_error(model, batch, loss=mean_loss, draws=0),
        "cannot be called": lambda: gradient_error(model, batch, loss=3),
        "neither a method": lambda: gradient_error(model, batch, "GroupQuant(4)", loss=mean_loss),
    }
    for message, call in cases.items():
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(packlight.NothingMatchedError):
        gradient_error(model, batch, {"nowhere": NEAREST}, loss=mean_loss)
    with pytest.raises(InputError, match="no layer 'x'"):
        gradient_error(model, batch, NEAREST, loss=mean_loss, draws=1).sentence("x")


def test_one_draw_tells_no_bias():
    model, batch = net()
    report = gradient_error(model, batch, GroupQuant(4), loss=mean_loss, draws=1)
    assert report.whole.weights[0].bias is None
    assert "one draw" in str(report)


def test_a_gradient_that_a_draw_lacks_is_one_of_zeros():
    sums = _Sums(passes.Sample(torch.tensor([3.0, 4.0]), 1.0))
    sums.add(torch.zeros(2))
    assert sums.deviation().error == 1


# ---- what is shown -------------------------------------------------------------------------------


def test_a_report_prints_saves_and_says_it_in_a_sentence(tmp_path):
    model, batch = net()
    report = gradient_error(model, batch, NEAREST, GroupQuant(8), loss=mean_loss, draws=2)
    assert report.methods == ("GroupQuant(bits=4, rounding='nearest')", "GroupQuant(bits=8)")
    share = report.whole.of_noise(0)
    assert f"this is {100 * share:.0f}% of your batch's own noise" in report.sentence()
    assert report.sentence("0", 1).startswith(
        "GroupQuant(bits=8): the gradient of 0 (Linear) is off"
    )
    printed = str(report)
    assert "(2) error" in printed
    assert "0 (Linear)" in printed
    assert "cosine" not in printed
    assert GradientReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["rows"][1]["layer"] == "1"
    for text in ("{}", "[]", "no", report.to_json().replace('"draws"', '"drawn"')):
        with pytest.raises(InputError, match="GradientReport"):
            GradientReport.from_json(text)
    with pytest.raises(InputError, match="format"):
        GradientReport.from_json(report.to_json().replace('"format": 1', '"format": 0'))
    report.plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 5000
    with pytest.raises(InputError, match="at least 1"):
        report.plot(tmp_path / "errors.png", limit=0)
    nothing = dataclasses.replace(report, rows=())
    with pytest.raises(InputError, match="nothing to plot"):
        nothing.plot(tmp_path / "errors.png")
    assert repr(report).startswith("GradientReport(model='Sequential'")


def test_many_layers_share_lines():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(50)])
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    report = gradient_error(model, torch.randn(4, 64), NEAREST, loss=loss, draws=1)
    printed = report.to_text()
    assert "0-49 (50 x Linear)" in printed
    assert "49 (Linear)" in report.to_text(every_layer=True)
    (line,) = report.lines(40)
    assert line.weights[0] == report.whole.weights[0]


# ---- the command line ----------------------------------------------------------------------------

NET = """
import torch
from torch import nn

def make(width=64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, 8))
    batch = torch.randn(16, width), torch.randn(16, 8)
    return model, batch, lambda model, batch: (model(batch[0]) - batch[1]).square().mean()

def alone():
    model, batch, loss = make()
    return model, lambda model: loss(model, batch)
"""


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net_of_gradients.py").write_text(NET)
    command = ["gradient-error", "net_of_gradients:make", "--device", "cpu"]
    main([*command, "--method", "GroupQuant(4)", "--compare", "GroupQuant(8)", "--plot", "p.png"])
    printed = capsys.readouterr().out
    assert "(1) GroupQuant(bits=4): the gradient of all weights" in printed
    assert "(2) GroupQuant(bits=8): the gradient of all weights" in printed
    assert "p.png written" in printed
    assert (tmp_path / "p.png").exists()
    main([*command, "--compare", "GroupQuant(8)"])  # beside the default
    printed = capsys.readouterr().out
    assert "(1) FixedPoint(bits=4), GroupQuant(bits=4), FewBit(bits=3): the" in printed
    assert "(2) GroupQuant(bits=8): the gradient of all weights" in printed
    main([*command, "--config", "width=32", "--draws", "2", "--json"])
    report = GradientReport.from_json(capsys.readouterr().out)
    assert (report.draws, report.batch) == (2, 16)
    assert len(report.methods) == 1
    main(["gradient-error", "net_of_gradients:alone", "--device", "cpu", "--autocast", "bf16"])
    assert "noise is not known" in capsys.readouterr().out
    for words, message in (
        (["gradient-error", "hf:gpt2"], "without weights"),
        (["profile", "net_of_gradients:make"], "gradient-error takes"),
        ([*command, "--method", "nowhere=GroupQuant(4)"], "--no-strict"),
        ([*command, "--config", "width=3.5"], "cannot be made on cpu"),
        ([*command, "--compare", "GroupQuant(5)"], "bits=5"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert message in capsys.readouterr().err


# ---- on a device ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_device(autocast):
    model, batch = net()
    expected = gradient_error(model, batch, NEAREST, loss=mean_loss)
    model.insert(3, nn.Dropout(0.5))
    model, batch = model.cuda(), tuple(t.cuda() for t in batch)
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        report = gradient_error(model, batch, NEAREST, loss=mean_loss)
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], torch.cuda.get_rng_state())
    near = pytest.approx(expected.whole.weights[0].error, rel=0.2 if autocast else 0.01)
    assert report.whole.weights[0].error == near
    assert report.whole.noise == pytest.approx(expected.whole.noise, rel=0.05)
    assert all(parameter.grad is None for parameter in model.parameters())
