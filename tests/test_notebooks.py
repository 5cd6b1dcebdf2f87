"""The notebooks run, and they are stored with what they print and draw."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def pictures(notebook) -> int:
    outputs = [each for cell in notebook.cells for each in cell.get("outputs", [])]
    return sum("image/png" in each.get("data", {}) for each in outputs)


@pytest.mark.filterwarnings("ignore")  # of the machinery of kernels
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))  # of the kernel
    import nbformat  # what reads notebooks is not on every machine that runs tests of kernels

    import run_notebooks

    stored = nbformat.read(path, as_version=4)
    assert pictures(stored) == 2
    run = run_notebooks.run(path)
    assert pictures(run) == 2
    assert [cell.source for cell in run.cells] == [cell.source for cell in stored.cells]


def test_there_are_two():
    assert len(NOTEBOOKS) == 2
