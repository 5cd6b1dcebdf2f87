"""Several processes give the gradients of one."""

import pytest
import torch

from tests.parallel.ranks import run

# Programs of this folder, each on so many ranks.
PROGRAMS = {
    "layers.py": (2,),
    "sketches.py": (2,),
    "tiles.py": (2,),
    "heads.py": (2,),
    "fully_sharded.py": (2, 4),  # 4: two shards of two copies
    "tensor_parallel.py": (2, 4),  # 4: two of data by two of tensors
    "pipeline.py": (2, 4),  # 4: two of stages by two of data, and all in a row
    "context_parallel.py": (2, 4),
    "expert_parallel.py": (2, 4),
}


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("program", "count"), [(name, count) for name, counts in PROGRAMS.items() for count in counts]
)
def test_ranks_give_the_gradients_of_one_process(program, count, backend, tmp_path):
    if backend == "nccl" and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, and this machine has {torch.cuda.device_count()}")
    assert run(program, count, tmp_path, backend) == "same gradients\n"
