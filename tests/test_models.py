"""Models by a text: what is made, with which inputs, and what is refused and how."""

import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import packlight
from packlight import InputError, MissingDependencyError
from packlight.cli.models import DTYPES, Inputs, Shape, load_model, parse_inputs, parse_value

# ---- what is asked for ---------------------------------------------------------------------------


def test_inputs():
    assert parse_inputs(["batch=8, sequence=1024"]) == Inputs({"batch": 8, "sequence": 1024})
    assert parse_inputs(["batch=8", "image=64"]) == Inputs({"batch": 8, "image": 64})
    shapes = parse_inputs(["8x3x224x224,8:int64", "2x2:bf16"]).shapes
    assert shapes == (
        Shape((8, 3, 224, 224), None),
        Shape((8,), torch.int64),
        Shape((2, 2), torch.bfloat16),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch=0", "batch=0 is not a positive whole number"),
        ("batch=1.5", "not a positive whole number"),
        ("batch=", "not a positive whole number"),
        ("seq=5", "unknown size 'seq'; expected batch, sequence, image"),
        ("batch=1,batch=2", "batch is given twice"),
        ("8*128", "neither a size"),
        ("", "neither a size"),
        ("8x128:int46", "int46 is no dtype"),
        ("8x128:nn", "nn is no dtype"),
        ("batch=8,8x128", "either sizes"),
    ],
)
def test_wrong_inputs(text, message):
    with pytest.raises(InputError, match=message):
        parse_inputs([text])


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("0.1", 0.1), ("None", None), ("true", True), ("[1, 2]", [1, 2]), ("gelu", "gelu")],
)
def test_values(text, value):
    assert parse_value(text) == value


# ---- Python --------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Writes a module to an otherwise empty current directory and returns its name."""
    monkeypatch.chdir(tmp_path)
    name = f"models_of_{abs(hash(request.node.name))}"

    def write(source: str) -> str:
        Path(f"{name}.py").write_text(
            "import torch\nfrom torch import nn\n" + textwrap.dedent(source)
        )
        return name

    yield write
    sys.modules.pop(name, None)


def test_a_function(module):
    name = module("""
        def make(width=8, dtype=None):
            return nn.Sequential(nn.Linear(width, width), nn.GELU())
    """)
    path = list(sys.path)
    loaded = load_model(f"{name}:make", parse_inputs(["4x16,3:int64"]), config={"width": 16})
    assert sys.path == path
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"meta"}
    assert loaded.parameters == 16 * 17
    assert loaded.dtypes == ("float32",)
    assert loaded.inputs() == {"0": "4x16 float32", "1": "3 int64"}
    half = load_model(f"{name}:make", parse_inputs(["4x8"]), dtype=torch.bfloat16)
    assert half.inputs() == {"0": "4x8 bfloat16"}


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("torch.zeros(2, 4)", {"0": "2x4 bfloat16"}),
        ("(torch.zeros(2, 4),)", {"0": "2x4 bfloat16"}),
        (
            "[torch.zeros(2, 4), torch.zeros((), dtype=torch.int64), 5]",
            {"0": "2x4 bfloat16", "1": "scalar int64"},
        ),
        ("{'input': torch.zeros(2, 4)}", {"input": "2x4 bfloat16"}),
    ],
)
def test_a_function_with_inputs(module, inputs, expected):
    name = module(f"def make():\n    return nn.Linear(4, 4), {inputs}\n")
    assert load_model(f"{name}:make", dtype=torch.bfloat16).inputs() == expected
    with pytest.raises(InputError, match="brings its own inputs"):
        load_model(f"{name}:make", parse_inputs(["batch=2"]))


