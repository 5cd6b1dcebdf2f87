"""`predict`: what a run would keep, without the run."""

import copy
import dataclasses
import math
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import FewBit, GroupQuant, Inverted, convert, predict, profile
from packlight.errors import InputError
from packlight.predict import failing_module, predict_change


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, width))
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        x = x + self.drop(self.attention(self.norms[0](x)))
        return x + F.dropout(self.mlp(self.norms[1](x)), 0.1, self.training)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, groups=4), nn.GroupNorm(4, 16), nn.SiLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


MODELS = {
    "transformer": (lambda: nn.Sequential(Block(), Block()), (2, 24, 64)),
    "checkpointed": (Checkpointed, (2, 24, 64)),
    "convolutions": (conv_net, (4, 3, 20, 20)),
}
METHODS = [None, [GroupQuant(), FewBit()], Inverted(), packlight.DEFAULT_METHODS]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("methods", METHODS, ids=["plain", "packs", "inverted", "default"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_the_prediction_is_what_a_run_keeps(name, methods, autocast):
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    if methods is not None:
        convert(model, methods, functional=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        run, predicted = profile(model, x), predict(model, x)
    assert abs(predicted.activation_bytes - run.activation_bytes) <= 0.03 * run.activation_bytes
    for part in ("parameter_bytes", "buffer_bytes", "input_bytes", "allocated_bytes", "peak_bytes"):
        assert getattr(predicted, part) == getattr(run, part)
    assert predicted.by_module().keys() == run.by_module().keys()
    assert predicted.by_operation().keys() == run.by_operation().keys()


def test_nothing_of_the_model_changes_and_no_random_number_is_drawn():
    model, x = nn.Sequential(conv_net(), nn.Dropout(0.5)), torch.randn(4, 3, 20, 20)
    before = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    predict(model, x)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


def test_a_model_without_memory_is_predicted_as_one_with_it():
    model, x = Block(), torch.randn(2, 24, 64)
    expected = predict(model, x)
    with torch.device("meta"):
        meta, meta_x = Block(), torch.randn(2, 24, 64)
    with FakeTensorMode():
        fake, fake_x = Block(), torch.randn(2, 24, 64)
    assert predict(meta, meta_x) == predict(fake, fake_x) == expected
    assert predict(meta, x) == expected


def test_a_model_that_fits_nowhere():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(65536, 65536) for _ in range(8)))
        x = torch.empty(2**16, 65536)
    report = predict(model, x)
    assert report.parameter_bytes > 2**37
    assert report.activation_bytes == 7 * 2**34


def test_loss_keywords_and_structures_are_taken():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, batch, scale=1.0):
            return {"out": torch.tanh(self.fc(batch["x"])) * scale}

    model, x, target = Model(), torch.randn(4, 8), torch.randint(8, (4,))
    call = {"loss": lambda y: F.cross_entropy(y["out"], target), "scale": torch.ones(())}
    assert (
        predict(model, {"x": x}, **call).by_operation()
        == profile(model, {"x": x}, **call).by_operation()
    )


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    x = torch.randn(2, 8)
    assert predict(model, x).parameter_bytes == profile(model, x).parameter_bytes == 4 * 80


def test_what_depends_on_values_names_the_operation_and_the_line():
    class Peeks(nn.Module):
        def forward(self, x):
            return x * x.max().item()

    with pytest.raises(
        InputError, match=r"_local_scalar_dense.*test_predict\.py:\d+.* needs the val"
    ):
        predict(Peeks(), torch.randn(3, requires_grad=True))


