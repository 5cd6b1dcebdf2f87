"""Whole blocks of transformers, converted and compiled, keep what converted blocks keep eagerly."""

import pytest
import torch

from benchmarks.models import DecoderBlock, EncoderBlock, PreNormBlock
from packlight import FewBit, GroupQuant, convert, profile

BLOCKS = {
    "encoder with dropout": lambda: EncoderBlock(128, 4, 512),
    "pre-norm": lambda: PreNormBlock(128, 4, False, 0.0),
    "pre-norm with dropout, causal": lambda: PreNormBlock(128, 4, True, 0.1),
    "decoder": lambda: DecoderBlock(128, 4, 2, 384),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_compiled_block_keeps_no_more_than_the_eager_one(name, autocast, fresh_compiler):
    """Between two blocks nothing is shared in compiled code, so it is one block."""
    block, x = BLOCKS[name](), torch.randn(4, 128, 128)
    block.attention.p = 0.0  # on the CPU, torch has no fused attention with dropout
    convert(block, (GroupQuant(4), FewBit(3)), functional=True)
    # The compiler's own choice of what to keep, after the decompositions of its default backend.
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autocast("cpu", torch.bfloat16, autocast):
        eager = profile(block, x).activation_bytes
        assert profile(compiled, x).activation_bytes <= eager + 64
