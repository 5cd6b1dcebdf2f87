"""Each script of `examples` runs at a tiny size, and does what it is there to show."""

import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

import packlight
from packlight.method import Method

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "common")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a script with these arguments; gives its names and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(Method, "_kinds", dict(Method._kinds))  # one defines a method

    def running(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, "--tiny", *arguments])
        monkeypatch.delitem(sys.modules, "common", raising=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of trainers, about a machine without a GPU
            names = runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
        return names, capsys.readouterr().out

    return running


def losses(printed):
    return re.findall(r"loss'?:? '?([\d.]+)", printed)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "full"])
def test_a_script_runs(script, run):
    names, printed = run(script)
    if script == "own_method":
        assert "checks of the contract passed" in printed
        assert type(names["model"][1]) is packlight.groupquant.Linear
        return
    assert "packlight: a step keeps" in printed or re.search(
        r"keeps .* before and .* after", printed
    )
    found = [float(loss) for loss in losses(printed)]
    assert script == "lightning_vit" or len(found) >= 2
    assert all(0 < loss < 10 for loss in found)


def test_the_adapters_of_lora_are_plain(run, tmp_path):
    from safetensors.torch import load_file

    run("lora")
    weights = load_file(tmp_path / "out" / "adapters" / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_a_loop_goes_on_from_its_checkpoint_bit_for_bit(run):
    whole = losses(run("full")[1])
    assert len(whole) == 2
    resumed = losses(run("full", "--resume")[1])
    assert resumed == whole[1:]


def test_a_release_tries_every_script():
    from tools import release

    assert sorted([*release.ALONE, *release.OTHERS]) == SCRIPTS
