"""`packlight.graphed`: what is replayed, what is launched, and what is refused.

On a device CUDA records and replays. Without one a stand-in does, which runs the recorded pass
again and writes what it gives into the same memory; all else is the code that a device runs.
"""

import contextlib
import copy
import pickle
import random
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import packlight
from packlight import _seeds
from packlight.errors import CannotGraphError, InputError
from packlight.graphs import Graphs, replay
from packlight.graphs.recorder import CudaRecorder
from tests.blocks import EncoderBlock
from tests.helpers import DEVICES

# On a thread of autograd that has run nothing on the device before.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")


class Again:
    """A recorder without a device."""

    runs_again = True
    replays = 0
    recordings = 0

    def anew(self):
        return Again()

    def restart(self):
        pass

    def is_recording(self):
        return False

    def refuse(self, tensors):
        assert tensors

    @contextlib.contextmanager
    def recording(self, device):
        self.recordings += 1
        state, rounding = torch.get_rng_state(), _seeds.rounding_state()
        yield _seeds.SeedTable(device)
        torch.set_rng_state(state)
        _seeds.set_rounding_state(rounding)

    def warm_up(self, run):
        run()

    def record(self, run):
        state = torch.get_rng_state()  # a pass that is only recorded draws nothing on a device
        found = run()
        torch.set_rng_state(state)

        def again():
            self.replays += 1
            with torch.enable_grad():
                anew = run()
            with torch.no_grad():
                for static, x in zip(found, anew, strict=True):
                    if static is not None:
                        static.copy_(x)

        return found, again


class Counted(CudaRecorder):
    replays = 0
    recordings = 0

    def recording(self, device):
        self.recordings += 1
        return super().recording(device)

    def record(self, run):
        found, again = super().record(run)

        def counted():
            self.replays += 1
            again()

        return found, counted


def graphed(model, shapes=8):
    device = next(model.parameters()).device.type
    return replay(model, Graphs(shapes, Again() if device == "cpu" else Counted())).recorder


def passes(model, *args, **kwargs):
    """Gradients of the parameters, and the result, of one step."""
    for parameter in model.parameters():
        parameter.grad = None
    result = model(*args, **kwargs)
    loss = result if isinstance(result, torch.Tensor) else result["loss"]
    loss.float().add(1).pow(3).mean().backward()  # of a norm's output the square says nothing
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def near(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}")


def mlp(device="cpu", **options):
    layers = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4)
    return nn.Sequential(*layers).to(device, **options)


class Loss(nn.Module):
    """A model with its loss, like those of transformers."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, labels=None, scale=1.0):
        logits = self.body(x) * scale
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits, "name": "loss"}


@pytest.mark.parametrize("device", DEVICES)
def test_steps_are_those_of_a_launched_model(device):
    model = Loss(mlp(device))
    plain = copy.deepcopy(model)
    recorder = graphed(model)
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, plain))
    for _ in range(4):
        x, labels = torch.randn(8, 32, device=device), torch.randint(4, (8,), device=device)
        for m, optimizer in ((model, ours), (plain, theirs)):
            found = m(x, labels=labels)
            found["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert found["name"] == "loss"
        near(dict(model.named_parameters()), dict(plain.named_parameters()))
    assert (recorder.recordings, recorder.replays) == (1, 8)


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_copies(device):
    model = Loss(mlp(device))
    graphed(model)
    x, labels = torch.randn(8, 32, device=device), torch.zeros(8, dtype=torch.long, device=device)
    first = model(x, labels)
    first["loss"].backward()
    logits = first["logits"].detach().clone()
    model(2 * x, labels)["loss"].backward()
    assert torch.equal(first["logits"], logits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_add_up(device, to_none):
    model = mlp(device)
    plain = copy.deepcopy(model)
    recorder = graphed(model)
    for _ in range(3):
        for _ in range(2):
            x = torch.randn(8, 32, device=device)
            model(x).sum().backward()
            plain(x).sum().backward()
        near(
            {name: p.grad for name, p in model.named_parameters()},
            {name: p.grad for name, p in plain.named_parameters()},
        )
        model.zero_grad(to_none)
        plain.zero_grad(to_none)
    assert recorder.replays == 12


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_add_up_over_kinds_of_inputs(device):
    """The second recording's gradients may lie where the first has let activations go."""
    model = mlp(device)
    plain = copy.deepcopy(model)
    recorder = graphed(model)
    for rows in (512, 8, 512, 8):
        x = torch.randn(rows, 32, device=device)
        result = model(x)
        recorded = vars(model)["_packlight_graphs"].recordings
        places = {g.data_ptr() for each in recorded for g in each.gradients}
        assert all(p.grad is None or p.grad.data_ptr() not in places for p in model.parameters())
        result.sum().backward()
        plain(x).sum().backward()
        near(
            {name: p.grad for name, p in model.named_parameters()},
            {name: p.grad for name, p in plain.named_parameters()},
        )
    assert recorder.replays == 8


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_that_is_held_is_not_overwritten(device):
    model = mlp(device)
    recorder = graphed(model)
    x = torch.randn(8, 32, device=device)
    model(x).sum().backward()
    held = model[0].weight.grad.view(-1)
    was = held.clone()
    model.zero_grad()
    with pytest.warns(UserWarning, match="still referred to"):
        model(-3 * x).sum().backward()
    assert recorder.replays == 2
    assert torch.equal(held, was)
    del held
    model.zero_grad()
    model(x).sum().backward()
    assert recorder.replays == 4
    assert torch.equal(model[0].weight.grad.view(-1), was)


