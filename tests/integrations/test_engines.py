"""Adapters of engines: what a line of their configurations says, in engines as pip has them.

Engines of several processes are in `tests/parallel`, torchtitan and Megatron-Core among them;
torchtitan's configuration is in `test_torchtitan.py`.
"""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from accelerate.state import AcceleratorState, GradientState
from axolotl.integrations.base import PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.utils.dict import DictDefault
from trl import TrlParser
from trl.trainer.utils import add_fused_lm_head

import packlight
from packlight import FewBit, GroupQuant
from packlight._torch import saved_tensor_hooks
from packlight.integrations import megatron
from packlight.integrations._options import imported, read_options
from packlight.integrations.accelerate import Accelerator
from packlight.integrations.axolotl import PacklightArgs, PacklightPlugin
from packlight.integrations.transformers import PacklightCallback
from packlight.integrations.trl import PacklightConfig
from tests.integrations.models import batch, make

TEXT = "GroupQuant(8, group_size=32, rounding='nearest'), FewBit(8)"
METHODS = (GroupQuant(8, group_size=32, rounding="nearest"), FewBit(8))

# --- Options.


def test_options_are_arguments(tmp_path):
    path = tmp_path / "methods.toml"
    packlight.save_methods({"Linear": GroupQuant(4)}, path, rest=GroupQuant(8))
    given = {"methods": str(path), "head": "lm_head", "rest": "None", "strict": None}
    found = read_options(given, "engine")
    assert found == {"methods": {"Linear": GroupQuant(4)}, "head": "lm_head", "rest": None}
    assert found["methods"].rest == GroupQuant(8)
    assert read_options(TEXT, "engine") == {"methods": METHODS}
    assert read_options(None, "engine") == {}
    assert read_options({"head": "True", "memory": "0.3"}, "engine") == {
        "head": True,
        "memory": 0.3,
    }
    assert read_options({"memory": "22GiB"}, "engine") == {"memory": "22GiB"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"metods": TEXT}, r"engine: packlight has no option 'metods' \(near: methods\)"),
        ({"methods": "GroupQant(4)"}, r"engine: option methods .*near: GroupQuant"),
        ({"methods": "no/such.toml"}, r"engine: option methods .*no/such.toml cannot be read"),
        ({"methods": 4}, r"engine: option methods=4 .*expected a text"),
        ({"rest": "FewBit(3)"}, r"engine: option rest .*is no quantiser"),
        ({"strict": "no"}, r"engine: option strict='no' .*expected true or false"),
        ({"head": 1}, r"engine: option head=1 .*expected true or false or a text"),
        (4, r"engine: the options of packlight are 4; expected a mapping"),
    ],
)
def test_a_wrong_option_is_named(given, said):
    with pytest.raises(packlight.InputError, match=said):
        read_options(given, "engine")


def test_a_plan_needs_a_batch():
    said = r"no option memory here, as engine converts a model before .*plan\.save\('plan\.toml'\)"
    with pytest.raises(packlight.InputError, match=said):
        read_options({"memory": 0.3}, "engine", trains=False)


def test_megatron_names_a_wrong_option():
    with pytest.raises(packlight.InputError, match="no option head here: megatron has losses"):
        megatron.converted(None, head=True)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.transformer.spec_utils", None)
    said = r"packlight\.integrations\.megatron needs megatron\.core.*install megatron"
    with pytest.raises(packlight.MissingDependencyError, match=said):
        megatron.converted(None)
    with pytest.raises(packlight.MissingDependencyError, match="install axolotl"):
        imported("axolotl.integrations.of_a_newer_release")


# --- TRL.