def test_a_class_and_a_module(module):
    name = module("""
        class Net(nn.Linear):
            def __init__(self, width=4):
                super().__init__(width, width)
        net = Net()
        class Nets:
            small = net
    """)
    for text in (f"{name}:Net", f"{name}:net", f"{name}:Nets.small"):
        loaded = load_model(text, parse_inputs(["2x4"]))
        assert type(loaded.model).__name__ == "Net"
        assert packlight.predict(loaded.model, *loaded.arguments).input_bytes == 2 * 4 * 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def make():\n    return 5", "returned a int; expected an nn.Module, or a pair"),
        ("def make():\n    return 5, torch.zeros(2)", "returned a tuple"),
        ("def make(width):\n    return nn.GELU()", "missing a required argument: 'width'"),
        ("make = 5", "is a int; expected a function or a module"),
        ("def mke():\n    return nn.GELU()", r"has no 'make' \(near: mke\)"),
        ("def make():\n    return nn.GELU()", "has no inputs; give their shapes"),
        ("raise ValueError('a\\nb')", r"importing .* failed: ValueError: a b \(models_of_.*py:3\)"),
        ("import modle_of_none", "importing .* failed: ModuleNotFoundError: No module named"),
        ("def make(:", "importing .* failed: SyntaxError"),
        (
            "def make():\n    x = torch.zeros(1)\n    return nn.Linear(4, int(x.item()) + 4)",
            r"cannot be made on the meta device: .*item\(\).*\(models_of_.*py:5\); what needs",
        ),
    ],
)
def test_a_function_that_is_not_as_expected(module, source, message):
    name = module(source)
    with pytest.raises(InputError, match=message):
        load_model(f"{name}:make")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("roberta", r"unknown model 'roberta' \(near: hf:roberta\); expected hf:TYPE \(such as"),
        ("no_such_module:make", "no module 'no_such_module', neither in this directory nor inst"),
        ("packlight.no_such:make", r"no module 'packlight.no_such'"),
        ("a:b:c", "unknown model"),
        (":", "unknown model"),
        ("", "unknown model"),
    ],
)
def test_unknown_models(text, message):
    with pytest.raises(InputError, match=message):
        load_model(text)


def test_what_only_transformers_has(module):
    name = module("net = nn.Linear(4, 4)")
    with pytest.raises(InputError, match="a task is for models of transformers"):
        load_model(f"{name}:net", task="causal-lm")
    with pytest.raises(InputError, match="nothing to configure"):
        load_model(f"{name}:net", config={"width": 4})


# ---- transformers --------------------------------------------------------------------------------


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="pip install 'transformers>=5'"):
        load_model("hf:bert")


TINY = {"num_hidden_layers": 1}

LANGUAGE = {"input_ids": "2x16 int64"}
LABELLED = {**LANGUAGE, "labels": "2x16 int64"}


@pytest.mark.parametrize(
    ("text", "task", "kind", "inputs"),
    [
        ("hf:bert", None, "BertForMaskedLM", LABELLED),
        ("hf:bert", "causal-lm", "BertLMHeadModel", LABELLED),
        ("hf:roberta", "base", "RobertaModel", LANGUAGE),
        ("hf:roberta", "token-classification", "RobertaForTokenClassification", LABELLED),
        (
            "hf:bert",
            "sequence-classification",
            "BertForSequenceClassification",
            {**LANGUAGE, "labels": "2 int64"},
        ),
        (
            "hf:bert",
            "question-answering",
            "BertForQuestionAnswering",
            {**LANGUAGE, "start_positions": "2 int64", "end_positions": "2 int64"},
        ),
        ("hf:llama", None, "LlamaForCausalLM", LABELLED),
        ("hf:gpt2", None, "GPT2LMHeadModel", LABELLED),
        (
            "hf:t5",
            None,
            "T5ForConditionalGeneration",
            {**LABELLED, "decoder_input_ids": "2x16 int64"},
        ),
        ("hf:opt", None, "OPTForCausalLM", LABELLED),
        ("hf:gemma3_text", None, "Gemma3ForCausalLM", LABELLED),
    ],
)
def test_heads_and_labels(text, task, kind, inputs):
    sizes = parse_inputs(["batch=2,sequence=16"])
    loaded = load_model(text, sizes, task=task, config=TINY)
    assert type(loaded.model).__name__ == kind
    assert loaded.inputs() == inputs
    assert loaded.model.training
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"meta"}
    # The loss is part of the forward pass.
    report = packlight.predict(loaded.model, **loaded.keywords)
    assert report.activation_bytes > 0
    assert ("NllLoss" in str(report.by_operation())) == (task != "base")


