"""Questions to torch's inside (`_torch/`): each answer, and that without the private name."""

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from packlight import _torch
from packlight._torch import autograd, backends, graph, modes


@pytest.fixture
def lost(monkeypatch):
    """Takes a capability away."""

    def lose(capability):
        monkeypatch.setattr(capability, "values", None, raising=False)

    return lose


# ---- tensors without values, layouts, norms ------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def test_which_tensors_have_no_values(lost):
    with FakeTensorMode():
        fake = torch.empty(3)
    assert backends.is_fake(fake)
    for tensor in (torch.ones(3), nn.Parameter(torch.ones(3)), torch.ones(3).as_subclass(Subclass)):
        assert not backends.is_fake(tensor)
    lost(_torch.FAKES)
    assert not backends.is_fake(fake)


def test_tensors_with_values_are_made_while_others_have_none(lost):
    with FakeTensorMode():
        with backends.with_values():
            assert torch.ones(3).tolist() == [1, 1, 1]
        lost(_torch.FAKES)
        with backends.with_values():
            assert type(torch.ones(3)) is not torch.Tensor


@pytest.mark.parametrize("axes", [2, 3])
def test_the_memory_format_is_that_of_torch_s_own_kernels(axes):
    """An interpolation lays its result out as its input suggests."""
    sizes = (2, 3, 4, 6, 5)[: axes + 2]
    for order in itertools.permutations(range(axes + 2)):
        back = [order.index(axis) for axis in range(axes + 2)]
        for whole in (1, 2):  # dense, and every other element of the last axis in memory
            permuted = [sizes[axis] for axis in order]
            permuted[-1] *= whole
            x = torch.ones(permuted)[..., ::whole].permute(back)
            assert x.shape == sizes
            y = F.interpolate(x, scale_factor=2)
            expected = torch.empty(y.shape, memory_format=backends.memory_format(x))
            assert y.stride() == expected.stride(), (order, whole)


def test_a_batch_norm_is_torch_s_with_its_statistics(monkeypatch):
    x, weight, bias = torch.randn(8, 3, 4) * 2 + 1, torch.rand(3), torch.rand(3)
    expected = F.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-3)
    for _ in range(2):
        arguments = (x, weight, bias, None, None, True, 0.1, 1e-3, False)
        y, mean, rstd, *_ = backends.batch_norm(*arguments)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(mean, x.mean((0, 2)))
        torch.testing.assert_close(rstd, (x.var((0, 2), unbiased=False) + 1e-3).rsqrt())
        monkeypatch.setattr(backends, "_batch_norm", None)


# ---- backends ------------------------------------------------------------------------------------


def test_the_current_device_is_that_of_the_tensor(monkeypatch, lost):
    x = torch.ones(3)
    for current, answer in ((x.get_device(), True), (x.get_device() + 1, False)):
        monkeypatch.setattr(
            _torch.CURRENT_DEVICE, "values", (lambda current=current: current,), raising=False
        )
        assert backends.is_current_device(x) is answer
    lost(_torch.CURRENT_DEVICE)
    assert backends.is_current_device(x) is False


def test_the_current_stream_is_that_of_the_device_of_a_tensor(monkeypatch, lost):
    x = torch.ones(3)
    assert backends.current_stream(x) == 0
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(
        _torch.CURRENT_STREAM, "values", (lambda device: 7 + device,), raising=False
    )
    assert backends.current_stream(x) == 7 + x.get_device()
    lost(_torch.CURRENT_STREAM)
    assert backends.current_stream(x) is None


def test_the_attention_kernel_is_that_which_torch_takes(lost):
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    backend = backends.attention_backend(q, q, q, None, 0.0, True)
    assert backend == SDPBackend.FLASH_ATTENTION.value
    mask = torch.ones(8, 8, requires_grad=True)
    assert backends.attention_backend(q, q, q, mask, 0.0, False) == SDPBackend.MATH.value
    lost(_torch.FUSED_ATTENTION)
    assert backends.attention_backend(q, q, q, None, 0.0, True) == SDPBackend.MATH.value


@pytest.mark.parametrize(
    ("version", "answer"),
    [
        (None, False),
        ("3.5.1", False),
        ("3.6.0", True),
        ("3.7.1+git12", True),
        ("3.8.9", True),
        ("3.9.0", False),
        ("3.10.0", False),
    ],
)
@pytest.mark.filterwarnings("ignore:packlight is tested with Triton")
def test_tested_releases_of_triton_launch_directly(version, answer, monkeypatch, lost):
    monkeypatch.setattr(backends, "triton_version", lambda: version)
    monkeypatch.setattr(backends, "TESTED_TRITON", ("3.6", "3.8"))
    monkeypatch.setattr(_torch.TRITON, "values", (object(), object()), raising=False)
    launches_directly = backends.launches_directly.__wrapped__
    assert launches_directly() is answer
    lost(_torch.TRITON)
    assert launches_directly() is False


