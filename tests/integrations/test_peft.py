"""LoRA and packlight, in either order."""

import copy
import re

import peft
import pytest
import torch
from torch import nn

import packlight
from packlight import FewBit, GroupQuant
from tests.integrations.models import BATCH, LENGTH, WIDTH, batch, make, step, worst_error

EIGHT = (GroupQuant(bits=8, group_size=32, rounding="nearest"), FewBit(bits=8))
TARGETS = {"llama": ["q_proj", "v_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}

pytestmark = pytest.mark.filterwarnings(
    # peft says so of GPT-2's Conv1D and goes on, as it is meant to.
    "ignore:fan_in_fan_out is set to False:UserWarning",
)


def lora(model, name):
    """LoRA with random weights: by default B is zero, and A has no gradient."""
    packlight.manual_seed(7)
    config = peft.LoraConfig(
        r=4, target_modules=TARGETS[name], lora_dropout=0.0, init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("name", TARGETS)
def test_a_lora_model_is_converted(name):
    plain, inputs = lora(make(name), name), batch(name)
    converted = copy.deepcopy(plain)
    packlight.convert(converted, EIGHT)
    output, expected = step(plain, inputs)
    ours, actual = step(converted, inputs)
    torch.testing.assert_close(ours.logits, output.logits, rtol=1e-5, atol=1e-5)
    assert set(actual) == {key for key in expected if "lora_" in key}
    assert worst_error(actual, expected) < 0.05
    kept = [packlight.profile(model, **inputs).activation_bytes for model in (plain, converted)]
    assert kept[0] > 3 * kept[1]


@pytest.mark.parametrize("name", TARGETS)
def test_lora_on_a_converted_model(name):
    plain, inputs = lora(make(name), name), batch(name)
    model = make(name)
    packlight.convert(model, EIGHT)
    converted = lora(model, name)
    converted.load_state_dict(plain.state_dict())
    output, expected = step(plain, inputs)
    ours, actual = step(converted, inputs)
    torch.testing.assert_close(ours.logits, output.logits, rtol=1e-5, atol=1e-5)
    assert worst_error(actual, expected) < 0.05
    # The new matrices are plain layers, until they are converted too.
    before = packlight.profile(converted, **inputs).activation_bytes
    packlight.convert(converted, EIGHT)
    assert packlight.profile(converted, **inputs).activation_bytes < before
    assert worst_error(step(converted, inputs)[1], expected) < 0.05


def test_a_frozen_layer_keeps_nothing_of_its_own():
    """Of a projection with LoRA one pack is kept, which the norm before it has made."""
    model = nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "q_proj": nn.Linear(WIDTH, WIDTH)})
    wrapped = peft.get_peft_model(
        _Chain(model), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    packlight.convert(wrapped, GroupQuant(bits=4))
    x = torch.randn(BATCH * LENGTH, WIDTH, requires_grad=True)
    rows = packlight.profile(wrapped, x).rows
    pack = x.numel() // 2
    assert sum(row.bytes for row in rows if row.dtype == "uint8") == pack + _small_pack()
    assert not any("base_layer" in row.module for row in rows)


def _small_pack():
    """What A gives, which B reads: four values a token, at 4 bits."""
    return BATCH * LENGTH * 4 // 2


class _Chain(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        return self.parts["q_proj"](self.parts["norm"](x))


@pytest.mark.parametrize("frozen", ["all", "first block"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_conversion_never_keeps_more_of_a_frozen_model(name, frozen):
    model, inputs = make(name), batch(name)
    head = {"bert": "classifier", "gpt2": "transformer.ln_f", "llama": "model.norm"}[name]
    if frozen == "all":
        model.requires_grad_(False)
        model.get_submodule(head).requires_grad_(True)
    else:
        blocks = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers"}
        model.get_submodule(blocks[name])[0].requires_grad_(False)
        model.get_input_embeddings().requires_grad_(False)
    before = packlight.profile(model, **inputs)
    packlight.convert(model, EIGHT)
    after = packlight.profile(model, **inputs)
    assert after.activation_bytes <= before.activation_bytes

    def by_block(report):
        sums = {}
        for row in report.rows:  # as far as the number of the block
            block = re.match(r"(\D*\d*)", row.module).group()
            sums[block] = sums.get(block, 0) + row.bytes
        return sums

    for block, kept in by_block(after).items():
        assert kept <= by_block(before)[block], block


@pytest.mark.parametrize("name", TARGETS)
def test_merge_and_unload_give_a_plain_model(name):
    plain, inputs = lora(make(name), name), batch(name)
    converted = copy.deepcopy(plain)
    packlight.convert(converted, EIGHT)
    before = converted.eval()(**inputs).logits
    merged = converted.merge_and_unload()
    packlight.revert(merged)
    kinds = {type(module) for module in merged.modules()}
    assert kinds == {type(module) for module in make(name).modules()}
    assert merged.state_dict().keys() == make(name).state_dict().keys()
    torch.testing.assert_close(merged.eval()(**inputs).logits, before, rtol=1e-4, atol=1e-4)


def test_merging_in_place_and_back():
    model, inputs = lora(make("llama"), "llama"), batch("llama")
    packlight.convert(model, EIGHT)
    before = model.eval()(**inputs).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=1e-4)
    original = model.unload()
    assert packlight.revert(original) > 0
    plain = make("llama")
    assert [type(m) for m in original.modules()] == [type(m) for m in plain.modules()]


def test_an_adapter_is_saved_and_loaded(tmp_path):
    model, inputs = lora(make("llama"), "llama"), batch("llama")
    packlight.convert(model, EIGHT)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make("llama"), tmp_path)
    assert torch.equal(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)