def test_options_in_a_file_and_on_the_command_line_of_trl(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("packlight_methods: GroupQuant(4)\npacklight_head: true\n")

    def parse(arguments):
        return TrlParser(PacklightConfig).parse_args_and_config(arguments)

    (options,) = parse(["--config", str(path), "--packlight_memory", "0.5"])
    (callback,) = options.callbacks()
    assert isinstance(callback, PacklightCallback)
    assert (callback.methods, callback.head, callback.memory) == (GroupQuant(4), True, 0.5)
    (callback,) = parse([])[0].callbacks()
    assert callback.methods == packlight.DEFAULT_METHODS
    assert parse(["--packlight_methods", "off"])[0].callbacks() == []
    path.write_text("packlight_methods: off\n")  # a boolean, to YAML
    assert parse(["--config", str(path)])[0].callbacks() == []
    with pytest.raises(packlight.InputError, match="trl: option rest of packlight"):
        parse(["--packlight_rest", "FewBit(3)"])


def test_the_loss_of_trl_is_left_alone():
    """`SFTTrainer` computes it from the head's weight, as `head=True` finds it and leaves it."""
    inputs = batch("llama")
    plain = make("llama")
    models = [plain, copy.deepcopy(plain)]
    found = []
    for model in models:
        add_fused_lm_head(model)
        if model is not plain:
            assert packlight.convert(model, {}, head=True).heads == ("lm_head",)
        output = model(**inputs, fused_lm_head=True)
        (-output.log_probs.sum()).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append([output.log_probs.detach(), *gradients])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


# --- Trainers of transformers, through Axolotl and TRL.


def trained(folder, callbacks):
    """Losses of a tiny Llama, the model, and its weights after a few steps."""
    model = make("llama")
    rows = [{name: rows[i] for name, rows in batch("llama").items()} for i in range(4)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=3, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
        disable_tqdm=True, dataloader_pin_memory=False, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], model


def test_a_trainer_of_axolotl_trains_as_one_with_the_callback(tmp_path):
    plugins = PluginManager.get_instance()
    name = "packlight.integrations.axolotl.PacklightPlugin"
    written = {"plugins": [name], "packlight": {"methods": TEXT}, "lora_qkv_kernel": True}
    plugins.register(name)
    try:
        cfg = DictDefault(written)
        plugins.plugins[name].register(cfg)
        assert (cfg.lora_mlp_kernel, cfg.lora_qkv_kernel) == (False, True)
        _, schema = merge_input_args()
        assert "packlight" in schema.model_fields
        (callback,) = plugins.add_callbacks_pre_trainer(cfg, None)
    finally:
        del plugins.plugins[name]
    direct = PacklightCallback(METHODS)
    losses, model = trained(tmp_path, [callback])
    expected, other = trained(tmp_path, [direct])
    assert losses == expected
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    exact, plain = trained(tmp_path, [])
    assert losses == pytest.approx(exact, rel=1e-3)
    assert callback.kept_bytes == direct.kept_bytes
    measured = packlight.profile(plain, **batch("llama")).activation_bytes
    assert 0 < callback.kept_bytes < 0.5 * measured


def test_the_file_in_the_docs_is_one_of_axolotl():
    page = Path(__file__).parents[2] / "docs" / "engines.md"
    (block,) = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    written = yaml.safe_load(block)
    assert written["plugins"] == [f"{PacklightPlugin.__module__}.{PacklightPlugin.__name__}"]
    (callback,) = PacklightPlugin().add_callbacks_pre_trainer(written, None)
    assert callback.methods == (GroupQuant(4), FewBit(3))
    assert callback.head is True


def test_axolotl_names_a_wrong_option():
    with pytest.raises(ValueError, match="axolotl: packlight has no option 'metods'"):
        PacklightArgs(packlight={"metods": TEXT})
    with pytest.raises(packlight.InputError, match="axolotl: option methods of packlight"):
        PacklightPlugin().add_callbacks_pre_trainer({"packlight": {"methods": "Few(3)"}}, None)


# --- accelerate.


@pytest.fixture
def accelerators():
    """Makes an `Accelerator` of packlight's."""
    made = []

    def make_one(**options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        made.append(Accelerator(cpu=True, **options))
        return made[-1]

    yield make_one
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def steps(accelerator, model, optimizer, count):
    inputs = batch("llama")
    for _ in range(count):
        accelerator.backward(model(**inputs).loss)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_accelerator_converts_and_says_so(accelerators, capsys):
    accelerator = accelerators(packlight={"methods": TEXT, "head": True})
    model, other = make("llama"), make("llama")
    plain = packlight.profile(model, **batch("llama")).activation_bytes
    packlight.convert(other, METHODS, head=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    found = steps(accelerator, model, optimizer, 2)
    direct = torch.optim.SGD(other.parameters(), lr=0.1)
    assert torch.equal(found, steps(accelerators(packlight=None), other, direct, 2))
    assert 0 < accelerator.packlight.kept_bytes < 0.5 * plain
    assert capsys.readouterr().out.count("packlight: a step keeps") == 1


@pytest.mark.parametrize("option", [{"device": "H200"}, {"batch": torch.zeros(1)}])
def test_what_is_of_a_plan_needs_memory(accelerators, option):
    with pytest.raises(packlight.InputError, match="give memory= as well"):
        accelerators(packlight=option)


def test_hooks_of_a_measurement_are_on_within_the_first_training_pass_alone(accelerators):
    """A loop may evaluate first, or never call `accelerator.backward`."""
    accelerator = accelerators(packlight={"methods": TEXT, "report": False})
    model = accelerator.prepare(make("llama"))
    inputs, seen = batch("llama"), []
    model.model.norm.register_forward_pre_hook(lambda *_: seen.append(saved_tensor_hooks()))
    assert saved_tensor_hooks() is None
    model.eval()(**inputs)
    with pytest.raises(ValueError, match="exactly one"):
        model.train()(no_such="input")
    assert saved_tensor_hooks() is None
    model(**inputs).loss.backward()
    model(**inputs).loss.backward()
    assert saved_tensor_hooks() is None
    assert [hooks is not None for hooks in seen] == [False, True, False]
    assert accelerator.packlight.kept_bytes > 0


@pytest.mark.parametrize("rest", [None, "GroupQuant(4)"])
def test_a_saved_state_goes_on_with_the_stream_of_rounding(accelerators, rest, tmp_path):
    options = {"report": False} if rest is None else {"report": False, "rest": rest}

    def trained(first, then, load=False):
        accelerator = accelerators(packlight={"methods": "GroupQuant(2)", **options})
        packlight.manual_seed(11)
        model = make("llama", attention_dropout=0.1)
        made = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        if load:
            accelerator.load_state(tmp_path)
        else:
            steps(accelerator, *made, first)
            accelerator.save_state(tmp_path)
        return steps(accelerator, *made, then)

    whole = trained(2, 2)
    assert torch.equal(trained(0, 2, load=True), whole)
    (tmp_path / "packlight_rounding_0.json").unlink()  # as of a training without packlight
    assert not torch.equal(trained(0, 2, load=True), whole)


def test_an_accelerator_plans_for_the_rows_of_its_first_loader(accelerators):
    rows = [{name: rows[i] for name, rows in batch("llama").items()} for i in range(4)]
    training, evaluation = (torch.utils.data.DataLoader(rows, batch_size=n) for n in (2, 4))
    peaks = []
    for loaders in ([training], [training, evaluation], [evaluation]):
        accelerator = accelerators(packlight={"memory": 0.5, "device": "H200", "report": False})
        model = make("llama")
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()), *loaders)
        assert isinstance(accelerator.packlight.plan, packlight.Plan)
        peaks.append(accelerator.packlight.plan.peak_bytes)
    assert peaks[0] == peaks[1] < peaks[2]
    with pytest.raises(packlight.InputError, match=r"memory=0\.5 needs a batch"):
        accelerators(packlight={"memory": 0.5}).prepare(make("llama"))


def test_a_model_that_is_prepared_by_itself_is_converted_unless_it_is_not_trained(accelerators):
    accelerator = accelerators(packlight="GroupQuant(4)")
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    accelerator.prepare_model(model, evaluation_mode=True)
    assert type(model[0]) is torch.nn.Linear
    accelerator.prepare_model(model)
    assert type(model[0]) is not torch.nn.Linear
    converted = accelerator.packlight.conversion
    accelerator.prepare_model(model)
    assert accelerator.packlight.conversion is converted


@pytest.mark.parametrize("name", ["metods", "memories"])
def test_an_accelerator_names_a_wrong_option(accelerators, name):
    with pytest.raises(packlight.InputError, match=f"accelerate: packlight has no option '{name}'"):
        accelerators(packlight={name: TEXT})
