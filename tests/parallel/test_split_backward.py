"""A backward pass in two, of the input and of the weights, as zero-bubble pipelines have it."""

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.flop_counter import FlopCounterMode

import packlight
from packlight import Checkpoint, FewBit, GroupQuant, Inverted, Sketch, Tiles, _torch
from tests.helpers import nodes_outlive_results

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
PACKS = GroupQuant(4, group_size=32)
METHODS = {
    "packs": {"methods": PACKS, "rest": PACKS},
    "exact": {"methods": (FewBit(), Inverted())},
    "sketch": {"methods": Sketch(rows=0.5), "strict": False},
    "checkpoint": {"methods": (Checkpoint(PACKS), PACKS)},
    "tiles": {"methods": (Tiles(4, keep=None), PACKS)},
}


class Llama(nn.Module):
    """A block in which three layers at once are one node: gate, up and down."""

    def __init__(self):
        super().__init__()
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, vocab_size=8)
        model = transformers.LlamaModel(config)
        self.block, self.rotary = model.layers[0], model.rotary_emb

    def forward(self, x):
        turns = self.rotary(x, torch.arange(x.shape[1])[None])
        return self.block(x, position_embeddings=turns)


class Bert(nn.Module):
    """A block in which norms are one node with what stands before them."""

    def __init__(self):
        super().__init__()
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.block = transformers.BertModel(transformers.BertConfig(**SIZES, **rates)).encoder

    def forward(self, x):
        return self.block(x)[0]


class ViT(nn.Module):
    """A block in which norms are one node with what stands behind them."""

    def __init__(self):
        super().__init__()
        config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4)
        self.block = next(
            each for each in transformers.ViTModel(config).modules()
            if type(each).__name__ == "ViTLayer"
        )  # fmt: skip

    def forward(self, x):
        found = self.block(x)
        return found if isinstance(found, torch.Tensor) else found[0]


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(32, 32, 3, padding=1), nn.GELU(), nn.Conv1d(32, 32, 1), nn.Tanh()
        )

    def forward(self, x):
        return self.layers(x) * 1.0


def passes(model, xs, gradients, split):
    """Of micro-batches that are all alive: gradients of the inputs and of the weights."""
    packlight.manual_seed(5)
    model.zero_grad()
    xs = [x.clone().requires_grad_() for x in xs]
    ys = [model(x) for x in xs]
    if split:
        kept = [
            stage_backward_input([y], [dy], [x], model.parameters())[1]
            for x, y, dy in zip(xs, ys, gradients, strict=True)
        ]
        assert all(p.grad is None for p in model.parameters())
        for groups in kept:
            stage_backward_weight(model.parameters(), groups)
    else:
        for y, dy in zip(ys, gradients, strict=True):
            y.backward(dy)
    return [x.grad for x in xs], {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("make", [Llama, Bert, ViT, Convolutions])
def test_gradients_are_those_of_the_whole_pass(make, how):
    model = make().train()
    packlight.convert(model, **how)
    xs, gradients = torch.randn(2, 3, 2, 32, 64)
    inputs, weights = passes(model, xs, gradients, split=False)
    try:
        of_inputs, of_weights = passes(model, xs, gradients, split=True)
    except RuntimeError:  # loud
        assert not nodes_outlive_results()
        return
    assert all(map(torch.equal, inputs, of_inputs))
    assert weights.keys() == of_weights.keys()
    for name, truth in weights.items():
        torch.testing.assert_close(of_weights[name], truth, rtol=1e-5, atol=1e-5)


def work(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("knows", [True, False], ids=["knows", "without"])
@pytest.mark.parametrize("make", [Llama, Bert, ViT, Convolutions])
def test_each_of_the_two_computes_what_it_is_for(make, knows, monkeypatch):
    if not knows:  # every product twice, and the same gradients
        monkeypatch.setattr(_torch.NEEDED, "values", None)
    model = make().train()
    packlight.convert(model, PACKS)
    x, dy = torch.randn(2, 2, 32, 64)
    x.requires_grad_()
    of_all = model(x)
    whole = work(lambda: of_all.backward(dy))
    y, groups = model(x), []
    of_input = work(
        lambda: groups.extend(stage_backward_input([y], [dy], [x], model.parameters())[1])
    )
    assert (of_input < 0.6 * whole) == knows
    if nodes_outlive_results():
        of_weights = work(lambda: stage_backward_weight(model.parameters(), groups))
        # A node of several layers comes to its first weight by way of its last.
        assert (of_weights < 0.75 * whole) == knows


def test_gradients_of_some_inputs_ask_for_nothing_else():
    model = nn.Sequential(nn.Linear(64, 64))
    layer = model[0]
    packlight.convert(model, PACKS)
    x = torch.randn(32, 64, requires_grad=True)
    one = 2 * 32 * 64 * 64
    for inputs, times in ((x, 1), (layer.weight, 1), ((x, layer.weight), 2), (layer.bias, 0)):
        loss = model(x).sum()
        assert work(lambda loss=loss, to=inputs: torch.autograd.grad(loss, to)) == times * one
