"""Where random numbers come from: rounding has a stream of its own, masks are torch's."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import packlight
from packlight import DEFAULT_REST, FewBit, GroupQuant, Sketch, _seeds, _torch
from packlight import groupquant as gq

LAYERS = {
    "GroupQuant": (GroupQuant(bits=4), lambda: nn.Linear(64, 64)),
    "norm": (GroupQuant(bits=2), lambda: nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))),
    "activation": (GroupQuant(bits=2), lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU())),
    "sketch": (Sketch(rows=0.5, min_rows=1), lambda: nn.Linear(64, 64)),
}


def gradients_of_two_steps(model, x, run=None):
    found = []
    for _ in range(2):
        model.zero_grad()
        (model if run is None else run)(x.clone()).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return found


def train(method, make, compiled=False):
    """The model's next draw, and gradients of two steps, from a seed on."""
    torch.manual_seed(0)
    model = make()
    if method is not None:
        packlight.convert(model, method)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    x = torch.randn(32, 64)
    found = gradients_of_two_steps(model, x, run)
    return torch.rand(3).tolist(), found


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", LAYERS)
def test_rounding_draws_nothing_from_torch_differs_by_step_and_repeats(
    name, compiled, fresh_compiler
):
    method, make = LAYERS[name]
    plain, _ = train(None, make)
    draws, (first, second) = train(method, make, compiled)
    again, (first_again, second_again) = train(method, make, compiled)
    assert draws == plain == again
    assert not torch.equal(first, second)
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)


def test_manual_seed_starts_a_converted_model_anew():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.3), nn.Linear(64, 64))
    packlight.convert(model, [GroupQuant(bits=4), FewBit(3)])
    x = torch.randn(32, 64)
    runs = []
    for _ in range(2):
        packlight.manual_seed(3)
        runs.append(gradients_of_two_steps(model, x))
    assert all(map(torch.equal, *runs))


def test_manual_seed_seeds_torch():
    torch.manual_seed(5)
    expected = torch.rand(2)
    packlight.manual_seed(5)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("seed", [1.0, "1", True, None])
def test_manual_seed_refuses_what_is_no_whole_number(seed):
    with pytest.raises(packlight.InputError, match="seed="):
        packlight.manual_seed(seed)


def test_a_layer_that_is_made_starts_its_rounding():
    def run():
        torch.manual_seed(1)
        layer = gq.Linear(64, 64)
        return gradients_of_two_steps(layer, torch.randn(32, 64))

    (first, second), again = run(), run()
    assert not torch.equal(first, second)
    assert all(map(torch.equal, (first, second), again))


def test_saving_rounds_by_the_same_rule():
    def run(packs):
        torch.manual_seed(0)
        model, found = nn.Linear(64, 64), []
        for _ in range(2):
            x = torch.randn(32, 64).requires_grad_() * 1.0
            model.zero_grad()
            if packs:
                with packlight.saving(GroupQuant(bits=4), min_bytes=0):
                    loss = model(x).square().sum()
            else:
                loss = model(x).square().sum()
            loss.backward()
            found.append(model.weight.grad)
        return torch.rand(1).item(), found

    plain, _ = run(False)
    draw, (first, second) = run(True)
    again, repeated = run(True)
    assert plain == draw == again
    assert not torch.equal(first, second)
    assert all(map(torch.equal, (first, second), repeated))


def test_two_contexts_of_one_generator_state_round_differently():
    model, x = nn.Linear(64, 64), torch.randn(32, 64, requires_grad=True)
    found = []
    for _ in range(2):
        model.zero_grad()
        with packlight.saving(GroupQuant(bits=4), min_bytes=0):
            loss = model(x * 1.0).square().sum()
        loss.backward()
        found.append(model.weight.grad)
    assert not torch.equal(*found)


def test_converting_again_what_is_converted_does_not_start_the_stream_anew():
    model, x = nn.Linear(64, 64), torch.randn(32, 64)
    packlight.convert(model, GroupQuant(bits=4))
    (first, _) = gradients_of_two_steps(model, x)
    packlight.convert(model, GroupQuant(bits=4))
    assert not torch.equal(first, gradients_of_two_steps(model, x)[0])