def test_pictures():
    loaded = load_model("hf:vit", parse_inputs(["batch=2"]), config=TINY, dtype=torch.float16)
    assert loaded.inputs() == {"pixel_values": "2x3x224x224 float16", "labels": "2 int64"}
    config = {**TINY, "image_size": [32, 64], "num_channels": 1}
    assert load_model("hf:vit", config=config).inputs()["pixel_values"] == "1x1x32x64 float32"
    resnet = load_model("hf:resnet", parse_inputs(["image=96"]), config={"depths": [1, 1, 1, 1]})
    assert resnet.inputs()["pixel_values"] == "1x3x96x96 float32"
    with pytest.raises(InputError, match="has no sequence among its sizes; it has batch and image"):
        load_model("hf:vit", parse_inputs(["sequence=5"]), config=TINY)
    with pytest.raises(InputError, match="has no image among its sizes; it has batch and sequence"):
        load_model("hf:bert", parse_inputs(["image=5"]), config=TINY)


@pytest.mark.parametrize(
    ("text", "longest"),
    [("hf:bert", 512), ("hf:roberta", 510), ("hf:opt", 2048), ("hf:gpt2", 1024)],
)
def test_a_sequence_is_no_longer_than_the_positions(text, longest):
    """As the model itself: it runs with `longest` tokens and fails with one more."""
    loaded = load_model(text, config=TINY)
    assert loaded.inputs()["input_ids"] == f"1x{min(longest, 512)} int64"
    load_model(text, parse_inputs([f"sequence={longest}"]), config=TINY)
    with pytest.raises(InputError, match=f"longer than the {longest} positions of .*--config"):
        load_model(text, parse_inputs([f"sequence={longest + 1}"]), config=TINY)
    import transformers

    config = transformers.AutoConfig.for_model(text.removeprefix("hf:"), **TINY, vocab_size=8)
    real = type(loaded.model)(config)
    real(torch.full((1, longest), 3))
    with pytest.raises((IndexError, RuntimeError)):
        real(torch.full((1, longest + 1), 3))


def test_rotary_positions_have_no_end():
    loaded = load_model("hf:llama", parse_inputs(["sequence=9999"]), config=TINY)
    assert loaded.inputs()["input_ids"] == "1x9999 int64"


def test_a_directory(tmp_path):
    config = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 32, "dtype": "bfloat16"}
    config |= {"num_attention_heads": 2, "architectures": ["BertForTokenClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(tmp_path), config={"hidden_size": 64})
    assert type(loaded.model).__name__ == "BertForTokenClassification"
    assert loaded.task == "token-classification"
    assert loaded.dtypes == ("bfloat16",)
    assert loaded.model.config.hidden_size == 64
    assert load_model(str(tmp_path), dtype=torch.float32).dtypes == ("float32",)
    # A class without a row in our table: the usual head.
    config["architectures"] = ["BertForPreTraining"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(str(tmp_path)).task == "masked-lm"


@pytest.mark.parametrize("model_type", ["bert", "own"])
def test_code_that_comes_with_a_configuration_is_not_run(tmp_path, model_type):
    (tmp_path / "own.py").write_text("raise SystemExit('run')\n")
    config = {
        "model_type": model_type,
        "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    if model_type == "bert":
        assert type(load_model(str(tmp_path), config=TINY).model).__name__ == "BertForMaskedLM"
    else:
        with pytest.raises(InputError, match=r"is refused: ValueError: .*contains custom code"):
            load_model(str(tmp_path))


def test_options_of_the_making():
    loaded = load_model("hf:bert", config={**TINY, "attn_implementation": "eager"})
    assert loaded.model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("text", "keywords", "message"),
    [
        ("hf:lama", {}, r"has no model 'lama'; near: llama, "),
        ("hf:zzzzzzzzzz", {}, "has no model 'zzzzzzzzzz'; there are [0-9]+, such as "),
        ("hf:", {}, "has no model ''"),
        ("hf:bert", {"task": "seq2seq-lm"}, "has no head for seq2seq-lm; it has masked-lm"),
        ("hf:encodec", {"task": "causal-lm"}, "has no head for causal-lm; it has base"),
        ("hf:bert", {"config": {"hiden_size": 3}}, r"has no 'hiden_size' \(near: hidden_size"),
        ("hf:bert", {"config": {"xyzzy": 3}}, "has no 'xyzzy'; it has .*hidden_size"),
        ("hf:bert", {"config": {"hidden_size": "a"}}, "is refused: .*expected int, got str"),
        (
            "hf:bert",
            {"config": {"hidden_size": 100}},
            "cannot be made: ValueError: The hidden size",
        ),
        ("hf:bert", {"inputs": Inputs({}, (Shape((8,), None),))}, "takes sizes"),
        ("hf:wav2vec2", {"config": TINY}, "takes input_values, which cannot be made from sizes"),
        ("hf:nobody/nothing", {}, "the configuration of hf:nobody/nothing is refused: OSError"),
    ],
)
def test_what_transformers_refuses(text, keywords, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message) as caught:
        load_model(text, **keywords)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_configuration(tmp_path):
    with pytest.raises(InputError, match=r"has no config.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is refused"):
        load_model(str(tmp_path))


def test_a_model_of_transformers_from_a_function(module):
    name = module("""
        def make():
            import transformers
            config = transformers.AutoConfig.for_model("gpt2", num_hidden_layers=1)
            return transformers.AutoModelForCausalLM.from_config(config)
    """)
    loaded = load_model(f"{name}:make", parse_inputs(["batch=2,sequence=8"]))
    assert loaded.inputs() == {"input_ids": "2x8 int64"}


def test_dtypes_are_those_of_the_command_line():
    from packlight.cli import command_line, models

    assert tuple(DTYPES) == command_line._DTYPES
    assert tuple(models.TASKS) == command_line._TASKS


# ---- what strangers and slips of the finger may ask for ------------------------------------------


STRANGE = [
    {"_attn_implementation": "someone/kernel"},
    {"attn_implementation": "flash_attention_2"},
    {"_attn_implementation_internal": "paged|someone/kernel"},
    {"text_config": {"model_type": "llama", "_attn_implementation": "someone/kernel"}},
    {"attn_implementation": {"text_config": "someone/kernel", "": "sdpa"}},
    {"layers": [{"inner": {"experts_implementation": "someone/kernel"}}]},
    {"use_kernels": True},
    {"use_timm_backbone": True},
    {"backbone": "resnet50"},
    {"backbone": "someone/backbone", "use_timm_backbone": False},
    {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:someone/net"}},
    {"backbone_config": {"model_type": "timm_backbone", "use_pretrained_backbone": True}},
    {"vision_config": {"model_type": "timm_wrapper", "architecture": "hf_hub:someone/net"}},
    {"num_hidden_layers": 10**7},
    {"num_hidden_layers": 10**30},
    {"text_config": {"vocab_size": -(10**30)}},
]


@pytest.mark.parametrize("entries", STRANGE, ids=str)
def test_a_configuration_of_a_stranger_fetches_nothing(tmp_path, entries):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **entries}))
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path), Inputs({"sequence": 8}))
    assert "\n" not in str(caught.value)
    assert re.search(r"to fetch|too large|beyond 64 bits", str(caught.value))


