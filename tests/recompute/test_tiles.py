"""MLPs in tiles of tokens, against the plain modules."""

import copy
import itertools
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import (
    CannotConvertError,
    Checkpoint,
    DoubleBackwardError,
    GroupQuant,
    InputError,
    ModifiedWeightError,
    NothingMatchedError,
    Tiles,
)
from tests.helpers import every_device, kept_bytes, pack_bytes, relative_error

EXACT = Tiles(tokens=4, keep=None)
WIDTH = 32


class Gated(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48, bias=False)
        self.down = nn.Linear(48, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states):
        product = F.silu(self.gate(hidden_states)) * self.up(hidden_states)
        return self.down(self.dropout(product))


class Block(nn.Module):
    """Counts how often the linear layer of its MLP runs."""

    def __init__(self, mlp: type[nn.Module] = Gated):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), mlp()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.first(x)
        return x + self.mlp(self.norm(x))


class Rolled(Block):
    """A model that is no MLP itself."""

    def forward(self, x):
        return super().forward(x + x.roll(1, -2))


def counter(module):
    """Token counts of the forward passes of a module."""
    counts: list[int] = []
    module.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[-2]))
    return counts


def pair(plain, methods=EXACT):
    model = copy.deepcopy(plain)
    packlight.convert(model, methods)
    return plain, model