def test_a_stream_goes_on_from_its_state():
    model, x = nn.Linear(64, 64), torch.randn(32, 64)
    packlight.convert(model, GroupQuant(bits=4))
    gradients_of_two_steps(model, x)
    state = _seeds.rounding_state()
    expected = gradients_of_two_steps(model, x)
    gradients_of_two_steps(model, x)
    _seeds.set_rounding_state(state)
    assert all(map(torch.equal, gradients_of_two_steps(model, x), expected))


def test_numbers_of_a_stream_differ_and_are_integers_of_64_bits():
    numbers = {_seeds.mixed(base, count) for base in (0, 1, 2**64 - 1) for count in range(1000)}
    assert len(numbers) == 3000
    assert all(2**62 <= number < 2**63 for number in numbers)


class Generator:
    """What is asked of the generator of a CUDA device."""

    def __init__(self, seed, offset=0):
        self.seed, self.offset = seed, offset

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset


class OnCuda:
    is_cuda, is_meta = True, False

    def get_device(self):
        return 0


def test_a_mask_s_seed_on_a_gpu_is_read_off_the_generator_which_moves_on(monkeypatch):
    generator = Generator(3)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,), raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first, second = (_seeds.mask_seed(OnCuda()) for _ in range(2))
    assert generator.offset == 8
    generator.set_offset(0)
    assert (_seeds.mask_seed(OnCuda()), _seeds.mask_seed(OnCuda())) == (first, second)
    assert first != second
    generator.seed, generator.offset = 4, 0
    assert _seeds.mask_seed(OnCuda()) != first


def test_masks_come_from_torch_s_generator():
    x = torch.ones(64, 64)
    torch.manual_seed(1)
    first = packlight.fewbit.dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(packlight.fewbit.dropout(x, 0.5), first)
    assert not torch.equal(packlight.fewbit.dropout(x, 0.5), first)


def test_a_captured_graph_advances_a_counter_that_was_there_before(monkeypatch):
    device = torch.device("cuda", 0)
    counter = torch.zeros(1, dtype=torch.int64)
    monkeypatch.setattr(_seeds, "_counters", {device: counter})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    first, second = (_seeds._reference(device, 0) for _ in range(2))
    assert counter.item() == 2
    assert first.item() != second.item()


@pytest.mark.parametrize("captured", [False, True])
def test_seeds_drawn_at_once_are_those_of_a_device_without_steps(captured, monkeypatch):
    device = torch.device("cpu") if not captured else torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    drawn = []
    steps = _seeds._made_steps(torch.device("cpu"))
    monkeypatch.setattr(_seeds, "_made_steps", lambda device: steps.clone())
    for kept in ({}, {device: steps}):
        monkeypatch.setattr(_seeds, "_steps", kept)
        monkeypatch.setattr(_seeds, "_counters", {device: torch.zeros(1, dtype=torch.int64)})
        packlight.manual_seed(3)
        drawn.append([_seeds._seeds_reference(device, 0) for _ in range(2)])
    assert all(map(torch.equal, *drawn))
    first, second = drawn[0]
    assert (first.shape, first.dtype) == ((512,), torch.int64)
    assert len({*first.tolist(), *second.tolist()}) == 1024


def test_seeds_of_a_graph_are_told_apart_and_are_one_number_each(fresh_compiler):
    """A compiler makes one of two equal calls."""
    calls = []

    def backend(graph, _):
        nodes = (node for node in graph.graph.nodes if node.op == "call_function")
        calls.extend(node.args for node in nodes if "next_rounding_seed" in str(node.target))
        return graph

    def seeds(x):
        seeds = [_seeds.rounding_seed(x) for _ in range(2)]
        return *seeds, _seeds.rounding_tensor(x), _seeds.mask_seed(x)

    found = torch.compile(seeds, backend=backend, fullgraph=True)(torch.ones(3))
    assert [(seed.shape, seed.dtype) for seed in found] == [((1,), torch.int64)] * 4
    assert len(set(calls)) == 3
    assert len({seed.item() for seed in found}) == 4


