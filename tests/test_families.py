"""Families of other packages' models: what a conversion makes of them is as it was recorded."""

import json
import warnings

import pytest
import torch
from tools.models import RECORD, recorded

import packlight
from tests.families import FAMILIES

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("diffusers")

DATA = json.loads(RECORD.read_text())


def minor(version: str) -> list[str]:
    return version.split(".")[:2]


def test_all_families_are_recorded():
    assert DATA["families"].keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_as_it_was_recorded(name):
    """A forward that changed upstream shows in what is kept: see whether rules still hold, and
    record it anew by `python -m tools.models`."""
    if minor(torch.__version__) != minor(DATA["versions"]["torch"]):
        pytest.skip(f"recorded with torch {DATA['versions']['torch']}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other package
        model, batch = FAMILIES[name].started()
        before = packlight.profile(model, **batch)
        conversion = packlight.convert(model)
        after = packlight.profile(model, **batch)
    found, expected = recorded(conversion.left_of(before - after)), DATA["families"][name]
    assert found["left"] == expected["left"]
    assert found["before"] == pytest.approx(expected["before"], rel=0.02)
    assert found["after"] == pytest.approx(expected["after"], rel=0.02)
    assert packlight.predict(model, **batch).activation_bytes == pytest.approx(
        after.activation_bytes, rel=0.03
    )
