"""Walks: what is allocated when, beside what is known of it."""

import copy
import json
import pathlib
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import packlight
from benchmarks.user.choices import CHOICES
from benchmarks.user.scenarios import SCENARIOS
from packlight import _imagined
from packlight.parallel import Parallel
from packlight.planner import walk
from packlight.planner.costs import Costs
from packlight.planner.devices import device_of
from packlight.planner.menu import MENU, PACKED_4
from packlight.planner.optimizers import OPTIMIZERS
from packlight.planner.runs import runs_of
from packlight.planner.study import Study
from packlight.planner.timeline import BACKWARD, FORWARD, STEP
from packlight.planner.walk import Walker
from tests.planner.models import Block, Latent, Model, on_meta, singles

H200 = device_of("H200")
GIB = 2**30


def test_a_mlp_allocates_what_it_is_made_of() -> None:
    model = nn.Sequential(nn.Linear(256, 1024, bias=False), nn.ReLU(), nn.Linear(1024, 256))
    x = torch.empty(512, 256)
    timeline = Walker(model, (x,), {}).walk(H200).timeline
    static = timeline.parts
    assert static.parameters == 4 * (2 * 256 * 1024 + 256)
    assert static.inputs == 4 * 512 * 256
    assert static.workspace == H200.rates.workspace
    # The ReLU's output, which it and the next Linear keep, and the loss.
    assert timeline.kept == 4 * 512 * 1024 + 512
    # While the ReLU's gradient is computed its output, the gradient of it and the result are there,
    # and the gradients of the second layer's parameters; the loss and its gradient.
    relu = 3 * 4 * 512 * 1024 + 4 * (1024 * 256 + 256) + 2 * 512
    assert max(s.peak for s in timeline.segments if s.place == "1") == relu
    # Gradients of all weights are there at the end.
    assert timeline.segments[-1].after >= static.trained
    phases = [segment.phase for segment in timeline.segments]
    assert phases == sorted(phases, key=[FORWARD, BACKWARD, STEP].index)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1024, 1024))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.weight), self.weight)


def test_the_second_gradient_of_a_weight_is_added_in_place() -> None:
    with torch.device("meta"):
        model, x = Tied(), torch.empty(4, 1024)
    timeline = Walker(model, (x,), {}).walk(H200).timeline
    one = timeline.parts.trained
    # Two gradients at once, and not their sum beside them.
    assert 2 * one <= timeline.peak - timeline.static < 2.1 * one


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("methods", [None, packlight.Checkpoint(), packlight.GroupQuant(4)])
def test_three_blocks_stand_for_all(methods: packlight.Method | None, autocast: bool) -> None:
    model, tokens = on_meta(depth=9)
    found = []
    for runs in (None, singles(model)):
        walker = Walker(model, (tokens,), {}, None, torch.optim.AdamW, runs)
        if methods is not None:
            with walker.imagined():
                packlight.convert(walker.model, methods)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(walker.walk(H200).timeline)
    short, whole = found
    assert len(short.segments) == len(whole.segments)
    assert short.parts == whole.parts
    for one, other in zip(short.segments, whole.segments, strict=True):
        assert one.place == other.place
        assert one.phase == STEP or (one.before, one.peak) == (other.before, other.peak)
    times = [sum(s.device_ms + s.host_ms for s in t.segments if s.phase != STEP) for t in found]
    assert times[0] == pytest.approx(times[1])


def test_blocks_that_differ_are_walked_by_themselves() -> None:
    model = Model(depth=8)
    model.blocks[3] = Block(64, dropout=0.1)
    lengths = [len(run.names) for run in runs_of(model)]
    assert lengths == [1, 1, 1, 1, 1, 1, 1, 1]
    assert [len(run.names) for run in runs_of(Model(depth=8))] == [8]


