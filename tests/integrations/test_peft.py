"""LoRA and packlight, in either order."""

import contextlib
import copy
import re

import bitsandbytes
import peft
import pytest
import torch
import transformers
from torch import nn

import packlight
import packlight.groupquant as gq
from packlight import FewBit, GroupQuant, Sketch
from packlight.integrations.peft import adalora, made, scaled
from packlight.integrations.peft.adapters import Adapter
from tests.helpers import relative_error
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
    # The new matrices were converted as the model was: nothing is left to convert.
    before = packlight.profile(converted, **inputs).activation_bytes
    packlight.convert(converted, EIGHT)
    assert packlight.profile(converted, **inputs).activation_bytes == before
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
    assert sum(row.bytes for row in rows if row.dtype == "uint8") == pack
    adapter = [row for row in rows if row.module.endswith("q_proj")]
    assert sum(row.bytes for row in adapter) == BATCH * LENGTH * 4 * 4  # A x, of rank 4, exactly
    assert not any("base_layer" in row.module for row in rows)


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


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("scaling", [2.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (16,), (0,), (2, 0, 4)])
def test_one_function_for_a_layer_and_its_adapter(base, adapter, scaling, bias, shape):
    """The results of PEFT's own operations, bit for bit, and their gradients."""
    wide = torch.float64
    layer, x, dy = _adapted_linear(base, adapter, scaling, bias, shape)
    truth, wide_x = copy.deepcopy(layer).to(wide), x.detach().to(wide).requires_grad_()
    plain = layer(x)
    packlight.convert(layer, GroupQuant(bits=8, group_size=32))
    y = layer(x)
    assert y.dtype == base
    assert torch.equal(y, plain)
    if x.numel() >= 32:
        assert y.grad_fn.name() == "_LoraBackward"
        y.add_(0.0)  # it may be written to
    y.backward(dy)
    expected = truth(wide_x)
    expected.backward(dy.to(wide))
    near = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
    torch.testing.assert_close(y, expected.to(base), rtol=near[base], atol=near[base])
    torch.testing.assert_close(x.grad, wide_x.grad.to(base), rtol=near[base], atol=4 * near[base])
    (first, second), (wide_first, wide_second) = (
        (model.lora_A["default"].weight.grad, model.lora_B["default"].weight.grad)
        for model in (layer, truth)
    )
    assert first.dtype == second.dtype == adapter
    if x.numel() >= 32:
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        made = torch.autograd.grad(layer(x).sum(), weights)
        assert [g.stride() for g in made] == [w.stride() for w in weights]
        assert relative_error(second, wide_second) < near[base]
        assert relative_error(first, wide_first) < 0.02


def _adapted_linear(base, adapter, scaling, bias, shape=(3, 5)):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH, bias=bias)).to(base)
    config = peft.LoraConfig(
        r=4, lora_alpha=4 * scaling, target_modules=["0"], init_lora_weights=False
    )
    layer = peft.get_peft_model(model, config).base_model.model[0]
    for part in (layer.lora_A, layer.lora_B):
        part.to(adapter)
    x = torch.randn(*shape, WIDTH, dtype=base).requires_grad_()
    return layer, x, torch.randn(*shape, 2 * WIDTH, dtype=base)


def _hook(layer):
    layer.lora_A["default"].register_forward_hook(lambda *_: None)


def _dropout(layer):
    layer.lora_dropout["default"] = nn.Dropout(0.5)


def _own_forward(layer):
    layer.base_layer.forward = layer.base_layer.forward


def test_what_float16_cannot_hold_is_not_kept_in_it():
    layer, x, dy = _adapted_linear(torch.float16, torch.float32, 2.0, True)
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        first.mul_(1e6)
        second.mul_(1e-6)
    [expected] = torch.autograd.grad(layer(x), second, dy)
    packlight.convert(layer, GroupQuant(bits=8, group_size=32))
    y = layer(x)
    assert y.grad_fn.name() == "_LoraBackward"
    [gradient] = torch.autograd.grad(y, second, dy)
    assert relative_error(gradient, expected) < 1e-3


@pytest.mark.parametrize(
    "change",
    [
        _hook,
        _dropout,
        _own_forward,
        lambda layer: layer.base_layer.requires_grad_(True),
        lambda layer: layer.lora_A.requires_grad_(False),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.lora_A["default"].eval(),
    ],
)
def test_elsewhere_the_code_of_peft_runs(change):
    layer, x, _ = _adapted_linear(torch.float32, torch.float32, 2.0, True)
    packlight.convert(layer, GroupQuant(bits=8, group_size=32))
    assert layer(x).grad_fn.name() == "_LoraBackward"
    change(layer)
    assert layer(x).grad_fn.name() != "_LoraBackward"


