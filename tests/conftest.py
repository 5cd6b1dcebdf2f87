"""Where kernels run in tests: in Triton's interpreter on the CPU, on the device with `--gpu`."""

import os
import sys

import pytest

# Triton reads its variable when it is imported, so it is set before any test module is. Ours tells
# the workers of pytest-xdist, which do not see the command line.
if "--gpu" in sys.argv:
    os.environ["PACKLIGHT_TEST_GPU"] = "1"
if "PACKLIGHT_TEST_GPU" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import numpy as np
import torch

# How long an example takes says nothing: a machine may do other work, and first calls compile.
hypothesis.settings.register_profile("packlight", deadline=None)
hypothesis.settings.load_profile("packlight")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests that need a CUDA device")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--gpu was given and torch sees no CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--gpu"):
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: make gpu-test")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quiet_interpreter():
    """The interpreter computes with NumPy, which warns of the infinities that kernels rely on."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True, scope="session")
def _interpreter_loops():
    """The interpreter makes loop bounds by int(array of one element), which NumPy 2.4 refuses."""
    if "TRITON_INTERPRET" not in os.environ:
        yield
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
    yield
    interpreter._patch_lang_tensor = patch


@pytest.fixture(autouse=True, scope="session")
def _interpreter_products():
    """The interpreter multiplies matrices of bfloat16 by their bits."""
    if "TRITON_INTERPRET" not in os.environ:
        yield
        return
    from triton.language import bfloat16
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != bfloat16:
            return handle.data
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def mended(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(widened(a), widened(b), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = mended
    yield
    InterpreterBuilder.create_dot = create_dot


@pytest.fixture
def collected():
    """For tests that capture: a graph of an earlier test that is freed then ends a capture."""
    from packlight.graphs.recorder import nothing_freed

    with nothing_freed():
        yield


@pytest.fixture
def poison():
    """Fills what torch.empty gives with NaN, so that an element nobody wrote is loud."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["reference", "kernel"])
def backend(request, monkeypatch):
    """Runs a test of a `layer` on its reference and on its kernels."""
    if request.param == "kernel":
        request.getfixturevalue("layer").use_kernels(monkeypatch)
    return request.param


@pytest.fixture
def fresh_compiler():
    """Compiled code is kept a function, and one of another layer counts as a recompilation."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
