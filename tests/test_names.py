"""Names of modules, as tables print them."""

import copy

import pytest
from torch import nn

import packlight
from packlight.report.names import condensed, together


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["lm_head"], "lm_head"),
        (["a.0.q", "a.0.k", "a.1.q", "a.1.k"], "a.0-1.{q, k}"),
        (["a.0.q.A.d", "a.0.q.B.d", "a.0.up.A.d"], "a.0.{q.{A, B}.d, up.A.d}"),
        (["a.q.A", "a.k.A", "a.q.B", "a.k.B", "b"], "a.{q, k}.{A, B}, b"),
        (["a.norm", "a.layers.0.norm"], "a.{norm, layers.0.norm}"),
        (["a", "a.b"], "a.{itself, b}"),
        (["wte", "h.0.attn"], "wte, h.0.attn"),
        (["x", "y"], "x, y"),
    ],
)
def test_what_names_share_stands_once(names, text):
    assert together(condensed(names)) == text


def test_a_printed_conversion_shows_where_names_differ():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_rather_long_name_of_a_query, self.key = nn.Linear(64, 64), nn.Linear(64, 64)
            self.views = nn.Identity()

    inner = nn.ModuleList(Part() for _ in range(3))
    model = nn.ModuleDict(
        {"base_model": nn.ModuleDict({"model": nn.ModuleDict({"layers": inner})})}
    )
    text = str(packlight.convert(model, {"*.0.key": None, "*": packlight.GroupQuant(bits=4)}))
    lines = text.splitlines()
    assert lines[0] == "ModuleDict: 5 of 6 layers converted"  # views keep nothing
    assert lines[1] == "names are those within base_model.model.layers"
    squeezed = "".join(text.split())
    assert "0-2.a_rather_long_name_of_a_query,1-2.key" in squeezed
    assert "…" not in text


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_names_end_their_lines_between_parts(monkeypatch, width):
    """Adapters have the longest names, and what differs stands at their ends."""
    monkeypatch.setenv("COLUMNS", str(width))
    inner = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("base_layer", "lora_A", "lora_B")})
    names = [f"{side}_projection_of_a_block" for side in ("query", "key", "value", "output")]
    block = nn.ModuleDict({name: copy.deepcopy(inner) for name in names})
    model = nn.Sequential(*(nn.ModuleDict({"self_attention": copy.deepcopy(block)}),) * 1)
    text = str(packlight.convert(model, packlight.GroupQuant(bits=4)))
    ends = [line.split()[-1] for line in text.splitlines() if "_of_a_block" in line]
    assert all(end[-1] in ",." or end[-1] == "}" for end in ends), text
    assert max(map(len, text.splitlines())) <= width
    assert "{base_layer, lora_A, lora_B}" in " ".join(text.split()).replace(". ", ".")


def test_attention_whose_calls_are_covered_is_not_called_left():
    """Its projection's own forward never runs, so that is no layer to convert."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    conversion = packlight.convert(layer)
    assert not conversion.skipped
    assert "self_attn" in conversion.functional
    assert "left as it is" not in str(conversion)
    conversion = packlight.convert(layer, functional=False)
    assert [row.kind for row in conversion.skipped] == ["MultiheadAttention"]
