"""Ranks of parallel runs: what is divided, what is sent, and what cannot be divided."""

import collections
import dataclasses
import inspect

import pytest
import torch
from torch import nn

import packlight
from packlight import InputError, Parallel
from packlight.planner.cutting import group_for
from packlight.planner.devices import device_of
from packlight.planner.fit import choices, extremes, fit
from packlight.planner.menu import EXACT, PACKED_4
from packlight.planner.study import Study
from tests.parallel.decoder import CUTS, WIDTH, WORDS, Decoder, loss_of

H200 = device_of("H200")
ROWS, TOKENS = 4, 256


def on_meta(depth: int = 8) -> tuple[Decoder, torch.Tensor]:
    with torch.device("meta"):
        return Decoder(depth), torch.empty(ROWS, TOKENS, dtype=torch.int64)


def loss(logits):
    return loss_of(logits, torch.empty(logits.shape[:2], dtype=torch.int64))


def timelines(parallel: Parallel, option=EXACT, optimizer=torch.optim.AdamW) -> list:
    model, tokens = on_meta()
    with group_for(parallel):
        study = Study(model, (tokens,), {}, H200, loss, optimizer, False, parallel)
        return [stage.walked(option, option).timeline for stage in study.stages]


def size(module: nn.Module) -> int:
    return sum(4 * p.numel() for p in module.parameters())


def test_shards_divide_what_is_static_and_not_what_is_kept():
    (one,), (rank,) = timelines(Parallel()), timelines(Parallel(shard=4))
    assert rank.kept == one.kept
    for name in ("parameters", "optimizer", "trained"):
        part, whole = getattr(rank.parts, name), getattr(one.parts, name)
        assert abs(part / whole - 1 / 4) < 0.01, name
    model, _ = on_meta()
    outside = size(model) - size(model.blocks)
    assert rank.parts.wires == outside  # stays gathered
    # Gathered for each pass, but for what stays, and reduced: each time all but a quarter.
    blocks = size(model.blocks)
    assert rank.sent["shard"] == pytest.approx(3 / 4 * (3 * blocks + 2 * outside), rel=1e-3)


def test_shards_of_another_dtype():
    (rank,), (wide,) = (
        timelines(Parallel(shard=4, shard_dtype=dtype)) for dtype in (None, torch.float64)
    )
    assert wide.parts.parameters == pytest.approx(2 * rank.parts.parameters, rel=1e-3)
    assert wide.parts.optimizer == pytest.approx(2 * rank.parts.optimizer, rel=1e-2)
    assert wide.parts.wires == rank.parts.wires  # of the model's dtype


def test_ddp_has_buckets():
    (one,), (rank,) = timelines(Parallel()), timelines(Parallel(replicate=4))
    assert rank.parts.wires == pytest.approx(one.parts.trained, rel=1e-3)
    assert rank.sent == {"replicate": pytest.approx(2 * 3 / 4 * one.parts.trained, rel=1e-3)}


def test_sequence_parallel_sends_what_formulas_say():
    """By tokens an all-gather and a reduce-scatter for attention, MLP and head, in each pass."""
    (rank,) = timelines(Parallel(tensor=4, cuts=CUTS))
    hidden = 4 * ROWS * TOKENS * WIDTH
    # Forward and backward pass of two parts of each of 8 blocks; of the head, and the embedding.
    expected = 3 / 4 * hidden * (8 * 2 * 4 + 2 + 2 + 1)
    assert rank.sent["tensor"] == pytest.approx(expected, rel=0.03)  # norms reduce gradients
    (whole,) = timelines(Parallel(tensor=4, sequence=False, cuts=CUTS))
    assert whole.kept > 1.3 * rank.kept


def test_stages_have_micro_batches_by_1f1b():
    stages = timelines(Parallel(pipeline=4))
    model, tokens = on_meta()
    with group_for(Parallel()):
        plain = Study(model, (tokens[:1],), {}, H200, loss).walked(EXACT, EXACT)
    (part,) = {p.grows for p in plain.parts() if p.run and p.phase == "forward" and p.place == 1}
    for stage, timeline in enumerate(stages[1:3], start=1):
        # Two blocks, as often as there are stages from here on.
        assert timeline.kept == pytest.approx(2 * part * (4 - stage), rel=0.1)
    hidden = 4 * TOKENS * WIDTH
    assert stages[0].sent["pipeline"] == stages[3].sent["pipeline"] == 4 * hidden
    assert stages[1].sent["pipeline"] == 2 * 4 * hidden
    assert [t.parts.wires for t in stages] == [4 * hidden, 8 * hidden, 8 * hidden, 4 * hidden]


def test_context_divides_what_is_kept():
    (one,), (rank,) = timelines(Parallel()), timelines(Parallel(context=4))
    assert rank.kept == pytest.approx(one.kept / 4, rel=0.01)
    # Keys and values of a quarter go to three, forward and backward, and so do their gradients.
    attention = 2 * 4 * ROWS * TOKENS // 4 * WIDTH
    assert rank.sent["context"] == 8 * 3 * attention * 3


