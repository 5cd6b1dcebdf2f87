"""The public names, and what importing them must not do."""

import re
import subprocess
import sys

import pytest
import torch

import packlight
import packlight.fewbit
import packlight.groupquant
import packlight.groupquant.fixed_point
import packlight.inverted
import packlight.sketch
from packlight._torch import constant_while_traced

NAMES = {
    "DEFAULT_METHODS",
    "DEFAULT_REST",
    "CannotConvertError",
    "CannotGraphError",
    "Checkpoint",
    "Codebook",
    "Conversion",
    "DoubleBackwardError",
    "FewBit",
    "FixedPoint",
    "Grade",
    "GradientReport",
    "GroupQuant",
    "InfeasibleBudgetError",
    "InputError",
    "Inverted",
    "MemoryReport",
    "Method",
    "MissingDependencyError",
    "ModifiedWeightError",
    "NothingMatchedError",
    "Offload",
    "PacklightError",
    "Parallel",
    "Plan",
    "Quantiser",
    "Sketch",
    "Tiles",
    "__version__",
    "convert",
    "fewbit",
    "fit_codebook",
    "gradient_error",
    "graphed",
    "groupquant",
    "head",
    "inverted",
    "launched",
    "layers",
    "load_methods",
    "manual_seed",
    "plan",
    "predict",
    "profile",
    "recompute",
    "revert",
    "rounding_state",
    "save_methods",
    "saving",
    "set_rounding_state",
    "sketch",
    "use_reference",
}


def test_public_names():
    assert set(packlight.__all__) == NAMES
    fixed_point = packlight.groupquant.fixed_point
    methods = (
        packlight.fewbit,
        packlight.inverted,
        packlight.groupquant,
        fixed_point,
        packlight.layers,
        packlight.sketch,
        packlight.recompute,
    )
    for module in (packlight, *methods):
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            assert getattr(module, name).__doc__ or name == "__version__", f"{name} is undocumented"


def test_import_needs_no_triton_and_touches_no_device():
    program = """
import sys
sys.modules["triton"] = None
import packlight, torch
assert not torch.cuda.is_initialized()
assert "matplotlib" not in sys.modules
assert "transformers" not in sys.modules
assert "packlight.cli" not in sys.modules
assert "torch._dynamo" not in sys.modules  # a second
x = torch.randn(8, requires_grad=True)
packlight.fewbit.gelu(x).sum().backward()
assert not any(name.endswith("kernels") for name in sys.modules if name.startswith("packlight"))
print("fine")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "fine\n", result.stderr


def test_functions_are_constant_while_traced_as_torch_has_it():
    theirs = torch.compiler.assume_constant_result(lambda: 1)
    assert vars(constant_while_traced(lambda: 1)) == vars(theirs)


@pytest.mark.parametrize("match", ["full True", "3 bits rotated, silu backward"])
def test_kernels_compile_for_a_gpu_without_one(match):
    """The interpreter accepts what the compiler refuses; tools/compile_kernels.py tries all."""
    program = f"import sys; sys.argv = ['', '--match', '{match}']; "
    program += "import runpy; runpy.run_path('tools/compile_kernels.py', run_name='__main__')"
    import os

    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert re.search(r"^[1-9]\d* kernels compiled for sm_90", result.stdout, re.MULTILINE), (
        result.stderr[-2000:]
    )