def test_the_function_refuses_what_layers_refuse():
    layer, x, dy = _adapted_linear(torch.float32, torch.float32, 2.0, True)
    packlight.convert(layer, GroupQuant(bits=8, group_size=32))
    with pytest.raises(packlight.DoubleBackwardError):
        torch.autograd.grad(layer(x), x, dy, create_graph=True)
    y = layer(x)
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(2)
    with pytest.raises(packlight.ModifiedWeightError):
        y.backward(dy)


# ---- a base of 4 bits ----------------------------------------------------------------------------


def _four_bits(adapter, bias, shape=(3, 5), **options):
    """A Linear of bitsandbytes that is adapted, in bfloat16, with an input and a gradient."""
    torch.manual_seed(5)
    plain = nn.Linear(2 * WIDTH, WIDTH, bias=bias).bfloat16()
    base = bitsandbytes.nn.Linear4bit(
        2 * WIDTH, WIDTH, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    base.load_state_dict(plain.state_dict())
    model = nn.Sequential(base.to("cpu"))
    if bias:
        base.bias = nn.Parameter(plain.bias.detach())
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(model, config, **options).base_model.model[0]
    for part in (layer.lora_A, layer.lora_B):
        part.to(adapter)
    x = torch.randn(*shape, 2 * WIDTH, dtype=torch.bfloat16).requires_grad_()
    return layer, x, torch.randn(*shape, WIDTH, dtype=torch.bfloat16)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_one_function_for_a_base_of_4_bits(adapter, bias):
    layer, x, dy = _four_bits(adapter, bias)
    plain, other_x = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    packlight.convert(layer, GroupQuant(bits=8, group_size=32))
    y, expected = layer(x), plain(other_x)
    assert y.grad_fn.name() == "_LoraBackward"
    assert torch.equal(y, expected)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(x.grad, other_x.grad, rtol=2e-2, atol=2e-2)
    for part, allowed in (("lora_A", 0.02), ("lora_B", 0.01)):
        ours, theirs = (getattr(m, part)["default"].weight.grad for m in (layer, plain))
        assert ours.dtype == adapter
        assert relative_error(ours, theirs) < allowed
    wide = torch.randn(64, 2 * WIDTH, dtype=torch.bfloat16, requires_grad=True)
    kept = [packlight.profile(lambda m=m: m(wide * 1.0)).activation_bytes for m in (plain, layer)]
    assert kept[0] > 1.5 * kept[1]


def test_elsewhere_a_base_of_4_bits_is_left_to_its_code():
    for change, name in ((_dropout, "_SumBackward"), (_hook, "_SumBackward")):
        layer, x, _ = _four_bits(torch.float32, False)
        packlight.convert(layer, GroupQuant(bits=8, group_size=32))
        change(layer)
        assert layer(x).grad_fn.name() == name
    layer, x, _ = _four_bits(torch.float32, False)
    plain = copy.deepcopy(layer)
    packlight.convert(layer, GroupQuant(bits=8, group_size=32))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
    row = x[:1, :1]
    assert torch.equal(layer(row), plain(row))
    plain.lora_dropout["default"] = layer.lora_dropout["default"] = nn.Dropout(0.0)
    assert torch.equal(layer(x), plain(x))  # the sum alone


# ---- every kind of adapter -----------------------------------------------------------------------

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=ALL, init_lora_weights=False),
    "DoRA": lambda: peft.LoraConfig(
        r=4, target_modules=ALL, use_dora=True, init_lora_weights=False
    ),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, target_modules=ALL, total_step=100, lora_dropout=0.0,
        init_lora_weights=False,
    ),
    "IA3": lambda: peft.IA3Config(
        target_modules=ALL, feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=16, target_modules=ALL, init_weights=False),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=ALL, init_weights=False),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=ALL, init_weights=False),
}  # fmt: skip
MIXINS = {
    "LoRA": scaled.DoraLayer,  # LoRA's layers, whose adapters may be of either kind
    "DoRA": scaled.DoraLayer,
    "AdaLoRA": adalora.AdaLoraLayer,
    "IA3": scaled.ScaledLayer,
    "OFT": made.MadeRotation,
    "LoHa": made.MadeDelta,
    "LoKr": made.MadeDelta,
}


