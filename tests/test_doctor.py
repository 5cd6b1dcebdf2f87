"""`packlight doctor`: what it says of a machine that is well, of one that is not, and of none."""

import json

import pytest
import torch

import packlight
from packlight.cli import doctor, main

CPU = torch.device("cpu")
KINDS = {kind.name: kind for kind in doctor.kinds()}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_gradients_are_within_a_limit_that_is_near(kind, monkeypatch):
    monkeypatch.setattr(doctor, "_ROUNDS", 1)
    outcome = doctor._tried(kind, CPU)
    assert outcome.failure is None
    assert outcome.reference is None  # the CPU runs no kernels
    assert outcome.torchs > kind.limit / 20 or kind.limit <= 5e-2
    assert outcome.launch_us > 0
    assert outcome.torch_us > 0


def test_kernels_are_compared_with_the_reference(monkeypatch):
    """As on a GPU: both sides run here, on either side of `use_reference`."""
    monkeypatch.setattr(doctor, "_ROUNDS", 1)
    monkeypatch.setattr(doctor, "runs_kernels", lambda device: True)
    kind = KINDS["packed GELU"]
    assert doctor._tried(kind, CPU).reference == 0

    def wrong(x):
        from packlight import _library

        return kind.ours(x) * (1 if _library._reference_depth else 1.1)

    outcome = doctor._tried(doctor.Kind("wrong", wrong, kind.torchs, kind.shapes, 0.5), CPU)
    assert outcome.reference == pytest.approx(0.1)
    assert "from the reference's" in outcome.failure


def test_a_wrong_gradient_and_an_error_are_reported(monkeypatch, capsys):
    def raises(x):
        raise RuntimeError("no kernel image is available\nand more")

    def nan(x):
        return x * torch.nan

    kinds = [
        doctor.Kind("twice", lambda x: 2 * x, lambda x: x, ((4, 4),), 0.5),
        doctor.Kind("nan", nan, lambda x: x, ((4, 4),), 0.5),
        doctor.Kind("raises", raises, lambda x: x, ((4, 4),), 0.5),
        doctor.Kind("right", lambda x: x * 1, lambda x: x, ((4, 4),), 0.5),
    ]
    monkeypatch.setattr(doctor, "kinds", lambda: kinds)
    monkeypatch.setattr(doctor, "_models", lambda device: {})
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--device", "cpu"])
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "FAILED: twice: gradients are 1 from torch's, more than 0.5" in printed
    assert "FAILED: nan: gradients are nan from torch's" in printed
    assert "FAILED: raises: RuntimeError: no kernel image is available\n" in printed
    assert "cpu: 3 of 4 checks failed: twice, nan, raises" in printed


def test_a_machine_that_is_well(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_ROUNDS", 1)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--device", "cpu"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("```text\n")
    assert printed.endswith(f"cpu: all {len(KINDS) + 1} checks passed\n```\n")
    assert f"packlight: {packlight.__version__}\n" in printed
    assert "note: no CUDA device" in printed
    assert all(len(line) <= 100 or line.startswith("note") for line in printed.splitlines())


def test_as_json(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_models", lambda device: {})
    monkeypatch.setattr(doctor, "kinds", lambda: [KINDS["few-bit ReLU"]])
    with pytest.raises(SystemExit):
        main(["doctor", "--device", "cpu", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["machine"]["torch"] == torch.__version__
    assert data["checks"][0]["torchs"] == 0
    assert any("no CUDA device" in note for note in data["without"])


def test_a_device_that_is_not_here(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--device", "nowhere"])
    assert stopped.value.code == 2
    assert "--device nowhere cannot be used here" in capsys.readouterr().err


def test_untested_versions_and_missing_names_are_said(monkeypatch):
    monkeypatch.setattr(doctor, "TESTED_TORCH", ("1.0", "1.1"))
    notes = list(doctor.unsupported(CPU))
    assert any("is tested with torch 1.0 to 1.1" in note for note in notes)


@pytest.mark.gpu
def test_on_the_device(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 0, capsys.readouterr().out
