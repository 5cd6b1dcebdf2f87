"""Heads of transformers, whose losses are computed by chunks: against the plain models."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import Trainer, TrainingArguments

import packlight
from packlight import GroupQuant
from packlight.head import LazyLogits
from packlight.integrations.transformers import PacklightCallback
from tests.integrations.models import make, step, worst_error

VOCABULARY = 2048

_SIZES = {
    "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": VOCABULARY,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DECODER = {**_SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "use_cache": False}
_ENCODER = {
    **_SIZES, "intermediate_size": 96, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_BART = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "vocab_size": VOCABULARY,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "max_position_embeddings": 64,
}  # fmt: skip

# What stands between head and loss: nothing, a scale, a cap, a bias; a loss of the model's own.
FAMILIES = {
    "LlamaForCausalLM": _DECODER,
    "MistralForCausalLM": {**_DECODER, "tie_word_embeddings": True},
    "Qwen3ForCausalLM": {**_DECODER, "head_dim": 16},
    "Gemma2ForCausalLM": {**_DECODER, "head_dim": 16, "final_logit_softcapping": 0.5},
    "Gemma3ForCausalLM": {**_DECODER, "head_dim": 16, "final_logit_softcapping": 0.5},
    "CohereForCausalLM": {**_DECODER, "logit_scale": 0.3},
    "Cohere2ForCausalLM": {**_DECODER, "head_dim": 16, "logit_scale": 3.0},
    "GraniteForCausalLM": {**_DECODER, "logits_scaling": 0.3},
    "PhiForCausalLM": {**_DECODER, "resid_pdrop": 0.0},
    "OPTForCausalLM": {
        **_SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0,
        "max_position_embeddings": 64,
    },
    "FalconForCausalLM": {**_SIZES, "use_cache": False},
    "GPTNeoXForCausalLM": {**_SIZES, "intermediate_size": 96},
    "BloomForCausalLM": {
        "hidden_size": 64, "n_head": 4, "n_layer": 1, "vocab_size": VOCABULARY,
        "hidden_dropout": 0.0, "attention_dropout": 0.0,
    },
    "MixtralForCausalLM": {**_DECODER, "num_local_experts": 2, "output_router_logits": True},
    "BertForMaskedLM": _ENCODER,
    "RobertaForMaskedLM": _ENCODER,
    "AlbertForMaskedLM": {**_ENCODER, "embedding_size": 32},
    "DistilBertForMaskedLM": {
        "dim": 64, "n_heads": 4, "n_layers": 1, "hidden_dim": 96, "vocab_size": VOCABULARY,
        "dropout": 0.0, "attention_dropout": 0.0,
    },
    "T5ForConditionalGeneration": {
        "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4,
        "vocab_size": VOCABULARY, "dropout_rate": 0.0, "decoder_start_token_id": 0,
    },
    "BartForConditionalGeneration": _BART,
    "MarianMTModel": _BART,
}  # fmt: skip


def family(name: str):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**FAMILIES[name])).train()
    if hasattr(model, "final_logits_bias"):
        torch.nn.init.normal_(model.final_logits_bias)
    ids = torch.randint(3, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = -100
    return model, {"input_ids": ids, "labels": labels}


def is_lazy(z) -> bool:
    return type(z) is LazyLogits and z._state.values is None and z._state.bare is None


def kept(model, inputs, methods=None) -> int:
    """Bytes kept by the body and the loss; nobody holds the logits."""
    return packlight.profile(lambda: model(**inputs).loss).activation_bytes


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_gradients_and_bytes_of_a_family(name):
    plain, inputs = family(name)
    model = copy.deepcopy(plain)
    conversion = packlight.convert(model, {}, head=True)
    assert len(conversion.heads) == 1
    expected, true = step(plain, inputs)
    output, found = step(model, inputs)
    assert is_lazy(output.logits)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert worst_error(found, true) < 1e-5
    assert torch.equal(output.logits + 0, expected.logits)
    assert kept(plain, inputs) - kept(model, inputs) > 0.9 * 4 * 3 * 16 * VOCABULARY
    assert model.eval()(**inputs).logits.equal(plain.eval()(**inputs).logits)
    assert packlight.revert(model) == 1


@pytest.mark.parametrize("count", [77, torch.tensor(77)], ids=["a number", "a tensor"])
def test_a_loss_of_several_batches_is_divided_by_their_tokens(count):
    """As `Trainer` has it where it accumulates gradients."""
    plain, inputs = family("LlamaForCausalLM")
    model = copy.deepcopy(plain)
    packlight.convert(model, {}, head=True)
    inputs["num_items_in_batch"] = count
    expected, true = step(plain, inputs)
    output, found = step(model, inputs)
    assert is_lazy(output.logits)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    tokens = (inputs["labels"][:, 1:] != -100).sum()
    mean = plain(**{**inputs, "num_items_in_batch": None}).loss
    torch.testing.assert_close(output.loss, mean * tokens / 77)
    assert worst_error(found, true) < 1e-5


def llama(**changes):
    torch.manual_seed(0)
    sizes = {**_DECODER, **changes}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).train()
    ids = torch.randint(3, sizes["vocab_size"], (4, 64), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_eighth_of_what_plain_training_keeps_is_alive(dtype):
    """No finished gradient of the head is hidden: all that lives counts, found by the collector."""
    model, inputs = llama(
        vocab_size=8192, hidden_size=128, intermediate_size=344, num_hidden_layers=2
    )
    model.to(dtype)
    before = packlight.profile(model, **inputs).activation_bytes
    packlight.convert(model, functional=True, head=True)
    report = packlight.profile(model, **inputs)
    assert report.activation_bytes <= 0.12 * before
    assert packlight.predict(model, **inputs).activation_bytes == report.activation_bytes
    output = model(**inputs)
    reached = [tensor for node in nodes(output.loss.grad_fn) for tensor in held(node)]
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    sizes = [one.nbytes for one in reached if one.data_ptr() not in parameters]
    assert max(sizes) < 8192 * 128  # neither a head nor logits
    assert sum(sizes) <= 0.12 * before


def nodes(root):
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending.extend(following for following, _ in node.next_functions)


def held(node):
    saved = getattr(node, "saved_tensors", ())
    yield from (one for one in saved if one is not None)
    attributes = vars(node).values() if hasattr(node, "__dict__") else ()
    yield from (one for one in attributes if isinstance(one, torch.Tensor))


def test_the_heads_pack_is_fine_and_its_gradients_nearly_exact():
    plain, inputs = llama()
    model = copy.deepcopy(plain)
    method = GroupQuant(bits=4, group_size=32)
    options = {"head": True, "strict": False, "functional": False}
    packlight.convert(model, {"model.norm": method, "lm_head": method}, **options)
    _, true = step(plain, inputs)
    _, found = step(model, inputs)
    assert 0 < worst_error({"w": found["lm_head.weight"]}, {"w": true["lm_head.weight"]}) < 0.02
    layer = "model.layers.0.mlp.up_proj.weight"
    assert worst_error({"w": found[layer]}, {"w": true[layer]}) < 0.04


@pytest.mark.parametrize("copies", [None, ["lm_head"]], ids=["frozen head", "trained copy"])
def test_lora(copies):
    model, inputs = llama()
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False,
        task_type="CAUSAL_LM", modules_to_save=copies,
    )  # fmt: skip
    plain = peft.get_peft_model(model, config)
    converted = copy.deepcopy(plain)
    packlight.convert(converted, {}, head=True)
    expected, true = step(plain, inputs)
    output, found = step(converted, inputs)
    assert is_lazy(output.logits)
    torch.testing.assert_close(output.loss, expected.loss)
    assert worst_error(found, true) < 1e-5
    assert kept(plain, inputs) - kept(converted, inputs) > 0.8 * 4 * 4 * 64 * VOCABULARY


def test_a_lora_of_the_head_is_told():
    model, _ = llama()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(packlight.CannotConvertError, match=r"peft\..*Linear and no torch"):
        packlight.convert(model, GroupQuant(), head=True)


def test_logits_to_keep():
    plain, inputs = llama()
    model = copy.deepcopy(plain)
    packlight.convert(model, {}, head=True)
    ids = inputs["input_ids"]
    results = []
    for one in (plain, model):
        logits = one(input_ids=ids, logits_to_keep=9).logits
        F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), ids[:, -8:].reshape(-1)).backward()
        results.append({name: parameter.grad for name, parameter in one.named_parameters()})
    assert is_lazy(logits)
    assert worst_error(results[1], results[0]) < 1e-5


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning"  # the tracer looks at it
)
def test_checkpointed_and_compiled_blocks_leave_the_head_lazy():
    plain, inputs = llama(num_hidden_layers=2)
    for prepare in (
        lambda model: model.gradient_checkpointing_enable(),
        lambda model: [layer.compile(backend="aot_eager") for layer in model.model.layers],
    ):
        model = copy.deepcopy(plain)
        packlight.convert(model, {}, head=True)
        prepare(model)
        output, found = step(model, inputs)
        assert is_lazy(output.logits)
        assert worst_error(found, step(plain, inputs)[1]) < 1e-5
    torch._dynamo.reset()


def test_a_model_compiled_whole_is_right():
    plain, inputs = llama()
    model = copy.deepcopy(plain)
    packlight.convert(model, {}, head=True)
    model.compile(backend="aot_eager", fullgraph=True)
    output, found = step(model, inputs)
    assert type(output.logits) is torch.Tensor
    assert worst_error(found, step(plain, inputs)[1]) < 1e-5
    torch._dynamo.reset()


# ---- Trainer -------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(4)
        self.ids = torch.randint(3, 128, (24, 16), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def own_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, 128), labels[:, 1:].reshape(-1))


WAYS = {
    "plain": {},
    "smoothing": {"label_smoothing_factor": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "own loss": {"compute_loss_func": own_loss},
    "autocast": {"bf16": True},
}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_trains_as_without(tmp_path, way):
    settings = {
        "output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "max_steps": 3,
        "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True, "seed": 3, "dataloader_pin_memory": False, **WAYS[way],
    }  # fmt: skip
    own = settings.pop("compute_loss_func", None)
    losses, evaluated = [], []
    for callbacks in ([], [PacklightCallback({}, head=True)]):
        trainer = Trainer(
            model=make("llama"), args=TrainingArguments(**settings), train_dataset=Rows(),
            eval_dataset=Rows(), callbacks=callbacks, compute_loss_func=own,
        )  # fmt: skip
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        evaluated.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if way == "autocast" else 1e-5)
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-3)
    assert callbacks[0].conversion.heads == ("lm_head",)
    assert trainer.model.lm_head.training is False
