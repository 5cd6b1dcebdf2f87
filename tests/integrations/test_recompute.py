"""Checkpoints and tiles in models of transformers, PEFT and timm, against the plain models."""

import copy
import pickle

import peft
import pytest
import timm
import torch
import transformers
from transformers import Trainer, TrainingArguments

import packlight
from packlight import DEFAULT_METHODS, Checkpoint, GroupQuant, Tiles
from packlight.integrations.transformers import PacklightCallback
from tests.helpers import pack_bytes, peak_bytes
from tests.integrations.models import BATCH, LENGTH, WIDTH, batch, make, step, worst_error

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

EXACT = (Checkpoint(keep=None), Tiles(tokens=48, keep=None))
LONGEST = (Checkpoint(), Tiles(tokens=48), *DEFAULT_METHODS)

# What runs in tiles, of two blocks.
MLPS = {
    "bert": 0,  # whose MLP is half of one module and half of another
    "gpt2": 2,
    "llama": 2,
    "qwen3": 2,
    "phi3": 2,
    "t5": 4,
    "vit": 2,
}


@pytest.mark.parametrize("name", MLPS)
def test_a_family(name):
    plain, inputs = make(name), batch(name)
    model = copy.deepcopy(plain)
    conversion = packlight.convert(model, EXACT)
    methods = [row.method for row in conversion.replaced]
    assert methods.count(EXACT[1]) == MLPS[name]
    assert methods.count(EXACT[0]) == (4 if name == "t5" else 2)
    expected, true = step(plain, inputs)
    output, found = step(model, inputs)
    torch.testing.assert_close(output.loss, expected.loss)
    assert worst_error(found, true) < 2e-5
    assert packlight.revert(model) == len(methods)
    kinds = zip(model.modules(), plain.modules(), strict=True)
    assert all(type(ours) is type(theirs) for ours, theirs in kinds)
    assert not any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def total_error(found, true):
    """Of all gradients together: those of a query that hardly matters are small."""
    found, true = (torch.cat([grads[n].flatten() for n in true]) for grads in (found, true))
    return ((found - true).norm() / true.norm()).item()


def llama(**changes):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 3, "intermediate_size": 160, "vocab_size": 128, **changes,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).train()


def test_blocks_keep_packs_and_mlps_nothing():
    model, inputs = llama(use_cache=False), batch("llama")
    run = lambda: model.model(inputs["input_ids"]).last_hidden_state  # noqa: E731
    packlight.convert(model, (Checkpoint(), GroupQuant(4)), functional=True)
    without = packlight.profile(run).activation_bytes
    packlight.convert(model, (Checkpoint(), Tiles(48), GroupQuant(4)), functional=True)
    with_tiles = packlight.profile(run).activation_bytes
    states = 3 * torch.get_rng_state().nbytes  # of the tiles' random numbers
    assert with_tiles - without == states
    packs = 3 * pack_bytes(BATCH * LENGTH * WIDTH, 8)
    assert packs < without < packs + 4 * BATCH * LENGTH * WIDTH + 2**16


def test_a_cache_of_keys_and_values_is_filled_once():
    """A model that is trained as it is configured, with `use_cache=True`."""
    plain, inputs = llama(), batch("llama")
    model = copy.deepcopy(plain)
    packlight.convert(model, EXACT)
    _, true = step(plain, inputs)
    _, found = step(model, inputs)
    assert worst_error(found, true) < 2e-5


def test_pickled():
    model, inputs = llama(), batch("llama")
    packlight.convert(model, EXACT)
    found, expected = (step(one, inputs)[1] for one in (pickle.loads(pickle.dumps(model)), model))
    assert worst_error(found, expected) == 0


def test_the_models_own_checkpointing_before():
    plain, inputs = llama(use_cache=False), batch("llama")
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable()
    before = packlight.profile(lambda: model(**inputs).loss).activation_bytes
    packlight.convert(model, Checkpoint())
    saved = before - packlight.profile(lambda: model(**inputs).loss).activation_bytes
    inner = BATCH * LENGTH * WIDTH
    assert saved == 3 * (4 * inner - pack_bytes(inner, 8))
    assert total_error(step(copy.deepcopy(model), inputs)[1], step(plain, inputs)[1]) < 0.02
    packlight.revert(model)
    assert packlight.profile(lambda: model(**inputs).loss).activation_bytes == before


@pytest.mark.parametrize("order", ["adapters first", "adapters later"])
def test_lora(order):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = peft.get_peft_model(llama(use_cache=False), config)
    model = copy.deepcopy(plain)
    if order == "adapters later":
        model = llama(use_cache=False)
        packlight.convert(model, EXACT)
        model = peft.get_peft_model(model, config)
        model.load_state_dict(plain.state_dict())
    else:
        conversion = packlight.convert(model, EXACT)
        kinds = [row.kind for row in conversion.replaced]
        assert kinds.count("LlamaMLP") == kinds.count("LlamaDecoderLayer") == 3 == len(kinds) / 2
    inputs = batch("llama")
    assert worst_error(step(model, inputs)[1], step(plain, inputs)[1]) < 2e-5
    # Adapters in a module that runs in tiles are torch's own, as all that is in there.
    if order == "adapters later":
        mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
        assert type(mlp.gate_proj) is peft.tuners.lora.Linear
        assert type(mlp.gate_proj.lora_A["default"]) is torch.nn.Linear


