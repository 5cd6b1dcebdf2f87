"""`choose` reaches its ratio, measured by other means, with no more rows than that takes."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight import GroupQuant, Sketch, sketch
from packlight.errors import InputError
from packlight.sketch import choosing
from packlight.sketch.choosing import _SHARES

WIDTH, CLASSES = 12, 5


class Attention(nn.Module):
    """Three projections of one tensor, one of them through a view, and a fourth of their sum."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        q, k = self.q(x).tanh(), self.k(x).relu()
        return self.out(q + 3 * k + self.v(x.view(-1, WIDTH)).view_as(x))


def batches_of(count=3, tokens=240, like=lambda x: x):
    return [
        (like(torch.randn(4, tokens // 4, WIDTH)), torch.randint(CLASSES, (tokens,)))
        for _ in range(count)
    ]


def loss_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1])


def heavy(x):
    """Tokens of very different weight, so that kinds differ."""
    return x * torch.rand(*x.shape[:-1], 1).pow(3) * 4


def weight_gradients(model, batch):
    model.zero_grad()
    loss_of(model)(batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.dim() == 2}


def inputs_and_gradients(model, batch):
    """By layer, x and the gradient of the output, by hooks of this test's own."""
    found, handles = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):

            def forward(module, args, output, name=name):
                output.register_hook(lambda g: found.update({name: (args[0].detach(), g)}))

            handles.append(layer.register_forward_hook(forward))
    loss_of(model)(batch).backward()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("kind", "ratio"), [("rows", 1.0), ("srht", 1.0), ("top_rows", 3.0), ("gaussian", 8.0)]
)
def test_the_chosen_rows_reach_the_ratio_in_simulation(kind, ratio):
    """Variances of gradients of the converted model over its draws, beside those of samples."""
    packlight.manual_seed(0)
    model = Attention()
    batch = batches_of(1, 240, heavy)[0]
    chosen = sketch.choose(model, [batch], ratio, loss=loss_of(model), kinds=[kind])
    own = {
        name: sketch.sample_variance(*pair).item()
        for name, pair in inputs_and_gradients(model, batch).items()
    }
    exact = weight_gradients(model, batch)
    packlight.convert(model, chosen)
    draws = 200
    errors = dict.fromkeys(exact, 0.0)
    for _ in range(draws):
        for name, gradient in weight_gradients(model, batch).items():
            errors[name] += (gradient - exact[name]).square().sum().item() / draws
    assert any(layer.method for layer in chosen.layers)
    for layer in chosen.layers:
        measured = errors[f"{layer.name}.weight"] / own[layer.name]
        if layer.method is None:
            assert measured == 0
            assert layer.ratio > ratio
        else:
            assert measured < ratio * 1.15
            assert measured == pytest.approx(layer.ratio, rel=0.15)


def test_no_fewer_rows_would_do():
    packlight.manual_seed(1)
    model = nn.Linear(WIDTH, CLASSES)
    batches = batches_of(3, 400, heavy)
    chosen = sketch.choose(model, batches, 1.0, loss=loss_of(model), kinds=["srht"])
    (layer,) = chosen.layers
    pairs = [inputs_and_gradients(model, batch)[""] for batch in batches]
    own = sum(sketch.sample_variance(*pair) for pair in pairs)

    def ratio(share):
        return (sum(sketch.variance(*pair, "srht", share) for pair in pairs) / own).item()

    share = layer.method.rows
    assert layer.ratio == pytest.approx(ratio(share))
    assert layer.ratio <= 1 < ratio(_SHARES[_SHARES.index(share) + 1])
    assert (layer.tokens, layer.rows) == (400, layer.method.row_count(400))


def test_rows_need_what_is_known_of_them():
    model = Attention()
    for ratio, share in ((1.0, 0.5), (3.0, 0.25), (15.0, 0.0625)):
        batches = batches_of(2, 480)
        chosen = sketch.choose(model, batches, ratio, loss=loss_of(model), kinds=["rows"])
        assert {layer.method for layer in chosen.layers} == {Sketch(share, "rows")}
        assert all(layer.ratio == pytest.approx(ratio) for layer in chosen.layers)


def test_the_kind_with_the_fewest_rows():
    """Norms that go with gradients are what transforms are better at; ties go to the first."""
    packlight.manual_seed(2)
    model = Attention()
    for like, kinds in ((heavy, ["rows", "srht"]), (heavy, ["srht", "rows"])):
        batches = batches_of(2, 240, like)
        of = {
            kind: sketch.choose(model, batches, loss=loss_of(model), kinds=[kind]) for kind in kinds
        }
        both = sketch.choose(model, batches, loss=loss_of(model), kinds=kinds)
        for layer, *alone in zip(both.layers, *(each.layers for each in of.values()), strict=True):
            assert layer.rows == min(one.rows for one in alone)


def test_layers_that_read_one_tensor_have_one_sketch():
    packlight.manual_seed(3)
    model = Attention()
    batches = batches_of(2, 240, heavy)
    chosen = sketch.choose(model, batches, loss=loss_of(model))
    q, k, v, out = chosen.layers
    assert q.method == k.method == v.method
    assert [layer.note for layer in (q, k, v, out)] == [
        "", "shares that of 'q'", "shares that of 'q'", ""
    ]  # fmt: skip
    assert max(q.ratio, k.ratio, v.ratio) <= 1
    # Bytes of a batch: what is kept of the input before, and of the converted model.
    assert k.exact_bytes == k.kept_bytes == 0
    assert q.exact_bytes == 240 * WIDTH * 4
    hidden = [layer for layer in (q, out) if layer.method]
    packlight.convert(model, chosen)
    whole = nn.Sequential(nn.Hardtanh(), model)  # what the model itself is given counts apart
    x = batches[0][0].clone()
    kept = packlight.profile(whole, x).activation_bytes
    saved = sum(layer.exact_bytes - layer.kept_bytes for layer in hidden)
    packlight.revert(model)
    assert packlight.profile(whole, x).activation_bytes - kept == saved > 0


