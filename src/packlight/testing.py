"""The contract of a quantiser as checks: for a method in a package of one's own.

    import pytest
    from packlight.testing import checks

    @pytest.mark.parametrize("check", checks(BlockFloat()), ids=str)
    def test_block_float(check):
        check()

The numbers in the names of checks are those of "The contract of every layer" in
docs/architecture.md.
"""

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from packlight.convert import convert, revert
from packlight.errors import DoubleBackwardError
from packlight.method import Method
from packlight.profile import profile
from packlight.quantiser import Quantiser
from packlight.saving import saving


class _Gated(nn.Module):
    """A gated unit in a model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class _Attention(nn.Module):
    """Attention in a model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class _Behind(nn.Module):
    """A model behind an operation: what it keeps of its input is no tensor of the user's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x + 1.0)
        return y


ROWS, IMAGES = (4, 32, 64), (2, 16, 12, 12)

# Models and the shapes of their inputs.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(64, 96), ROWS),
    "LayerNorm and Linear": (lambda: nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32)), ROWS),
    "RMSNorm and Linear": (lambda: nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 32)), ROWS),
    "GELU and Linear": (lambda: nn.Sequential(nn.GELU(), nn.Linear(64, 32)), ROWS),
    "SiLU": (nn.SiLU, ROWS),
    "Tanh": (nn.Tanh, ROWS),
    "gated unit": (_Gated, ROWS),
    "GLU": (nn.GLU, ROWS),
    "attention": (_Attention, ROWS),
    "Conv2d": (lambda: nn.Conv2d(16, 16, 3, padding=1), IMAGES),
    "BatchNorm2d and Conv2d": (
        lambda: nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)),
        IMAGES,
    ),
    "GroupNorm": (lambda: nn.GroupNorm(4, 16), IMAGES),
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One promise of the contract, about one model; called, it raises where the promise fails."""

    name: str
    run: Callable[[], None]

    def __call__(self) -> None:
        self.run()

    def __str__(self) -> str:
        return self.name


def checks(method: Quantiser, error: float = 0.05) -> list[Check]:
    """What the contract promises of a method, for every layer.

    `error` is that of a gradient that counts as near: |g~ - g| < error |g|.
    """
    return list(_checks(method, error))


def _checks(method: Quantiser, error: float) -> Iterator[Check]:
    for check in (_value, _text, _2_keep_and_restore):
        yield Check(check.__name__[1:], lambda check=check: check(method))  # type: ignore[misc]
    every: tuple[Callable[..., None], ...] = (
        _1_forward_and_2_backward, _3_drop_in, _5_shapes, _6_only_in_training, _8_compile,
        _9_checkpoint, _11_not_finite, _saving,
    )  # fmt: skip
    for check in every:
        for model in MODELS:
            yield Check(
                f"{check.__name__[1:]}, {model}",
                lambda check=check, model=model: check(method, model, error),  # type: ignore[misc]
            )
    yield Check("sharing", lambda: _sharing(method))


# ---- models --------------------------------------------------------------------------------------


