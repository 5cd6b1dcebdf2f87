"""Several processes give the gradients of one: tensor and sequence parallel, and FSDP2."""

import socket
import subprocess
import sys

import pytest
import torch

from tests.parallel.ranks import HERE, run

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


# ---- engines -------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torchtitan 0.3 is of torch 2.13")
def test_a_line_of_torchtitan(tmp_path):
    assert run("titan.py", 2, tmp_path) == "same gradients\n"


def test_a_layer_specification_of_megatron(tmp_path):
    assert run("megatron_layers.py", 2, tmp_path) == "same gradients\n"


def test_the_fsdp2_plugin_of_accelerate():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = {"num_processes": 2, "num_machines": 1, "mixed_precision": "no", "fsdp_version": 2}
    options |= {"dynamo_backend": "no", "main_process_port": port}
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", *given]
    found = subprocess.run(
        [*launch, str(HERE / "accelerated.py")], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr[-4000:]
    assert found.stdout == "same gradients\n"