def test_layers_that_no_rows_serve_are_left_exact():
    """A Gaussian sketch of nearly all rows is about as noisy as the batch."""
    model = Attention()
    chosen = sketch.choose(model, batches_of(1), 0.5, loss=loss_of(model), kinds=["gaussian"])
    assert all(layer.method is None for layer in chosen.layers)
    assert {layer.rows for layer in chosen.layers} == {240}
    assert "left exact, since nearly all rows do not reach the ratio: q, k, v, out" in str(chosen)
    few = batches_of(1, 12)
    chosen = sketch.choose(model, few, loss=loss_of(model))
    assert {layer.note for layer in chosen.layers} == {"left exact, with no more than 16 tokens"}
    with pytest.raises(packlight.NothingMatchedError):
        packlight.convert(model, chosen)


def test_one_exact_reader_leaves_the_others_exact():
    """The tensor is kept for that one anyway."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)
            self.c = nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            return self.a(x) + 0 * self.b(x), self.c(x[:, :8])

    model = Two()
    x = [torch.randn(2, 30, WIDTH)]

    def loss(x):
        y, z = model(x)
        return y.square().mean() + z.square().mean()

    chosen = sketch.choose(model, x, loss=loss)
    a, b, c = chosen.layers
    assert a.method is b.method is c.method is None  # a view counts as what it is a view of
    assert a.note == "left exact, as others are that read the same input"
    assert b.note == "left exact, since the gradient has no noise in these batches"


def test_a_mapping_for_convert_and_for_files(tmp_path):
    model = Attention()
    chosen = sketch.choose(model, batches_of(), loss=loss_of(model))
    packlight.save_methods(chosen, tmp_path / "methods.toml")
    loaded = packlight.load_methods(tmp_path / "methods.toml")
    assert loaded == dict(chosen)
    assert {*chosen} == {"q", "k", "v", "out"}
    conversion = packlight.convert(model, loaded)
    for row in conversion.replaced:
        assert row.method == chosen[row.names[0]]
    rest = nn.Sequential(model, nn.Linear(4, 4))
    others = {f"0.{name}": method for name, method in chosen.items()}
    assert len(packlight.convert(rest, {**others, "*": GroupQuant()}).replaced) == 5
    table = str(chosen)
    assert "4 of 4 layers sketched, with at most 1 times the variance of the batch" in table
    for layer in chosen.layers:
        assert f"{layer.rows} of {layer.tokens}" in table
    assert table.count("shared") == 2


def test_everything_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout())
    model.append(nn.Linear(WIDTH, CLASSES))
    batch = torch.randn(80, WIDTH), torch.randint(CLASSES, (80,))
    loss_of(model)(batch).backward()
    before = [p.grad for p in model.parameters()]
    values = [grad.clone() for grad in before]
    buffers = [b.clone() for b in model.buffers()]
    torch.manual_seed(5)
    sketch.choose(model, [batch, batch], loss=loss_of(model))
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    for p, grad, value in zip(model.parameters(), before, values, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)
    assert all(map(torch.equal, buffers, model.buffers()))
    assert not any(module._forward_hooks for module in model.modules())


def test_other_models_and_batches():
    """Pointwise convolutions, models with a loss of their own, frozen and converted layers."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.point = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)
            self.frozen, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
            self.frozen.requires_grad_(False)

        def forward(self, image, target):
            x = self.point(self.wide(image)).flatten(2).transpose(1, 2)
            loss = F.mse_loss(self.head(self.frozen(x)), target)
            return type("Output", (), {"loss": loss})

    model = Net()
    batch = {"image": torch.randn(4, 3, 10, 10), "target": torch.randn(4, 64, 4)}
    for given in (batch, tuple(batch.values())):
        chosen = sketch.choose(model, [given])
        assert [layer.name for layer in chosen.layers] == ["point", "head"]
        assert {layer.tokens for layer in chosen.layers} == {256}
    packlight.convert(model, chosen)
    again = sketch.choose(model, [batch])
    assert [layer.method for layer in again.layers] == [layer.method for layer in chosen.layers]


def test_under_autocast_bytes_are_those_of_16_bits():
    model = Attention()
    batches = batches_of(1)
    wide = sketch.choose(model, batches, loss=loss_of(model))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = sketch.choose(model, batches, loss=loss_of(model))
    for layer, half in zip(wide.layers, narrow.layers, strict=True):
        assert half.exact_bytes == layer.exact_bytes / 2
        assert half.ratio == pytest.approx(layer.ratio, rel=0.1)


def test_bad_arguments_raise():
    model, batches = Attention(), batches_of(1)
    for ratio in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="no number above 0"):
            sketch.choose(model, batches, ratio, loss=loss_of(model))
    with pytest.raises(InputError, match="kinds is empty"):
        sketch.choose(model, batches, loss=loss_of(model), kinds=[])
    with pytest.raises(InputError, match="is none of"):
        sketch.choose(model, batches, loss=loss_of(model), kinds=["fourier"])
    with pytest.raises(InputError, match="is no loss and has none"):
        sketch.choose(model, [batches[0][0]])
    with pytest.raises(InputError, match="no gradient came"):
        sketch.choose(model.eval(), batches, loss=loss_of(model))
    with pytest.raises(InputError, match="no gradient came"):
        sketch.choose(model.train(), [], loss=loss_of(model))


def test_the_example_runs():
    failed, attempted = doctest.testmod(choosing)
    assert attempted
    assert not failed
