"""The page of a report: one file, the very numbers of the report, and areas that add up.

Looks at the page without a browser; `tools/look_at_report.py` opens it in one.
"""

import html.parser
import json
import re
import shutil
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import packlight
from packlight import FewBit, InputError, MemoryReport
from packlight.report import human_bytes


class Page(html.parser.HTMLParser):
    """The elements of a page, and the text of each script by its id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self.title = ""
        self._open: str | None = None
        self._script: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self._script = dict(attrs)["id"]
            self.scripts[self._script] = ""

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[self._script] += data
        if self._open == "title":
            self.title += data


class Block(nn.Module):
    """A gated unit: two layers that share their input, and a product in its own forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.gate(x)) * self.up(x))


def model() -> nn.Module:
    blocks = nn.Sequential(*(Block(16) for _ in range(3)))
    parts = {"first": nn.Linear(16, 16), "blocks": blocks, "norm": nn.LayerNorm(16)}
    return nn.Sequential(OrderedDict(parts))


@pytest.fixture
def reports() -> tuple[MemoryReport, MemoryReport]:
    net, x = model(), torch.randn(8, 16)
    before = packlight.profile(net, x)
    packlight.convert(net, {nn.GELU: FewBit(2)})
    return before, packlight.profile(net, x)


def embedded(page: Page) -> dict[str, Any]:
    return json.loads(page.scripts["data"])


def test_a_page_holds_the_report(reports, tmp_path):
    before, after = reports
    path = tmp_path / "report.html"
    before.to_html(path)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.title == "Sequential: kept for the backward pass"
    data = embedded(page)
    assert data["after"] is None
    assert MemoryReport.from_json(json.dumps({"format": 1, **data["before"]})) == before
    (before - after).to_html(path)
    data = embedded(Page(path.read_text(encoding="utf-8")))
    assert MemoryReport.from_json(json.dumps({"format": 1, **data["before"]})) == before
    assert MemoryReport.from_json(json.dumps({"format": 1, **data["after"]})) == after


def test_a_page_needs_nothing_else(reports, tmp_path):
    path = tmp_path / "report.html"
    reports[0].to_html(path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "base")
        assert not {"src", "href", "action"} & set(attributes), tag
    assert not re.search(r"https?:|url\(|@import|\bimport\(|fetch\(|\{\{", text)
    assert set(page.scripts) == {"data", "code"}


def test_names_cannot_break_the_page(tmp_path):
    name = '</script><script>alert("1")</script><!--{{title}}'
    net = nn.Sequential()
    net.add_module(name, nn.GELU())
    kind = type("<b>&", (nn.Sequential,), {})
    inner = kind(nn.Linear(4, 4), net)
    path = tmp_path / "report.html"
    packlight.profile(inner, torch.randn(2, 4)).to_html(path)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.title == "<b>&: kept for the backward pass"
    assert set(page.scripts) == {"data", "code"}
    assert [tag for tag, _ in page.tags].count("script") == 2
    modules = {row["module"] for row in embedded(page)["before"]["rows"]}
    assert f"1.{name}" in modules


def test_a_report_of_nothing(tmp_path):
    path = tmp_path / "report.html"
    report = packlight.profile(nn.Identity(), torch.randn(2))
    report.to_html(path)
    assert embedded(Page(path.read_text(encoding="utf-8")))["before"]["rows"] == []


def test_a_page_that_cannot_be_written(reports, tmp_path):
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        reports[0].to_html(tmp_path)


# ---- the script, in node -------------------------------------------------------------------------

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")


def run_script(page: Path, program: str) -> Any:
    """What a program that follows the page's script prints as JSON."""
    scripts = Page(page.read_text(encoding="utf-8")).scripts
    data = f"const {{before, after}} = {scripts['data']};\n"
    start = "\nconst reports = after === null ? [before] : [before, after];\n"
    source = scripts["code"] + data + start + f"console.log(JSON.stringify({program}));"
    result = subprocess.run(["node", "-"], input=source, capture_output=True, text=True)
    assert result.stderr == ""
    return json.loads(result.stdout)


