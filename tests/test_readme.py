"""The README's examples run."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example, capsys):
    exec(compile(example, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "GELU" in printed
    assert "saved" in printed


def test_there_is_an_example():
    assert EXAMPLES