def test_an_untested_release_of_triton_is_named(monkeypatch):
    monkeypatch.setattr(backends, "triton_version", lambda: "9.9.0")
    monkeypatch.setattr(_torch.TRITON, "values", (object(), object()), raising=False)
    with pytest.warns(UserWarning, match=r"tested with Triton 3\..*, and this is 9\.9\.0"):
        backends.launches_directly.__wrapped__()


def test_the_release_of_triton():
    import triton

    assert backends.triton_version() == triton.__version__


# ---- modes ---------------------------------------------------------------------------------------


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Other(Mode):
    pass


def test_the_innermost_mode_is_off_where_it_is_of_the_very_kind(lost):
    def seen(first, second=0):
        return first, second, modes.function_modes()

    assert seen(1) == (1, 0, [])
    with Mode() as outer:
        assert _torch.without_mode(Mode, seen, 1, second=2) == (1, 2, [])
        assert modes.function_modes() == [outer]
        with Other() as inner:
            assert _torch.without_mode(Mode, seen, 1) == (1, 0, [outer, inner])
            assert _torch.without_mode(Other, seen, 1) == (1, 0, [outer])
            assert modes.function_modes() == [outer, inner]
            with pytest.raises(ZeroDivisionError):
                _torch.without_mode(Other, lambda: 1 / 0)
            assert modes.function_modes() == [outer, inner]
            assert modes.innermost(Mode) is inner  # which derives from it
            assert modes.innermost(Other) is inner
            assert modes.take_off(Mode) is None
            mode = modes.take_off(Other)
            assert modes.function_modes() == [outer]
            assert modes.innermost(Other) is None
            modes.put_on(mode)
            assert modes.function_modes() == [outer, inner]
        lost(_torch.MODES)
        assert _torch.without_mode(Mode, modes.function_modes) == [outer]
        assert modes.innermost(Mode) is outer
        assert modes.innermost(Other) is None
        assert modes.take_off(Mode) is None
    assert modes.function_modes() == []


def test_calls_go_past_subclasses_and_not_past_modes():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            raise AssertionError

    x, calls = torch.ones(3).as_subclass(Loud), []

    class Counting(Mode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    with modes.without_torch_functions():
        torch.add(x, 1)
        with Counting():
            torch.add(x, 1)
    assert calls == [torch.add]
    with pytest.raises(AssertionError):
        torch.add(x, 1)


def test_transforms_are_seen(lost):
    answers = []

    def ask(x):
        answers.append(modes.in_transform())
        return x.sum()

    x = torch.ones(3)
    torch.func.grad(ask)(x)
    torch.func.vmap(ask)(x)
    with forward_ad.dual_level():
        ask(x)
    assert answers == [True] * 3
    ask(x)
    lost(_torch.TRANSFORMS)
    torch.func.grad(ask)(x)
    assert answers[3:] == [False] * 2


# ---- autograd ------------------------------------------------------------------------------------


def test_the_hooks_that_are_active(lost):
    def pack(x):
        return x

    assert autograd.saved_tensor_hooks() is None
    with saved_tensors_hooks(abs, abs), saved_tensors_hooks(pack, abs):
        assert autograd.saved_tensor_hooks() == (pack, abs)
        lost(_torch.HOOKS)
        assert autograd.saved_tensor_hooks() is None


def test_nodes_are_numbered_in_their_order():
    before = autograd.next_node_number()
    y = torch.ones(3, requires_grad=True) * 1
    assert y.grad_fn._sequence_nr() == before
    assert autograd.next_node_number() == before + 1


def test_the_leaves_of_an_operation_are_those_of_its_inputs_that_require_gradients():
    a, b = (torch.ones(3, requires_grad=True) for _ in range(2))
    for factors, leaves in (((a, b), [a, b]), ((a, torch.ones(3)), [a]), ((a * 1, b), [b])):
        found = graph.leaves((factors[0] * factors[1]).grad_fn)
        assert list(map(id, found)) == list(map(id, leaves))


def test_what_is_to_run_at_the_end_of_a_backward_pass(lost):
    events = []

    def note(event):
        events.append(event)

    def note_end():
        note("end")

    def backward():
        x = torch.ones(3, requires_grad=True)
        first = x * 1
        second = first * 1
        second.register_hook(lambda _: note(autograd.at_end_of_backward(note_end)))
        first.register_hook(lambda _: events.append("later"))
        second.sum().backward()

    assert not autograd.at_end_of_backward(lambda: events.append("never"))
    backward()
    assert events == [True, "later", "end"]
    lost(_torch.BACKWARD)
    backward()
    assert events == [True, "later", "end", False, "later"]


def test_a_storage_is_known_again_and_taken_for_no_other():
    x = torch.ones(64)
    reference = autograd.storage_reference(x)
    assert autograd.has_storage(x, reference)
    assert autograd.has_storage(x[3:], reference)
    assert not autograd.has_storage(x.clone(), reference)
    x.data = torch.ones(64)
    gc.collect()
    others = [torch.ones(64) for _ in range(9)]
    assert not any(autograd.has_storage(tensor, reference) for tensor in (x, *others))
