"""Whole blocks of transformers, converted, in compiled code and in CUDA graphs."""

import pytest
import torch

from packlight import FewBit, GroupQuant, convert, profile
from tests.blocks import DecoderBlock, EncoderBlock, PreNormBlock
from tests.helpers import relative_error

BLOCKS = {
    "encoder with dropout": lambda: EncoderBlock(128, 4, 512),
    "pre-norm": lambda: PreNormBlock(128, 4, False, 0.0),
    "pre-norm with dropout, causal": lambda: PreNormBlock(128, 4, True, 0.1),
    "decoder": lambda: DecoderBlock(128, 4, 2, 384),
}

# A graph captured parameters that live on the default stream, which costs a wait and no more.
in_a_graph = pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")


def converted(name, dropout=None, **options):
    """A block at 4 bits, and an input for it; `dropout` replaces every probability."""
    block, x = BLOCKS[name]().cuda(), torch.randn(4, 128, 128, device="cuda", requires_grad=True)
    for module in block.modules():
        if dropout is not None and hasattr(module, "p"):
            module.p = dropout
    convert(block, (GroupQuant(4, **options), FewBit(3)), functional=True)
    return block, x


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_compiled_block_keeps_no_more_than_the_eager_one(name, autocast, fresh_compiler):
    """One block: of two, compiled one by one, the second packs its input again."""
    block, x = BLOCKS[name](), torch.randn(4, 128, 128)
    block.attention.p = 0.0  # on the CPU, torch has no fused attention with dropout
    convert(block, (GroupQuant(4), FewBit(3)), functional=True)
    # The compiler's own choice of what to keep, after the decompositions of its default backend.
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autocast("cpu", torch.bfloat16, autocast):
        eager = profile(block, x).activation_bytes
        assert profile(compiled, x).activation_bytes <= eager + 64


@in_a_graph
@pytest.mark.usefixtures("collected")
@pytest.mark.gpu
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_in_cuda_graphs_computes_what_the_launched_one_does(name):
    """`make_graphed_callables` takes the launches of a step off the CPU."""
    block, x = converted(name, dropout=0.0, rounding="nearest")
    inputs, dy = [x, *block.parameters()], torch.randn_like(x)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        expected = torch.autograd.grad(block(x), inputs, dy)
        graphed = torch.cuda.make_graphed_callables(block, (x,))
        for _ in range(2):
            actual = torch.autograd.grad(graphed(x), inputs, dy)
            for a, b in zip(actual, expected, strict=True):
                assert (a - b).norm() <= 1e-3 * b.norm()


@in_a_graph
@pytest.mark.usefixtures("collected")
@pytest.mark.gpu
def test_each_replay_of_a_graph_draws_its_own_masks_and_roundings():
    name = "encoder with dropout"
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        block, x = converted(name)
        graphed = torch.cuda.make_graphed_callables(block, (x,))
        first, second = graphed(x).clone(), graphed(x).clone()
        assert (first != second).float().mean() > 0.5  # masks of dropout
        block, x = converted(name, dropout=0.0)
        graphed, dy = torch.cuda.make_graphed_callables(block, (x,)), torch.randn_like(x)
        weight = block.fc1.weight
        grads = [torch.autograd.grad(graphed(x), weight, dy)[0].clone() for _ in range(2)]
        assert 0.01 < relative_error(grads[1], grads[0]) < 0.5  # roundings