def step(model, x, dy=None, run=lambda model, x: model(x)):
    """Output and gradients by name, of input and parameters."""
    packlight.manual_seed(3)
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = run(model, x)
    if dy is None:
        generator = torch.Generator().manual_seed(2)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    y.backward(dy)
    return y.detach(), {"input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def assert_same(found, expected, rtol=1e-9):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


MODULES = {
    "gated": Gated,
    "sequential": lambda: nn.Sequential(
        nn.Linear(WIDTH, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 16)
    ),
}
SHAPES = {
    "rows": lambda: torch.randn(9, WIDTH),
    "one": lambda: torch.randn(1, WIDTH),
    "whole tiles": lambda: torch.randn(2, 8, WIDTH),
    "tokens": lambda: torch.randn(3, 5, WIDTH),
    "image": lambda: torch.randn(2, 3, 3, WIDTH),
    "transposed": lambda: torch.randn(5, 3, WIDTH).transpose(0, 1),
    "columns": lambda: torch.randn(WIDTH, 7).t(),
    "expanded": lambda: torch.randn(1, 1, WIDTH).expand(2, 5, WIDTH),
    "empty": lambda: torch.randn(2, 0, WIDTH),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MODULES)
def test_output_and_gradients_are_those_of_the_plain_module(kind, shape):
    torch.manual_seed(0)
    plain, model = pair(MODULES[kind]().double())
    x = SHAPES[shape]().double()
    (y, grads), (ours, our_grads) = step(plain, x), step(model, x)
    assert ours.shape == y.shape
    assert ours.is_contiguous()
    assert_same(ours, y)
    assert_same(our_grads, grads)


def test_a_module_runs_by_tiles_and_keeps_its_input_alone():
    block = Gated()
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    packlight.convert(block, EXACT)
    counts = counter(block.gate)
    assert kept_bytes(lambda: block(x)) == x.nbytes
    y = block(x)
    counts.clear()
    y.sum().backward()
    assert counts == [4, 4, 4, 3]
    block.eval()
    counts.clear()
    assert torch.equal(block(x), block.forward(x))
    assert counts == [5, 5]


def test_the_input_is_the_pack_of_the_norm_in_front():
    torch.manual_seed(0)
    x = torch.randn(4, 16, WIDTH, requires_grad=True)
    norm = nn.LayerNorm(WIDTH)
    alone = kept_bytes(lambda: copied(norm)(x))
    model = nn.Sequential(norm, Gated())
    packlight.convert(model, {"0": GroupQuant(4), "1": Tiles(4)})
    assert kept_bytes(lambda: model(x)) == alone
    # Of another grade than is asked for it has a pack of its own.
    packlight.convert(model, {"0": GroupQuant(4), "1": Tiles(4, keep=GroupQuant(8))})
    assert kept_bytes(lambda: model(x)) == alone + pack_bytes(x.numel(), 8)


def copied(norm):
    norm = copy.deepcopy(norm)
    packlight.convert(norm, GroupQuant(4))
    return norm


def test_the_error_is_that_of_the_pack():
    torch.manual_seed(0)
    plain, model = pair(Gated(), Tiles(7, keep=GroupQuant(8)))
    x = torch.randn(4, 16, WIDTH)
    (y, grads), (ours, our_grads) = step(plain, x), step(model, x)
    torch.testing.assert_close(ours, y)
    for name, grad in grads.items():
        assert relative_error(our_grads[name], grad) < 0.02, name
    assert kept_bytes(lambda: model(x.requires_grad_())) == pack_bytes(x.numel(), 8)


FROZEN = {
    "all but one": lambda name: name != "up.weight",
    "all": lambda name: True,
    "biases": lambda name: name.endswith("bias"),
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("from_data", [False, True], ids=["behind a layer", "from data"])
def test_frozen_parameters(frozen, from_data):
    torch.manual_seed(0)
    plain = Gated().double()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    plain, model = pair(plain)
    x = torch.randn(9, WIDTH).double().requires_grad_(not from_data)
    results = []
    for one in (plain, model):
        y = one(x)
        assert y.requires_grad == (not from_data or frozen != "all")
        if y.requires_grad:
            leaves = [leaf for leaf in (x, *one.parameters()) if leaf.requires_grad]
            results.append(torch.autograd.grad(y.square().sum(), leaves))
    if results:
        assert_same(results[1], results[0])


def test_a_parameter_has_one_gradient_for_its_hooks():
    torch.manual_seed(0)
    plain, model = pair(Gated().double())
    x = torch.randn(9, WIDTH).double()
    calls = []
    for one in (plain, model):
        one.up.weight.register_hook(lambda grad: calls.append("hook") or grad * 0.5)
        one.up.weight.register_post_accumulate_grad_hook(lambda p: calls.append("after"))
    _, grads = step(plain, x)
    _, ours = step(model, x)
    assert calls == ["hook", "after"] * 2
    assert_same(ours, grads)


def test_tied_weights_within_and_outside():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.outside = nn.Linear(WIDTH, WIDTH)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
            self.mlp[0].weight = self.mlp[2].weight = self.outside.weight

        def forward(self, x):
            return self.mlp(self.outside(x))

    torch.manual_seed(0)
    plain, model = pair(Tied().double(), {"mlp": EXACT})
    x = torch.randn(9, WIDTH).double()
    assert_same(step(model, x)[1], step(plain, x)[1])
    assert model.mlp[0].weight is model.outside.weight


def test_parameters_that_are_not_used_have_no_gradient():
    class Half(Gated):
        def forward(self, x):
            return self.down(F.silu(self.gate(x)))

    plain, model = pair(Half().double())
    x = torch.randn(9, WIDTH).double()
    _, grads = step(model, x)
    assert grads["up.weight"] is None
    assert_same(grads, step(plain, x)[1])


@every_device
@pytest.mark.parametrize(
    "reentrant", [None, False, True], ids=["plain", "checkpoint", "re-entrant"]
)
def test_dropout_drops_the_same_in_both_passes(reentrant, device):
    """The module is linear in x, so <y, dy> = <x, dx> where the masks are the same."""
    mlp = nn.Sequential(
        nn.Linear(WIDTH, 64, bias=False), nn.Dropout(0.5), nn.Linear(64, 16, bias=False)
    ).to(device, torch.float64)
    packlight.convert(mlp, EXACT)
    x = torch.randn(3, 5, WIDTH, device=device).double()

    def run(model, x):
        if reentrant is None:
            return model(x)
        return checkpoint(model, x, use_reentrant=reentrant)

    dy = torch.randn(3, 5, 16, device=device).double()
    y, grads = step(mlp, x, dy, run)
    torch.testing.assert_close((y * dy).sum(), (x * grads["input"]).sum())
    after = torch.rand(4, device=device)
    packlight.manual_seed(3)
    with torch.no_grad():  # draws what the pass with gradients draws
        assert torch.equal(mlp(x), y)
    assert torch.equal(torch.rand(4, device=device), after)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recorded_as_a_graph(dropout):
    torch.manual_seed(0)
    plain = Block().cuda()
    plain.mlp.dropout.p = dropout
    plain, model = pair(plain, {"mlp": EXACT})
    packlight.graphed(model)
    x = torch.randn(3, 5, WIDTH, device="cuda")
    if dropout:  # launched, with the reason, or refused: never other masks
        with pytest.warns(UserWarning, match="tiles has a dropout"):
            model(x).sum().backward()
        return
    for _ in range(3):
        ours = {}  # a pass whose gradients are still referred to keeps the next one from a replay
        _, ours = step(model, x)
    expected = step(plain, x)[1]
    for name, grad in ours.items():
        assert relative_error(grad, expected[name]) < 1e-4, name


def test_autocast_is_that_of_the_forward_pass():
    torch.manual_seed(0)
    plain, model = pair(Gated())
    x = torch.randn(3, 5, WIDTH)

    def run(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            # The weight is used once more: its cast has to have a gradient.
            return y + F.linear(x, model.down.weight[:, :WIDTH])

    (y, grads), (ours, our_grads) = step(plain, x, run=run), step(model, x, run=run)
    assert ours.dtype == y.dtype
    torch.testing.assert_close(ours, y)
    for name, grad in grads.items():
        assert relative_error(our_grads[name], grad) < 5e-3, name


def test_many_tiles_lose_no_more_than_one_pass_in_bfloat16():
    torch.manual_seed(0)
    plain, model = pair(Gated().bfloat16(), Tiles(8, keep=None))
    x = torch.randn(1024, WIDTH).bfloat16()
    dy = torch.randn(1024, WIDTH).bfloat16()
    truth = step(copy.deepcopy(plain).double(), x.double(), dy.double())[1]
    _, grads = step(plain, x, dy)
    _, ours = step(model, x, dy)
    for name, grad in truth.items():
        assert ours[name].dtype == torch.bfloat16
        allowed = 1.5 * relative_error(grads[name], grad) + 2e-3
        assert relative_error(ours[name], grad) < allowed, name


def test_backward_twice():
    model = Gated().double()
    packlight.convert(model, EXACT)
    x = torch.randn(9, WIDTH).double().requires_grad_()
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, x)[0], first[0])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    with pytest.raises(DoubleBackwardError, match="keeps its input"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    model.eval()
    torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("change", ["written", "replaced"])
def test_a_weight_that_was_changed_since_raises(change):
    model = Gated()
    packlight.convert(model, EXACT)
    y = model(torch.randn(9, WIDTH, requires_grad=True))
    if change == "written":
        with torch.no_grad():
            model.up.weight.mul_(2)
    else:
        model.up.weight = nn.Parameter(torch.randn(48, WIDTH))
    with pytest.raises(ModifiedWeightError, match="modified or replaced"):
        y.sum().backward()


def test_an_input_that_was_changed_since_raises():
    model = Gated()
    packlight.convert(model, EXACT)
    x = torch.randn(9, WIDTH, requires_grad=True) * 1
    y = model(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_computes_the_tiles_once_for_their_backward(reentrant):
    torch.manual_seed(0)
    plain, model = pair(Block().double(), {"mlp": EXACT})
    x = torch.randn(3, 5, WIDTH).double()
    counts = counter(model.mlp.gate)
    run = lambda model, x: checkpoint(model, x, use_reentrant=reentrant)  # noqa: E731
    _, ours = step(model, x, run=run)
    # Forward, and in the backward pass; a re-entrant checkpoint runs all of its block between.
    assert len(counts) == (12 if reentrant else 8)
    assert_same(ours, step(plain, x)[1])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled(checkpointed):
    torch.manual_seed(0)
    methods = {"mlp": Tiles(4, keep=None)}
    if checkpointed:
        methods[""] = Checkpoint()
    plain, model = pair(Block().double(), methods)
    x = torch.randn(2, 5, WIDTH).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    _, ours = step(model, x, run=lambda _, x: compiled(x))
    assert_same(ours, step(plain, x)[1])
    torch._dynamo.reset()


def test_transforms_of_torch_func_see_the_plain_module():
    plain, model = pair(Gated().double())
    x = torch.randn(9, WIDTH).double()
    results = [torch.func.grad(lambda x, one=one: one(x).sum())(x) for one in (plain, model)]
    assert_same(*results)


def test_copies_and_revert():
    torch.manual_seed(0)
    plain, model = pair(nn.Sequential(nn.LayerNorm(WIDTH), Gated()).double(), {"1": EXACT})
    x = torch.randn(9, WIDTH).double()
    expected = step(plain, x)[1]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        counts = counter(other[1].gate)
        assert_same(step(other, x)[1], expected)
        assert counts[:3] == [4, 4, 1]
    assert packlight.revert(model) == 1
    assert type(model[1]) is Gated
    assert kept_bytes(lambda: model(x)) == kept_bytes(lambda: plain(x))


def test_replicas_of_data_parallel_run_the_plain_module():
    model = Gated()
    packlight.convert(model, EXACT)
    (replica,) = [model._replicate_for_data_parallel()]
    counts = counter(replica.gate)
    replica(torch.randn(9, WIDTH))
    assert counts == [9]


# ---- which modules -------------------------------------------------------------------------------


def test_layers_inside_stay_torchs_own():
    model = Rolled()
    packlight.convert(model, GroupQuant(4), functional=True)
    assert type(model.mlp.gate) is not nn.Linear
    conversion = packlight.convert(model, (Tiles(), GroupQuant(4)), functional=True)
    assert [row.names for row in conversion.replaced] == [("norm",), ("mlp",), ("first",)]
    assert type(model.mlp.gate) is nn.Linear
    reasons = {row.names[0]: row.reason for row in conversion.skipped}
    assert reasons["mlp.gate"].startswith("within a module that runs in tiles")
    # A later call without tiles leaves the module, and all within, as they are.
    packlight.convert(model, {"mlp.*": GroupQuant(8), "norm": GroupQuant(8)})
    assert type(model.mlp.gate) is nn.Linear
    packlight.convert(model, {"mlp": None, "*": GroupQuant(8)})
    assert type(model.mlp.gate) is not nn.Linear
    packlight.revert(model)
    assert {type(module) for module in model.modules()} == {
        Rolled, nn.LayerNorm, Gated, nn.Linear, nn.Dropout,
    }  # fmt: skip


class Mixes(Gated):
    def forward(self, x):
        return super().forward(x - 1e-3 * x.mean(-2, keepdim=True))


class OverTheBatch(Gated):
    def forward(self, x):
        return super().forward(x - 1e-3 * x.mean(0, keepdim=True))


class DropPath(nn.Identity):
    pass


class ToyMoeBlock(Gated):
    pass


class TwoArguments(Gated):
    def forward(self, x, residual):
        return super().forward(x) + residual


class ShapeBound(Gated):
    def forward(self, x):
        return super().forward(x.view(4, 4, WIDTH))


REFUSED = {
    "positions": (Mixes, "depends on others"),
    "batch": (OverTheBatch, "depends on others"),
    "softmax": (lambda: nn.Sequential(Gated(), nn.Softmax(1)), "depends on others"),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)),
        "BatchNorm1d, which normalises over the batch",
    ),
    "by sample": (
        lambda: nn.Sequential(nn.Linear(8, 8), DropPath(), nn.Linear(8, 8)), "draws by sample"
    ),
    "routing": (ToyMoeBlock, "ToyMoeBlock, which routes tokens to experts"),
    "arguments": (TwoArguments, "takes 2 arguments"),
    "one layer": (lambda: nn.Linear(8, 8), "no MLP of two Linear layers"),
    "convolution": (
        lambda: nn.Sequential(nn.Conv1d(8, 8, 1), nn.Linear(8, 8), nn.Linear(8, 8)),
        "Conv1d, which is not known to work on each position",
    ),
    "flattened": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Flatten(0), nn.Linear(48, 8)),
        "not one tensor with the positions",
    ),
    "a shape": (ShapeBound, r"does not run on a tensor \(2, 3, 32\): RuntimeError"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_work_by_position_is_refused(case):
    build, reason = REFUSED[case]
    model = nn.ModuleDict({"part": build()})
    with pytest.raises(CannotConvertError, match=reason):
        packlight.convert(model, {"part": Tiles()})
    if case not in ("softmax",):  # of which the first part is an MLP
        with pytest.raises(NothingMatchedError):
            packlight.convert(model, Tiles())
    assert type(model["part"]) is type(build())


def test_attention_is_no_mlp():
    block = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
    with pytest.raises(NothingMatchedError):
        packlight.convert(block, Tiles())


def test_a_model_without_values_is_looked_at_by_its_operators():
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "mlp": Gated(),
                "sequential": MODULES["sequential"](),
                "mixes": Mixes(),
                "softmax": nn.Sequential(Gated(), nn.Softmax(1)),
                "attention": timm.layers.Attention(WIDTH, 4),
            }
        )
    conversion = packlight.convert(model, Tiles())
    names = [row.names[0] for row in conversion.replaced]
    assert names == ["mlp", "sequential", "softmax.0"]
    with pytest.raises(CannotConvertError, match="no values to try it with, and calls mean"):
        packlight.convert(model, {"mixes": Tiles()})


def test_predict_counts_what_profile_measures():
    model = Rolled()
    packlight.convert(model, (Tiles(4), GroupQuant(4)))
    x = torch.randn(3, 16, WIDTH)
    measured = packlight.profile(model, x).activation_bytes
    assert packlight.predict(model, x).activation_bytes == pytest.approx(measured, abs=11_000)


def test_a_call_with_other_arguments_is_refused():
    class Optional(Gated):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    model = Optional()
    packlight.convert(model, EXACT)
    assert model(x=torch.randn(9, WIDTH)).shape == (9, WIDTH)
    with pytest.raises(InputError, match="takes one tensor, got 2"):
        model(torch.randn(9, WIDTH), 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tokens": 0}, "tokens=0"), ({"tokens": 2.0}, "tokens=2.0"), ({"keep": 8}, "keep=8")],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(InputError, match=message):
        Tiles(**arguments)


def test_every_width_of_a_tile_gives_the_same():
    torch.manual_seed(0)
    plain = Gated().double()
    x = torch.randn(2, 6, WIDTH).double()
    expected = step(plain, x)[1]
    for tokens in itertools.chain(range(1, 14), [2048]):
        assert_same(step(pair(plain, Tiles(tokens, keep=None))[1], x)[1], expected)
