"""The benchmarks' harness, on models that are small: rows, resuming, failures, and the picture."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import packlight

if not (Path(__file__).parents[1] / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)

from benchmarks import kernel_suite, plans, plot, rows, run, scale, step, table, train_suite
from benchmarks.user import __main__ as user
from benchmarks.user import runner, show, worker
from tests.resnets import preactivation_resnet

ROW = {
    "device": "a device",
    "torch": "2.11",
    "triton": None,
    "python": "3.12",
    "commit": "abc",
}


def measure(tmp_path, *words, suite="step"):
    run.main(
        ["--suite", suite, "--device", "cpu", "--out", str(tmp_path), "--commit", "abc", *words]
    )
    return [row for path in tmp_path.glob("*.jsonl") for row in rows.read(path)]


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice", ["checkpoint", "packlight 4", "packlight 4 + checkpoint", "packlight checkpoint"]
)
def test_a_choice_is_checked_and_measured(tmp_path, choice, monkeypatch, capsys):
    monkeypatch.setattr(step, "CHOICES", {key: step.CHOICES[key] for key in ("eager", choice)})
    eager, row = measure(tmp_path, "--filter", "tiny/")
    assert (eager["choice"], row["choice"], row["model"]) == ("eager", choice, "tiny")
    assert row["step_ms"] > 0
    assert row["profile_bytes"] < eager["profile_bytes"] / 2
    assert row["error_median"] <= row["error_worst"]
    assert row["commit"] == "abc"
    assert "less" in capsys.readouterr().out


def test_what_is_measured_already_is_skipped(tmp_path):
    words = ("--filter", "tiny/eager", "tiny/save")
    first = measure(tmp_path, *words)
    assert measure(tmp_path, *words) == first
    assert len(measure(tmp_path, "--commit", "def", *words)) == 2 * len(first) == 4


def test_a_failure_is_a_row_and_is_tried_again_only_if_asked(tmp_path, monkeypatch, capsys):
    def fail(model):
        raise ValueError("no room\nmore")

    monkeypatch.setitem(step.CHOICES, "checkpoint", step.Choice(fail))
    words = ("--filter", "tiny/eager", "tiny/checkpoint")
    monkeypatch.setattr(step, "CHOICES", dict(step.CHOICES))
    eager, failed = measure(tmp_path, *words)
    assert failed["failed"] == "ValueError: no room"
    assert {"model", "choice", "device", "commit", "torch"} <= failed.keys()
    assert "no room" in capsys.readouterr().out
    assert measure(tmp_path, *words) == [eager, failed]
    monkeypatch.setitem(step.CHOICES, "checkpoint", step.Choice(step.checkpointed))
    assert "failed" not in measure(tmp_path, "--retry", *words)[-1]


def test_nothing_wrong_is_timed(tmp_path, monkeypatch):
    def scale(model):
        for parameter in model.parameters():
            parameter.data *= 1.5

    promises_too_much = step.CHOICES["packlight 4"]._replace(limit=0.001)
    choices = {"eager": step.Choice(), "scaled": step.Choice(scale), "packed": promises_too_much}
    monkeypatch.setattr(step, "CHOICES", choices)
    scaled, packed = measure(tmp_path, "--filter", "tiny/scaled", "tiny/packed")
    assert scaled["failed"].startswith("IncorrectError: the output is off by")
    assert packed["failed"].startswith("IncorrectError: gradients are off by")
    assert "step_ms" not in scaled | packed


def test_a_budget_stops_before_what_would_not_fit(tmp_path, capsys):
    rows.append(
        tmp_path / step.OUT,
        {"model": "tiny", "choice": "eager", "seconds": 50, **rows.settings("cpu", "older")},
    )
    assert len(measure(tmp_path, "--filter", "tiny/eager", "--budget", "40")) == 1
    assert "about 50 s" in capsys.readouterr().out
    assert len(measure(tmp_path, "--filter", "tiny/eager", "--budget", "70")) == 2


def test_models_are_measured_in_processes_side_by_side(tmp_path, capfd):
    words = ("--filter", "tiny/eager", "tiny-gpt2/eager", "tiny/checkpoint", "--processes", "2")
    found = measure(tmp_path, *words)
    assert {(row["model"], row["choice"]) for row in found} == {
        ("tiny", "eager"),
        ("tiny", "checkpoint"),
        ("tiny-gpt2", "eager"),
    }
    assert all("failed" not in row for row in found)
    assert "3 of 3 cases" in capfd.readouterr().out
    assert measure(tmp_path, *words) == found


def test_what_is_missing_is_what_no_commit_has(tmp_path):
    before = measure(tmp_path, "--filter", "tiny/eager")
    assert measure(tmp_path, "--filter", "tiny/eager", "--missing", "--commit", "def") == before
    assert len(measure(tmp_path, "--filter", "tiny/eager", "--commit", "def")) == 2


@given(st.integers(0, 3000), st.integers(1, 500))
def test_the_largest_batch_is_found_within_a_share(limit, start):
    found = step.largest(lambda size: size <= limit, start)
    assert found <= limit <= found + max(1, found / 32)


def test_the_default_is_the_choice_at_4_bits_where_there_is_no_batch_norm():
    def converted(choice):
        model = step.TINY["tiny"].make()
        step.CHOICES[choice].prepare(model)
        return [(name, type(module)) for name, module in model.named_modules()]

    assert converted("packlight default") == converted("packlight 4")
    assert not step.applies(step.TINY["tiny"].make(), "packlight default")
    assert step.applies(step.TINY["tiny-resnet50"].make(), "packlight default")


def test_filters():
    cases = [rows.Case(name, "", {}, dict, 1) for name in ("a/eager", "a/eager 2", "b/eager")]
    cases.append(rows.Case("tiny/eager", "", {}, dict, 1, hidden=True))

    def names(*filters):
        return [case.name for case in run.chosen(cases, list(filters))]

    assert names() == ["a/eager", "a/eager 2", "b/eager"]
    assert names("*/eager") == ["a/eager", "b/eager"]
    assert names("eager 2", "b/") == ["a/eager 2", "b/eager"]
    assert names("tiny/") == ["tiny/eager"]


@pytest.mark.parametrize("name", step.MODELS)
def test_models_have_the_shapes_that_they_say(name):
    case = step.MODELS[name]
    with torch.device("meta"):
        model, x = case.make(), torch.empty(1, *case.shape[1:])
        y = model(x)
    assert y.shape == (x.shape if x.dim() == 3 else (1, 2048, 7, 7))
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    # Those of the papers without embeddings and heads, rotary embeddings have none.
    expected = {"roberta": 85, "llama": 969, "vit": 85, "resnet50": 23.5, "gpt2-medium": 302}
    assert parameters == pytest.approx(expected[name.removesuffix("-fp32")], rel=0.01)


# ---- kernels -------------------------------------------------------------------------------------


def test_a_kernel_that_got_slower_is_printed_in_red(tmp_path, capsys):
    words = ("--filter", "groupquant/pack nearest bf16 4 bits", "--log2-elements", "12")
    (row,) = measure(tmp_path, *words, suite="kernels")
    assert "\033[31m" not in capsys.readouterr().out
    path = tmp_path / "groupquant.jsonl"
    path.write_text(json.dumps({**row, "pack_ms": row["pack_ms"] / 1e3, "unpack_ms": 1e9}) + "\n")
    measure(tmp_path, *words, "--commit", "def", suite="kernels")
    out = capsys.readouterr().out
    assert "\033[31m pack_ms" in out
    assert "unpack_ms" not in out


def test_what_counts_as_slower():
    before = {**ROW, "forward_ms": 1.0, "forward_torch_ms": 1.0, "copy_ms": 1.0, "both_ms": 2.0}
    row = {**before, "forward_ms": 1.2, "forward_torch_ms": 3.0, "copy_ms": 3.0, "both_ms": 2.1}
    assert run.slowdowns(row, before) == {"forward_ms": 1.2}
    assert run.slowdowns(row, None) == run.slowdowns({**row, "device": "another"}, before) == {}


def test_every_row_of_a_kernel_belongs_to_one_case():
    words = "--suite kernels --device cuda --log2-elements 20 24 28"
    cases = kernel_suite.cases(run.arguments(words.split()))
    assert len({case.name for case in cases}) == len(cases)
    for out in {case.out for case in cases}:
        for row in rows.read(rows.RESULTS / out):
            found = [case for case in cases if case.out == out and rows.same_case(row, case)]
            assert len(found) == 1, row


# ---- training ------------------------------------------------------------------------------------


def test_training_rows_are_set_beside_exact_ones_of_the_same_seeds():
    found = [
        {**ROW, "case": "gpt", "method": method, "seed": seed, "loss": [9, loss], "kept_bytes": 1}
        for method, losses in (("exact", (1.0, 2.0)), ("other", (1.1, 2.2)))
        for seed, loss in enumerate(losses)
    ]
    text = train_suite.line(found[-1], found)
    assert "validation loss 2.2000" in text
    assert "2 seeds 1.6500" in text
    assert "to exact +0.1500 (paired t-test, p = 0.20)" in text


def test_a_gpt_trains_by_a_method(tmp_path, monkeypatch):
    sizes = {"steps": 3, "layers": 1, "width": 16, "heads": 1, "context": 8, "batch": 2}
    monkeypatch.setitem(train_suite.gpt.SIZES, "cpu", sizes)
    text = torch.randint(256, (400,), dtype=torch.uint8)
    monkeypatch.setattr(train_suite.gpt, "text", lambda: packlight.cli.demo.Text(text, text))
    (row,) = measure(tmp_path, "--filter", "gpt/default/0", suite="train")
    assert len(row["loss"]) == len(row["loss_steps"]) == 4


@pytest.mark.parametrize(
    ("script", "line", "message"),
    [
        ("cifar", "", "arguments are required: source, target"),
        ("cifar", "nowhere out.npz", "nowhere holds no train-*.parquet"),
        ("glue", "", "--repack --speed --monitor --model --roberta is required"),
        ("glue", "--speed", "--data says where"),
        ("glue", "--speed --roberta", "not allowed with"),
        ("glue", "--speed --data nowhere", "nowhere is not what --repack writes"),
        ("glue", "--speed --data nowhere.npz", "nowhere.npz"),
        ("glue", "--roberta --methods what", "'what'"),
    ],
)
def test_wrong_arguments_are_one_line(script, line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        getattr(train_suite, script).main(line.split())
    assert end.value.code == 2
    (text,) = capsys.readouterr().err.splitlines()
    assert message in text


@pytest.mark.parametrize("name", train_suite.cifar.RUNS)
def test_networks_of_cifar_are_converted(name):
    for method in train_suite.cifar.RUNS[name]:
        model = train_suite.cifar.network(name, method)
        kinds = {type(module).__module__.split(".")[0] for module in model.modules()}
        assert ("packlight" in kinds) == (method != "exact")
    assert isinstance(model, nn.Module)


@pytest.mark.filterwarnings("ignore")  # of other packages; a user sees them too
def test_a_roberta_of_a_directory_is_fine_tuned(tmp_path, capsys):
    """As `--model roberta-base` does where the hub can be reached."""
    import pyarrow
    import pyarrow.parquet
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *ByteLevel.alphabet()]
    vocabulary = {word: number for number, word in enumerate(words)}
    model, data = tmp_path / "model", tmp_path / "data"
    data.mkdir()
    RobertaTokenizerFast(vocab=vocabulary, merges=[]).save_pretrained(model)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"vocab_size": len(words), "intermediate_size": 64, "max_position_embeddings": 140}
    plain = RobertaModel(RobertaConfig(**shape, type_vocab_size=1))
    plain.save_pretrained(model)
    for split, count in (("train", 32), ("dev", 8)):
        rows_of = {"sentence": ["a sentence"] * count, "label": [i % 2 for i in range(count)]}
        pyarrow.parquet.write_table(pyarrow.table(rows_of), data / f"cola-{split}.parquet")
    glue = train_suite.glue
    loaded = glue.Store(glue.tokenised(data, str(model), ["cola"])).model(0)
    for name, weight in plain.encoder.state_dict().items():
        assert torch.equal(loaded.roberta.encoder.state_dict()[name], weight)
    options = ["--tasks", "cola", "--seeds", "5", "--methods", "exact", "gelu3", "--commit", "abc"]
    out = tmp_path / "rows.jsonl"
    glue.main(["--model", str(model), "--data", str(data), *options, "--out", str(out)])
    found = rows.read(out)
    assert [row["method"] for row in found] == ["exact", "gelu3"]
    assert found[1]["kept_bytes"] < found[0]["kept_bytes"]
    assert {row["model"] for row in found} == {str(model)}
    assert "cola, gelu3, seed 5" in capsys.readouterr().out


def test_what_repack_writes_has_the_words_that_occur_and_weights_in_bfloat16():
    glue = train_suite.glue
    weight = torch.randn(9, 4)
    ids = {"cola/train/ids": np.array([5, 8, 3]), "cola/dev/ids": np.array([8, 5])}
    given = {"config": np.array('{"vocab_size": 9}'), glue._WORDS: weight.numpy(), **ids}
    arrays = glue.with_words_that_occur(given)
    assert arrays["cola/train/ids"].tolist() == [2, 3, 1]
    assert arrays["cola/dev/ids"].tolist() == [3, 2]
    assert json.loads(str(arrays["config"])) == {"vocab_size": 4}
    kept = torch.from_numpy(glue.from_bytes(glue.in_bytes(arrays[glue._WORDS])))
    assert torch.equal(kept, weight[[0, 3, 5, 8]].bfloat16().float())


def test_the_network_of_the_paper_on_approximate_activations():
    """164 layers and 1.7 million parameters, as published; at 4 bits codes are most of what is
    kept, and the first and the last layer are exact."""
    whole = preactivation_resnet(18)
    weighted = [m for m in whole.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == 164
    assert sum(p.numel() for p in whole.parameters()) == pytest.approx(1.7e6, rel=0.03)
    images = torch.randn(8, 3, 32, 32)
    exact, coded = (train_suite.cifar.network("preact29", name) for name in ("exact", "fixed4"))
    assert type(coded[0]) is nn.Conv2d
    assert type(coded[-1]) is nn.Linear
    coded.load_state_dict(exact.state_dict())
    torch.testing.assert_close(coded(images), exact(images))

    before, after = (packlight.predict(model, images) for model in (exact, coded))
    assert before.activation_bytes / after.activation_bytes > 14


# ---- a user's step -------------------------------------------------------------------------------

FIELDS = {
    *("device", "torch", "triton", "python", "commit", "versions", "unit", "batch", "length"),
    *("loss", "grad_norm", "grad_norms", "warm_s", "first_loss", "last_loss", "ms", "host_ms"),
    *("static_gib", "kept_gib", "peak_gib", "reserved_gib", "per_s", "gpu_ms", "kernels"),
    "python_calls",
}


@pytest.mark.filterwarnings("ignore")  # of other packages; a user sees them too
@pytest.mark.parametrize("scenario", ["roberta-32", "lora8b-4k"])
def test_a_user_s_step_is_measured_and_checked(scenario):
    found = []
    for choice in ("eager", "checkpoint", "default"):
        job = worker.Job(scenario, choice, "cpu", tiny=True, steps=1, commit="abc")
        row = {"scenario": scenario, "choice": choice}
        for part in worker.measure(job, turn=list):
            row |= part
        found.append(row)
        assert row.keys() >= FIELDS
        assert (row["commit"], row["grads_missing"], row["unit"]) == ("abc", 0, "tokens")
        assert runner.check(row, found) == "passed"
    eager, checkpoint, default = found
    assert eager["python_calls"] < checkpoint["python_calls"] < default["python_calls"]
    assert eager["grad_norms"] != default["grad_norms"]  # it was converted
    doubled = [2 * norm if i == 3 else norm for i, norm in enumerate(default["grad_norms"])]
    for wrong in ({"loss": 1.1 * eager["loss"]}, {"grad_norms": doubled}, {"grads_missing": 1}):
        assert runner.check(default | wrong, found).startswith("failed")
    assert runner.check(default, [default]) == "no eager row"


@pytest.mark.filterwarnings("ignore")  # of other packages; a user sees them too
def test_a_long_step_is_compared_with_the_plain_model_s_in_its_process(capsys):
    found = {}
    for choice in ("checkpoint", "attention4"):
        job = worker.Job("lora8b-32k", choice, "cpu", tiny=True, steps=2, mode="once")
        row = {"scenario": "lora8b-32k", "choice": choice, "mode": "once"}
        for part in worker.measure(job, turn=list):
            row |= part
        assert (row["length"], row["compared"], row["steps"]) == (32, 32, 1)
        assert runner.check(row, []) == "passed"
        found[choice] = row
    exact, packed = found["checkpoint"], found["attention4"]
    assert exact["gradient_error"] < 1e-3 < packed["gradient_error"] < 0.2
    assert exact["eager"] == packed["eager"]
    assert packed["grad_norms"] != packed["eager"]["grad_norms"]
    wrong = {"loss": 1.1 * exact["loss"]}, {"gradient_error": 0.6}, {"grads_missing": 1}
    for one in (*wrong, {"grad_norms": [1.4 * norm for norm in exact["grad_norms"]]}):
        assert runner.check(exact | one, []).startswith("failed")


def test_a_choice_has_a_process_and_what_fails_is_a_row(tmp_path, capfd):
    out = tmp_path / "user.jsonl"
    words = f"run --tiny --device cpu --scenarios llama1b --choices eager,liger --out {out}"
    user.main([*words.split(), "--processes", "2", "--steps", "1", "--commit", "abc"])
    found = {row["choice"]: row for row in rows.read(out)}
    assert found["eager"]["check"] == "passed"
    assert found["eager"].keys() >= FIELDS
    assert ": " in found["liger"]["error"]  # Liger-Kernel is not here, or its kernels need a GPU
    user.main([*words.split(), "--missing"])
    assert len(rows.read(out)) == 2
    assert "Error" in capfd.readouterr().err


# What a worker says, without what it measures; what it does meanwhile is told to a file.
FAKE = """
import json, pathlib, sys, threading, time
job = json.loads(sys.argv[1])
say = lambda message: print(json.dumps(message), flush=True)
state = lambda name: say({"state": name, "at": time.monotonic()})
def work():
    with (FOLDER / job["choice"]).open("w") as file:
        while True:
            print(time.monotonic(), file=file, flush=True)
            time.sleep(0.002)