def test_nothing_of_the_model_changes() -> None:
    model, tokens = Model(), torch.zeros(2, 16, dtype=torch.int64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    Walker(model, (tokens,), {}, None, torch.optim.AdamW).walk(H200)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert _imagined.kind_of(torch.empty(0)) == "cpu"


@pytest.mark.parametrize(
    ("name", "bytes_each"), [("adamw", 8), ("adamw-8bit", 2), ("paged", 0), ("sgd", 0)]
)
def test_optimisers_hold_their_states(name: str, bytes_each: float) -> None:
    model = nn.Linear(512, 512, bias=False)
    walker = Walker(model, (torch.empty(4, 512),), {}, None, OPTIMIZERS[name])
    held = walker.walk(H200).static.optimizer
    scales = 2 * 4 * 512 * 512 // 256 if name == "adamw-8bit" else 0
    assert 0 <= held - (bytes_each * 512 * 512 + scales) <= 1024  # a count of steps


@pytest.mark.parametrize("make", [torch.optim.Adafactor, transformers.Adafactor])
def test_optimisers_that_read_values(make: Any) -> None:
    """Adafactor reads norms, holds a row and a column, and steps one after another."""
    model = nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 512))
    walked = Walker(model, (torch.empty(4, 512),), {}, None, make).walk(H200)
    real = make([copy.deepcopy(p) for p in model.parameters()])
    for parameter in real.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    real.step()
    states = [t for state in real.state.values() for t in state.values()]
    held = sum(t.nbytes for t in states if isinstance(t, torch.Tensor) and t.dim())
    assert 0 <= walked.static.optimizer - held <= 4 * 512  # a scalar of each
    step = max(s.peak for s in walked.timeline.segments if s.phase == STEP)
    grads = sum(p.nbytes for p in model.parameters())
    assert grads + 4 * 512 * 256 <= step <= grads + 3.2 * 4 * 512 * 256


def test_what_a_step_asks_of_finite_gradients_is_answered_as_for_those() -> None:
    class Careful(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad.isnan().any().item():
                        return None
            return super().step(closure)

    model = nn.Linear(512, 512, bias=False)
    held = [
        Walker(model, (torch.empty(4, 512),), {}, None, make).walk(H200).static.optimizer
        for make in (torch.optim.AdamW, Careful)
    ]
    assert held[0] == held[1] > 0


def test_a_step_of_many_tensors_takes_memory_of_its_own() -> None:
    model, tokens = on_meta(depth=6)

    def foreach(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, foreach=True)

    timeline = Walker(model, (tokens,), {}, None, foreach).walk(H200).timeline
    step = max(s.peak for s in timeline.segments if s.phase == STEP)
    trained = timeline.parts.trained
    assert 1.9 * trained < step < 3.1 * trained  # gradients, and a list as long or two


def test_dropout_keeps_a_byte_an_element_as_on_a_gpu() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1))
    x = torch.empty(1024, 64)
    plain = Walker(model[0], (x,), {}).walk(H200).timeline.kept
    dropped = Walker(model, (x,), {}).walk(H200).timeline.kept
    assert dropped - plain <= 1024 * 64 * (1 + 4)  # the mask, and the result for the mean
    assert dropped - plain >= 1024 * 64


@pytest.mark.parametrize("masked", [False, True])
def test_values_narrower_than_keys_have_no_scores_kept_as_on_a_gpu(masked: bool) -> None:
    timeline = (
        Walker(Latent(64, 4, 0.1, masked), (torch.empty(2, 512, 64),), {}).walk(H200).timeline
    )
    heads = 2 * 4 * 512
    # Queries and values, the result (and the loss's input), and a statistic of each row.
    bias = 4 * 512 * 512 if masked else 0
    assert timeline.kept == pytest.approx(4 * heads * (192 + 2 * 128 + 1) + bias, rel=0.01)


def test_autocast_runs_norms_in_32_bits_as_on_a_gpu() -> None:
    seen = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.linear(x))
            seen.append(y.dtype)
            return y

    with torch.autocast("cpu", torch.bfloat16):
        Walker(Net(), (torch.empty(4, 8),), {}).walk(H200)
        Net()(torch.zeros(4, 8))
    assert seen == [torch.float32, torch.bfloat16]


