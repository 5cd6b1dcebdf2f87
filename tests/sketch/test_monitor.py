"""The monitor samples what `variance` says, leaves the training alone, and writes it down."""

import csv

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import packlight
from packlight import Sketch, sketch
from packlight.errors import InputError, MissingDependencyError
from packlight.sketch import VarianceMonitor


def model_of():
    packlight.manual_seed(0)
    return nn.Sequential(sketch.Linear(6, 8, rows=16, kind="srht"), nn.Tanh(), nn.Linear(8, 3))


def train(model, steps, x=None):
    packlight.manual_seed(1)
    for _ in range(steps):
        model(torch.randn(40, 6) if x is None else x).square().sum().backward()


def test_samples_are_the_variances():
    model, x = model_of(), torch.randn(40, 6)
    seen = []
    model[0].register_forward_hook(lambda m, i, y: y.register_hook(seen.append) and None)
    with VarianceMonitor(model, every=3) as monitor:
        train(model, 7, x)
    assert [(s.step, s.layer, s.kind, s.tokens, s.rows) for s in monitor.samples] == [
        (step, "0", "srht", 40, 16) for step in (0, 3, 6)
    ]
    for sample, step in zip(monitor.samples, (0, 3, 6), strict=True):
        assert sample.sketch_variance == sketch.variance(x, seen[step], "srht", 16).item()
        assert sample.sample_variance == sketch.sample_variance(x, seen[step]).item()
        assert sample.ratio == sample.sketch_variance / sample.sample_variance
        assert sample.alpha == sketch.correlation(x, seen[step]).item()
        assert sample.bound == sketch.ratio_bound(x, seen[step], 16).item()
    assert list(monitor.ratios()) == ["0"]
    (line,) = [line.split() for line in str(monitor).splitlines() if "srht" in line]
    assert line[:5] == ["0", "srht", "16", "of", "40"]
    expected = (
        monitor.ratios()["0"],
        *(
            sum(getattr(sample, name) for sample in monitor.samples) / 3
            for name in ("alpha", "bound")
        ),
    )
    assert line[5:] == [f"{value:.3g}" for value in expected]
    train(model, 3, x)  # the hooks are gone
    assert len(monitor.samples) == 3


def test_training_is_left_alone():
    gradients = []
    for watched in (False, True):
        model = model_of()
        monitor = VarianceMonitor(model, every=1) if watched else None
        train(model, 2)
        gradients.append([p.grad for p in model.parameters()])
        if monitor is not None:
            monitor.close()
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_plain_layers_as_if_they_were_sketched():
    model = model_of()
    with VarianceMonitor(model, every=1, method=Sketch(0.5, "rows")) as monitor:
        train(model, 1)
    assert {(s.layer, s.kind, s.rows) for s in monitor.samples} == {
        ("0", "srht", 16),
        ("2", "rows", 20),
    }


def test_convolutions_and_their_positions():
    model = sketch.Conv2d(4, 3, 1, rows=16, kind="srht")
    x = torch.randn(2, 4, 5, 6)
    dy = torch.randn(2, 3, 5, 6)
    with VarianceMonitor(model) as monitor:
        model(x).backward(dy)
    (sample,) = monitor.samples
    expected = sketch.variance(x.movedim(1, -1), dy.movedim(1, -1), "srht", 16).item()
    assert (sample.tokens, sample.sketch_variance) == (60, expected)


def test_what_is_not_sampled():
    model = model_of()
    with VarianceMonitor(model, every=1) as monitor:
        with torch.no_grad():
            model(torch.randn(40, 6))
        model.eval()
        train(model, 1)
        model.train()
        x = torch.randn(40, 6)
        y = model(x)
        x.mul_(2.0)  # no longer what the layer read
        y.sum().backward()
        model[0].weight.requires_grad_(False)
        train(model, 1)
    assert monitor.samples == []
    assert "0 layers, 0 samples" in str(monitor)
    with pytest.raises(InputError, match="nothing was sampled"):
        monitor.plot("never.png")


def test_files(tmp_path, monkeypatch):
    model = model_of()
    method = Sketch(0.5)
    with VarianceMonitor(model, every=1, method=method) as monitor:
        train(model, 2)
    monitor.to_csv(tmp_path / "variance.csv")
    with open(tmp_path / "variance.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["ratio"]) for line in lines] == [s.ratio for s in monitor.samples]
    assert lines[0]["layer"] == monitor.samples[0].layer
    assert [float(line["bound"]) for line in lines] == [s.bound for s in monitor.samples]
    assert float(lines[0]["alpha"]) == monitor.samples[0].alpha

    with SummaryWriter(tmp_path) as writer:
        monitor.to_tensorboard(writer)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for layer in {sample.layer for sample in monitor.samples}:
        expected = [sample.ratio for sample in monitor.samples if sample.layer == layer]
        written = [event.value for event in events.Scalars(f"sketch_variance_ratio/{layer}")]
        assert written == pytest.approx(expected, rel=1e-6)

    for limit in (12, 1):
        monitor.plot(tmp_path / "variance.png", limit=limit)
        assert (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="needs matplotlib"):
        monitor.plot(tmp_path / "variance.png")


def test_nothing_to_watch():
    with pytest.raises(InputError, match="has no layer of packlight"):
        VarianceMonitor(nn.Linear(3, 3))
    with pytest.raises(InputError, match="every=0"):
        VarianceMonitor(model_of(), every=0)
