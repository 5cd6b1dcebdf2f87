"""The examples of docs/integrations.md run."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
# In the order of the page.
NAMES = ["transformers", "trainer", "peft", "accelerate", "lightning", "diffusers"]

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "The 'train_dataloader' does not have many workers",
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    )
]


@pytest.mark.parametrize("example", EXAMPLES, ids=NAMES)
def test_example_runs(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out
    if "print(" in example:
        assert re.search(r"[\d.]+ times less|\d+ bytes are kept of a step", printed)