threading.Thread(target=work, daemon=True).start()
state("ready")
if job["choice"] == "liger+packed":
    sys.exit("ended unasked")
sys.stdin.readline()
time.sleep(0.05)
state("warm")
stops = json.loads(sys.stdin.readline())
seen = FOLDER / ("seen-" + job["choice"])
if job["choice"] == "checkpoint" and not seen.exists():
    seen.touch()
    say({"row": {"error": "OutOfMemoryError: CUDA out of memory"}})
elif job["choice"] == "liger":
    print("what went wrong", file=sys.stderr)
    sys.exit(3)
elif job["choice"] == "compile":
    time.sleep(60)
else:
    begin = time.monotonic()
    time.sleep(0.2)
    say({"row": {"ms": 1, "from": begin, "until": time.monotonic(), "stops": stops}})
"""


def test_processes_take_turns_and_all_others_are_stopped(tmp_path, monkeypatch):
    fake = FAKE.replace("FOLDER", f"pathlib.Path({str(tmp_path)!r})")
    monkeypatch.setattr(runner, "COMMAND", [runner.sys.executable, "-c", fake])
    choices = ["default", "eager", "checkpoint", "liger", "compile", "liger+packed"]
    jobs = runner.jobs(["llama1b"], choices, runner.Job("", "", "cuda"))
    found = {}
    turns = runner.Turns(jobs, 6, 100.0, 4.0, str(tmp_path))
    assert turns.run(60, lambda job, row: found.update({job.choice: row})) == []
    assert found["liger"]["error"] == "ended with 3: what went wrong"
    assert found["liger+packed"]["error"] == "ended with 1: ended unasked"
    assert found["compile"]["error"].startswith("TimeoutError: more than 4 s")
    measured = {choice: found[choice] for choice in ("eager", "default", "checkpoint")}
    assert found["eager"]["until"] < found["default"]["from"]
    assert "ms" in found["checkpoint"]  # which had no room beside others, and had alone
    for choice, row in measured.items():
        for other in measured.keys() - {choice}:
            ticks = map(float, (tmp_path / other).read_text().split())
            assert not [tick for tick in ticks if row["from"] < tick < row["until"]]


def test_eager_has_its_room_where_it_is_ready_last(tmp_path, monkeypatch):
    """Others wait for its turn, so it must not wait for theirs."""
    fake = FAKE.replace("FOLDER", f"pathlib.Path({str(tmp_path)!r})")
    slow = fake.replace(
        'state("ready")', 'time.sleep(0.8 * (job["choice"] == "eager"))\nstate("ready")'
    )
    monkeypatch.setattr(runner, "COMMAND", [runner.sys.executable, "-c", slow])
    jobs = runner.jobs(["llama1b"], ["eager", "default"], runner.Job("", "", "cuda"))
    found = []
    turns = runner.Turns(jobs, 2, 30.0, 20.0, str(tmp_path))  # room for one of 28 GiB
    assert turns.run(15, lambda job, row: found.append(job.choice)) == []
    assert found == ["eager", "default"]


def test_jobs_that_there_was_no_time_for_are_returned(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "COMMAND", [runner.sys.executable, "-c", "input()"])
    jobs = runner.jobs(["llama1b"], ["eager", "default"], runner.Job("", "", "cuda"))
    assert runner.Turns(jobs, 1, 100.0, 60.0, str(tmp_path)).run(0.1, print) == jobs


@pytest.mark.parametrize("bend", [0.0, 3e-9], ids=["linear", "more than linear"])
def test_the_longest_sequence_fits(monkeypatch, bend):
    """Of a model whose peak is 16 GiB and so much a token, by an allocator with a limit."""
    limits, taken = [float("inf")], []

    class Trained:
        def __init__(self, scenario, choice, size, device):
            self.optimizer = torch.optim.SGD([torch.zeros(1)])

        def see(self, size):
            self.size = size

        def step(self):
            assert self.size.batch == 1
            tokens = self.size.length
            taken.append(int((16 + 0.002 * tokens + bend * tokens**2) * worker.GIB))
            if taken[-1] > limits[-1] * 140 * worker.GIB:
                raise torch.OutOfMemoryError

    cuda = {
        "get_device_properties": lambda _: argparse.Namespace(total_memory=140 * worker.GIB),
        "set_per_process_memory_fraction": limits.append,
        "max_memory_allocated": lambda: taken[-1],
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(worker, "Trained", Trained)
    job = worker.Job("llama1b", "eager", "cpu", mode="longest", limit=80.0)
    (row,) = worker.extreme(job, turn=list)
    truth = max(n for n in range(0, 40000, 256) if 16 + 0.002 * n + bend * n * n <= 80)
    assert 0.95 * truth <= row["length"] <= truth
    assert row["length"] % 256 == 0
    assert limits[-1] == 80 / 140
    assert row["peak_gib"] <= 80
    with pytest.raises(torch.OutOfMemoryError, match="no length fits into 10 GiB"):
        [*worker.extreme(job._replace(limit=10.0), turn=list)]


def test_jobs_that_mean_something():
    def names(scenario, mode):
        job = runner.Job("", "", "cuda", mode=mode, limit=24.0)
        return {job.choice for job in runner.jobs([scenario], list(runner.CHOICES), job)}

    assert "default+head" in names("gpt2m", "step") - names("vitb", "step")
    assert "liger" in names("llama1b", "longest")
    assert "compile" not in names("llama1b", "longest")
    assert names("vitb", "longest") == names("lora8b-4k", "largest") == set()
    with pytest.raises(SystemExit, match="what: not one of eager"):
        runner.order("eager,what", runner.CHOICES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_table_and_the_pictures_of_a_user_s_step(tmp_path, capsys):
    def row(choice, ms, peak, **more):
        same = {"mode": "step", "loss": 1, "grad_norms": [1, 1], "grads_missing": 0}
        same |= {"scenario": "vitb", "dropout_in_check": False, "choice": choice}
        return {**ROW, **same, "ms": ms, "peak_gib": peak, **more}

    found = [
        row("eager", 99.0, 12.0),
        row("checkpoint", 140.4, 2.5),
        row("default", 90.0, 2.0, grad_norms=[1, 2]),  # wrong
        row("default", 144.0, 3.0),
        row("compile", 70.0, 1.0) | {"device": "another"},
        {**ROW, "scenario": "vitb", "mode": "step", "choice": "packed", "error": "no"},
        {**ROW, "scenario": "vitb", "mode": "step", "choice": "budget", "error": "out of memory"},
        row("packed", 9.0, 9.0, mode="largest", batch=77, limit_gib=24.0, unit="images", per_s=5.4),
    ]
    for one in found:
        rows.append(tmp_path / "user.jsonl", one)
    user.main(["table", "--results", str(tmp_path / "user.jsonl")])
    assert capsys.readouterr().out.splitlines() == [
        "| | eager | checkpoint | packlight default | compile, budget 0.5 |",
        "| --- | --- | --- | --- | --- |",
        "| ViT-B/16, 128 images | **99.0 / 12.0** | **140 / 2.50** | 144 / 3.00 | out of memory |",
        "",
        "| | packlight checkpoint |",
        "| --- | --- |",
        "| ViT-B/16: largest batch in 24 GiB | 77 (5 images/s) |",
    ]
    user.main(["plot", "--results", str(tmp_path / "user.jsonl"), "--out", str(tmp_path)])
    assert (tmp_path / "user-vitb.png").read_bytes().startswith(b"\x89PNG")
    assert show.steps([]).count("\n") == 1


# ---- the picture ---------------------------------------------------------------------------------

_numbers = st.integers(1, 6)


@given(st.lists(st.tuples(_numbers, _numbers), max_size=12))
def test_the_front_is_what_no_point_beats(pairs):
    points = [plot.Point(str(i), memory, speed) for i, (memory, speed) in enumerate(pairs)]

    def beaten(point):
        return any(
            other.memory <= point.memory
            and other.speed >= point.speed
            and (other.memory, other.speed) != (point.memory, point.speed)
            for other in points
        )

    found = plot.front(points)
    expected = {(p.memory, p.speed) for p in points if not beaten(p)}
    assert [(p.memory, p.speed) for p in found] == sorted(expected)


def test_points_are_the_latest_rows_beside_their_own_eager_row():
    def row(choice, kept, ms, commit, **more):
        return {**ROW, "model": "roberta", "choice": choice, "commit": commit} | {
            "kept_bytes": kept * 2**30, "step_ms": ms, **more
        }  # fmt: skip

    found = [
        row("eager", 8, 10, "a", graph_ms=8),
        row("packlight 4", 2, 20, "a"),
        row("packlight 4", 3, 40, "a", graph_ms=16),
        row("packlight 4", 3, 50, "b") | {"device": "another"},
        {**ROW, "model": "roberta", "choice": "packlight 4", "failed": "no"},
        row("eager", 8, 30, "b"),
        row("compile", 6, 15, "b"),
        row("packlight 2", 1, 40, "a", graph_ms=12, graph_eager_ms=6),
    ]
    points = {point.choice: point for point in plot.latest(found, "a device")["roberta"]}
    assert points["packlight 4"] == plot.Point("packlight 4", 3, 0.5, True)
    assert points["compile"] == plot.Point("compile", 6, 2.0, False)
    assert points["packlight 2"] == plot.Point("packlight 2", 1, 0.5, True)  # took turns


@pytest.mark.parametrize(
    ("choice", "label"),
    [
        ("eager", "eager"),
        ("compile", "compile"),
        ("compile + checkpoint", "checkpoint"),
        ("compile, budget 0.5", "budget 0.5"),
        ("packlight 4", "4 bits"),
        ("packlight 4 + checkpoint, compile", "4 bits + checkpoint"),
        ("packlight 4, attention 4, compile", "4 bits, attention 4"),
        ("packlight few-bit 3", "few-bit 3"),
    ],
)
def test_labels(choice, label):
    assert plot.Point(choice, 1, 1).label == label


@pytest.mark.parametrize(
    ("lowest", "highest"), [(7, 11.5), (7, 23), (1, 7.9), (1.5, 12.5), (0.1, 16)]
)
def test_an_axis_of_memory_has_ticks_to_read_it_by(lowest, highest):
    marks = plot.ticks(lowest, highest)
    assert 5 <= len(marks) <= 12
    assert marks == sorted(marks)
    assert all(lowest <= mark <= highest for mark in marks)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pictures_are_drawn_from_rows(tmp_path):
    results = tmp_path / "results"
    for row in rows.read(rows.RESULTS / step.OUT):
        rows.append(results / step.OUT, row)
    for method in ("exact", "default"):
        for seed in range(2):
            rows.append(
                results / "cifar.jsonl",
                {**ROW, "method": method, "seed": seed, "loss": [2, 1], "accuracy": [0.1, 0.5]}
                | {"kept_bytes": 2**30},
            )
    foretold = {"scenario": "vitb", "predicted_peak": 2**31, "predicted_ms": 50.0, "peak": 2**31}
    for kind, max_error, ms in (("plan", 0.15, 52.0), ("checkpoint", None, 60.0)):
        row = {**foretold, "kind": kind, "max_error": max_error, "ms": ms}
        rows.append(results / "planner.jsonl", {**ROW, **row})
    plot.main(["--results", str(results), "--out", str(tmp_path)])
    for name in ("step.png", "cifar.png", "plans.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_all_choices_find_room_in_one_panel(tmp_path):
    """Two dozen points, as a full run gives."""
    names = [*step.CHOICES]
    for i, choice in enumerate(names):
        kept = {"eager": 12}.get(choice, 0.4 * 1.13 ** (i % 24 + 1))
        row = {"model": "llama", "choice": choice, "kept_bytes": kept * 2**30}
        rows.append(tmp_path / step.OUT, {**ROW, **row, "step_ms": 100 + 7 * (i * 5 % 11)})
    plot.main(["--results", str(tmp_path), "--out", str(tmp_path)])
    assert (tmp_path / "step.png").exists()


def test_no_rows_no_picture(tmp_path):
    with pytest.raises(SystemExit, match="no rows"):
        plot.main(["--results", str(tmp_path), "--out", str(tmp_path)])
    assert isinstance(run.arguments(["--suite", "step"]), argparse.Namespace)


# ---- tables --------------------------------------------------------------------------------------


def test_the_tables_of_the_docs_are_those_of_the_rows():
    text = "".join(page.read_text(encoding="utf-8") for page in table.PAGES)
    assert table.filled(text) == text
    shown = {name for name, made in table.TABLES.items() if len(made().splitlines()) > 2}
    assert {f"<!-- table {name} -->" for name in shown} <= set(text.splitlines())


def test_a_plan_stands_beside_the_fastest_choice_that_fits_and_errs_no_more():
    base = {"scenario": "vitb", "commit": "new", "peak": 2**30, "predicted_peak": 2**30}
    base |= {"device_ms": 10.0, "predicted_device_ms": 11.0}
    choices = {"packs of 2 bits": 5.0, "packs of 4 bits": 9.0, "checkpoint": 12.0, "torch": 1.0}
    own = [
        {**base, "kind": kind, "device_ms": ms, **({"peak": 2**34} if kind == "torch" else {})}
        for kind, ms in choices.items()
    ]
    plan = {**base, "kind": "plan", "budget": 2**31}
    own += [{**plan, "max_error": error} for error in (0.1, None, 0.0)]
    own += [{**own[-2], "budget": 2**29}, {**own[-2], "device_ms": 99.0, "commit": "old"}]
    text = table.plans([own[-1], *own[:-1]])
    title = "| ViT-B/16, 128 images |"
    assert text.splitlines()[2:] == [
        f"{title} 4 or more | 2.00 | 1.00 (1.00) | 10.0 (11.0) | 9.0, packs of 4 bits |",
        f"{title} any | 0.50 | 1.00 (1.00) | 10.0 (11.0) | none |",
        f"{title} any | 2.00 | 1.00 (1.00) | 10.0 (11.0) | 5.0, packs of 2 bits |",
    ]


def test_a_row_of_scale_is_what_the_command_says():
    run = scale.RUNS[0]
    (row,) = [r for r in table.scale_rows("title") if r["title"] == run.title]
    now = scale.measure(run, only="packlight")["choices"]["packlight"]
    said = row["choices"]["packlight"]
    assert now["sent"] == said["sent"]
    for name in ("static", "wires", "kept", "peak"):
        assert now[name] == pytest.approx(said[name], rel=1e-3), name


def test_a_table_of_steps():
    def row(choice, kept, ms, **more):
        return {**ROW, "device": table.DEVICE, "model": "roberta", "choice": choice} | {
            "kept_bytes": kept * 2**30, "step_ms": ms, "graph_ms": ms, "error_median": 0.1, **more
        }  # fmt: skip

    found = [
        row("eager", 8, 10),
        row("eager", 8, 12),
        row("packlight 4, compile", 2, 30, largest_batch=77),
        row("packlight 4, compile", 2, 8, graph_eager_ms=12, graph_compile_ms=6),
        row("packlight 4, compile", 2, 20, largest_batch=78),
        row("packlight 2", 1, 8) | {"device": "another"},
    ]
    title = step.MODELS["roberta"].title
    assert table.steps(found).splitlines()[2:] == [
        f"| **{title}**: eager | 8.00 GiB | 12.0 ms | 10.0 ms | | - |",
        "| packlight 4 bits, compile | 2.00 GiB (4.00x less) | 8.0 ms (1.50x; 0.75x of compile)"
        " | 8.0 ms (1.25x) | 78 | 0.100 |",
    ]


def test_a_table_of_training_runs():
    def runs(method, kept, values, **more):
        return [
            {**ROW, "case": "gpt", "method": method, "kept_bytes": kept * 2**20, "loss": [9, value]}
            | {"seed": seed, **more}
            for seed, value in reversed([*enumerate(values)])
        ]

    found = [
        *runs("group4", 5, (1.1, 2.2)),
        *runs("exact", 10, (1.0, 2.0)),
        *runs("exact", 10, (7.0,), steps=3),  # another experiment
        *runs("inverted", 11, (1.0, 2.0)),
    ]
    assert table.training(found).splitlines()[2:] == [
        "| exact | 10 MiB | 1.0000, 2.0000 | 1.5000 +- 0.7071 | |",
        "| inverted | 11 MiB (1.10x more) | 1.0000, 2.0000 | 1.5000 +- 0.7071 | 0 |",
        "| GroupQuant, 4 bits | 5 MiB (2.00x less) | 1.1000, 2.2000 | 1.6500 +- 0.7778"
        " | +0.1500, p = 0.20 |",
    ]


def test_the_time_of_the_device_is_that_of_kernels_and_of_short_gaps():
    """Not that of what waits for the host, nor twice that of copies beside kernels."""
    spans = [(100.0, 130.0), (131.5, 141.5), (1000.0, 1010.0), (1004.0, 1012.0)]
    events = [SimpleNamespace(time_range=SimpleNamespace(start=s, end=e)) for s, e in spans]
    assert plans.busy_ms(events[::-1]) == pytest.approx((30 + 1.5 + 10 + plans.GAP + 12) / 1e3)


def test_plans_are_of_scenarios_and_of_choices_that_are_plans():
    from benchmarks.user.choices import CHOICES, PLANS
    from benchmarks.user.scenarios import SCENARIOS

    for choice, limits in PLANS.items():
        assert CHOICES[choice].kind == "plan"
        assert limits.keys() <= SCENARIOS.keys()


@pytest.mark.parametrize("words", [["--limit", "80"], ["--once", "--limit", "80"]])
def test_a_limit_is_of_one_step_on_a_device(words):
    with pytest.raises(SystemExit, match="limit"):
        user.main(["run", "--device", "cpu", *words])


# Of rotated codes at 4, 3 and 2 bits: what packs may err by, as rows have it.
LIMITS_OF_ERRORS = {
    ("normal", "error"): (0.100, 0.195, 0.37),
    ("MiniLM, Linears", "of_minmax"): (0.45, 0.45, 0.40),
    ("mean", "error_squared"): (None, None, 0.15),
    ("outliers", "error"): (0.12, None, 0.40),
    ("MiniLM, attention", "dq"): (0.16, None, None),
    ("MiniLM, attention", "dk"): (0.16, None, None),
    ("MiniLM, attention", "dv"): (0.16, None, None),
    ("GPT, attention", "dq"): (0.13, None, None),
    ("GPT, attention", "dk"): (0.13, None, None),
    ("GPT, attention", "dv"): (0.13, None, None),
}


@pytest.mark.parametrize(("case", "field"), LIMITS_OF_ERRORS)
def test_errors_of_rotated_packs_are_within_their_limits(case, field):
    found = [row for row in rows.read(rows.RESULTS / "pack_errors.jsonl") if row["case"] == case]
    for bits, limit in zip((4, 3, 2), LIMITS_OF_ERRORS[case, field], strict=True):
        newest = [row for row in found if (row["code"], row["bits"]) == ("rotated", bits)][-1:]
        assert limit is None or newest[0][field] <= limit, bits


@pytest.mark.parametrize("case", ["MiniLM, attention", "GPT, attention"])
def test_attention_that_runs_again_on_8_bits_errs_less_than_the_form_with_a_statistic(case):
    found = rows.read(rows.RESULTS / "pack_errors.jsonl")
    again, kept = (
        [row for row in found if row["case"] == case and row.get("again") is way][-1]
        for way in (True, False)
    )
    assert sum(again[name] for name in ("dq", "dk", "dv")) < 0.66 * sum(
        kept[name] for name in ("dq", "dk", "dv")
    )