def test_a_configuration_of_a_stranger_runs_no_code(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    code = {
        "auto_map": {
            "AutoConfig": "evil.C",
            "AutoModel": "evil.M",
            "AutoModelForCausalLM": "evil.M",
        }
    }
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = {"model_type": "llama", **small, "intermediate_size": 8, "vocab_size": 8, **code}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(tmp_path), Inputs({"sequence": 8}))
    assert type(loaded.model).__module__.startswith("transformers.")
    assert not hasattr(loaded.model.config, "auto_map")
    config = {"model_type": "unknown", **code}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="refused"):
        load_model(str(tmp_path), Inputs({"sequence": 8}))


@pytest.mark.parametrize("text", ["[1]", "9" * 5000, "[" * 5000, "{", '"a"'])
def test_a_configuration_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path))
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "batch=" + "9" * 31,
        "batch=" + "9" * 5000,
        "9" * 31 + "x4",
        "sequence=" + "0" * 5000,
        "4x" * 50,
    ],
    ids=lambda text: text[:9],
)
def test_sizes_have_bounds(text):
    with pytest.raises(InputError) as caught:
        parse_inputs([text])
    assert len(str(caught.value)) < 300


def test_inputs_have_bounds():
    inputs = Inputs({"batch": 10**9 - 1, "sequence": 10**9 - 1})
    with pytest.raises(InputError, match="more elements than any memory"):
        load_model("hf:llama", inputs, config={"num_hidden_layers": 1})
    with pytest.raises(InputError, match="num_hidden_layers: 10000000, too large"):
        load_model("hf:llama", config={"num_hidden_layers": 10**7})


@pytest.mark.parametrize("text", ["9" * 5000, "0x" + "f" * 5000, "9" * 25, "[" * 5000])
def test_values_have_bounds(text):
    with pytest.raises(InputError) as caught:
        parse_value(text)
    assert len(str(caught.value)) < 300