def test_a_device_has_one_counter_that_any_later_pass_may_write_to(monkeypatch):
    monkeypatch.setattr(_seeds, "_counters", {})
    with torch.inference_mode():
        counter = _seeds._counter(torch.device("cpu"))
    assert torch.equal(counter.add_(1), torch.ones(1, dtype=torch.int64))
    assert _seeds._counter(torch.device("cpu")) is counter
    assert _seeds._counter(torch.device("meta")).device.type == "meta"


def test_seeds_of_other_tensors_than_cuda_s_make_no_counter(monkeypatch):
    monkeypatch.setattr(_seeds, "_counters", {})
    for x in (torch.ones(3), torch.ones(3, device="meta")):
        assert isinstance(_seeds.rounding_seed(x), int)
        assert _seeds.rounding_tensor(x).device == x.device
    assert not _seeds._counters


@pytest.mark.usefixtures("collected")
@pytest.mark.gpu
def test_replays_of_a_graph_round_differently_and_draw_nothing_from_torch():
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, device="cuda")
    packlight.convert(layer, GroupQuant(bits=4))
    x = torch.randn(32, 64, device="cuda")

    def step():
        layer.zero_grad(set_to_none=False)
        layer(x * 1.0).square().sum().backward()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    found = []
    offset = torch.cuda.default_generators[0].get_offset()
    for _ in range(3):
        graph.replay()
        found.append(layer.weight.grad.clone())
    assert torch.cuda.default_generators[0].get_offset() == offset
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_a_loop_that_resumes_needs_the_stream_of_rounding():
    def resumed(with_rounding):
        torch.manual_seed(0)
        layer = packlight.groupquant.Linear(64, 64, bits=2)
        x = torch.randn(256, 64)
        layer(x).sum().backward()  # the step before the checkpoint
        state, generator = packlight.rounding_state(), torch.get_rng_state()
        layer.zero_grad()
        layer(x).square().sum().backward()
        expected = layer.weight.grad
        packlight.manual_seed(99)  # another process
        torch.set_rng_state(generator)
        if with_rounding:
            packlight.set_rounding_state(state)
        layer.zero_grad()
        layer(x).square().sum().backward()
        return torch.equal(layer.weight.grad, expected)

    assert resumed(with_rounding=True)
    assert not resumed(with_rounding=False)


@pytest.mark.parametrize("around", [contextlib.nullcontext, lambda: packlight.saving(DEFAULT_REST)])
def test_a_loop_with_dropout_resumes_bit_for_bit(around):
    def made():
        layers = nn.Linear(64, 64), nn.Dropout(0.3), nn.GELU(), nn.LogSigmoid()
        model = nn.Sequential(*layers, nn.Linear(64, 1))
        packlight.convert(model)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def steps(model, optimizer, count):
        for _ in range(count):
            with around():
                loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.manual_seed(0)
    x = torch.randn(256, 64)
    model, optimizer = made()
    steps(model, optimizer, 2)
    weights = copy.deepcopy(model.state_dict())
    generator, rounding = torch.get_rng_state(), packlight.rounding_state()
    without_a_break = steps(model, optimizer, 3)
    packlight.manual_seed(99)  # another process
    model, optimizer = made()
    model.load_state_dict(weights)
    torch.set_rng_state(generator)
    packlight.set_rounding_state(rounding)
    assert torch.equal(steps(model, optimizer, 3), without_a_break)


@pytest.mark.parametrize("draw", [_seeds.rounding_seed, _seeds.rounding_tensor])
def test_a_counter_is_there_before_traced_code_runs_on_a_device(draw, monkeypatch):
    """What runs first may be a warm-up in the memory of CUDA graphs, where nothing may live on."""
    made = []
    with FakeTensorMode():
        here, there = torch.empty(2), torch.empty(2, device="cuda:0")
        monkeypatch.setattr(_seeds, "_counter", made.append)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(_torch, "is_traced", lambda: True)
        draw(here)
        assert made == []
        draw(there)
    assert made == [torch.device("cuda:0")]
