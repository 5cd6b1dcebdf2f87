"""Programs that run as several processes of one group.

A server that has imported torch and transformers once forks the processes of all programs: each
would take seconds to import them.
"""

import multiprocessing
import os
import pathlib
import runpy
import sys

HERE = pathlib.Path(__file__).parent
LIMIT = 300  # seconds

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([
    "packlight", "tests.integrations.models", "torch.distributed.fsdp",
    "torch.distributed.pipelining", "torch.distributed.tensor.experimental",
    "torch.distributed.tensor.parallel",
])  # fmt: skip


def run(program: str, count: int, folder: pathlib.Path, backend: str = "gloo") -> str:
    """What rank 0 of `program`, a file of this folder, prints. Raises if a rank fails."""
    started = [
        _server.Process(target=_run, args=(program, rank, count, folder, backend), daemon=True)
        for rank in range(count)
    ]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(LIMIT)
        codes = [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
            process.join()
    # Where one fails, others lose their connection: the reason may be in any of them.
    failed = [
        f"rank {rank}, exit code {code}:\n{(folder / f'errors {rank}').read_text()[-3000:]}"
        for rank, code in enumerate(codes)
        if code != 0
    ]
    assert not failed, "\n".join(failed)
    return (folder / "output 0").read_text()


def _run(program: str, rank: int, count: int, folder: pathlib.Path, backend: str) -> None:
    """One process of a program, as `python program` would be."""
    for stream, name in ((1, "output"), (2, "errors")):
        with (folder / f"{name} {rank}").open("w") as file:
            os.dup2(file.fileno(), stream)
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), BACKEND=backend, STORE=str(folder / "store"),
        MASTER_ADDR="localhost",
    )  # fmt: skip
    sys.argv = [str(HERE / program)]
    runpy.run_path(sys.argv[0], run_name="__main__")


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