def test_packed_attention_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel torch takes is asked by a call on tensors without values: that is no work."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(**shape, use_cache=False)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).train()
    called: list[str] = []

    class Seen(Costs):
        def of(self, func: Any, args: Any, result: Any, tensors: Any) -> tuple[float, float]:
            called.append(func.overloadpacket.__name__)
            return super().of(func, args, result, tensors)

    monkeypatch.setattr(walk, "Costs", Seen)
    ids = torch.zeros(1, 512, dtype=torch.long)
    Study(model, (ids,), {"labels": ids}, H200).walked(PACKED_4, PACKED_4)
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    assert called.count(kernel) == called.count(f"{kernel}_backward") == 1


def test_a_loss_that_is_no_number_is_refused() -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(packlight.InputError, match="one element"):
        Walker(model, (torch.empty(4, 8),), {}, lambda y: y).walk(H200)
    with pytest.raises(packlight.InputError, match="needs the values"):
        Walker(model, (torch.empty(4, 8),), {}, lambda y: y[y > 0].sum()).walk(H200)


# ---- what an allocator counted -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "choice"),
    [
        ("llama1b", "eager"),
        ("llama1b", "checkpoint"),
        ("vitb", "eager"),
        ("vitb", "checkpoint"),
        ("roberta-32", "eager"),
    ],
)
def test_peaks_are_those_that_an_h200_counted(scenario: str, choice: str) -> None:
    """Of plain steps: what conversions keep goes with the commit that was measured."""
    pytest.importorskip("timm" if scenario == "vitb" else "transformers")
    rows = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "user.jsonl"
    measured = [
        row
        for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines())
        if (row["scenario"], row["choice"], row["mode"]) == (scenario, choice, "step")
    ][-1]
    task = SCENARIOS[scenario]
    with torch.device("meta"):
        model, batch = task.model(task.size), task.batch(task.size)
    # The tensors of the batch, which its loss holds.
    held = {
        name: cell.cell_contents
        for name, cell in zip(batch.__code__.co_freevars, batch.__closure__, strict=True)
    }
    args, kwargs = (), {}
    if "ids" in held:
        kwargs = {"input_ids": held["ids"], "labels": held.get("labels", held["ids"])}
    else:
        args = (held["x"],)
    walker = Walker(model.train(), args, kwargs, None, OPTIMIZERS["adamw"])
    with walker.imagined():
        for change in CHOICES[choice].changes:
            change(walker.model)
    with torch.autocast("cpu", torch.bfloat16, enabled=task.autocast):
        timeline = walker.walk(H200).timeline
    assert timeline.static / GIB == pytest.approx(measured["static_gib"], rel=0.01)
    assert timeline.peak / GIB == pytest.approx(measured["peak_gib"], rel=0.01)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_batch_with_values_is_packed_as_one_without_is() -> None:
    """The second run of a checkpoint has its input without values."""
    layer = nn.TransformerEncoderLayer(64, 4, 64, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    study = Study(model, (torch.randn(2, 64, 64),), {}, H200)
    assert all(study.runs(option, PACKED_4) for option in MENU)


@pytest.mark.parametrize("parallel", [None, Parallel(shard=2, shard_dtype=torch.float32)])
def test_a_step_of_the_optimiser_is_walked_once_for_all_conversions(
    parallel: Parallel | None,
) -> None:
    """And is, where it begins, that of a walk by itself."""
    steps = []

    class Counted(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            steps.append(1)
            return super().step(closure)

    model, tokens = on_meta(depth=5)
    given = (model, (tokens,), {}, None, Counted, None, parallel)
    walker = Walker(*given)
    plain = walker.walk(H200)
    with walker.imagined():
        packlight.convert(walker.model, packlight.GroupQuant(bits=4))
    converted = walker.walk(H200)
    assert len(steps) == 2  # one for the states, one that is walked
    alone = Walker(*given)
    with alone.imagined():
        packlight.convert(alone.model, packlight.GroupQuant(bits=4))
    assert alone.walk(H200) == converted != plain
    assert [s for s in converted.segments if s.phase == STEP]
