"""What every layer's function checks first, and the dtype in which autocast would run it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from packlight import _checks
from packlight.errors import DoubleBackwardError, InputError


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(_checks, "_autocast_dtypes", {})


def lowered(empty):
    """One of those that autocast runs in its own dtype."""
    return F.linear(empty, empty.new_empty(1, 0))


def widened(empty):
    """One of those that it runs in float32."""
    return F.mse_loss(empty, empty)


def untouched(empty):
    return empty + 1


def dtype_of(probe, x, name=None):
    return _checks.autocast_dtype(x, name, probe)


PROBES = {"lowered": lowered, "widened": widened, "untouched": untouched}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("order", [list(PROBES), list(reversed(PROBES))])
def test_each_function_has_the_dtype_that_autocast_gives_it(order, named):
    """Also where another function, dtype or autocast was asked about before."""
    for _ in range(2):
        for autocast in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", autocast):
                for given in (torch.float32, torch.bfloat16, torch.float16):
                    x = torch.ones(3, dtype=given)
                    expected = {"lowered": autocast, "widened": torch.float32, "untouched": given}
                    for name in order:
                        found = dtype_of(PROBES[name], x, name if named else None)
                        assert found == expected[name], (name, given, autocast)


def test_without_autocast_and_on_meta_nothing_is_asked():
    def never(_):
        raise AssertionError("the probe ran")

    assert dtype_of(never, torch.ones(2, dtype=torch.float16), "name") == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert dtype_of(never, torch.ones(2, device="meta"), "name") == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert dtype_of(never, torch.ones(2), "name") == torch.float32


def test_the_answer_is_remembered_for_functions_with_a_name():
    asked = []

    def probe(empty):
        asked.append((empty.numel(), empty.requires_grad, torch.is_grad_enabled()))
        return lowered(empty)

    x = torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            dtype_of(probe, x, "name")
        assert asked == [(0, False, False)]  # a checkpoint counts what is saved
        for _ in range(2):
            dtype_of(probe, x)
    assert len(asked) == 3


def test_a_cast_is_made_where_the_dtype_differs():
    x = torch.ones(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert _checks.autocast(x, "lowered", lowered).dtype == torch.bfloat16
        assert _checks.autocast(x, "untouched", untouched) is x


def test_what_is_no_dense_tensor_of_floats_is_refused():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        _checks.check_tensor(torch.ones(2, dtype=dtype), "f")
    for wrong, message in (
        ([1.0], "f takes a tensor, got list"),
        (torch.ones(2).to_sparse(), "f takes a dense tensor, got layout torch.sparse_coo"),
        (torch.nested.as_nested_tensor([torch.ones(2)], layout=torch.jagged), "dense tensor"),
        (torch.ones(2, dtype=torch.int32), "got torch.int32"),
        (torch.ones(2, dtype=torch.complex64), "got torch.complex64"),
    ):
        with pytest.raises(InputError, match=message):
            _checks.check_tensor(wrong, "f")


def test_tensors_of_transforms_are_refused_where_gradients_are_recorded():
    def checked(x):
        assert _checks.is_transformed()
        assert not _checks.is_taken(x)
        _checks.check_tensor(x, "f")
        return x.sum()

    x = torch.ones(2)
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(InputError, match=r"f keeps packed bits, which torch\.func"):
            transform(checked)(x)
    with torch.no_grad():
        torch.func.vmap(checked)(x)
    assert not _checks.is_transformed()
    assert _checks.is_taken(x)


def test_what_layers_take():
    """Tensors of inference mode where no gradient is recorded: autograd cannot save them."""
    with torch.inference_mode():
        x = torch.ones(2)
        assert _checks.is_taken(x)
    assert not _checks.is_taken(x)
    with torch.no_grad():
        assert _checks.is_taken(x)
    for wrong in (torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.int32)):
        assert not _checks.is_taken(wrong)


def test_numbers_are_numbers():
    _checks.check_numbers("f", a=1, b=2.5)
    for wrong in ("1", None, torch.ones(1)):
        with pytest.raises(InputError, match=r"f: b=.* is not a number"):
            _checks.check_numbers("f", a=1, b=wrong)


def test_in_place_on_leaves_that_require_gradients_raises_as_in_torch():
    leaf = torch.ones(3, requires_grad=True)
    for tensor in (leaf, leaf[:2]):
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            _checks.check_inplace(tensor)
    for tensor in (torch.ones(3), torch.ones(3)[:2], leaf * 1, (leaf * 1)[:2]):
        _checks.check_inplace(tensor)


def test_when_something_must_be_kept():
    x = torch.ones(2, requires_grad=True)
    assert _checks.needs_gradient(x)
    assert not _checks.needs_gradient(torch.ones(2))
    with torch.no_grad():
        assert not _checks.needs_gradient(x)


def test_only_a_parameter_without_gradient_is_frozen():
    assert _checks.is_frozen(nn.Parameter(torch.ones(2), requires_grad=False))
    assert not _checks.is_frozen(nn.Parameter(torch.ones(2)))
    assert not _checks.is_frozen(torch.ones(2))


def test_a_recorded_backward_pass_is_refused():
    with torch.no_grad():
        _checks.refuse_second_derivative()
    with pytest.raises(DoubleBackwardError, match=r"keeps its sketch.*differentiated twice"):
        _checks.refuse_second_derivative("its sketch")
