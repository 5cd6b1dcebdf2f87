"""Several processes give the gradients of one: tensor and sequence parallel, and FSDP2."""

import pytest
import torch

from tests.parallel.ranks import run

NCCL = pytest.param("nccl", marks=pytest.mark.gpu)


def skip_without_gpus(backend, count):
    if backend == "nccl" and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")


@pytest.mark.parametrize("backend", ["gloo", NCCL])
@pytest.mark.parametrize("count", [2, 4])  # 4: two of data by two of tensors
def test_tensor_and_sequence_parallel(tmp_path, backend, count):
    skip_without_gpus(backend, count)
    assert run("tensor_parallel.py", count, tmp_path, backend) == "same gradients\n"


@pytest.mark.parametrize("backend", ["gloo", NCCL])
def test_fully_sharded(tmp_path, backend):
    skip_without_gpus(backend, 2)
    assert run("fully_sharded.py", 2, tmp_path, backend) == "same gradients\n"
