"""`convert(model, rest=...)`: what no rule is for is packed within the model's forward passes."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import DEFAULT_REST, FewBit, GroupQuant, profile, saving
from packlight.convert import DEFAULT_METHODS
from packlight.errors import DoubleBackwardError, InputError
from packlight.groupquant.grouping import OFFSET
from packlight.integrations._measure import KeptBytes
from packlight.saving import saver
from tests.helpers import pack_bytes, relative_error

FOUR = GroupQuant(bits=4)
EIGHT = GroupQuant(bits=8)
ELEMENTS = 64 * 64
TENSOR = 4 * ELEMENTS  # bytes
PACK = pack_bytes(ELEMENTS, code=OFFSET)


class Wave(nn.Module):
    """sin(x) cos(x), of which torch keeps x and both factors, and no rule knows anything."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return torch.sin(x).sinh() + torch.cos(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Wave(), Wave()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).square().mean()


def batch() -> Tensor:
    return torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    packlight.manual_seed(1)
    model(x).mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def converted(model: nn.Module, rest=FOUR, methods=FewBit(3), **options) -> nn.Module:  # noqa: B008
    packlight.convert(model, methods, rest=rest, **options)
    return model


def kept(model: nn.Module, *inputs, **options) -> int:
    return profile(model, *inputs, **options).activation_bytes


def test_what_has_no_rule_is_packed_and_forward_values_are_torchs():
    plain, x = Model(), batch()
    model = converted(copy.deepcopy(plain))
    assert torch.equal(model(x), plain(x))
    exact = gradients(plain, x)
    assert 0 < relative_error(gradients(model, x), exact) < 0.1
    fine = converted(copy.deepcopy(plain), rest=EIGHT)
    assert relative_error(gradients(fine, x), exact) < 0.01
    with saving(FOUR, min_bytes=1024):
        assert kept(model, x) == kept(plain, x)
    assert kept(model, x) < kept(plain, x) / 6


def test_bytes_are_those_of_packs_and_predicted_ones_the_same():
    model, x = Wave(), batch().requires_grad_()
    # The product with the scale keeps x, an input; sine and cosine share a pack, sinh has another.
    assert kept(model, x) == 2 * TENSOR
    converted(model)
    assert kept(model, x) == 2 * PACK
    assert packlight.predict(model, x).activation_bytes == 2 * PACK


def test_the_conversion_says_what_becomes_of_the_rest():
    conversion = packlight.convert(Model(), FewBit(3), rest=EIGHT)
    assert conversion.rest == EIGHT
    assert "the rest is packed by GroupQuant(bits=8)" in str(conversion)
    assert conversion.to_dict()["rest"] == EIGHT.to_dict()
    assert packlight.convert(Model(), FewBit(3)).to_dict()["rest"] is None


@pytest.mark.parametrize(
    ("methods", "rest"),
    [
        (DEFAULT_METHODS, DEFAULT_REST),
        ((packlight.Checkpoint(), *DEFAULT_METHODS), DEFAULT_REST),
        ({"first": None, "*": DEFAULT_METHODS}, DEFAULT_REST),
        (FOUR, None),
        ({"first": DEFAULT_METHODS}, None),
    ],
)
def test_by_itself_the_default_methods_have_a_rest(methods, rest):
    assert packlight.convert(Model(), methods).rest == rest


def test_nothing_is_packed_in_eval_and_without_gradients():
    model, x = converted(Model()), batch()
    before = kept(Model(), x)
    assert kept(model.eval(), x) == before
    with torch.no_grad():
        assert model.train()(x).grad_fn is None
    assert before == 6 * TENSOR
    model.first.eval()  # a part decides for itself
    assert kept(model, x) == 2 * TENSOR + 4 * PACK
    model.eval().first.train()
    assert kept(model, x) == 4 * TENSOR + 2 * PACK