def _model(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    return make(), torch.randn(shape)


def _converted(model: nn.Module, method: Method) -> nn.Module:
    ours = copy.deepcopy(model)
    convert(ours, method, functional=True, strict=False)
    return ours


def _gradients(
    model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None
) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x) if run is None else run(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(weights.to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def _check_near(ours: list[Tensor], theirs: list[Tensor], error: float) -> None:
    assert len(ours) == len(theirs), "a gradient is missing"
    for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = a.double(), b.double()
        # Sums that are 0 but for rounding are near anything as small.
        distance, size = (a - b).norm(), b.norm() + 1e-4 * b.numel() ** 0.5
        assert distance < error * size, f"gradient {place} is off by {distance / size:.3f}"


# ---- the promises --------------------------------------------------------------------------------


def _value(method: Quantiser) -> None:
    assert method == copy.deepcopy(method) == pickle.loads(pickle.dumps(method))
    assert Method.from_dict(method.to_dict()) == method
    assert method.grade.serves(method.grade)


def _text(method: Quantiser) -> None:
    from packlight.method_files import format_methods, parse_methods

    assert parse_methods(format_methods(method)) == method


def _2_keep_and_restore(method: Quantiser) -> None:
    """Values of any length come back, as near as the grade says, of packs that are their own."""
    torch.manual_seed(0)
    parts = set()
    for count in (0, 1, 31, 33, 1000):
        for dtype in (torch.float32, torch.bfloat16):
            flat = torch.randn(count).to(dtype)
            before, state = flat.clone(), torch.get_rng_state()
            kept = method.keep(flat, method.seed(flat))
            assert isinstance(kept, tuple), f"keep returns a {type(kept).__name__}, not a tuple"
            parts.add(len(kept))
            assert torch.equal(flat, before), "keep writes to what it is given"
            assert torch.equal(torch.get_rng_state(), state), "keep draws from torch's generator"
            storages = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel()}
            assert flat.untyped_storage().data_ptr() not in storages, (
                "keep returns what it is given"
            )
            back = method.restore(dtype, count, *kept)
            assert back.shape == flat.shape, f"{count} values come back as {tuple(back.shape)}"
            assert back.dtype == dtype
            # A step of the widest group; codes of many bits are as fine as the dtype.
            step = 16 / 2.0 ** min(method.grade.bits, 7)
            assert (back - flat).abs().amax() < step if count else True, f"of {count} values"
    assert len(parts) == 1, f"keep returns {sorted(parts)} tensors"


def _1_forward_and_2_backward(method: Quantiser, name: str, error: float) -> None:
    model, x = _model(name)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        plain = copy.deepcopy(model).to(dtype)
        ours, theirs = (_gradients(m, x.to(dtype)) for m in (_converted(plain, method), plain))
        assert torch.equal(ours[0], theirs[0]), f"the output differs from torch's in {dtype}"
        _check_near(ours, theirs, error if dtype != torch.bfloat16 else 2 * error)


def _3_drop_in(method: Quantiser, name: str, error: float) -> None:
    model, x = _model(name)
    ours = _converted(model, method)
    assert list(ours.state_dict()) == list(model.state_dict())
    twin = pickle.loads(pickle.dumps(ours))
    assert torch.equal(twin(x), ours(x))
    assert revert(ours) > 0
    assert [type(m) for m in ours.modules()] == [type(m) for m in model.modules()]


def _5_shapes(method: Quantiser, name: str, error: float) -> None:
    model, x = _model(name)
    ours = _converted(model, method)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    _check_near(_gradients(ours, strided), _gradients(model, strided), error)
    if x.dim() == 3:
        few = x[:1, :1]
        _check_near(_gradients(ours, few), _gradients(model, few), error)
        _gradients(ours, x[:0])


def _6_only_in_training(method: Quantiser, name: str, error: float) -> None:
    model, x = _model(name)
    ours = _converted(model, method)
    x.requires_grad_()
    kept, plain = (profile(_Behind(m), x).activation_bytes for m in (ours, model))
    assert kept < plain, f"{kept} bytes are kept, by torch {plain}"
    y = ours(x)
    try:
        torch.autograd.grad(y.sum(), x, create_graph=True)
    except DoubleBackwardError:
        pass
    else:
        raise AssertionError("a second derivative is not refused")
    ours.eval()
    kept, plain = (profile(m, x).activation_bytes for m in (ours, model.eval()))
    assert kept == plain, f"{kept} bytes are kept in eval(), by torch {plain}"


def _8_compile(method: Quantiser, name: str, error: float) -> None:
    model, x = _model(name)
    ours = _converted(model, method)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    _check_near(_gradients(ours, x, compiled), _gradients(model, x), error)


def _9_checkpoint(method: Quantiser, name: str, error: float) -> None:
    model, x = _model(name)
    ours = _converted(model, method)
    for reentrant in (True, False):
        found = _gradients(
            ours,
            x,
            lambda x, r=reentrant: checkpoint(ours, x, use_reentrant=r),
        )
        _check_near(found[1:], _gradients(model, x)[1:], error)


def _11_not_finite(method: Quantiser, name: str, error: float) -> None:
    model, x = _model(name)
    for value in (float("nan"), float("inf")):
        x.view(-1)[5] = value
        ours, theirs = (_gradients(m, x) for m in (_converted(model, method), model))
        for a, b in zip(ours, theirs, strict=True):
            assert a.isfinite().logical_not()[~b.isfinite()].all(), f"{value} comes out finite"


def _saving(method: Quantiser, name: str, error: float) -> None:
    model, x = _model(name)
    with saving(method):
        ours = _gradients(model, x)
    _check_near(ours, _gradients(model, x), 2 * error)


def _sharing(method: Quantiser) -> None:
    """q, k and v read one tensor: it is kept once."""
    torch.manual_seed(0)
    heads = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
    convert(heads, method)
    x = torch.randn(32, 64, requires_grad=True).sin()
    ys = [head(x) for head in heads]
    packs = [y.grad_fn.saved_tensors[1:] for y in ys if y.grad_fn is not None]
    assert all(a is b for pack in packs for a, b in zip(pack, packs[0], strict=True))
