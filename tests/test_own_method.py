"""A quantiser in a package of one's own, and the contract for such: `packlight.testing`."""

import pytest

import packlight
from packlight.testing import checks
from tests.block_float import BlockFloat

METHODS = {"BlockFloat": BlockFloat(), "GroupQuant": packlight.GroupQuant(8, 64)}
CHECKS = {f"{name}, {check}": check for name, method in METHODS.items() for check in checks(method)}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_quantiser_keeps_the_contract(check):
    check()
