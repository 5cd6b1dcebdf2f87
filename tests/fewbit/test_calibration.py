"""`calibrate`: the histogram of what a layer reads, its codebook, and what that gains."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight import FewBit, GroupQuant, fit_codebook
from packlight.errors import InputError
from packlight.fewbit import calibrate
from packlight.fewbit.codebook import default_codebook
from tests.helpers import gradient


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.1),
        nn.Tanh(), nn.Linear(16, 16), nn.ELU(0.5, inplace=True), nn.ReLU(),
    )  # fmt: skip


def batches(count=3):
    torch.manual_seed(1)
    return [torch.randn(64, 16) for _ in range(count)]


def read_by_gelu(net):
    """What the GELU reads in all batches, rounded as it is counted."""
    seen = []
    with net[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten())):
        for batch in batches():
            net(batch)
    return torch.cat(seen).bfloat16().double().numpy()


def test_the_error_is_the_relative_error_of_the_gradient_and_smaller_than_by_default():
    net = model()
    found = calibrate(net, batches())
    assert [layer.name for layer in found.layers] == list(found) == ["1", "5", "7"]
    assert [layer.kind for layer in found.layers] == ["GELU", "Tanh", "ELU"]
    first = found.layers[0]
    x = read_by_gelu(net)
    slope = gradient(F.gelu, torch.from_numpy(x))[1].numpy()
    for book, error in (
        (first.codebook, first.error),
        (default_codebook("gelu", 3), first.default_error),
    ):
        expected = np.linalg.norm(slope - book.derivative(x)) / np.linalg.norm(slope)
        assert error == pytest.approx(expected, rel=1e-6)
    assert all(layer.error < 0.9 * layer.default_error for layer in found.layers)
    # The histogram has every value, in bins of about as many.
    assert sum(first.counts) == pytest.approx(1)
    assert max(first.counts) < 2 / 250
    np.testing.assert_allclose(
        np.histogram(x, first.edges)[0] / len(x), first.counts, rtol=1e-9, atol=1e-12
    )


def test_a_codebook_is_fitted_under_the_mixture():
    net = model()
    for share in (0.0, 1.0):
        book = calibrate(net, batches(), 2, default_share=share).layers[0].codebook
        if share:
            expected = fit_codebook(F.gelu, 2, weight=("normal", 3.0))
            assert book.borders == pytest.approx(
                fit_codebook(F.gelu, 2, weight=("normal", 3.0), parity="none").borders, abs=0.02
            )
            assert book.error == pytest.approx(expected.error, rel=0.01)
        else:
            # From samples themselves: as good, where the histogram has other bins.
            x = read_by_gelu(net)
            slope = gradient(F.gelu, torch.from_numpy(x))[1].numpy()
            best = fit_codebook(F.gelu, 2, weight=x)
            errors = [np.mean((slope - b.derivative(x)) ** 2) for b in (book, best)]
            assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_the_answer_is_what_convert_takes_and_files_hold(tmp_path):
    net = model()
    found = calibrate(net, batches())
    assert found["1"] == FewBit(codebook=found.layers[0].codebook)
    conversion = packlight.convert(net, {**found, "*": GroupQuant(8)})
    assert dict.fromkeys(type(row.method) for row in conversion.replaced).keys() == {
        FewBit,
        GroupQuant,
    }
    packlight.save_methods(found, tmp_path / "methods.toml")
    assert packlight.load_methods(tmp_path / "methods.toml") == dict(found)
    # A converted model reads the same, and the last conversion counts.
    assert list(calibrate(net, batches())) == list(found)
    packlight.convert(net, found)
    net(torch.randn(4, 16)).sum().backward()


def test_it_prints_a_table():
    text = str(calibrate(model(), batches()))
    assert text.startswith("Relative error of the gradient, by layer and codebook\n")
    assert "5 (Tanh)" in text
    assert "x less" in text


def test_everything_is_left_as_it_was():
    net = model()
    state = copy.deepcopy(net.state_dict())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    calibrate(net, [torch.randn(8, 16) for _ in range(2)])
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert net.training
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())

    def fails(_):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        calibrate(net, batches(), run=fails)
    assert not any(module._forward_pre_hooks for module in net.modules())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.SiLU()
        self.unused = nn.GELU()
        self.again = self.act

    def forward(self, x, scale=1.0):
        return self.again(input=self.act(x * scale))


def test_batches_are_called_as_they_are():
    x = torch.linspace(-3, 3, 100)
    net = Net()
    one = calibrate(net, [x * 2])
    assert list(one) == ["act"]  # nothing of what no batch reaches, and one for both places
    for batch in ((x, 2.0), [x, 2.0], {"x": x, "scale": 2.0}):
        assert calibrate(net, [batch]).layers == one.layers
    labelled = calibrate(net, [(x, "label")], run=lambda batch: net(batch[0] * 2))
    assert labelled.layers == one.layers
    packlight.convert(net, one)
    assert net.act.codebook == one.layers[0].codebook


@pytest.mark.gpu
def test_a_model_on_a_device_reads_and_converts_as_on_the_cpu():
    on_cpu = calibrate(model().eval(), batches())
    net = model().eval().cuda()
    found = calibrate(net, [batch.cuda() for batch in batches()])
    for ours, theirs in zip(found.layers, on_cpu.layers, strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=0.02)
    packlight.convert(net.train(), found)
    net(batches()[0].cuda()).sum().backward()


def test_names_that_look_like_patterns():
    net = nn.Module()
    net.add_module("[a]*", nn.GELU())
    found = calibrate(net, [torch.randn(50)], run=lambda batch: net.get_submodule("[a]*")(batch))
    packlight.convert(net, found)
    assert net.get_submodule("[a]*").bits == 3


def test_outliers_and_what_is_not_finite_cost_nothing():
    net = nn.Sequential(nn.GELU())
    x = torch.randn(20000)
    plain = calibrate(net, [x]).layers[0]
    x[:5] = torch.tensor([1e30, -1e30, math.nan, math.inf, -math.inf])
    wild = calibrate(net, [x]).layers[0]
    assert wild.error == pytest.approx(plain.error, rel=0.02)
    assert wild.codebook.borders == pytest.approx(plain.codebook.borders, abs=0.05)
    constant = calibrate(net, [torch.full((10,), 0.5)], default_share=0.0).layers[0]
    assert constant.error < 1e-3
    zeros = calibrate(nn.Sequential(nn.Tanhshrink()), [torch.zeros(3)])
    assert zeros.layers[0].error == 0
    with pytest.raises(InputError, match=r"layer '0' .* read no finite value"):
        calibrate(net, [torch.full((3,), math.nan)])


def test_compiled_layers_are_seen(fresh_compiler):
    net = model()
    compiled = torch.compile(net, backend="eager")
    compiled(batches()[0])
    names = [f"_orig_mod.{name}" for name in calibrate(net, batches())]
    assert list(calibrate(compiled, batches())) == names


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibrate(3, []), "expected an nn.Module"),
        (lambda: calibrate(nn.ReLU(), [torch.ones(3)]), "no activation layer with a codebook"),
        (lambda: calibrate(nn.GELU(), []), "no batch reached an activation layer"),
        (lambda: calibrate(nn.GELU(), [torch.ones(3)], 9), "bits=9"),
        (lambda: calibrate(nn.GELU(), [torch.ones(3)], default_share=2), "default_share=2"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
