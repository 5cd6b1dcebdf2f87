"""Blocks whose inputs lie on the host, against checkpoints that keep them."""

import copy
import pickle

import pytest
import torch
from torch import nn

import packlight
from packlight import Checkpoint, GroupQuant, InputError, Offload
from packlight.method_files import format_methods, parse_methods
from packlight.planner import menu
from packlight.planner.devices import device_of
from packlight.planner.walk import Walker
from packlight.recompute import offloading
from tests.recompute.test_checkpoint import WIDTH, Model, gradients

EIGHT = GroupQuant(8, rounding="nearest")


@pytest.fixture
def plain() -> Model:
    torch.manual_seed(0)
    return Model(blocks=4, dropout=0.5)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 64, WIDTH)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("packed", [None, EIGHT])
def test_gradients_are_those_of_a_checkpoint(
    plain: Model, x: torch.Tensor, packed: GroupQuant | None
) -> None:
    kept, away = copy.deepcopy(plain), copy.deepcopy(plain)
    packlight.convert(kept, Checkpoint(keep=packed))
    conversion = packlight.convert(away, Offload(packed=packed))
    assert [row.names for row in conversion.replaced] == [(f"blocks.{i}",) for i in range(4)]
    assert equal(gradients(away, x), gradients(kept, x))
    assert [block.runs for block in away.blocks] == [2] * 4
    if packed is None:
        assert equal(gradients(away, x), gradients(plain, x))


def test_nothing_that_is_kept_is_the_input(plain: Model, x: torch.Tensor) -> None:
    packlight.convert(plain, Offload(packed=None))
    seen: list[torch.Tensor] = []
    plain.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    y = plain(x)
    assert sum(one.data_ptr() == seen[0].data_ptr() for one in held(y)) == 0


def held(y: torch.Tensor) -> list[torch.Tensor]:
    """What is away, of the last pass."""
    found, away = [], offloading._last.away()
    while away is not None:
        found += [tensor for tensor in away.hosted if tensor is not None]
        away = away.before()
    return found


def test_the_block_before_is_sent_for(plain: Model, x: torch.Tensor) -> None:
    packlight.convert(plain, Offload())
    y = plain(x)
    last = offloading._last.away()
    chain = [last]
    while (before := chain[-1].before()) is not None and len(chain) < 4:
        chain.append(before)
    assert len(chain) == 4
    assert all(away.here is None for away in chain)
    last.back()
    assert last.here is None
    assert chain[1].here is not None
    assert chain[2].here is None
    y.sum().backward()


def test_passes_without_gradients_put_nothing_away(plain: Model, x: torch.Tensor) -> None:
    expected_model = copy.deepcopy(plain)
    packlight.convert(plain, Offload(packed=EIGHT))
    packlight.convert(expected_model, Offload(packed=EIGHT))
    expected = gradients(expected_model, x)
    packlight.manual_seed(3)
    leaf = x.detach().requires_grad_()
    y = plain(leaf)
    last = offloading._last.away()
    state = torch.get_rng_state()
    with torch.no_grad():
        plain(torch.randn(2, 64, WIDTH))
    torch.set_rng_state(state)
    assert offloading._last.away() is last
    y.square().sum().backward()
    assert torch.equal(leaf.grad, expected["input"])


def test_an_exception_leaves_nothing_behind(plain: Model, x: torch.Tensor) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("on purpose")

    expected = copy.deepcopy(plain)
    packlight.convert(plain, Offload(packed=EIGHT))
    packlight.convert(expected, Offload(packed=EIGHT))
    second = plain.blocks[2].second
    plain.blocks[2].second = Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        plain(x)
    plain.blocks[2].second = second
    assert equal(gradients(plain, x), gradients(expected, x))


def test_two_graphs_at_a_time(plain: Model, x: torch.Tensor) -> None:
    plain.eval().train()
    packlight.convert(plain, Offload(packed=None))
    for block in plain.blocks:
        block.dropout.p = 0.0
    other = torch.randn(2, 64, WIDTH)
    first, second = plain(x).sum(), plain(other).sum()
    plain.zero_grad()
    first.backward()
    one = plain.stem.weight.grad.clone()
    plain.zero_grad()
    second.backward()
    two = plain.stem.weight.grad.clone()
    for sample, grad in ((x, one), (other, two)):
        plain.zero_grad()
        plain(sample).sum().backward()
        assert torch.equal(plain.stem.weight.grad, grad)


