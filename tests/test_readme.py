"""The examples of the README and of the guides run."""

import ast
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
from torch import nn

import packlight
from packlight.cli import main
from packlight.method import Method

ROOT = Path(__file__).parent.parent


def examples(page: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found


def has_its_packages(example: str) -> bool:
    """Whether what it imports is here: the newest torch is tried without other packages."""
    found = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Import)]
    roots = [alias.name.partition(".")[0] for node in found for alias in node.names]
    return all(importlib.util.find_spec(root) for root in roots)


def test_the_examples_of_the_readme_run_one_after_the_other(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    first, *others = examples("README.md")
    for example in (first, *filter(has_its_packages, others)):
        exec(compile(example, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "GELU" in printed
    assert "saved" in printed
    assert type(names["model"][1]) is nn.GELU
    if importlib.util.find_spec("peft") is not None:
        assert names["callback"].kept_bytes
        layers = names["lora"].modules()
        assert any(isinstance(part, packlight.groupquant.Linear) for part in layers)


def test_the_examples_on_layers_run(capsys):
    names = {}
    for example in examples("docs/layers.md"):
        exec(compile(example, "docs/layers.md", "exec"), names)
    assert isinstance(names["model"][1], packlight.fewbit.GELU)


def test_the_examples_on_few_bit_derivatives_run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for example in examples("docs/fewbit.md"):
        exec(compile(example, "docs/fewbit.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "even 2.0" in printed
    assert "x less" in printed
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
    assert (tmp_path / "calibrated.toml").exists()


def test_the_table_of_the_page_on_few_bit_derivatives_is_what_the_command_prints(capsys):
    page = (ROOT / "docs/fewbit.md").read_text(encoding="utf-8")
    main(["codebook", "gelu", "--bits", "3"])
    printed = capsys.readouterr().out
    assert printed[: printed.index("as a method")] in page


@pytest.mark.parametrize("example", examples("docs/how-to-choose.md"))
def test_an_example_of_the_guide_runs(example):
    names = {}
    exec(compile(example, "docs/how-to-choose.md", "exec"), names)
    trained = names["blocks"] if "blocks" in names else names["model"]
    stepped = (
        [names["optimizer"].state[p] for p in trained.parameters()] if "optimizer" in names else []
    )
    grads = [p.grad for p in trained.parameters()]
    assert all(stepped) if stepped else all(grad is not None for grad in grads)


def test_the_examples_of_the_page_on_sketches_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for example in examples("docs/sketch.md"):
        exec(compile(example, "docs/sketch.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "tensor(999.6" in printed
    assert "2 of 2 layers sketched" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"variance.csv", "methods.toml"}


def test_the_page_on_quantisers_of_one_s_own_runs_and_its_class_keeps_the_contract(monkeypatch):
    monkeypatch.setattr(Method, "_kinds", dict(Method._kinds))  # it has another BlockFloat
    page = types.ModuleType("page_on_own_methods")
    monkeypatch.setitem(sys.modules, page.__name__, page)  # where pickle finds the class
    for example in examples("docs/own_method.md"):
        exec(compile(example, "docs/own_method.md", "exec"), vars(page))
    assert set(page.BlockFloat.fused) == {"norm"}
    checks = {str(check): check for check in page.checks(page.BlockFloat())}
    del checks["8_compile, LayerNorm and Linear"]  # seconds; `test_own_method.py` compiles
    run = [check for name, check in checks.items() if "," not in name or "LayerNorm" in name]
    for check in run:
        check()
    assert len(run) == 11
