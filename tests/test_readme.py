"""The examples of the README run."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from torch import nn

import packlight

ROOT = Path(__file__).parent.parent


def examples() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def has_its_packages(example: str) -> bool:
    """Whether what it imports is here: the newest torch is tried without other packages."""
    found = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Import)]
    roots = [alias.name.partition(".")[0] for node in found for alias in node.names]
    return all(importlib.util.find_spec(root) for root in roots)


def test_the_examples_of_the_readme_run_one_after_the_other(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    first, *others = examples()
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


def test_the_examples_of_the_readme_run_where_there_is_no_triton(tmp_path):
    """As on macOS and Windows."""
    first, *others = examples()
    without = "import sys; sys.modules['triton'] = None; sys.modules['triton.language'] = None"
    vision = next(example for example in others if "timm" in example)
    program = "\n".join((without, first, *filter(has_its_packages, [vision])))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "GELU" in done.stdout


def test_the_readme_is_read_in_one_go():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
