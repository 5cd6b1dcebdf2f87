"""The examples of the README and of the guide run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def examples(page: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found


@pytest.mark.parametrize("example", examples("README.md"))
def test_an_example_of_the_readme_runs(example, capsys):
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "GELU" in printed
    assert "saved" in printed


@pytest.mark.parametrize("example", examples("docs/how-to-choose.md"))
def test_an_example_of_the_guide_runs(example):
    names = {}
    exec(compile(example, "docs/how-to-choose.md", "exec"), names)
    assert all(parameter.grad is not None for parameter in names["blocks"].parameters())
