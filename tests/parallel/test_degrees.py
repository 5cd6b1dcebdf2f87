"""Bytes of a rank are those that were foretold."""

import pytest

from tests.parallel.ranks import run


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_allocate_what_was_foretold(tmp_path, count):
    assert run("degrees.py", count, tmp_path) == "as foretold\n"
