"""Names of modules, as tables print them."""

import pytest
from torch import nn

import packlight
from packlight.report.names import condensed, together


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["lm_head"], "lm_head"),
        (["a.0.q", "a.0.k", "a.1.q", "a.1.k"], "a.0-1.{q, k}"),
        (["a.0.q.A.d", "a.0.q.B.d", "a.0.up.A.d"], "a.0.{q, up}.{A, B}.d"),
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