def test_gradients_are_copies_where_torch_does_not_count(monkeypatch):
    from packlight import _torch

    monkeypatch.setattr(_torch.STORAGE_USES, "values", None)
    model = mlp()
    recorder = graphed(model)
    x = torch.randn(8, 32)
    model(x).sum().backward()
    held = model[0].weight.grad.view(-1)
    was = held.clone()
    model.zero_grad()
    model(-3 * x).sum().backward()
    assert recorder.replays == 4
    assert torch.equal(held, was)


@pytest.mark.parametrize("device", DEVICES)
def test_two_passes_before_a_backward_pass(device):
    model = mlp(device)
    plain = copy.deepcopy(model)
    recorder = graphed(model)
    x, y = torch.randn(2, 8, 32, device=device)
    for m in (model, plain):
        (m(x) * m(y)).sum().backward()
    assert recorder.replays == 2  # the second pass was launched
    near(
        {name: p.grad for name, p in model.named_parameters()},
        {name: p.grad for name, p in plain.named_parameters()},
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_pass_without_its_backward_pass_holds_nothing_up(device):
    model = mlp(device)
    recorder = graphed(model)
    x = torch.randn(8, 32, device=device)
    for _ in range(3):
        model(x)
    assert recorder.replays == 3


def test_a_second_backward_pass_is_refused():
    model = mlp()
    graphed(model)
    loss = model(torch.randn(8, 32)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran already"):
        loss.backward()


def test_another_result_is_not_differentiated():
    model = Loss(mlp())
    graphed(model)
    found = model(torch.randn(8, 32), torch.zeros(8, dtype=torch.long))
    with pytest.raises(RuntimeError, match="another result is differentiated"):
        (found["loss"] + found["logits"].sum()).backward()


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_get_gradients(device):
    model = mlp(device)
    plain = copy.deepcopy(model)
    recorder = graphed(model)
    for _ in range(2):
        x = torch.randn(8, 32, device=device, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        model(x).sum().backward()
        plain(y).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    assert (recorder.recordings, recorder.replays) == (1, 4)


# ---- kinds of input ------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(0.5))
        self.last = nn.Linear(32, 1)
        self.weights = None  # tensors that are no buffers

    def forward(self, x, factor=1.0):
        y = self.last(self.inner(x)) * factor
        return y if self.weights is None else y * self.weights


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def weighted(model, x, value):
    model.weights = torch.full((1,), value, dtype=x.dtype, device=x.device)
    return {}


CHANGES = {
    "a shape": lambda m, x: ((x[:4],), {}),
    "a dtype": lambda m, x: ((x.double(),), {}) if m.double() else None,
    "a number": lambda m, x: ((x, 2.0), {}),
    "a keyword": lambda m, x: ((), {"x": x}),
    "requires_grad of the input": lambda m, x: ((x.clone().requires_grad_(),), {}),
    "requires_grad of a parameter": lambda m, x: ((x,), m.last.requires_grad_(False) and {}),
    "training of a part": lambda m, x: ((x,), m.inner.eval() and {}),
    "an attribute": lambda m, x: ((x,), setattr(m.inner[2], "p", 0.1) or {}),
    "a parameter's memory": lambda m, x: (
        (x,), setattr(m.last.weight, "data", m.last.weight.data.clone()) or {}
    ),
    "a tensor that is an attribute": lambda m, x: ((x,), weighted(m, x, 3.0)),
    "the class of a part": lambda m, x: ((x,), setattr(m.last, "__class__", Doubled) or {}),
    "the forward of a part": lambda m, x: ((x,), setattr(m.inner[2], "forward", torch.tanh) or {}),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_recorded_anew(device, change):
    model = Mixed().to(device)
    recorder = graphed(model)
    x = torch.randn(8, 32, device=device)
    weighted(model, x, 1.0)
    passes(model, x)
    passes(model, x)
    assert recorder.recordings == 1
    args, kwargs = CHANGES[change](model, x)
    plain = copy.deepcopy(model)
    packlight.launched(plain)
    for p in (part for m in (model, plain) for part in m.modules() if isinstance(part, nn.Dropout)):
        p.p = p.p if change == "an attribute" else 0.0
    before = recorder.recordings
    ours = passes(model, *args, **kwargs)
    assert recorder.recordings == before + 1
    if change != "an attribute":
        torch.testing.assert_close(ours, passes(plain, *args, **kwargs))


def test_what_is_no_training_pass_is_launched():
    model = mlp()
    recorder = graphed(model)
    x = torch.randn(8, 32)
    with torch.no_grad():
        model(x)
    model.eval()
    model(x).sum().backward()
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        model(x).sum().backward()
    assert recorder.recordings == 0


def test_kinds_are_recorded_up_to_a_number():
    model = mlp()
    recorder = graphed(model, shapes=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            for rows in (1, 2, 3, 4):
                passes(model, torch.randn(rows, 32))
    assert [str(w.message) for w in said] == [
        "packlight.graphed: 2 kinds of inputs are recorded, and this is one more: it is launched;"
        " pad inputs to fewer shapes, or raise shapes="
    ]
    assert (recorder.recordings, recorder.replays) == (2, 8)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    model = mlp(device)
    plain = copy.deepcopy(model)
    recorder = graphed(model)
    x = torch.randn(8, 32, device=device)
    for _ in range(2):
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(device, dtype=dtype):
                ours, theirs = passes(model, x), passes(plain, x)
            assert ours[0].dtype == dtype
            torch.testing.assert_close(ours, theirs)
    assert (recorder.recordings, recorder.replays) == (2, 8)


@pytest.mark.parametrize("device", DEVICES)
def test_buffers_are_those_of_a_launched_model(device):
    model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16)).to(device)
    plain = copy.deepcopy(model)
    graphed(model)
    for _ in range(3):
        x = torch.randn(8, 32, device=device)
        passes(model, x)
        passes(plain, x)
        near(dict(model.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("device", DEVICES)
def test_random_numbers_go_on(device):
    """Masks and rounding differ from replay to replay, and a seed repeats them."""
    model = EncoderBlock(64, 4, 256, p=0.5).to(device)
    packlight.convert(model, packlight.GroupQuant(2, 32), functional=True)
    graphed(model)
    x = torch.randn(4, 16, 64, device=device)
    runs = []
    for seed in (0, 1, 0):
        packlight.manual_seed(seed)
        runs.append([passes(model, x) for _ in range(2)])
    if device == "cuda":
        runs = runs[1:]  # the first run has recorded
    else:
        torch.testing.assert_close(runs[0], runs[2], rtol=0, atol=0)
    outputs = [found[0] for run in runs[:2] for found in run]
    for i, a in enumerate(outputs):
        assert not any(torch.equal(a, b) for b in outputs[:i])


@pytest.mark.parametrize("device", DEVICES)
def test_rounding_is_unbiased_over_replays(device):
    model = nn.Linear(64, 16).to(device)
    plain = copy.deepcopy(model)
    packlight.convert(model, packlight.GroupQuant(2, 32))
    recorder = graphed(model)
    x = torch.randn(32, 64, device=device)
    exact = passes(plain, x)[1]["weight"]
    found = torch.stack([passes(model, x)[1]["weight"] for _ in range(200)])
    assert recorder.recordings == 1
    one = (found[0] - exact).norm()
    assert (found.mean(0) - exact).norm() < 0.15 * one  # 1 / sqrt(200) = 0.07


# ---- what is refused -----------------------------------------------------------------------------


class Body(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.function = function

    def forward(self, x):
        return self.function(self, self.layer(x))


class Cache:
    pass


def _counts(module, x):
    module.steps = getattr(module, "steps", 0) + 1
    return x


def _leaves_a_tensor(module, x):
    module.loss = x.square().mean()
    return x


def _leaves_a_tensor_in(container):
    def put(module, x):
        values = vars(module).setdefault("values", container())
        if container is dict:
            values["loss"] = x.detach().mean()
        else:
            values.append(x.detach().mean())
        return x

    return put


def _counts_in_a_tensor(module, x):
    module.__dict__.setdefault("steps", torch.zeros(())).add_(1)
    return x


STRAY = torch.ones(8, requires_grad=True)
REFUSED = {
    "draws random numbers on the CPU": lambda m, x: x if random.random() < 2 else -x,
    "changes attributes of Body": _counts,
    "set use_cache=False": lambda m, x: (x, Cache()),
    "neither an argument nor a parameter": lambda m, x: x * STRAY,
    "no result of the pass requires a gradient": lambda m, x: x.detach(),
}


CHANGING = {
    "a number": _counts,
    "a tensor": _leaves_a_tensor,
    "a list": _leaves_a_tensor_in(list),
    "a dictionary": _leaves_a_tensor_in(dict),
    "values of a tensor": _counts_in_a_tensor,
}


@pytest.mark.parametrize("kind", CHANGING)
def test_attributes_that_a_pass_changes(kind):
    """Also where they are there before, so that no attribute is new."""
    model = Body(CHANGING[kind])
    model(torch.randn(2, 8))
    recorder = graphed(model)
    for _ in range(3):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            passes(model, torch.randn(2, 8))
        assert recorder.replays == 0
        assert all("changes attributes of Body" in str(each.message) for each in said)


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_recorded_is_launched_with_a_warning(reason):
    model = Body(REFUSED[reason])
    graphs = Graphs(8, Again())
    replay(model, graphs)
    x = torch.randn(2, 8)
    with pytest.warns(UserWarning, match=reason):
        found = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        model(x)
    assert graphs.recorder.replays == 0
    expected = model.function(model, F.linear(x, model.layer.weight, model.layer.bias))
    torch.testing.assert_close(
        found[0] if isinstance(found, tuple) else found,
        expected[0] if isinstance(expected, tuple) else expected,
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["of a part", "of all modules"])
@pytest.mark.parametrize("name", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_every_kind(name, kind, when):
    model = mlp()
    recorder = graphed(model)
    x = torch.randn(8, 32, requires_grad=True)  # else a full backward hook warns
    if when == "after":
        passes(model, x)
    replays, calls = recorder.replays, []
    register = (
        getattr(model[1], f"register_{name}_hook")
        if kind == "of a part"
        else getattr(nn.modules.module, f"register_module_{name}_hook")
    )
    handle = register(lambda module, *_: calls.append(module))
    try:
        with pytest.warns(UserWarning, match="has hooks"):
            passes(model, x)
        passes(model, x)
    finally:
        handle.remove()
    assert calls.count(model[1]) == 2
    assert recorder.replays == replays


def triple(parameter):
    parameter.grad.mul_(3)


def test_hooks_of_parts_are_refused_and_others_run():
    model = mlp()
    recorder = graphed(model)
    calls = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    x = torch.randn(8, 32)
    passes(model, x)
    passes(model, x)
    assert (recorder.replays, calls) == (4, ["model"] * 2)
    model = mlp()
    graphed(model)
    model[1].register_forward_hook(lambda *_: calls.append("part"))
    with pytest.warns(UserWarning, match="1 has hooks"):
        passes(model, x)
    model = mlp()
    plain = copy.deepcopy(model)
    recorder = graphed(model)
    for m in (model, plain):
        m[0].weight.register_hook(lambda g: 2 * g)
        m[0].bias.register_post_accumulate_grad_hook(triple)
    for _ in range(2):
        near(passes(model, x)[1], passes(plain, x)[1])
    assert recorder.replays == 4


def test_parts_that_are_replaced_and_hooks_that_come_later_are_seen():
    model = mlp()
    recorder = graphed(model)
    x = torch.randn(8, 32)
    passes(model, x)
    model[2] = nn.Linear(64, 4)
    plain = copy.deepcopy(model)
    packlight.launched(plain)
    near(passes(model, x)[1], passes(plain, x)[1])
    assert (recorder.recordings, recorder.replays) == (2, 4)
    calls = []
    handle = model[1].register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="1 has hooks"):
        passes(model, x)
    assert (calls, recorder.replays) == ([1], 4)
    handle.remove()
    passes(model, x)
    assert recorder.replays == 6


def test_an_argument_that_is_no_value():
    model = Loss(mlp())
    graphed(model)
    assert model(torch.randn(2, 32), scale=1.0, labels=None)["loss"] is None
    with (
        pytest.warns(UserWarning, match="an argument is a Cache"),
        pytest.raises(TypeError),
    ):
        model(torch.randn(2, 32), scale=Cache())


def test_a_torch_that_does_not_take_arguments_apart(monkeypatch):
    from packlight import _torch

    monkeypatch.setattr(_torch.TREES, "values", None)
    with pytest.raises(CannotGraphError, match="take arguments apart"):
        packlight.graphed(mlp())


def test_wrong_arguments():
    with pytest.raises(InputError, match=r"expected an nn\.Module"):
        packlight.graphed(torch.ones(1))
    with pytest.raises(InputError, match="shapes=0"):
        packlight.graphed(mlp(), shapes=0)
    model = packlight.graphed(mlp())
    with pytest.raises(CannotGraphError, match="are on cpu"):
        packlight.graphed(model, torch.randn(8, 32))
    with pytest.warns(UserWarning, match="are on cpu"):
        passes(model, torch.randn(8, 32))
    with pytest.raises(CannotGraphError, match=r"eval\(\)"):
        packlight.graphed(model.eval(), torch.randn(8, 32))


@pytest.mark.gpu
def test_what_waits_for_the_device_is_refused():
    model = Body(lambda m, x: x if x.sum().item() < 1e9 else -x).cuda()
    x = torch.randn(2, 8, device="cuda")
    with pytest.raises(CannotGraphError, match="waits for the device"):
        packlight.graphed(model, x)
    packlight.launched(model)
    packlight.graphed(model)
    with pytest.warns(UserWarning, match="waits for the device"):
        model(x).sum().backward()
    assert model.layer.weight.grad is not None
    model.eval()
    with pytest.raises(CannotGraphError, match="in eval"):
        packlight.graphed(model, x)


# ---- conversions, copies -------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_converting_and_reverting(device):
    model = EncoderBlock(64, 4, 256, p=0.0).to(device)
    plain = copy.deepcopy(model)
    kind = type(model)
    recorder = graphed(model)
    x = torch.randn(4, 16, 64, device=device)
    near(passes(model, x)[1], passes(plain, x)[1])
    packlight.convert(model, packlight.GroupQuant(8), functional=True)
    converted = passes(model, x)[1]
    assert recorder.recordings == 2
    for name, exact in passes(plain, x)[1].items():
        if name == "attention.k.bias":  # 0: a softmax is blind to it
            continue
        error = (converted[name] - exact).norm() / exact.norm()
        assert error < 0.05, (name, error)
    assert packlight.revert(model) > 0
    assert type(model) is kind
    near(passes(model, x)[1], passes(plain, x)[1])
    assert packlight.launched(model) == 0


def test_copies_and_files():
    model = Loss(mlp())
    keys = list(model.state_dict())
    recorder = graphed(model)
    x, labels = torch.randn(8, 32), torch.zeros(8, dtype=torch.long)
    passes(model, x, labels)
    assert isinstance(model, Loss)
    assert type(model).__name__ == "Loss"
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        near(passes(other, x, labels)[1], passes(model, x, labels)[1])
        own = vars(other)["_packlight_graphs"].recorder
        assert own is not recorder
        assert own.replays == 2
        assert packlight.launched(other) == 1
        assert type(other) is Loss


def test_a_graphed_part_within_a_graphed_model():
    model = Loss(mlp())
    plain = copy.deepcopy(model)
    inner = graphed(model.body)
    x, labels = torch.randn(8, 32), torch.zeros(8, dtype=torch.long)
    near(passes(model, x, labels)[1], passes(plain, x, labels)[1])
    assert inner.replays == 2
    outer = graphed(model)  # its graphs hold those of its parts
    near(passes(model, x, labels)[1], passes(plain, x, labels)[1])
    assert (outer.replays, inner.replays) == (2, 2)
    assert packlight.launched(model) == 1


# ---- models of transformers ----------------------------------------------------------------------


def llama(**options):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head", [False, True])
def test_a_language_model(device, head):
    model = llama(use_cache=False).to(device)
    plain = copy.deepcopy(model)
    packlight.convert(model, packlight.GroupQuant(8), functional=True, head=head)
    recorder = graphed(model)
    for _ in range(2):
        ids = torch.randint(3, 120, (2, 16), device=device)
        ours = passes(model, input_ids=ids, labels=ids)
        theirs = passes(plain, input_ids=ids, labels=ids)
        torch.testing.assert_close(ours[0], theirs[0])
        for name, exact in theirs[1].items():
            error = (ours[1][name] - exact).norm() / exact.norm()
            assert error < 0.1, (name, error)
    assert (recorder.recordings, recorder.replays) == (1, 4)
    found = model(input_ids=ids, labels=ids)
    if head:
        with pytest.raises(AttributeError, match="gives no logits"):
            found.logits.argmax(-1)
    else:
        torch.testing.assert_close(found.logits, plain(input_ids=ids).logits)
    model.eval()
    torch.testing.assert_close(
        model(input_ids=ids).logits.float(), plain.eval()(input_ids=ids).logits.float()
    )


def test_a_cache_is_refused_with_a_hint():
    model = llama()
    graphed(model)
    ids = torch.randint(3, 120, (2, 16))
    with pytest.warns(UserWarning, match="set use_cache=False"):
        passes(model, input_ids=ids, labels=ids)


class Wrapped(nn.Module):
    """Packs two sequences into a row, which the arguments of the whole do not say."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels):
        half = torch.arange(input_ids.shape[1] // 2)
        positions = torch.cat([half, half]).expand_as(input_ids)
        return self.model(input_ids=input_ids, labels=labels, position_ids=positions)


def test_masks_are_those_of_a_launched_pass(monkeypatch):
    """A pass that is captured makes a mask of its own accord, which the faster kernels lack."""
    masks = []

    def attention(query, key, value, attn_mask=None, **options):
        masks.append(attn_mask)
        return plain_attention(query, key, value, attn_mask=attn_mask, **options)

    plain_attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ids = torch.randint(3, 120, (2, 16))
    model = packlight.graphed(llama(use_cache=False))
    vars(model)["_packlight_graphs"].recorder = Again()
    given = [{}, {"attention_mask": torch.ones_like(ids)}, {"position_ids": ids}]
    for more in given:
        masks.clear()
        passes(model, input_ids=ids, labels=ids, **more)
        recorded = masks[:4]  # two layers, warmed up and recorded; then the stand-in replays
        assert all((mask is None) == (not more) for mask in recorded), more
    adapted = peft.get_peft_model(llama(use_cache=False), peft.LoraConfig())
    for model, is_free in ((adapted, True), (Wrapped(llama(use_cache=False)), False)):
        packlight.graphed(model)
        vars(model)["_packlight_graphs"].recorder = Again()
        masks.clear()
        passes(model, input_ids=ids, labels=ids)
        assert all((mask is None) == is_free for mask in masks[:4]), type(model)


@pytest.mark.parametrize("device", DEVICES)
def test_a_trainer_and_an_adapter(tmp_path, device):
    """A Trainer's steps are those of a launched model; PEFT's adapters are trained alone."""
    settings = {
        "output_dir": str(tmp_path), "use_cpu": device == "cpu", "report_to": [], "max_steps": 3,
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no",
        "seed": 3,
        "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 1,
    }  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 120, (64, 16))]
    models = [peft.get_peft_model(llama(use_cache=False), peft.LoraConfig()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        packlight.convert(model, packlight.GroupQuant(8, rounding="nearest"), functional=True)
        model.to(device)
    recorder = graphed(models[0])
    for model in models:
        arguments = transformers.TrainingArguments(**settings)
        transformers.Trainer(model, arguments, train_dataset=rows).train()
    near(models[0].state_dict(), models[1].state_dict())
    assert (recorder.recordings, recorder.replays) == (1, 12)