@pytest.mark.parametrize("name", ["0", "1"])  # one has code of its own, one is torch's
def test_a_part_that_is_left_to_torch_keeps_what_torch_keeps(name):
    model, x = nn.Sequential(Wave(), nn.LogSigmoid(), nn.Sequential(nn.LogSigmoid())), batch()
    converted(model, methods={name: None, "*": FewBit(3)})
    dtypes: dict[str, set[str]] = {}
    for row in profile(model, x).rows:
        dtypes.setdefault(row.module, set()).add(row.dtype)
    assert dtypes.pop(name) == {"float32"}
    assert set.union(*dtypes.values()) <= {"uint8", "int32"}


def test_a_model_of_torchs_own_layers_alone():
    model, x = nn.Sequential(nn.LogSigmoid(), nn.InstanceNorm1d(64)), batch().requires_grad_()
    before = kept(model, x)
    converted(model)
    assert kept(model, x) < before / 2
    assert isinstance(model, nn.Sequential)
    packlight.revert(model)
    assert type(model) is nn.Sequential
    assert kept(model, x) == before


def test_what_is_called_apart_is_packed_by_itself():
    model, x = converted(Model()), batch().requires_grad_()
    assert kept(model.first, x) == 2 * PACK


def test_copies_and_pickles_keep_the_rest():
    model, x = converted(nn.Sequential(nn.Softplus(), nn.LogSigmoid()), rest=EIGHT), batch()
    expected = kept(model, x)
    assert kept(copy.deepcopy(model), x) == expected
    assert kept(pickle.loads(pickle.dumps(model)), x) == expected
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert kept(torch.load(stream, weights_only=False), x) == expected


def test_a_later_conversion_decides_anew():
    model, x = Model(), batch()
    before = kept(model, x)
    converted(model)
    assert kept(model, x) < before / 6
    converted(model, rest=None)
    assert kept(model, x) == before
    converted(model, rest=EIGHT)
    assert before / 4 < kept(model, x) < before / 3
    packlight.revert(model)
    assert type(model) is Model
    assert kept(model, x) == before


