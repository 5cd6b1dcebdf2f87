"""A quantiser in a package of one's own, and the contract for such: `packlight.testing`."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import packlight
from packlight import sharing
from packlight.layers import attention, channel_norms, functional, norms
from packlight.testing import checks
from tests import block_float
from tests.block_float import BlockFloat

METHODS = {"BlockFloat": BlockFloat(), "GroupQuant": packlight.GroupQuant(8, 64)}
CHECKS = {f"{name}, {check}": check for name, method in METHODS.items() for check in checks(method)}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_quantiser_keeps_the_contract(check):
    check()


def test_a_method_of_another_package_is_found_by_its_name(tmp_path):
    """A package names its methods in the entry points `packlight.methods`."""
    package = tmp_path / "other_quantiser"
    package.mkdir()
    source = Path(block_float.__file__).read_text().replace("BlockFloat", "OtherFloat")
    (package / "__init__.py").write_text(source)
    metadata = tmp_path / "other_quantiser-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: other-quantiser\nVersion: 1.0\n"
    )
    (metadata / "entry_points.txt").write_text(
        "[packlight.methods]\nOtherFloat = other_quantiser:OtherFloat\nBroken = no_such_module:B\n"
    )
    methods = tmp_path / "methods.toml"
    methods.write_text('[methods]\n"fc*" = "OtherFloat(block=64)"\n')
    program = (
        "import packlight, warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        f"    print(packlight.load_methods({str(methods)!r}))\n"
        "print(*[warning.message for warning in caught])\n"
        "print(packlight.Method.from_dict({'method': 'OtherFloat', 'block': 8}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found, warned, read = run.stdout.splitlines()
    assert found == "{'fc*': OtherFloat(block=64)}"
    assert "Broken" in warned
    assert read == "OtherFloat(block=8)"


def test_the_base_of_quantisers_is_no_method_of_its_own():
    with pytest.raises(packlight.InputError, match="unknown method 'Quantiser'"):
        packlight.Method.from_dict({"method": "Quantiser"})
    with pytest.raises(NotImplementedError):
        packlight.Quantiser().keep(torch.zeros(3), None)


def undecorated():
    class Undecorated(BlockFloat):
        """Its instances would be equal whatever their fields say."""

        block: int = 64

    return Undecorated()


def of_lists():
    @dataclasses.dataclass(frozen=True)
    class OfLists(BlockFloat):
        steps: list = dataclasses.field(default_factory=list)

    return OfLists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (undecorated, r"Undecorated is no frozen dataclass.*@dataclasses.dataclass\(frozen=True\)"),
        (of_lists, r"OfLists\(block=32, steps=\[\]\) has a field that is no plain value"),
    ],
)
def test_a_method_that_is_no_value_is_refused(make, message, monkeypatch):
    monkeypatch.setattr(packlight.Method, "_kinds", dict(packlight.Method._kinds))
    method = make()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    for methods in (method, [BlockFloat(), method], {"*": method}, {"*": (method,)}):
        with pytest.raises(packlight.InputError, match=message):
            packlight.convert(model, methods)
    with pytest.raises(packlight.InputError, match=message), packlight.saving(method):
        pass
    overrides = {"*": None, "MulBackward0": method}
    with (
        pytest.raises(packlight.InputError, match=message),
        packlight.saving(BlockFloat(), overrides=overrides),
    ):
        pass
    assert type(model[0]) is torch.nn.Linear


@dataclasses.dataclass(frozen=True)
class Halves(BlockFloat):
    """Keeps numbers of floating point, which could have gradients."""

    def keep(self, flat, seed):
        return (flat.to(torch.bfloat16),)

    def restore(self, dtype, count, *kept):
        return kept[0].to(dtype)


LAYERS = {
    "activation": lambda x: functional.silu(x, method=Halves()),
    "gated": lambda x: functional.glu(x, -1, method=Halves()),
    "norm": lambda x: norms.layer_norm(x, (64,), method=Halves()),
    "batch_norm": lambda x: channel_norms.batch_norm(
        x.flatten(0, 1), None, None, training=True, method=Halves()
    ),
    "group_norm": lambda x: channel_norms.group_norm(x.flatten(0, 1), 4, method=Halves()),
    "attention": lambda x: attention.scaled_dot_product_attention(
        x, x * 2, x * 3, method=Halves(), recompute=False
    ),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_what_a_layer_keeps_has_no_gradient(layer):
    y = LAYERS[layer](torch.randn(2, 4, 32, 64, requires_grad=True) * 1.0)
    pack = sharing.pack_of(y)
    assert pack is not None
    assert y.requires_grad
    assert not any(tensor is not None and tensor.requires_grad for tensor in pack.tensors)


def test_own_methods_are_shown_as_what_they_are():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    conversion = packlight.convert(model, BlockFloat(64))
    assert repr(model[0]) == "Linear(in_features=64, out_features=64, bias=True, block=64)"
    assert "BlockFloat(block=64)" in str(conversion)


class Twice(torch.nn.Module):
    """A model whose own code calls activations and products."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x):
        h = torch.nn.functional.silu(self.linear(x))
        return self.linear(h * self.linear(x))


def test_code_of_a_quantiser_is_not_covered_where_it_is_compiled(fresh_compiler):
    model, x = Twice(), torch.randn(4, 8, 64)
    packlight.convert(model, BlockFloat(), functional=True)
    expected = torch.autograd.grad(model(x).sum(), model.linear.weight)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).sum(), model.linear.weight)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_autocast_ends_where_a_method_keeps(monkeypatch):
    keep = BlockFloat.keep

    def rotated(self, flat, seed):
        assert (torch.eye(8) @ torch.eye(8)).dtype == torch.float32
        return keep(self, flat, seed)

    monkeypatch.setattr(BlockFloat, "keep", rotated)
    model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64), torch.nn.GELU())
    packlight.convert(model, BlockFloat())
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(8, 64)).sum().backward()


@pytest.mark.parametrize("shape", [(256, 64), (3, 171, 64)])
@pytest.mark.parametrize("method", [packlight.GroupQuant(8), packlight.Sketch(1 / 2)], ids=str)
def test_a_compiled_linear_is_followed_by_an_operation_in_place(method, shape, fresh_compiler):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(inplace=True))
    packlight.convert(model, {torch.nn.Linear: method})
    x = torch.randn(shape)
    (expected,) = torch.autograd.grad(model(x).sum(), [model[0].bias])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x).sum(), [model[0].bias])
    torch.testing.assert_close(found, expected)


def test_a_new_module_of_a_converted_class_is_plain():
    model = Twice()
    packlight.convert(model, packlight.GroupQuant(8), functional=True)
    fresh = type(model)()
    assert fresh(torch.randn(4, 64)).shape == (4, 64)
    assert not isinstance(fresh.linear, packlight.groupquant.Linear)