def test_accumulation_of_gradients():
    (one,), (rank,) = timelines(Parallel()), timelines(Parallel(microbatches=4))
    assert rank.kept == pytest.approx(one.kept / 4, rel=0.01)
    assert rank.segments[-1].before >= rank.parts.trained
    assert rank.ms > 3 * timelines(Parallel(microbatches=1))[0].ms * 0.25


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 8
        self.up = nn.Parameter(torch.empty(8, WIDTH, 64))
        self.down = nn.Parameter(torch.empty(8, 64, WIDTH))

    def forward(self, rows, index, weights):
        """Balanced: each expert has as many rows."""
        sent = rows.repeat_interleave(index.shape[1], 0)
        held = sent.view(len(self.up), -1, WIDTH)
        y = (held @ self.up).relu() @ self.down
        return (y.view(len(rows), -1, WIDTH) * weights[..., None]).sum(1)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 8), Experts()

    def forward(self, x):
        rows = x.flatten(0, 1)
        weights, index = self.router(rows).softmax(-1).topk(2)
        return self.experts(rows, index, weights).view_as(x)


def mixture() -> Decoder:
    model, _ = on_meta()
    with torch.device("meta"):
        for block in model.blocks:
            block.mlp = Mixture()
    return model


def test_experts_are_spread():
    tokens = on_meta()[1]
    found = {}
    for parallel in (Parallel(shard=8), Parallel(shard=8, expert=4)):
        study = Study(mixture(), (tokens,), {}, H200, loss, None, False, parallel)
        found[parallel.expert] = study.walked(EXACT, EXACT).timeline
    one, rank = found[1], found[4]
    assert rank.kept == pytest.approx(one.kept, rel=0.01)  # as many rows come as go
    assert rank.parts.parameters == pytest.approx(one.parts.parameters, rel=0.01)
    assert rank.peak < one.peak  # fewer weights are gathered
    # Two experts a token, there and back, in two passes: all but a quarter leaves the rank.
    sent = 4 * ROWS * TOKENS * WIDTH * 2
    assert rank.sent["expert"] == pytest.approx(8 * 4 * 3 / 4 * sent)
    more = dataclasses.replace(Parallel(shard=8, expert=4), imbalance=1.5)
    study = Study(mixture(), (tokens,), {}, H200, loss, None, False, more)
    assert study.walked(EXACT, EXACT).timeline.kept > 1.1 * rank.kept


@pytest.mark.parametrize(
    ("parallel", "says"),
    [
        (Parallel(tensor=3, sequence=False, cuts=CUTS), "tensor=3 does not divide columns of"),
        (Parallel(tensor=2), "has no tp_plan"),
        (Parallel(tensor=2, cuts={"*.nothing": "colwise"}), r"no Linear has a name"),
        (Parallel(tensor=2, cuts={"norm": "colwise"}), "norm, a LayerNorm, is to be cut"),
        (Parallel(pipeline=3, microbatches=4), "pipeline=3 does not divide blocks"),
        (Parallel(pipeline=2, microbatches=3), "microbatches=3 does not divide rows"),
        (Parallel(context=3), "context=3 does not divide tokens"),
        (Parallel(shard=2, expert=2), "no module with `num_experts`"),
    ],
)
def test_a_degree_that_does_not_divide_is_named(parallel, says):
    with pytest.raises(InputError, match=says):
        timelines(parallel)


@pytest.mark.parametrize(
    ("degrees", "says"),
    [
        ({"tensor": 0}, "tensor=0 is not a positive whole number"),
        ({"pipeline": 4, "microbatches": 2}, "leave stages of pipeline=4 without work"),
        ({"shard": 4, "expert": 3}, "expert=3 does not divide shard x context x tensor = 4"),
        ({"imbalance": 0.5}, "below 1"),
        ({"imbalance": "2"}, "imbalance='2' is no number"),
        ({"shard_dtype": torch.float32, "replicate": 2}, "shard_dtype is of shards, and shard x"),
        ({"shard": 2, "shard_dtype": "fp32"}, "shard_dtype='fp32' is no dtype"),
        ({"cuts": ["up"]}, "is no mapping such as"),
        ({"sequence": "no"}, "sequence='no' is neither True nor False"),
    ],
)
def test_degrees_that_cannot_be(degrees, says):
    with pytest.raises(InputError, match=says):
        Parallel(**degrees)


def test_heads_of_a_configuration_are_named():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.LlamaConfig(
            hidden_size=96, num_attention_heads=3, num_hidden_layers=2, intermediate_size=96
        )
        model = transformers.LlamaForCausalLM(config)
    with pytest.raises(InputError, match="tensor=2 does not divide num_attention_heads"):
        packlight.predict(model, torch.zeros(1, 64, dtype=torch.long), parallel=Parallel(tensor=2))


class Batch(collections.UserDict):
    """As a tokenizer makes it."""