def adapted(kind, dtype=torch.float32, **changes):
    """A Llama with random adapters; the same ones every time."""
    model = make("llama", **changes).to(dtype)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, KINDS[kind]())
    packlight.manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "oft_R" in name or "lokr" in name:
                parameter.normal_(0, 0.05)
            elif kind == "AdaLoRA" and "lora_" in name:  # else scores are in the thousands
                parameter.normal_(0, 0.3)
            elif "ia3" in name:
                parameter.normal_(1, 0.2)
    return wrapped.train()


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_results(kind, functional):
    inputs = batch("llama")
    plain = adapted(kind)
    output, expected = step(plain, inputs)
    model = adapted(kind)
    packlight.convert(model, EIGHT, functional=functional)
    assert sum(isinstance(module, MIXINS[kind]) for module in model.modules()) == 14
    ours, actual = step(model, inputs)
    torch.testing.assert_close(ours.logits, output.logits, rtol=1e-5, atol=1e-5)
    assert worst_error(actual, expected) < 0.05
    packlight.revert(model)
    for name, gradient in step(model, inputs)[1].items():
        assert torch.equal(gradient, expected[name])


class _Masked(nn.Module):
    """A dropout of the same elements every time."""

    def forward(self, x):
        torch.manual_seed(x.shape[-1])
        return x * (torch.rand(x.shape) < 0.7) / 0.7


def _dropping(model, dropout):
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.lora_dropout["default"] = copy.deepcopy(dropout)
    return model


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_with_a_dropout_keeps_one_pack_of_what_it_gives(dtype, autocast):
    inputs = batch("llama")

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, model = (_dropping(adapted("DoRA", dtype), _Masked()) for _ in range(2))
        output, expected = step(plain, inputs)
        packlight.convert(model, EIGHT, functional=True)
        ours, actual = step(model, inputs)
    near = {} if dtype == torch.float32 and not autocast else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(ours.logits, output.logits, **near)
    assert len(actual) == len(expected)
    assert worst_error(actual, expected) < (0.05 if not near else 0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_with_a_dropout_keeps_at_most_one_and_a_half_times_what_lora_keeps(dtype):
    inputs = {key: value.repeat(2, 4) for key, value in batch("llama").items()}
    kept = {}
    for kind in ("LoRA", "DoRA"):
        model = adapted(kind, dtype, hidden_size=128, intermediate_size=352)
        if kind == "DoRA":
            _dropping(model, nn.Dropout(0.1))
        packlight.convert(model, functional=True)
        body = model.base_model.model.model
        kept[kind] = packlight.profile(body, inputs["input_ids"]).activation_bytes
    assert kept["DoRA"] < 1.5 * kept["LoRA"], kept


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_every_part_of_an_adapter(kind):
    """One part at a time, so that no other hook has all parts called."""
    inputs = batch("llama")
    plain, model = adapted(kind), adapted(kind)
    packlight.convert(model, EIGHT)
    parts = [dict(m.named_modules()) for m in (plain, model)]
    for name in parts[0]:
        if "layers.1.mlp.down_proj" not in name:
            continue
        calls = [[], []]
        for part, seen in zip(parts, calls, strict=True):
            handle = part[name].register_forward_hook(lambda *_, seen=seen: seen.append(1))
            (plain if part is parts[0] else model)(**inputs)
            handle.remove()
        assert calls[0] == calls[1], name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "LoRA"])
def test_every_kind_keeps_about_what_lora_keeps(kind):
    sizes = {"hidden_size": 128, "intermediate_size": 352}
    inputs = batch("llama")
    inputs = {"input_ids": inputs["input_ids"].repeat(2, 4)}
    kept = {}
    for name in ("LoRA", kind):
        model = adapted(name, torch.bfloat16, **sizes)
        before = packlight.profile(model.base_model.model.model, **inputs).activation_bytes
        packlight.convert(model)
        after = packlight.profile(model.base_model.model.model, **inputs).activation_bytes
        assert before > 4 * after
        kept[name] = after
    assert kept[kind] < 1.5 * kept["LoRA"]


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "OFT", "AdaLoRA", "IA3"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_in_checkpoints(kind, reentrant):
    inputs = batch("llama")
    model = adapted(kind)
    nearest = (GroupQuant(bits=8, group_size=32, rounding="nearest"),)
    packlight.convert(model, nearest, functional=True)
    expected = step(model, inputs)[1]
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual = step(model, inputs)[1]
    assert worst_error(actual, expected) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind):
    inputs = batch("llama")
    model = adapted(kind)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, inputs)[1]
        packlight.convert(model, EIGHT)
        actual = step(model, inputs)[1]
    assert worst_error(actual, expected) < 0.1


