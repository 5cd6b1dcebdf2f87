"""Liger-Kernel and packlight, in either order.

The kernels of Liger's layers do not run on a CPU, also not in Triton's interpreter: they take plain
numbers. What the layers compute is known from those of transformers, in whose place they stand.
"""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

import packlight
from packlight import FewBit, GroupQuant
from packlight.errors import CannotConvertError
from packlight.integrations.transformers import PacklightCallback
from tests.integrations.models import batch, make, step, worst_error

# The Makefile of a checkout installs it; the sdist has no Makefile.
if not (
    importlib.util.find_spec("liger_kernel") or (Path(__file__).parents[2] / "Makefile").exists()
):
    pytest.skip("Liger-Kernel is not installed", allow_module_level=True)

from liger_kernel.transformers import (
    LigerGEGLUMLP,
    LigerLayerNorm,
    LigerPhi3SwiGLUMLP,
    LigerRMSNorm,
    LigerSwiGLUMLP,
)
from liger_kernel.transformers.model.llama import lce_forward
from liger_kernel.transformers.monkey_patch import (
    _apply_liger_kernel_to_instance,
    _patch_layer_norm_module,
)
from liger_kernel.transformers.rms_norm import LigerRMSNormForGemma

EIGHT = (GroupQuant(bits=8, group_size=32, rounding="nearest"), FewBit(bits=8))
# What of Liger runs on its own kernels whatever packlight does.
FUSED = "fused_linear_cross_entropy"
LAYERS_ALONE = {"rope": False, "cross_entropy": False, FUSED: False}

CLASSES = {
    "llama": (modeling_llama, {"LlamaMLP": LigerSwiGLUMLP, "LlamaRMSNorm": LigerRMSNorm}),
    "gemma": (modeling_gemma, {"GemmaMLP": LigerGEGLUMLP, "GemmaRMSNorm": LigerRMSNormForGemma}),
    "phi3": (modeling_phi3, {"Phi3MLP": LigerPhi3SwiGLUMLP, "Phi3RMSNorm": LigerRMSNorm}),
}


def of_classes(name, monkeypatch):
    """A model made of Liger's classes, as `apply_liger_kernel_to_...()` has it made."""
    module, classes = CLASSES[name]
    for kind, replacement in classes.items():
        monkeypatch.setattr(module, kind, replacement)
    model = make(name)
    assert any(isinstance(each, tuple(classes.values())) for each in model.modules())
    model.load_state_dict(PLAIN[name])
    return model


PLAIN = {name: make(name).state_dict() for name in CLASSES}


@pytest.fixture(autouse=True)
def _restored():
    """Liger patches a model's module for the process, also where a model is given."""
    modules = [module for module, _ in CLASSES.values()]
    before = [dict(vars(module)) for module in modules]
    yield
    for module, names in zip(modules, before, strict=True):
        vars(module).update(names)


def of_instances(name, monkeypatch):
    """A model whose modules have Liger's forwards, as `apply_...(model=model)` puts them there."""
    model = make(name)
    _apply_liger_kernel_to_instance(model=model, **LAYERS_ALONE)
    assert any("forward" in vars(each) for each in model.modules())
    return model


APPLIED = {"classes": of_classes, "instances": of_instances}


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("apply", APPLIED.values(), ids=APPLIED)
@pytest.mark.parametrize("name", CLASSES)
def test_a_model_with_liger_s_layers_is_converted(name, apply, functional, monkeypatch):
    inputs = batch(name)
    output, expected = step(make(name), inputs)
    model = make(name)
    packlight.convert(model, EIGHT, functional=functional)
    kept = packlight.profile(model, **inputs).activation_bytes
    patched = apply(name, monkeypatch)
    before = {key: type(module) for key, module in patched.named_modules()}
    packlight.convert(patched, EIGHT, functional=functional)
    ours, actual = step(patched, inputs)
    torch.testing.assert_close(ours.logits, output.logits, rtol=1e-5, atol=1e-5)
    assert worst_error(actual, expected) < 0.05
    assert packlight.profile(patched, **inputs).activation_bytes == kept
    assert packlight.convert(patched, EIGHT, functional=functional).replaced
    assert worst_error(step(patched, inputs)[1], expected) < 0.05
    packlight.revert(patched)
    assert {key: type(module) for key, module in patched.named_modules()} == before
    forwards = [vars(each)["forward"] for each in patched.modules() if "forward" in vars(each)]
    assert len(forwards) == (7 if apply is of_instances else 0)
    assert all(each.__module__.startswith("liger_kernel.") for each in forwards)


@pytest.mark.parametrize("apply", APPLIED.values(), ids=APPLIED)
def test_a_converted_model_is_copied_and_pickled(apply, monkeypatch):
    inputs = batch("llama")
    model = apply("llama", monkeypatch)
    packlight.convert(model, EIGHT)
    expected = step(model, inputs)[1]
    clones = [copy.deepcopy(model)]
    if apply is of_classes:  # on instances Liger puts methods that cannot be pickled
        clones.append(pickle.loads(pickle.dumps(model)))
    for clone in clones:
        assert worst_error(step(clone, inputs)[1], expected) < 1e-6