def test_a_batch_may_be_a_mapping_that_is_no_dictionary():
    model, tokens = on_meta()
    (name,) = inspect.signature(model.forward).parameters
    for parallel in (Parallel(tensor=2, cuts=CUTS), Parallel(context=2), Parallel(microbatches=2)):
        found = packlight.predict(model, Batch({name: tokens}), parallel=parallel)
        expected = packlight.predict(model, tokens, parallel=parallel)
        assert found.activation_bytes == pytest.approx(expected.activation_bytes, rel=1e-4)


def test_what_has_no_tokens_or_is_no_model_is_named():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.zeros(2, 4, 8)
    for degrees in ({"tensor": 2}, {"context": 2}):
        with pytest.raises(InputError, match="has no numbers of tokens"):
            packlight.predict(model, x, parallel=Parallel(**degrees))
    model, x = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8)), torch.zeros(2, 4).long()
    with pytest.raises(InputError, match="Sequential has no list of blocks"):
        packlight.predict(model, x, parallel=Parallel(tensor=2, cuts={"1": "colwise"}))
    with pytest.raises(InputError, match="pipeline=2 has stages of blocks, and the model has no"):
        packlight.plan(
            model, x, memory="1GiB", device="H200", head=False, parallel=Parallel(pipeline=2)
        )
    with pytest.raises(InputError, match="microbatches=2 are parts of a batch, and there is no"):
        packlight.predict(model, object(), parallel=Parallel(microbatches=2))
    with pytest.raises(InputError, match="model is a function, of which no copy"):
        packlight.predict(lambda x: x, x, parallel=Parallel(tensor=2))


def test_predict_is_of_a_rank():
    model, tokens = on_meta()
    one = packlight.predict(model, tokens, loss=loss).activation_bytes
    parallel = Parallel(tensor=2, cuts=CUTS)
    rank = packlight.predict(model, tokens, loss=loss, parallel=parallel).activation_bytes
    assert 0.45 < rank / one < 0.6
    part = packlight.predict(model, tokens, loss=loss, parallel=Parallel(context=2))
    assert part.activation_bytes == pytest.approx(one / 2, rel=0.01)
    with pytest.raises(InputError, match="a pipeline has several"):
        packlight.predict(model, tokens, parallel=Parallel(pipeline=2))
    assert not torch.distributed.is_initialized()


def test_a_plan_is_for_all_ranks():
    model, tokens = on_meta()
    plain = max(timelines(Parallel(pipeline=2)), key=lambda t: t.peak)
    plan = packlight.plan(
        model, tokens, memory=int(plain.peak * 0.95), optimizer=torch.optim.AdamW, loss=loss,
        device="H200", head=False, parallel=Parallel(pipeline=2),
    )  # fmt: skip
    assert [block.name for block in plan.blocks] == [f"blocks.{i}" for i in range(8)]
    assert plan.reserved_bytes <= plain.peak * 0.95
    for first in (0, 4):
        stage = Decoder()
        for place in range(8):
            if not first <= place < first + 4:
                stage.blocks[place] = nn.Identity()
        packlight.convert(stage, plan, strict=False)
    whole = packlight.convert(Decoder(), plan)
    assert len(whole.replaced) > 0


def test_a_fit_says_what_is_sent():
    model, tokens = on_meta()
    found = fit(
        "a decoder", model, (tokens,), {}, H200, torch.optim.AdamW, loss, False,
        sizes=False, parallel=Parallel(pipeline=2, shard=2, replicate=2),
    )  # fmt: skip
    text = " ".join(str(found).split())
    assert "a rank of 8: replicate 2, shard 2, pipeline 2; 4 micro-batches" in text
    assert "stands still for 20% of a step" in text
    assert all(row.sent["shard"] > row.sent["replicate"] > 0 for row in found.rows)
    assert found.to_dict()["parallel"]["ranks"] == 8


def test_sizes_are_those_of_a_data_parallel_rank():
    model, tokens = on_meta()
    study = Study(
        model, (tokens,), {}, H200, loss, head=False, parallel=Parallel(context=2, microbatches=2)
    )
    timeline = study.walked(EXACT, EXACT).timeline
    (plain, *_) = choices(False, transformers=False)
    most = extremes(study, plain, timeline.static + 2 * (timeline.peak - timeline.static), None)
    assert most["batch"] in (6, 8)  # two micro-batches of half of it, with gradients
    assert most["sequence"] % 128 == 0
    assert most["sequence"] > 2 * TOKENS


def test_a_process_that_has_a_group_is_told(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(InputError, match="call this before torch"):
        timelines(Parallel(tensor=2, cuts=CUTS))


def test_stages_are_not_foretold_under_autocast():
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InputError, match="without autocast"),
    ):
        timelines(Parallel(pipeline=2))


def test_packs_fall_with_the_tensors():
    (one,) = timelines(Parallel(), PACKED_4)
    (rank,) = timelines(Parallel(tensor=4, cuts=CUTS), PACKED_4)
    assert rank.kept < 0.3 * one.kept
    assert WORDS % 4 == 0
