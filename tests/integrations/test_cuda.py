"""Converted models of transformers on a CUDA device, as they are trained there."""

import copy

import pytest
import torch

import packlight
from packlight import FewBit, GroupQuant, _seeds
from packlight.fewbit import kernels
from tests.integrations.models import NAMES, batch, make, worst_error

pytestmark = pytest.mark.gpu

# To nearest and with groups of their own, so that two passes agree whatever the seed.
ALL = (GroupQuant(bits=8, group_size=32, rounding="nearest"), FewBit(bits=8))


def on_device(name):
    inputs = {key: value.cuda() for key, value in batch(name).items()}
    plain = make(name).cuda()
    converted = copy.deepcopy(plain)
    packlight.convert(converted, ALL)
    return plain, converted, inputs


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trained(model, inputs, steps=4):
    """Losses of some steps in float16 with scaled gradients, and the gradients of the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    losses = []
    for i in range(steps):
        packlight.manual_seed(i)
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = model(**inputs).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if i == 0:
            first = {name: grad.clone() for name, grad in gradients(model).items()}
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() == 2.0**10  # no step was left out
    return torch.tensor(losses), first


@pytest.mark.parametrize("name", NAMES)
def test_a_model_trains_in_float16_with_scaled_gradients(name):
    plain, converted, inputs = on_device(name)
    kept = []
    for model in (plain, converted):
        with torch.autocast("cuda", torch.float16):
            kept.append(packlight.profile(model, **inputs).activation_bytes)
    assert kept[1] < kept[0] / (1.3 if name == "t5" else 1.8)
    expected, truth = trained(plain, inputs)
    actual, ours = trained(converted, inputs)
    assert worst_error(ours, truth) < 0.08
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


# Inductor's advice: TensorFloat32 is off, an online softmax is not worth it here. And the empty
# graph by which it reserves memory for those to come.
@pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])  # the latter in CUDA graphs
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_compiled_model_computes_what_the_plain_one_does(name, mode, fresh_compiler, monkeypatch):
    # As in a process where nothing has run before: what is kept on the device is not there yet.
    monkeypatch.setattr(_seeds, "_counters", {})
    kernels._levels.cache_clear()
    kernels._borders.cache_clear()
    plain, converted, inputs = on_device(name)
    compiled = torch.compile(converted, fullgraph=True, mode=mode)
    for model, steps in ((plain, 1), (compiled, 1 if mode == "default" else 4)):
        for _ in range(steps):  # a graph is warmed up, recorded, replayed
            torch.compiler.cudagraph_mark_step_begin()
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                model(**inputs).loss.backward()
    assert worst_error(gradients(converted), gradients(plain)) < 0.15


@pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_each_replay_of_a_compiled_model_draws_seeds_anew(fresh_compiler, monkeypatch):
    monkeypatch.setattr(_seeds, "_counters", {})  # as where nothing has run before
    plain, _, inputs = on_device("bert")
    converted = copy.deepcopy(plain)
    packlight.convert(converted, (GroupQuant(bits=8, group_size=32), FewBit(bits=8)))
    compiled, found = torch.compile(converted, fullgraph=True, mode="reduce-overhead"), []
    for model, steps in ((plain, 1), (compiled, 5)):
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                model(**inputs).loss.backward()
            found.append(torch.cat([g.flatten() for g in gradients(model).values()]))
    assert worst_error(gradients(converted), gradients(plain)) < 0.15
    assert not torch.equal(found[-1], found[-2])