@pytest.mark.parametrize("where", ["class", "instance"])
def test_layer_norms(where):
    plain = nn.LayerNorm(64, eps=1e-4)
    x = torch.randn(32, 64, requires_grad=True)
    if where == "class":
        layer = LigerLayerNorm(64, eps=1e-4, bias=True)
        layer.load_state_dict(plain.state_dict())
    else:
        layer = copy.deepcopy(plain)
        _patch_layer_norm_module(layer)
    packlight.convert(layer, GroupQuant(bits=8))
    dy = torch.randn(32, 64)
    y, expected = layer(x), plain(x)
    torch.testing.assert_close(y, expected)
    ours = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    exact = torch.autograd.grad(expected, [x, *plain.parameters()], dy)
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()
    assert packlight.profile(layer, x).activation_bytes < x.nbytes / 2


def test_dtypes_are_liger_s():
    """Which gives the dtype of the input whatever that of the weight."""
    for norm in (LigerRMSNorm(64), LigerRMSNormForGemma(64)):
        packlight.convert(norm, GroupQuant())
        x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
        assert norm(x).dtype == torch.bfloat16


def test_dtypes_are_liger_s_in_a_block_that_adds_beside_the_norm(monkeypatch):
    model = of_classes("llama", monkeypatch).bfloat16()
    for module in model.modules():
        if isinstance(module, LigerRMSNorm):
            module.float()
    packlight.convert(model, GroupQuant())
    read = []
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.mlp.gate_proj):
            part.register_forward_pre_hook(lambda _, args: read.append(args[0].dtype))
    step(model, batch("llama"))
    assert read == [torch.bfloat16] * 4


@pytest.mark.parametrize(
    "norm",
    [
        LigerRMSNorm(64, casting_mode="none"),
        LigerRMSNorm(64, offset=1.0),
        LigerRMSNorm(64, elementwise_affine=False),
    ],
)
def test_norms_that_have_no_rule_are_left_alone(norm):
    model = nn.Sequential(norm, nn.Linear(64, 64))
    conversion = packlight.convert(model, GroupQuant(), functional=False)
    assert "casting_mode" in conversion.skipped[0].reason
    assert type(norm) is LigerRMSNorm


def test_applied_after_the_conversion_it_is_said_which_line_to_move():
    model, inputs = make("llama"), batch("llama")
    expected = step(model, inputs)[1]
    packlight.convert(model, EIGHT)
    _apply_liger_kernel_to_instance(model=model, rms_norm=False, **LAYERS_ALONE)
    # Liger's kernel runs then, and finds no device.
    said = pytest.warns(UserWarning, match=r"2 layers.*layers.0-1.mlp.*move packlight.convert")
    with said, pytest.raises(Exception):  # noqa: B017, PT011  whatever Triton raises
        model(**inputs)
    packlight.convert(model, EIGHT)
    assert worst_error(step(model, inputs)[1], expected) < 0.05


def test_by_the_trainer_s_argument(tmp_path):
    model, inputs = make("llama"), batch("llama")
    data = [{key: value[index % 4] for key, value in inputs.items()} for index in range(4)]
    callback = PacklightCallback(EIGHT)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path), max_steps=1, report_to=[], use_liger_kernel=True, use_cpu=True,
            liger_kernel_config=LAYERS_ALONE, save_strategy="no",
        ),
        train_dataset=data,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    norms = [row for row in callback.conversion.replaced if row.kind == "LlamaRMSNorm"]
    assert "liger_kernel" in norms[0].becomes
    assert callback.kept_bytes


@pytest.mark.parametrize("apply", APPLIED.values(), ids=APPLIED)
def test_a_head_that_liger_s_fused_loss_passes_by_is_told(apply, monkeypatch):
    """Its loss reads the weight of the head, and holds that weight's finished gradient."""
    without = make("llama")
    _apply_liger_kernel_to_instance(model=without, **LAYERS_ALONE)
    assert packlight.convert(without, EIGHT, head=True).heads == ("lm_head",)
    if apply is of_classes:
        monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", lce_forward)
        model = of_classes("llama", monkeypatch)
    else:
        model = make("llama")
        _apply_liger_kernel_to_instance(model=model, **LAYERS_ALONE | {FUSED: True})
    with pytest.raises(CannotConvertError, match=r"lm_head.*fused_linear_cross_entropy=False"):
        packlight.convert(model, EIGHT, head=True)


@pytest.mark.parametrize("functional", [False, True])
def test_a_fused_loss_that_comes_after_a_head_is_told(functional):
    model = make("llama")
    assert packlight.convert(model, EIGHT, functional=functional, head=True).heads
    parts = {**LAYERS_ALONE, "rms_norm": False, "swiglu": False, FUSED: True}
    _apply_liger_kernel_to_instance(model=model, **parts)
    with pytest.warns(UserWarning, match="Liger-Kernel was applied to 1 layers after"):
        step(model, {key: value[:1, :8] for key, value in batch("llama").items()})
    packlight.revert(model)


@pytest.mark.parametrize("part", ["rope", FUSED])
def test_what_stays_liger_s_works_beside(part):
    """In the interpreter; a profile counts the finished gradients that a fused loss keeps."""
    inputs = batch("llama")
    inputs = {key: value[:1, :8] for key, value in inputs.items()}
    output, expected = step(make("llama"), inputs)
    model = make("llama")
    parts = {**LAYERS_ALONE, "rms_norm": False, "swiglu": False, part: True}
    _apply_liger_kernel_to_instance(model=model, **parts)
    packlight.convert(model, EIGHT, functional=True)
    ours, actual = step(model, inputs)
    torch.testing.assert_close(ours.loss, output.loss, rtol=1e-4, atol=1e-4)
    assert worst_error(actual, expected) < 0.05
    if part != "rope":
        kept = packlight.profile(model, **inputs).rows
        weight = model.lm_head.weight.nbytes
        assert any(row.bytes == weight and "Liger" in row.operation for row in kept), kept
