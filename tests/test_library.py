"""The dispatcher of operators: which of reference and kernel a CUDA tensor takes, on a CPU too."""

import itertools
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import packlight
from packlight import _library, use_reference
from tests.helpers import every_device

SCHEMA = "dispatched_{}(Tensor x, Tensor? seed, float scale) -> Tensor"
NUMBERS = itertools.count()  # torch 2.11 forgets no operator's name


class Recorder:
    """The library, with what is registered for CUDA kept aside."""

    def __init__(self):
        self.library = torch.library.Library("packlight", "FRAGMENT")
        self.on_cuda = None
        self.tags = None

    def define(self, schema, tags=()):
        self.tags = tags
        self.library.define(schema, tags=tags)

    def impl(self, name, function, key):
        if key == "CUDA":
            self.on_cuda = function
        else:
            self.library.impl(name, function, key)


@pytest.fixture
def dispatched(monkeypatch):
    """The operator and its function for CUDA, whose kernel and reference say their own names."""
    recorder = Recorder()
    monkeypatch.setattr(_library, "_LIBRARY", recorder)
    monkeypatch.setattr(_library, "kernels_available", lambda: True)
    kernels = types.ModuleType("kernels_of_the_test")
    kernels.calls = []

    def launch(x, seed, scale):
        kernels.calls.append((x.device.type, seed, scale, kernels.entered[-1:]))
        return x + 1

    kernels.launch, kernels.entered = launch, []
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            kernels.entered.append(self.device)

        def __exit__(self, *_):
            kernels.entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", Device)
    schema = SCHEMA.format(next(NUMBERS))
    operator = _library.define_op(
        schema,
        reference=lambda x, seed, scale: x - 1,
        fake=lambda x, seed, scale: torch.empty_like(x),
        kernel="kernels_of_the_test:launch",
    )
    kernels.overload = getattr(torch.ops.packlight, schema.partition("(")[0]).default
    yield operator, recorder.on_cuda, kernels
    recorder.library._destroy()


@pytest.fixture(autouse=True)
def current(monkeypatch):
    """Tensors of these devices are on the current one."""
    devices = {"cpu"}
    monkeypatch.setattr("packlight._torch.is_current_device", lambda x: x.device.type in devices)
    return devices


def test_the_reference_serves_the_cpu_and_the_fake_the_compiler(dispatched):
    operator, _, kernels = dispatched
    x = torch.zeros(2)
    assert torch.equal(operator(x, None, 1.0), x - 1)
    torch.library.opcheck(kernels.overload, (x, None, 1.0), test_utils="test_faketensor")
    assert not kernels.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_serves_tensors_of_the_current_device(dispatched, dtype):
    _, on_cuda, kernels = dispatched
    x = torch.zeros(2, dtype=dtype)
    for _ in range(2):
        assert torch.equal(on_cuda(x, None, 2.0), x + 1)
    assert kernels.calls == [("cpu", None, 2.0, [])] * 2
    assert not kernels.entered


def test_another_device_is_made_the_current_one_around_the_launch(dispatched, current):
    """The device is that of the first tensor."""
    _, on_cuda, kernels = dispatched
    x, seed = torch.zeros(2), torch.zeros(1, device="meta")
    on_cuda(x, seed, 2.0)
    assert not kernels.entered
    current.clear()
    current.add("meta")
    assert torch.equal(on_cuda(x, seed, 2.0), x + 1)
    assert kernels.calls == [("cpu", seed, 2.0, []), ("cpu", seed, 2.0, [x.device])]
    assert kernels.entered == [x.device, None]


def test_what_takes_the_reference(dispatched, monkeypatch):
    _, on_cuda, kernels = dispatched
    x = torch.zeros(2)
    assert torch.equal(on_cuda(x.double(), None, 1.0), x.double() - 1)
    assert torch.equal(on_cuda(x, x.double(), 1.0), x - 1)  # any tensor in float64
    with use_reference():
        assert torch.equal(on_cuda(x, None, 1.0), x - 1)
    monkeypatch.setattr(_library, "kernels_available", lambda: False)
    assert torch.equal(on_cuda(x, None, 1.0), x - 1)
    assert not kernels.calls