@pytest.mark.filterwarnings("ignore")  # of torch's, where PEFT's code breaks the graph
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "AdaLoRA", "LoHa"])
def test_compiled(kind, fresh_compiler):
    inputs = batch("llama")
    model = adapted(kind)
    expected = step(model, inputs)[1]
    packlight.convert(model, EIGHT)
    run = torch.compile(model, backend="aot_eager")
    assert worst_error(step(run, inputs)[1], {f"_orig_mod.{k}": v for k, v in expected.items()}) < (
        0.05
    )


def test_a_sketch_of_the_input_serves_all_adapters():
    inputs = batch("llama")
    model = adapted("LoRA", torch.bfloat16)
    methods = {nn.Linear: Sketch(rows=16, min_rows=1), _is_adapter: Sketch()}
    packlight.convert(model, methods, functional=False)
    assert any(type(module).__mro__[1] is Adapter for module in model.modules())
    rows = packlight.profile(model, **inputs).rows
    sketches = [row for row in rows if "lora_A" in row.module and "layers.1.mlp" in row.module]
    assert {row.module.split(".")[-3] for row in sketches} == {"gate_proj", "down_proj"}


def _is_adapter(name, module):
    return hasattr(module, "base_layer")


def test_a_dropout_keeps_a_bit_an_element_and_shares_the_pack():
    inputs = batch("llama")
    model = peft.get_peft_model(
        make("llama").to(torch.bfloat16),
        peft.LoraConfig(r=4, target_modules=ALL, lora_dropout=0.1),
    )
    packlight.convert(model)
    rows = [
        row
        for row in packlight.profile(model, **inputs).rows
        if "layers.1" in row.module
        and "lora_" in row.module
        and "lora_B" not in row.module
        # Attention keeps no pack of its output, which others could share.
        and "o_proj.lora_A" not in row.module
    ]
    bits = BATCH * LENGTH // 8
    assert {row.module.split(".")[-2] for row in rows} == {"lora_dropout"}
    assert sum(row.bytes for row in rows) == bits * (6 * WIDTH + 160)


# ---- adapters that come later --------------------------------------------------------------------


def kinds_of(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_before_or_after_is_the_same(kind, functional):
    after = adapted(kind)
    packlight.convert(after, functional=functional)
    model = make("llama")
    packlight.convert(model, functional=functional)
    before = peft.get_peft_model(model, KINDS[kind]())
    ours, theirs = kinds_of(before.base_model.model), kinds_of(after.base_model.model)
    assert ours == theirs
    inputs = batch("llama")
    kept = [packlight.profile(m, **inputs).activation_bytes for m in (before, after)]
    assert kept[0] == kept[1]


def test_further_adapters_are_converted_too():
    for first in ("before", "after"):
        model = make("llama")
        if first == "before":
            packlight.convert(model)
        model = peft.get_peft_model(model, KINDS["LoRA"]())
        if first == "after":
            packlight.convert(model)
        model.add_adapter("second", KINDS["LoRA"]())
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        assert type(layer.lora_A["second"]) is type(layer.lora_A["default"]) is gq.Linear
        assert packlight.revert(model) > 0
        model.add_adapter("third", KINDS["LoRA"]())
        assert type(layer.lora_A["third"]) is type(layer.lora_A["second"]) is nn.Linear


def test_an_adapter_has_the_selector_of_its_layer():
    for methods in (
        {"*.up_proj": GroupQuant(bits=2), "*.q_proj": None, "*_proj": GroupQuant(bits=8)},
        {"*.lora_*": GroupQuant(bits=2), "*.q_proj": None, "*_proj": GroupQuant(bits=8)},
    ):
        model = make("llama")
        packlight.convert(model, methods, strict=False)
        model = peft.get_peft_model(model, KINDS["LoRA"]())
        layer = model.base_model.model.model.layers[0]
        assert layer.mlp.up_proj.lora_A["default"].method.bits == 2
        named = "*.lora_*" in methods
        assert layer.mlp.gate_proj.lora_A["default"].method.bits == (2 if named else 8)
        alone = layer.self_attn.q_proj.lora_A["default"]
        assert type(alone) is (gq.Linear if named else nn.Linear)


def test_nothing_else_that_comes_is_converted():
    model = make("llama")
    packlight.convert(model)
    model.lm_head = nn.Linear(WIDTH, 8)
    model.model.layers[0].mlp.up_proj = nn.Sequential(nn.Linear(WIDTH, 160))
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.layers[0].mlp.up_proj[0]) is nn.Linear


