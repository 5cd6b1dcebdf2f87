"""What the package says of itself where it is installed, by a wheel or from a checkout."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

import packlight

ROOT = Path(__file__).parent.parent
OLDEST = "2.11"


def requirements() -> list[str]:
    found = importlib.metadata.requires("packlight")
    assert found
    return [re.sub(r"\s", "", requirement) for requirement in found]


def test_the_oldest_torch_is_the_same_wherever_it_is_named():
    assert f"torch>={OLDEST}" in requirements()
    assert TorchVersion(torch.__version__) >= OLDEST
    assert f"torch >= {OLDEST}" in (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = ROOT / "Makefile"
    if makefile.exists():  # not in the sdist
        assert f"TORCH ?= {OLDEST}.0" in makefile.read_text(encoding="utf-8")


def test_an_installed_package_has_its_data_and_its_command():
    assert importlib.metadata.version("packlight") == packlight.__version__
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="packlight")
    assert command.value == "packlight.cli:main"
    files = importlib.metadata.files("packlight") or []
    if not any(file.name == "__init__.py" for file in files):
        pytest.skip("an editable installation has no files of its own")
    installed = Path(packlight.__file__).parent
    source = ROOT / "src" / "packlight"
    assert installed != source
    for path in source.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            copy = installed / path.relative_to(source)
            assert copy.read_bytes() == path.read_bytes(), f"{copy} is not what {path} is"


def test_the_version_is_the_same_wherever_it_is_named():
    assert f"\n## {packlight.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {packlight.__version__}\n" in citation


def test_what_installs_without_triton_asks_for_it_nowhere():
    """macOS and Windows have none: it is an extra, and of that Linux's alone."""
    asked = [each for each in requirements() if each.startswith("triton")]
    assert asked
    assert all("extra==" in each for each in asked)
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "triton >= 3.6; sys_platform == 'linux'" in pyproject