def test_a_graph_is_gone_through_twice(plain: Model, x: torch.Tensor) -> None:
    packlight.convert(plain, Offload(packed=None))
    loss = plain(x).sum()
    found = [torch.autograd.grad(loss, plain.stem.weight, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*found)


def test_autocast_is_that_of_the_forward_pass(plain: Model, x: torch.Tensor) -> None:
    other = copy.deepcopy(plain)
    packlight.convert(plain, Offload(packed=EIGHT))
    packlight.convert(other, Checkpoint(keep=EIGHT))
    found = []
    for model in (plain, other):
        packlight.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
        found.append(model.stem.weight.grad)
    assert torch.equal(*found)


def test_models_are_copied_pickled_and_reverted(plain: Model, x: torch.Tensor) -> None:
    kind = type(plain.blocks[0])
    expected = gradients(copy.deepcopy(plain), x)
    packlight.convert(plain, Offload(packed=None))
    for other in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert equal(gradients(other, x), expected)
        assert [block.runs for block in other.blocks] == [2] * 4
    assert packlight.revert(plain) >= 4
    assert type(plain.blocks[0]) is kind
    assert equal(gradients(plain, x), expected)


def test_methods_are_values() -> None:
    method = Offload(GroupQuant(4))
    assert parse_methods(format_methods(method)) == method
    assert packlight.Method.from_dict(method.to_dict()) == method
    with pytest.raises(InputError, match="packed=4"):
        Offload(packed=4)


def test_a_walk_has_no_packs_on_the_device() -> None:
    kept = {}
    for name, method in (("on", Checkpoint(GroupQuant(8))), ("off", Offload(GroupQuant(8)))):
        with torch.device("meta"):
            model, x = Model(blocks=6), torch.empty(64, 64, WIDTH)
        walker = Walker(model, (x,), {})
        with walker.imagined():
            packlight.convert(walker.model, method)
        kept[name] = walker.walk(device_of("H200")).timeline.kept
    assert kept["off"] < kept["on"] - 4 * 64 * 64 * WIDTH


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("option", menu.MENU, ids=lambda option: option.name)
def test_options_run_in_blocks_of_torch_beside_packs(option: menu.Option, dropout: float) -> None:
    """What a block's second run sees of its input is what its first saw: the packs that the block
    before made of it, and the notes of these, are in neither.
    """
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=dropout, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    chosen = (menu.PACKED_4, option, menu.PACKED_4, option)
    blocks = {f"layers.{place}": one for place, one in enumerate(chosen)}
    packlight.convert(model, menu.selectors(blocks, menu.PACKED_4), functional=True, strict=False)
    x = torch.randn(2, 64, 64, requires_grad=True)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *model.parameters()))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [None, EIGHT])
def test_on_a_gpu_copies_beside_the_blocks_change_no_bit(packed: GroupQuant | None) -> None:
    """Large enough that a copy takes longer than what is launched beside it."""
    torch.manual_seed(0)
    kept = Model(blocks=6).cuda()
    away = copy.deepcopy(kept)
    packlight.convert(kept, Checkpoint(keep=packed))
    packlight.convert(away, Offload(packed=packed))
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (kept, away)]
    for step in range(4):
        x = torch.randn(512, 256, WIDTH, device="cuda")
        used = []
        for model, optimizer in zip((kept, away), optimizers, strict=True):
            before = torch.cuda.memory_allocated()
            y = model(x)
            torch.cuda.synchronize()
            torch.empty(1, device="cuda")  # the allocator sees what copies have let go of
            used.append(torch.cuda.memory_allocated() - before)
            with torch.no_grad():
                model(x[:8])  # a pass without gradients in between
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert used[0] - used[1] >= (4 if packed is None else 1) * 6 * x.numel(), step
        assert equal(away.state_dict(), kept.state_dict()), step


@pytest.mark.gpu
def test_a_graph_of_offloaded_blocks_is_refused() -> None:
    model = Model(blocks=2).cuda()
    packlight.convert(model, Offload())
    x = torch.randn(2, 64, WIDTH, device="cuda")
    with pytest.raises(packlight.CannotGraphError, match="use Checkpoint"):
        packlight.graphed(model, x)
    packlight.launched(model)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
