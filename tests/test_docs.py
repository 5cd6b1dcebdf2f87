"""The pages: their code runs as it stands, top to bottom; links lead to files; commands are those
that there are; the reference has every public name.
"""

import argparse
import importlib.util
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

import packlight
from packlight.cli import command_line, main
from packlight.method import Method

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md")
}
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [name for name, text in PAGES.items() if PYTHON.search(text) and name != "README.md"]

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "The 'train_dataloader' does not have many workers",
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "'pin_memory' argument is set as true",
        "The .grad attribute of a Tensor that is not a leaf",
    )
]


# ---- what a page says of its own code, beside what the code asserts itself -----------------------


def after_layers(names, printed, folder):
    assert isinstance(names["model"][1], packlight.fewbit.GELU)


def after_fewbit(names, printed, folder):
    assert "even 2.0" in printed
    assert "x less" in printed
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
    assert (folder / "calibrated.toml").exists()


def after_sketch(names, printed, folder):
    assert "tensor(999.6" in printed
    assert "2 of 2 layers sketched" in printed
    assert {path.name for path in folder.iterdir()} == {"variance.csv", "methods.toml"}


def after_how_to_choose(names, printed, folder):
    assert all(names["optimizer"].state.values())
    assert all(p.grad is not None for p in names["blocks"].parameters())


def after_integrations(names, printed, folder):
    assert "times less is kept" in printed
    assert printed.count("bytes are kept of a step") == 2
    assert printed.count("packlight: a step keeps") == 3  # two of Trainers, one of Lightning


def after_own_method(names, printed, folder):
    assert set(names["BlockFloat"].fused) == {"norm"}
    checks = {str(check): check for check in names["checks"](names["BlockFloat"]())}
    del checks["8_compile, LayerNorm and Linear"]  # seconds; `test_own_method.py` compiles
    run = [check for name, check in checks.items() if "," not in name or "LayerNorm" in name]
    for check in run:
        check()
    assert len(run) == 11


AFTER = {
    "docs/layers.md": after_layers,
    "docs/fewbit.md": after_fewbit,
    "docs/sketch.md": after_sketch,
    "docs/how-to-choose.md": after_how_to_choose,
    "docs/integrations.md": after_integrations,
    "docs/own_method.md": after_own_method,
}


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Method, "_kinds", dict(Method._kinds))  # a page may define methods
    module = types.ModuleType("code_of_a_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where pickle finds classes
    before = torch.get_rng_state()
    for number, example in enumerate(PYTHON.findall(PAGES[page])):
        exec(compile(example, f"{page}, block {number}", "exec"), vars(module))
    torch.set_rng_state(before)
    check = AFTER.get(page)
    if check is not None:
        check(vars(module), capsys.readouterr().out, tmp_path)


def test_every_page_with_a_check_of_its_own_is_there():
    assert AFTER.keys() <= set(WITH_CODE)


def test_the_table_of_the_page_on_few_bit_derivatives_is_what_the_command_prints(capsys):
    main(["codebook", "gelu", "--bits", "3"])
    printed = capsys.readouterr().out
    assert printed[: printed.index("as a method")] in PAGES["docs/fewbit.md"]


# ---- commands and links --------------------------------------------------------------------------

CONTINUED = re.compile(r"\s*\\\n\s*")
COMMANDS = sorted(
    {
        command
        for text in PAGES.values()
        for command in re.findall(r"^\$ packlight (.*)$", CONTINUED.sub(" ", text), re.MULTILINE)
    }
)
COMMANDS_OF_FUNCTIONS = re.compile(
    r"_(fit|profile|convert|gradient_error|codebook|calibrate|demo|env|doctor)"
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_page_is_one(command, monkeypatch):
    """`test_cli.py` runs those of the command line's page; here their arguments are read."""
    seen = []
    for name in vars(command_line):
        if re.fullmatch(
            r"_(fit|profile|convert|gradient_error|codebook|calibrate|demo|env|doctor)", name
        ):
            monkeypatch.setattr(command_line, name, seen.append)
    main(shlex.split(command))
    assert isinstance(seen[0], argparse.Namespace)


LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    """Anchors, and links among the pages, are checked by `make docs`."""
    for target in LINK.findall(PAGES[page]):
        assert ((ROOT / page).parent / target).exists(), target


def test_lines_of_prose_are_not_long():
    lines = [
        line
        for name, text in PAGES.items()
        for line in text.splitlines()
        if len(line) > 160 and not line.startswith("|")
    ]
    assert len(lines) <= 5, lines


def test_the_reference_has_every_public_name():
    text = "".join(text for name, text in PAGES.items() if "reference" in name)
    shown = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    parts = {"fewbit", "groupquant", "inverted", "sketch", "head", "recompute", "layers"}
    for name in set(packlight.__all__) - parts - {"__version__"}:
        value = getattr(packlight, name)
        module = getattr(value, "__module__", "")
        names = {f"packlight.{name}", f"packlight.convert.{name}", "packlight.errors"}
        assert shown & (names if module != "packlight.errors" else {"packlight.errors"}), name
    assert {f"packlight.{part}" for part in ("fewbit", "groupquant", "inverted", "sketch")} <= shown


# ---- the README on an index ----------------------------------------------------------------------


def test_an_index_is_given_addresses():
    spec = importlib.util.spec_from_file_location("site_links", ROOT / "tools" / "site_links.py")
    site_links = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site_links)
    text = site_links.absolute(PAGES["README.md"], "", site_links.address())
    assert not LINK.findall(text)
    base = site_links.address()
    assert f"]({base}/blob/main/docs/convert.md)" in text
    assert f"]({base}/raw/main/docs/pictures/user-llama1b.png)" in text
    page = site_links.absolute("[a](../src) [b](convert.md) [c](#x)", "docs", base, inside="docs")
    assert page == f"[a]({base}/tree/main/src) [b](convert.md) [c](#x)"
