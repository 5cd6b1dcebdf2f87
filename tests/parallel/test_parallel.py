"""Several processes give the gradients of one."""

import socket
import subprocess
import sys

import pytest
import torch

from tests.parallel.ranks import HERE, run

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


# ---- engines -------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torchtitan 0.3 is of torch 2.13")
def test_a_line_of_torchtitan(tmp_path):
    assert run("titan.py", 2, tmp_path) == "same gradients\n"


def test_a_layer_specification_of_megatron(tmp_path):
    """On CPUs alone: it puts stand-ins in the place of CUDA's device."""
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
