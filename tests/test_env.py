"""What a bug report says about a machine, on machines with and without a GPU."""

import importlib.metadata
import json
import platform
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from packlight import __version__, env


def test_versions_are_those_installed() -> None:
    answers = env.collect()
    assert answers["packlight"] == __version__
    assert platform.python_version() in answers["python"]
    assert answers["torch"] == torch.__version__
    assert answers["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert answers["packages"].keys() == set(env.PACKAGES)


def test_a_missing_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "PACKAGES", ("no-such-package-is-here",))
    assert env.collect()["packages"] == {"no-such-package-is-here": "not installed"}


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    answers = env.collect()["environment"]
    assert answers["OMP_NUM_THREADS"] == "7"
    assert answers["TRITON_INTERPRET"] == "not set"
    assert answers.keys() == set(env.VARIABLES)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(env.shutil, "which", lambda name: None)
    answers = env.collect()
    assert answers["GPUs"] == "none"
    assert answers["NVIDIA driver"] == "nvidia-smi not found"
    assert answers["kernels"] == "not used: no CUDA device"


@pytest.mark.parametrize(
    ("triton", "kernels"), [(True, "used"), (False, "not used: Triton is not installed")]
)
def test_with_gpus(monkeypatch: pytest.MonkeyPatch, triton: bool, kernels: str) -> None:
    properties = SimpleNamespace(name="A Card", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(env, "kernels_available", lambda: triton)
    monkeypatch.setattr(env.shutil, "which", lambda name: "nvidia-smi")
    answer = SimpleNamespace(stdout="570.86.10\n570.86.10\n")
    monkeypatch.setattr(env.subprocess, "run", lambda *command, **options: answer)
    answers = env.collect()
    assert answers["GPUs"] == ["A Card, compute capability 9.0, 80.0 GiB"] * 2
    assert answers["NVIDIA driver"] == "570.86.10"
    assert answers["kernels"] == kernels
    assert "GPU 1: A Card, compute capability 9.0, 80.0 GiB\n" in env.as_text()


def test_a_driver_tool_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*command: object, **options: object) -> None:
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    monkeypatch.setattr(env.shutil, "which", lambda name: "nvidia-smi")
    monkeypatch.setattr(env.subprocess, "run", fail)
    assert env.collect()["NVIDIA driver"].startswith("nvidia-smi failed: ")


def test_text_and_json_say_the_same() -> None:
    answers = json.loads(env.as_json())
    assert answers == env.collect()
    lines = env.as_text().splitlines()
    assert f"torch: {torch.__version__}" in lines
    assert f"numpy: {answers['packages']['numpy']}" in lines
    assert all(": " in line for line in lines)


def test_it_runs_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As in a new process, where nothing has imported it yet.
    monkeypatch.delitem(sys.modules, "packlight.env")
    monkeypatch.setattr(sys, "argv", ["packlight.env", "--json"])
    runpy.run_module("packlight.env", run_name="__main__")
    assert json.loads(capsys.readouterr().out)["packlight"] == __version__