# ---- a quantised base ----------------------------------------------------------------------------


def of_4_bits(layer):
    made = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def of_8_bits(layer):
    return bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False)


class Int4Tensor(torch.Tensor):
    """A stand-in for a weight of torchao."""

    __module__ = "torchao.quantization"


def with_weight_of_torchao(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Int4Tensor), False)
    return layer


@pytest.mark.parametrize("make_layer", [of_4_bits, of_8_bits, with_weight_of_torchao])
def test_a_quantised_base_is_reported_as_what_it_is(make_layer):
    model = make("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = make_layer(layer.mlp.down_proj)
    conversion = packlight.convert(model)
    package = "torchao" if make_layer is with_weight_of_torchao else "bitsandbytes"
    skipped = [row for row in conversion.skipped if f"quantised by {package}" in row.reason]
    assert len(skipped) == 2
    assert all("down_proj" in row.names[0] for row in skipped)
    assert "quantised" in str(conversion)


@pytest.mark.parametrize("kind", [peft.LoHaConfig, peft.LoKrConfig, peft.OFTConfig])
@pytest.mark.parametrize("what", ["scaled", "disabled", "another adapter"])
def test_what_is_made_again_is_of_the_forward_pass(kind, what):
    """An adapter may be scaled or frozen between the passes, as for the loss of another one."""
    options = {"oft_block_size": 16} if kind is peft.OFTConfig else {"r": 4}
    config = kind(target_modules=["0"], **options)
    plain = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64), nn.GELU()), config).train()
    plain.add_adapter("other", copy.deepcopy(config))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.1)
    model = copy.deepcopy(plain)
    packlight.convert(model, GroupQuant(bits=8, rounding="nearest"))
    x = torch.randn(4, 64, 64)
    for m in (plain, model):
        layer = m.base_model.model[0]
        loss = m(x).square().mean()
        if what == "scaled" and kind is not peft.OFTConfig:
            layer.scale_layer(0.5)
        elif what == "another adapter":
            m.set_adapter("other")
        with m.disable_adapter() if what == "disabled" else contextlib.nullcontext():
            loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.requires_grad == theirs.requires_grad
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.05, atol=1e-4)


# --- Adapters of the experts of a mixture, which are parameters and no layers.

_MIXTURES = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"num_local_experts": 4, "head_dim": 16, "rope_parameters": {"rope_theta": 1e4}},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16},
    ),
}


def _mixture(name):
    kind, config, own = _MIXTURES[name]
    sizes = {
        "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "use_cache": False,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**sizes, **own}))
    return model.train()


def _on_experts(model):
    router = "gate" if hasattr(model.model.layers[0].mlp, "gate") else "router"
    packlight.manual_seed(7)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=[
            "mlp.experts.gate_up_proj", "mlp.experts.down_proj", f"mlp.{router}.weight"
        ],
        init_lora_weights=False,
    )  # fmt: skip
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", _MIXTURES)
def test_experts_and_routers_with_adapters(name, after):
    """What PEFT makes of a stack of experts and an adapter is computed again, and not kept."""
    plain = _on_experts(_mixture(name))
    if after:
        model = _mixture(name)
        packlight.convert(model, EIGHT)
        model = _on_experts(model)
        model.load_state_dict(plain.state_dict())
    else:
        model = copy.deepcopy(plain)
        packlight.convert(model, EIGHT)
    inputs = batch("llama")
    output, expected = step(plain, inputs)
    ours, actual = step(model, inputs)
    assert torch.equal(ours.logits, output.logits)
    assert actual.keys() == expected.keys()
    assert worst_error(actual, expected) < 0.1
    first = model(**inputs).loss  # for which PEFT parametrizes, and parametrizes anew
    model(**inputs).loss.backward(inputs=[p for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    first.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert worst_error(found, expected) < 0.1
    report = packlight.profile(model, **inputs)
    kept = [packlight.profile(each, **inputs).activation_bytes for each in (plain, model)]
    assert kept[0] > 3 * kept[1]
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    largest = max(p.numel() for p in experts.parameters())
    own = [row.bytes for row in report.rows if "experts" in row.module]
    assert max(own) < largest  # not even a pack of a stack