@needs_node
def test_the_script_adds_up_as_the_report_does(reports, tmp_path):
    before, after = reports
    path = tmp_path / "report.html"
    (before - after).to_html(path)
    totals = [before.activation_bytes, after.activation_bytes]
    kinds = ["alike", "module", "type", "operation", "line"]
    tables = run_script(
        path,
        f"Object.fromEntries({json.dumps(kinds)}.map((kind) => [kind, Object.fromEntries("
        "tabulate(reports, '', kind).map((row) => [row.name, row.sizes]))]))",
    )
    for kind in kinds:
        sums = [sum(sizes[column] for sizes in tables[kind].values()) for column in range(2)]
        assert sums == totals, kind
    by_module = (before - after).by_module()
    assert tables["module"] == {path: list(sizes) for path, sizes in by_module.items()}
    types = before.by_module_type()
    assert {name: sizes[0] for name, sizes in tables["type"].items() if sizes[0]} == types
    acts = [by_module[f"blocks.{index}.act"] for index in range(3)]
    assert tables["alike"]["blocks.*.act"] == [sum(column) for column in zip(*acts, strict=True)]
    inner = run_script(path, "tabulate(reports, 'blocks.1', 'module').map((row) => row.sizes)")
    wanted = [
        sum(row.bytes for row in report.rows if row.module.startswith("blocks.1"))
        for report in reports
    ]
    assert [sum(column) for column in zip(*inner, strict=True)] == wanted
    assert run_script(path, "makeTree(reports).sizes") == totals


@needs_node
def test_areas_are_in_proportion(reports, tmp_path):
    before, after = reports
    path = tmp_path / "report.html"
    (before - after).to_html(path)
    for column, report in enumerate((before, after)):
        boxes = run_script(
            path,
            "(() => { const root = makeTree(reports), found = [];"
            f" placeAll(partsOf(root), {column}, {{x: 5, y: 7, width: 600, height: 400}}, found);"
            " return found.filter((box) => box.node.leaf).map((box) =>"
            f" [box.node.sizes[{column}], box.x, box.y, box.width, box.height]); }})()",
        )
        assert sum(size for size, *_ in boxes) == report.activation_bytes
        for size, x, y, width, height in boxes:
            assert width * height == pytest.approx(240_000 * size / report.activation_bytes)
            assert x >= 5 - 1e-6
            assert y >= 7 - 1e-6
            assert x + width <= 605 + 1e-6
            assert y + height <= 407 + 1e-6
        for first in range(len(boxes)):
            for second in range(first):
                assert overlap(boxes[first], boxes[second]) < 1e-6


def overlap(first: list[float], second: list[float]) -> float:
    _, ax, ay, aw, ah = first
    _, bx, by, bw, bh = second
    wide = min(ax + aw, bx + bw) - max(ax, bx)
    high = min(ay + ah, by + bh) - max(ay, by)
    return max(wide, 0.0) * max(high, 0.0)


@needs_node
@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 5], [7], [6, 6, 4, 3, 2, 2, 1], [1, 1000, 0, 1]])
def test_layout(sizes, reports, tmp_path):
    path = tmp_path / "report.html"
    reports[0].to_html(path)
    boxes = run_script(path, f"layout({sizes}, {{x: 0, y: 0, width: 6, height: 4}})")
    areas = [box["width"] * box["height"] for box in boxes]
    total = sum(sizes) or 1
    assert areas == pytest.approx([24 * size / total for size in sizes])
    if sizes == [6, 6, 4, 3, 2, 2, 1]:
        # The example of Bruls, Huizing and van Wijk: the first column holds two squares of side 3
        # by 2.
        assert boxes[0] == pytest.approx({"x": 0, "y": 0, "width": 3, "height": 2})
        assert boxes[1] == pytest.approx({"x": 0, "y": 2, "width": 3, "height": 2})


@needs_node
def test_numbers_read_as_in_python(reports, tmp_path):
    path = tmp_path / "report.html"
    reports[0].to_html(path)
    counts = [0, 1, 999, 1000, 1023, 1024, 1536, 10_234, 10_240, 102_349, 1_023_488, 1_048_063]
    counts += [-5000, 2**40, 2**50, 45_307_969_548, 999 * 1024 + 511, 999 * 1024 + 513]
    printed = run_script(path, f"{counts}.map(human)")
    assert printed == [human_bytes(count) for count in counts]