def test_softmax_and_losses_stay_exact():
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.softmax(torch.sin(x), -1).tanh()
            return F.cross_entropy(y, torch.zeros(64, dtype=torch.long))

    model = converted(Scores(), methods=FewBit(3))
    rows = {row.operation: row.dtype for row in profile(model, batch().requires_grad_()).rows}
    assert rows["SoftmaxBackward0"] == rows["LogSoftmaxBackward0"] == "float32"


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, of_module: bool) -> None:
        super().__init__()
        self.before, self.block = Wave(), Wave()
        self.reentrant, self.of_module = reentrant, of_module

    def forward(self, x: Tensor) -> Tensor:
        block = self.block if self.of_module else lambda y: self.block(y).tanh()
        return checkpoint(block, self.before(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("of_module", [True, False])
def test_checkpoints_keep_their_inputs_and_nothing_inside(reentrant, of_module):
    plain, x = Checkpointed(reentrant, of_module), batch().requires_grad_()
    model = converted(copy.deepcopy(plain), rest=EIGHT)
    assert kept(plain, x) == 3 * TENSOR
    assert kept(model, x) == 2 * (ELEMENTS + 4 * ELEMENTS // 128) + TENSOR
    assert torch.equal(model(x), plain(x))
    assert 0 < relative_error(gradients(model, x), gradients(plain, x)) < 0.01


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("of_module", [True, False])
def test_a_measurement_of_a_callback_only_looks_on(reentrant, of_module):
    model, x = converted(Checkpointed(reentrant, of_module)), batch().requires_grad_()
    unmeasured, drawn = gradients(model, x), packlight.rounding_state()
    with KeptBytes(model) as measured:
        assert torch.equal(gradients(model, x), unmeasured)
    assert packlight.rounding_state() == drawn
    report = profile(model, x)
    assert measured.bytes == report.activation_bytes + report.input_bytes


def test_hooks_of_the_user_around_the_model_count():
    model, x = converted(Model()), batch()
    plain = gradients(Model(), x)
    with save_on_cpu():
        assert torch.equal(gradients(model, x), plain)
    with saving(EIGHT, overrides={"*": None}):
        assert torch.equal(gradients(model, x), plain)
    assert not torch.equal(gradients(model, x), plain)


def test_a_view_is_written_to_in_place_while_a_tensor_waits_for_its_operation():
    class Biased(nn.Module):
        """Its places are less than a group: torch's own Linear makes of them a view."""

        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Linear(64, 64)
            self.bias = nn.Sequential(nn.Linear(2, 64), nn.ReLU(inplace=True))
            self.register_buffer("places", torch.randn(1, 7, 7, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.scores(x) + self.bias(self.places).sum((0, 1, 2))

    plain, x = Biased(), batch()
    model = converted(copy.deepcopy(plain), methods=DEFAULT_METHODS)
    assert torch.equal(model(x), plain(x))
    assert 0 < relative_error(gradients(model, x), gradients(plain, x)) < 0.2


def test_an_exception_leaves_nothing_behind():
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.sin(x)
            raise ValueError("on purpose")

    x = batch().requires_grad_()
    with pytest.raises(ValueError, match="on purpose"):
        converted(Fails())(x)
    y = torch.sin(x)
    assert y.grad_fn._raw_saved_self.data is not None
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.cos(x))


def test_a_second_derivative_raises():
    model, x = converted(Model()), batch().requires_grad_()
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(model(x), x, create_graph=True)


def test_transforms_and_compiled_code_run_as_torchs():
    plain, x = Model(), batch()
    model = converted(copy.deepcopy(plain))
    expected = torch.func.grad(plain)(x)
    assert torch.allclose(torch.func.grad(model)(x), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(gradients(compiled, x), gradients(plain, x), rtol=1e-4, atol=1e-6)
    assert not torch.equal(gradients(model, x), gradients(plain, x))


def test_passes_for_which_it_is_not_worth_it_go_without(monkeypatch):
    entered = []
    active = saver.Saver.active
    monkeypatch.setattr(saver.Saver, "active", lambda self: entered.append(self) or active(self))
    model = converted(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), methods=FOUR)
    model(batch())
    model(batch())
    assert len(entered) == 1
    model(torch.cat([batch(), batch()]))  # a larger one is looked at again
    model(batch())
    assert len(entered) == 2
    useful = converted(Model())
    for _ in range(3):
        useful(batch())
    assert len(entered) == 5


class LastRows(nn.Module):
    """An operation without a rule that saves 1024 bytes, as routers of experts do."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:-4], torch.sin(x[-4:] * 1.5)])


WIDE = (nn.Linear(64, 256), nn.Linear(256, 64))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("layers", "packs"),
    [
        ((*WIDE, LastRows()), False),  # less than is worth a pack
        ((LastRows(), *WIDE), True),  # no less than all that was saved before it
        ((nn.Linear(64, 64), LastRows(), *WIDE, LastRows()), True),
        ((nn.Linear(64, 64), nn.Dropout(0.1), Wave()), True),
    ],
)
def test_what_a_step_computes_does_not_hang_on_the_steps_before_it(layers, packs, autocast):
    x, small = (torch.randn(rows, 64).requires_grad_() for rows in (256, 128))

    def step(*before):
        torch.manual_seed(0)
        model = converted(copy.deepcopy(nn.Sequential(*layers)), methods=FOUR)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for each in before:
                model(each).sum().backward()
            model.zero_grad()
            packlight.manual_seed(1)
            model(x).float().square().mean().backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        return found, packlight.rounding_state()

    (first, drawn), *others = step(), step(x), step(small), step(x, small, x)
    assert all(torch.equal(found, first) and state == drawn for found, state in others)
    exact = converted(copy.deepcopy(nn.Sequential(*layers)), methods=FOUR, rest=None)
    packed = converted(copy.deepcopy(nn.Sequential(*layers)), methods=FOUR)
    assert (kept(packed, x) < kept(exact, x)) == packs


def test_a_pass_goes_on_with_the_stream_of_rounding_wherever_torchs_generator_is():
    model = converted(nn.Sequential(nn.Linear(64, 64), Wave()), methods=FOUR)
    packlight.set_rounding_state({"base": 7, "next": 5})
    torch.manual_seed(99)
    model(batch())
    assert packlight.rounding_state()["base"] == 7
    assert packlight.rounding_state()["next"] > 5


def test_a_wrapper_of_torchs_is_not_what_enters():
    model, x = nn.Sequential(nn.LogSigmoid(), nn.InstanceNorm1d(64)), batch().requires_grad_()
    wrapped = nn.DataParallel(model)  # without devices it calls the module
    before = kept(model, x)
    converted(wrapped)
    assert type(wrapped) is nn.DataParallel
    assert kept(wrapped, x) == kept(model, x) < before / 2


@pytest.mark.parametrize(
    ("rest", "match"),
    [
        (FewBit(3), "no quantiser"),
        (GroupQuant, "did you mean"),
        ("8 bits", "no quant"),
        (8, "8"),
    ],
)
def test_a_rest_of_the_wrong_kind_raises(rest, match):
    with pytest.raises(InputError, match=match):
        packlight.convert(Model(), FewBit(3), rest=rest)


def test_files_say_what_becomes_of_the_rest(tmp_path):
    path, model = tmp_path / "methods.toml", Model()
    packlight.save_methods({"*": FewBit(3)}, path, rest=EIGHT)
    methods = packlight.load_methods(path)
    assert methods == {"*": FewBit(3)}
    assert packlight.convert(model, methods).rest == EIGHT
    assert packlight.convert(model, methods, rest=None).rest is None
    packlight.save_methods(methods, path)  # what was loaded says it too
    assert packlight.load_methods(path).rest == EIGHT
    packlight.save_methods(DEFAULT_METHODS, path, rest=None)
    assert packlight.convert(model, packlight.load_methods(path)).rest is None
    path.write_text('[methods]\nGELU = "FewBit(2)"\n')
    assert packlight.load_methods(path).rest == "auto"
    path.write_text('rest = "FewBit(2)"\n[methods]\nGELU = "FewBit(2)"\n')
    with pytest.raises(InputError, match=r"methods\.toml:1: rest: 'FewBit\(2\)' is no quantiser"):
        packlight.load_methods(path)


class Attend(torch.autograd.Function):
    """Attention as kernels of other packages have it: exponentials of scores less a statistic."""

    @staticmethod
    def forward(ctx, q, k, v):
        scores = q @ k.mT
        statistic = scores.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(q, k, v, statistic)
        return (scores - statistic).exp() @ v

    @staticmethod
    def backward(ctx, dy):
        q, k, v, statistic = ctx.saved_tensors
        p = (q @ k.mT - statistic).exp()
        dp = dy @ v.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True))
        return ds @ k, ds.mT @ q, p.mT @ dy


@torch.library.custom_op("packlight_tests::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    statistic = scores.logsumexp(-1, keepdim=True)
    return (scores - statistic).exp() @ v, statistic


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


attend.register_autograd(lambda ctx, dy, _: Attend.backward(ctx, dy), setup_context=_keep)


@pytest.mark.parametrize("function", [Attend.apply, lambda *qkv: attend(*qkv)[0]])
def test_functions_of_other_packages_are_packed_at_8_bits(function):
    """At four, probabilities are off by any factor: they are exponentials of what is kept."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 1, 1, 32))

        def forward(self, x):
            return function(*(x * self.scale).unbind())

    x = 0.7 * torch.randn(3, 2, 64, 32, generator=torch.Generator().manual_seed(0))
    plain = Attention()
    expected = gradients(plain, x)
    model = converted(plain, rest=FOUR)
    assert relative_error(gradients(model, x), expected) < 0.1
    rows = [row for row in profile(model, x).rows if "ttend" in row.operation]
    count = x.numel() // 3
    assert sum(row.bytes for row in rows if row.dtype == "uint8") == 3 * count
    assert [row.bytes for row in rows if row.dtype == "float32"] == [4 * 2 * 64]
