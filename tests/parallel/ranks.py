"""Programs that run as several processes of one group."""

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
LIMIT = 300  # seconds


def run(program: str, count: int, folder: pathlib.Path, backend: str = "gloo") -> str:
    """What rank 0 of `program`, a file of this folder, prints. Raises if a rank fails."""
    root = str(HERE.parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    places = {"MASTER_ADDR": "localhost", "STORE": str(folder / "store"), "BACKEND": backend}
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / program)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **places,
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "WORLD_SIZE": str(count),
            },
        )
        for rank in range(count)
    ]
    said = []
    try:
        for process in started:
            said.append(process.communicate(timeout=LIMIT))
    finally:
        for process in started:
            process.kill()
            process.communicate()
    # Where one fails, others lose their connection: the reason may be in any of them.
    failed = [
        f"rank {rank}:\n{errors[-2000:]}"
        for rank, (process, (_, errors)) in enumerate(zip(started, said, strict=True))
        if process.returncode
    ]
    assert not failed, "\n".join(failed)
    return said[0][0]


def join() -> tuple[int, int, str]:
    """Rank, number of ranks and kind of device, of a process that `run` has started."""
    import torch
    import torch.distributed as dist

    rank, count, backend = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "BACKEND"))
    kind = "cuda" if backend == "nccl" else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(rank))
    store = f"file://{os.environ['STORE']}"
    dist.init_process_group(backend, init_method=store, rank=int(rank), world_size=int(count))
    return int(rank), int(count), kind


def leave(word: str) -> None:
    """Ends a rank once all have come so far; threads of the group do nothing more."""
    import torch.distributed as dist

    print(word, flush=True)
    dist.barrier()
    os._exit(0)
