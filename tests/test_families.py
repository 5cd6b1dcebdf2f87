"""Families of other packages' models: what a conversion makes of them is as it was recorded."""

import copy
import gc
import json
import warnings

import pytest
import torch
from tools.models import RECORD, recorded
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

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
        in_forward, after_backward = alive(model, batch)
    found, expected = recorded(conversion.left_of(before - after)), DATA["families"][name]
    assert found["left"] == expected["left"]
    assert found["before"] == pytest.approx(expected["before"], rel=0.02)
    assert found["after"] == pytest.approx(expected["after"], rel=0.02)
    assert packlight.predict(model, **batch).activation_bytes == pytest.approx(
        after.activation_bytes, rel=0.03
    )
    # Neither does a closure hold what no one measures, nor do packs outlive the backward pass for
    # as long as someone has the loss.
    assert in_forward < 1.02 * after.activation_bytes
    assert after_backward < 0.005 * before.activation_bytes


def storages():
    """Of all tensors that are alive, by address. Autograd's have objects of Python by now."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
    return {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in found
        if x.layout == torch.strided and x.device.type == "cpu"
    }


def alive(model, batch):
    """Bytes beside results and gradients before and after the backward pass of a step."""
    own = storages()
    out = model(**batch)
    leaves = tree_leaves(dict(out) if isinstance(out, dict) else out)
    results = [y for y in leaves if isinstance(y, Tensor) and y.requires_grad]
    loss = sum(y.float().square().mean() for y in results)
    found = []
    for end in (lambda: None, loss.backward):
        end()
        apart = [loss, *results, *(p.grad for p in model.parameters() if p.grad is not None)]
        apart = own.keys() | {x.untyped_storage().data_ptr() for x in apart}
        found.append(sum(size for place, size in storages().items() if place not in apart))
    return found


# ---- the forward pass ----------------------------------------------------------------------------

# Their GELU is written out in operations that round one by one; the function of torch that takes
# its place rounds once.
ROUNDED_ONCE = {"gpt2", "albert", "fnet"}


def passed(model, batch):
    """Results of a training pass, and how those of each module lie in memory."""
    layouts = {}

    def look(name):
        def hook(module, inputs, output):
            tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
            layouts[name] = [x.stride() for x in tensors]

        return hook

    hooks = [m.register_forward_hook(look(name)) for name, m in model.named_modules()]
    packlight.manual_seed(0)
    output = model(**batch)
    for hook in hooks:
        hook.remove()
    found = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    return [x.detach().clone() for x in found], layouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_forward_pass_is_torchs_bit_for_bit(name, dtype):
    """Where a layer lays its result out otherwise, one behind it may round otherwise."""
    if name == "fnet" and dtype == torch.bfloat16:
        dtype = torch.float32  # torch has no Fourier transform of 16 bits

    def cast(x):
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other package
        plain, batch = FAMILIES[name].started()
        plain, batch = plain.to(dtype), tree_map(cast, batch)
        converted = copy.deepcopy(plain)
        packlight.convert(converted, functional=True)
        (exact, layouts), (ours, own) = passed(plain, batch), passed(converted, batch)
    assert {name: own[name] for name in layouts if name in own} == {
        name: layout for name, layout in layouts.items() if name in own
    }
    assert len(ours) == len(exact)
    for a, b in zip(ours, exact, strict=True):
        if name in ROUNDED_ONCE:
            near = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(a, b, rtol=near, atol=near * b.abs().max().item())
        else:
            assert torch.equal(a, b)