class Masked(nn.Module):
    """Looks at a mask, as transformers does: one without padding is not kept."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x, mask=None, lengths=None):
        if mask is None:
            mask = torch.ones(x.shape[:2], device=x.device)
        if lengths is not None:
            x = x[:, : lengths.max().item()]
        positions = torch.arange(x.shape[1], device=x.device)
        y = self.fc(x).exp()
        if (positions.diff() != 1).any() or not mask.all():
            y = y.masked_fill(mask[:, : y.shape[1], None] == 0, 0.0)
        return y


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"mask": torch.ones(4, 8, dtype=torch.bool)},
        {"mask": torch.arange(8) < torch.tensor([[8], [5], [3], [1]])},
        {"lengths": torch.tensor([5, 3, 1, 4])},
    ],
    ids=["made", "whole", "padded", "lengths"],
)
def test_masks_and_lengths_count_by_their_values(given):
    model, x = Masked(), torch.randn(4, 8, 16)
    before = copy.deepcopy(given)
    run, predicted = profile(model, x, **given), predict(model, x, **given)
    assert predicted == run
    assert all(torch.equal(given[name], value) for name, value in before.items())


class Middle(nn.Module):
    """A function of an activation."""

    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(16, 16), function

    def forward(self, x):
        return self.function(self.fc(x))


def clamped(h):
    if torch.isinf(h).any() or torch.isnan(h).any():
        h = torch.clamp(h, -1.0, 1.0)
    return h.sin()


def refused(h):
    loss = h.sin().mean()
    if not torch.isfinite(h).all().item() or loss.isnan() or not torch.isfinite(loss):
        raise ValueError
    if (h != h).any() or h.isnan().sum() > 0 or h.isfinite().sum() != h.numel():
        raise ValueError
    if not (h.abs() < float("inf")).all() or h.isfinite().float().mean() < 1:
        raise ValueError
    return loss


def engine(h):
    loss = h.sin().mean()
    value = loss.item()
    if not math.isfinite(value) or math.isnan(value):
        sys.exit(1)
    return loss if f"{value + 1:.3f}" else None


def variational(h):
    q = torch.distributions.Normal(h, F.softplus(h) + 1e-3)
    p = torch.distributions.Normal(torch.zeros_like(h), torch.ones_like(h))
    return q.rsample().sin() + torch.distributions.kl_divergence(q, p)


def gathered(h):
    """Fake values are written into real tensors."""
    out = torch.zeros(8, 16)
    for row in range(8):
        out[row] = h[row].sin()
    return out.exp()


@pytest.mark.parametrize("function", [clamped, refused, engine, variational, gathered])
def test_activations_are_taken_for_finite_numbers(function):
    model, x = Middle(function), torch.randn(8, 16)
    run, predicted = profile(model, x), predict(model, x)
    assert predicted.activation_bytes == run.activation_bytes > 0
    assert predicted.input_bytes == run.input_bytes


def looked_into(h):
    out = torch.zeros(8, 16)
    out[:] = h
    return out.exp() if (out > 0).any() else out


@pytest.mark.parametrize(
    "function",
    [
        looked_into,
        lambda h: h.sin() if h.max() > 3 else h.cos(),
        lambda h: h.sin() if h.mean().item() > 3 else h.cos(),
        lambda h: h.sin() if (h < 0).any() else h.cos(),
        lambda h: h[: int(h.sum().item())].sin(),
        lambda h: h.sin() * float(h.detach().numpy().max()),
        lambda h: h[h > 0].sin(),
        lambda h: F.dropout(h, h.mean().item()),
    ],
)
def test_other_values_are_not_guessed(function):
    with pytest.raises(InputError, match=r"test_predict\.py:\d+ in .* needs the values"):
        predict(Middle(function), torch.randn(8, 16))


def test_small_data_keeps_its_values():
    class Model(Middle):
        def forward(self, x, mask):
            h = self.fc(x) if x.sum() > 0 else x
            return h.sin().masked_fill(mask, 0.0) if (mask == float("-inf")).any() else h

    model, x, mask = Model(None), torch.ones(4, 16), torch.full((4, 16), -math.inf)
    model_of_bool = Model(None)
    assert predict(model, x, mask.isinf()) == profile(model, x, mask.isinf())
    assert predict(model_of_bool, -x, mask.isinf()) == profile(model_of_bool, -x, mask.isinf())


class Raises:
    def __getattr__(self, name):
        raise ValueError(f"{name} is ambiguous: it differs by layer")


@dataclasses.dataclass
class RaisesForOne:
    width: int = 64

    def __getattribute__(self, name):
        if name == "width":
            raise ValueError("ambiguous")
        return object.__getattribute__(self, name)


class Slots:
    __slots__ = ("empty", "tensor")

    def __init__(self):
        self.tensor = torch.ones(3)


@pytest.mark.parametrize(
    "config",
    [Raises(), RaisesForOne(), Slots(), threading.Lock(), {"inner": Raises()}, sys.stderr],
    ids=lambda config: type(config).__name__,
)
def test_objects_that_refuse_to_be_looked_into_do_not_stop_it(config):
    model, x = conv_net(), torch.randn(4, 3, 20, 20)
    model.config = model[0].config = config
    run, predicted = profile(model, x), predict(model, x)
    assert predicted == run
    assert model.config is config


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("place", ["input", "parameter", "buffer"])
@pytest.mark.parametrize("make", [lambda x: x.as_subclass(Subclass), lambda x: TwoTensor(x, x + 1)])
def test_tensor_subclasses(place, make):
    model, x = Middle(torch.sin), torch.randn(8, 16)
    if place == "parameter":
        model.fc.weight = nn.Parameter(make(torch.randn(16, 16)))
    elif place == "buffer":
        model.register_buffer("buffer", make(torch.randn(16, 16)))
    else:
        x = make(x)
    run, predicted = profile(model, x), predict(model, x)
    for part in ("activation_bytes", "input_bytes", "parameter_bytes", "buffer_bytes"):
        assert getattr(predicted, part) == getattr(run, part)


def test_what_cannot_be_predicted():
    rows = [torch.randn(3, 16), torch.randn(5, 16)]
    with pytest.raises(InputError, match="nested tensor"):
        predict(Middle(torch.sin), torch.nested.nested_tensor(rows, layout=torch.jagged))
    with pytest.raises(InputError, match="no copy without values"):
        predict(F.gelu, torch.randn(3))
    with pytest.raises(InputError, match="not initialised"):
        predict(nn.LazyLinear(3), torch.randn(3, 3))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device cuda is not there"):
            predict(nn.GELU(), torch.randn(3), device="cuda")


def test_a_change_is_what_the_model_keeps_beside_what_it_kept_before_it_was_converted():
    model, x = Block(), torch.randn(2, 16, 64)
    before = predict(model, x).activation_bytes
    convert(model, GroupQuant())
    change = predict_change(model, x)
    assert change.before.activation_bytes == before
    assert change.after.activation_bytes == predict(model, x).activation_bytes < before
    assert packlight.revert(model) > 0  # only a copy was


def test_the_module_that_fails_is_named_from_the_model_on():
    class Fails(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError

    def failing(model):
        with pytest.raises(ZeroDivisionError) as error:
            model(torch.ones(2))
        return failing_module(error.value)

    assert failing(nn.Sequential(nn.Identity(), nn.Sequential(Fails()))) == "1.0 (Fails)"
    assert failing(Fails()) == "the model itself (Fails)"
    assert failing_module(ZeroDivisionError()) == ""