def test_an_old_device_takes_the_reference(dispatched, monkeypatch):
    """Its kernels do not compile, which Triton would say at the first launch."""
    _, on_cuda, kernels = dispatched
    x = torch.zeros(2)
    monkeypatch.setattr(_library, "_is_too_old", lambda tensor: tensor is x)
    assert torch.equal(on_cuda(x, None, 1.0), x - 1)
    assert not kernels.calls
    other = torch.zeros(2)
    assert torch.equal(on_cuda(other, None, 1.0), other + 1)


def test_a_kernel_is_looked_up_when_the_first_tensor_comes(dispatched, monkeypatch):
    _, on_cuda, kernels = dispatched
    monkeypatch.delitem(sys.modules, kernels.__name__)
    with pytest.raises(ModuleNotFoundError, match="kernels_of_the_test"):
        on_cuda(torch.zeros(2), None, 1.0)
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    on_cuda(torch.zeros(2), None, 1.0)
    monkeypatch.delattr(kernels, "launch")
    on_cuda(torch.zeros(2), None, 1.0)  # and only once
    assert len(kernels.calls) == 2


def test_use_reference_ends_with_an_exception(dispatched):
    _, on_cuda, _ = dispatched
    x = torch.zeros(2)
    with pytest.raises(KeyError), use_reference():
        raise KeyError
    assert torch.equal(on_cuda(x, None, 1.0), x + 1)


def test_kernels_are_available_where_triton_is(monkeypatch):
    available = _library.kernels_available.__wrapped__
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not available()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "triton" or None)
    assert available()


def test_what_an_operator_writes_to_is_counted_past_the_dispatcher(monkeypatch, dispatched):
    *_, kernels = dispatched
    kernels.write = lambda x, mean: x + (0 if mean is None else mean.fill_(3.0))
    operator = _library.define_op(
        f"writes_{next(NUMBERS)}(Tensor x, Tensor(a!)? mean) -> Tensor",
        reference=lambda x, mean: x - 1,
        fake=lambda x, mean: torch.empty_like(x),
        kernel="kernels_of_the_test:write",
    )
    with torch.inference_mode():
        unversioned = torch.zeros(2)
    x, mean = torch.zeros(2), torch.zeros(2)
    assert torch.equal(operator(x, mean), x - 1)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr("packlight._torch.is_watched", lambda: False)
    before = mean._version
    assert torch.equal(operator(x, mean), x + 3)
    assert mean._version == before + 2  # `fill_`, and the operator
    assert torch.equal(operator(x, None), x)
    with torch.inference_mode():  # these have no version, so the dispatcher is asked
        assert torch.equal(operator(x, unversioned), x - 1)


@every_device
def test_float64_takes_the_reference_where_the_result_alone_has_it(device):
    """As what a pack stands for: codes and scales have other dtypes."""
    x, dy = torch.randn(2, 16, 64, dtype=torch.float64, device=device)
    layer = torch.nn.Linear(64, 64, dtype=torch.float64, device=device)
    layer(x).backward(dy)
    exact = layer.weight.grad
    layer.weight.grad = None
    packlight.convert(layer, packlight.GroupQuant(bits=8))
    layer(x).backward(dy)
    assert layer.weight.grad.dtype == torch.float64
    assert (layer.weight.grad - exact).norm() < 0.02 * exact.norm()


def test_code_of_the_compiler_calls_an_operator_past_the_dispatcher(monkeypatch, dispatched):
    """It calls `torch.ops.packlight.….default`, the object that torch knows the operator by."""
    *_, kernels = dispatched
    name = f"named_{next(NUMBERS)}"
    kernels.add = lambda x, number: x + number
    _library.define_op(
        f"{name}(Tensor x, float number) -> Tensor",
        reference=lambda x, number: x - number,
        fake=lambda x, number: torch.empty_like(x),
        kernel="kernels_of_the_test:add",
    )
    operator, x, seen = getattr(torch.ops.packlight, name).default, torch.zeros(2), []
    assert isinstance(operator, torch._ops.OpOverload)

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watching():
        assert torch.equal(operator(x, 2.0), x - 2)
    assert seen[0] is operator
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    assert torch.equal(operator(x, number=2.0), x - 2)  # keywords are the dispatcher's
    monkeypatch.setattr("packlight._torch.is_watched", lambda: True)
    assert torch.equal(operator(x, 2.0), x - 2)
    monkeypatch.setattr("packlight._torch.is_watched", lambda: False)
    assert torch.equal(operator(x, 2.0), x + 2)