def test_lora_with_packs_and_a_head():
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False,
        lora_dropout=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = peft.get_peft_model(llama(use_cache=False), config).train()
    model = copy.deepcopy(plain)
    eight = (Checkpoint(), Tiles(tokens=48, keep=GroupQuant(8)), GroupQuant(8))
    packlight.convert(model, eight, functional=True, head=True)
    for one in (plain, model):  # masks are of other draws where tokens come in tiles
        for part in one.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
    inputs = batch("llama")
    # Adapters that start at random make attention steep; gradients at 8 bits err more there.
    assert total_error(step(model, inputs)[1], step(plain, inputs)[1]) < 0.1


def test_the_sum_of_lora_is_that_of_peft_bit_for_bit(monkeypatch):
    monkeypatch.setattr("packlight.low_rank.reference._ELEMENTS", 3 * WIDTH)
    config = peft.LoraConfig(r=4, lora_alpha=9, target_modules=["0"], init_lora_weights=False)
    layer = torch.nn.Sequential(torch.nn.Linear(WIDTH, 48)).bfloat16()
    plain = peft.get_peft_model(layer, config).base_model.model[0]
    model = copy.deepcopy(plain)
    packlight.convert(model, {"*": (GroupQuant(8),)})
    x = torch.randn(2, 5, WIDTH).bfloat16()
    found = []
    for one in (plain, model):
        leaf = x.clone().requires_grad_()
        y = one(leaf)
        y.backward(torch.ones_like(y))
        grads = {"input": leaf.grad, "B": one.lora_B["default"].weight.grad}
        found.append((y, {**grads, "A": one.lora_A["default"].weight.grad}))
    assert torch.equal(found[0][0], found[1][0])
    # The adapter's share of it is added before it is rounded to 16 bits.
    torch.testing.assert_close(found[1][1]["input"], found[0][1]["input"], rtol=2**-6, atol=2**-6)
    assert worst_error(found[1][1], found[0][1]) < 0.02


def test_what_is_alive_at_the_peak():
    """Of each token, in widths of the model at 16 bits, beyond what all tokens share."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

    def per_token(methods) -> float:
        model = llama(use_cache=False, intermediate_size=7 * WIDTH // 2, num_hidden_layers=2)
        model = peft.get_peft_model(model.bfloat16(), config).train()
        packlight.convert(model, methods, functional=True, head=True)

        def step(length):
            ids = torch.randint(3, 128, (1, length))
            return peak_bytes(lambda: model(input_ids=ids, labels=ids).loss.backward())

        step(64)
        return (step(512) - step(256)) / 256 / (2 * WIDTH)

    blocks = Checkpoint(keep=None)
    plain, tiled = (per_token((blocks, *more, GroupQuant(4))) for more in ((), (Tiles(32),)))
    assert tiled < 0.6 * plain
    assert tiled < 20


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = torch.randint(3, 128, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(model, folder, *callbacks):
    settings = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "max_steps": 6,
        "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True, "seed": 3, "dataloader_pin_memory": False, "learning_rate": 3e-3,
        "gradient_accumulation_steps": 2,
    }  # fmt: skip
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=Rows(),
        callbacks=list(callbacks),
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_a_trainer_with_the_callback(tmp_path):
    plain = llama()
    model = copy.deepcopy(plain)
    callback = PacklightCallback(LONGEST, functional=True, head=True)
    losses = train(model, tmp_path / "ours", callback)
    expected = train(plain, tmp_path / "plain")
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses[-1] < losses[0]
    assert callback.conversion is not None
    assert Checkpoint() in [row.method for row in callback.conversion.replaced]


def test_blocks_and_mlps_of_timm():
    torch.manual_seed(0)
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, patch_size=8
    ).train()
    model = copy.deepcopy(plain)
    conversion = packlight.convert(model, EXACT)
    kinds = [row.kind for row in conversion.replaced]
    assert kinds == ["Block", "Mlp"] * 2
    images = torch.randn(3, 3, 32, 32)
    found = []
    for one in (plain, model):
        one.zero_grad()
        one(images).square().sum().backward()
        found.append({name: p.grad for name, p in one.named_parameters()})
    assert worst_error(found[1], found[0]) < 2e-5


def test_experts_are_refused_by_name():
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
            intermediate_size=96, num_local_experts=2, vocab_size=128,
        )
    )  # fmt: skip
    with pytest.raises(packlight.CannotConvertError, match="routes tokens to experts"):
        packlight.convert(model, {"*.mlp": Tiles()})
    with pytest.raises(packlight.NothingMatchedError):
        packlight.convert(model, Tiles())
