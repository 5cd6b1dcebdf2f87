"""`Conversion.left`: what is still kept, largest first, why, and what would help."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packlight
from packlight import FewBit, GroupQuant
from packlight.cli.command_line import main
from packlight.remedies import advice

FOUR = GroupQuant(bits=4)
TENSOR = 4 * 64 * 64


class Model(nn.Module):
    """A Linear, a product that no rule is for, a softmax and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = F.softmax(torch.sin(self.fc(x)), -1)
        return F.cross_entropy(torch.cosh(y), torch.zeros(len(x), dtype=torch.long))


def rows(conversion, *inputs):
    return {row.operation: row for row in conversion.left(*inputs).rows}


def test_rows_are_the_largest_first_and_add_up():
    conversion = packlight.convert(Model(), FOUR)
    left = conversion.left(torch.randn(64, 64))
    change = conversion.bytes(torch.randn(64, 64))
    assert left.before_bytes == change.before.activation_bytes
    assert left.after_bytes == change.after.activation_bytes == sum(row.bytes for row in left.rows)
    sizes = [row.bytes for row in left.rows]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(map(left.share, left.rows)) == pytest.approx(1)


def test_each_row_says_why_and_what_would_help():
    found = rows(packlight.convert(Model(), FOUR), torch.randn(64, 64))
    assert (found["Sin"].bytes, found["Sin"].why) == (TENSOR, "no rule is for it")
    assert found["Sin"].remedy == "rest=GroupQuant(bits=4)"
    assert found["Sin"].module_type == "Model"
    assert "test_left.py" in found["Sin"].source
    assert "head=True" in found["LogSoftmax"].remedy
    assert found["_Linear"].is_packed
    assert "fewer bits" in found["_Linear"].remedy
    found = rows(packlight.convert(Model(), FewBit(3), rest=FOUR), torch.randn(64, 64))
    assert (found["Softmax"].bytes, found["Softmax"].is_packed) == (TENSOR, False)
    assert "sdpa" in found["Softmax"].remedy


def test_what_would_help_helps():
    x = torch.randn(64, 64)
    found = rows(packlight.convert(Model(), FOUR, rest=FOUR), x)
    assert found["Sin"].is_packed
    assert found["Sin"].bytes < TENSOR / 7
    found = rows(packlight.convert(Model(), FOUR, functional=False), x)
    assert (found["Sin"].why, found["Sin"].remedy) == ("calls are not covered", "functional=True")


def test_reasons_of_layers_that_were_left_alone():
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    model = nn.Sequential(nn.GELU(), Own(64, 64), nn.GELU(), nn.Linear(64, 64))
    methods = {"3": None, nn.GELU: FewBit(3), nn.Linear: FOUR}
    conversion = packlight.convert(model, methods, functional=False)
    found = {row.modules: row for row in conversion.left(torch.randn(64, 64)).rows}
    assert found[("3",)].why == "left alone, as asked"
    assert found[("3",)].remedy == "no None for it"
    assert found[("1",)].why == "no selector picks it"


def test_it_prints_and_goes_to_plain_data():
    left = packlight.convert(Model(), FOUR, rest=FOUR).left(torch.randn(64, 64))
    text = str(left)
    assert "times less" in text
    assert (
        text.index("LogSoft") < text.index("\n", text.index("LogSoft")) < text.index("packs, codes")
    )
    data = json.loads(json.dumps(left.to_dict()))
    assert data["after_bytes"] == left.after_bytes
    assert data["rows"][0]["modules"] == [""]
    assert "Left(model='Model'" in repr(left)


def made():
    return Model(), (torch.randn(64, 64),)


def test_the_command_line_prints_it_and_takes_a_rest(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    out = tmp_path / "methods.toml"
    arguments = ["convert", "tests.test_left:made", "--method", "GroupQuant(4)"]
    assert not main([*arguments, "--rest", "GroupQuant(8)", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "the rest is packed by GroupQuant(bits=8)" in printed
    assert "what would help" in printed
    assert packlight.load_methods(out).rest == GroupQuant(bits=8)
    with pytest.raises(SystemExit):
        main([*arguments, "--dry-run", "--rest", "FewBit(2)"])
    assert "--rest 'FewBit(2)': 'FewBit(2)' is no quantiser" in capsys.readouterr().err
    assert not main([*arguments, "--dry-run", "--no-functional"])
    assert "functional=True" in capsys.readouterr().out


def test_errors_of_gradients_with_a_rest():
    batch, errors = torch.randn(64, 64), []
    for rest in (None, GroupQuant(bits=8), GroupQuant(bits=2)):
        report = packlight.gradient_error(
            Model(), batch, FewBit(3), rest=rest, loss=lambda model, x: model(x)
        )
        errors.append(report.rows[0].weights[0].error)
    assert errors[0] == 0
    assert 0 < errors[1] < errors[2]


def test_advice_needs_no_batch():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8), nn.GELU())
    conversion = packlight.convert(model, {"0": None, "2": FOUR}, functional=False)
    assert advice(model, conversion) == ["1: a selector for it, or '*' (no selector picks it)"]
    conversion = packlight.convert(model, FOUR, functional=False)
    (line,) = advice(model, conversion)
    assert line.startswith("1: build with torch's own class")
    conversion = packlight.convert(model, {"0": None, "2": FOUR, "*": None})
    assert advice(model, conversion) == []  # what was asked for is no advice
    model.get_output_embeddings = lambda: model[0]
    assert "head=True" in advice(model, conversion)[-1]
    conversion = packlight.convert(model, packlight.GroupQuant(bits=4), head="0")
    assert not any("head=True" in line for line in advice(model, conversion))


def test_a_conversion_is_judged_by_bytes():
    """What is kept as before is no share of what is covered."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
    x = torch.randn(64, 64, requires_grad=True)
    left = packlight.convert(model, {"1": FOUR}, functional=False).left(x)
    assert left.before_bytes == 3 * TENSOR  # of the first Linear the input, which is apart
    assert left.covered == pytest.approx(1 / 3)
    assert "33% of the bytes are covered" in " ".join(str(left).split())
    assert packlight.convert(model, FOUR).left(x).covered == 1
    assert packlight.convert(nn.Linear(64, 64), FOUR).left(x).covered == 0  # nothing but the input


def test_attention_without_a_kernel_says_so():
    layer = nn.TransformerEncoderLayer(64, 4, 64, dropout=0.1, batch_first=True)
    found = rows(packlight.convert(layer), torch.randn(2, 16, 64))
    assert found["SafeSoftmax"].remedy.startswith("a GPU, or a dropout of 0 in attention")
    layer = nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True)
    assert "SafeSoftmax" not in rows(packlight.convert(layer), torch.randn(2, 16, 64))
