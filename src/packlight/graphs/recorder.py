"""How CUDA records kernels and replays them."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from packlight import _seeds, _torch
from packlight.errors import CannotGraphError

_WARM_UPS = 3  # kernels are compiled, and libraries choose theirs and allocate


class CudaRecorder:
    """Records into one memory pool, whose recordings run one after the other."""

    runs_again = False  # a replay calls nothing of `run`

    def __init__(self) -> None:
        self.pool: Any = None

    def anew(self) -> "CudaRecorder":
        return CudaRecorder()

    def restart(self) -> None:
        """No recording is left: a pool ends with its last graph."""
        self.pool = None

    def is_recording(self) -> bool:
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

    def refuse(self, tensors: list[Tensor]) -> None:
        """Raises `CannotGraphError` unless all tensors are on one CUDA device."""
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1 or any(device.type != "cuda" for device in devices):
            found = ", ".join(sorted(map(str, devices)))
            raise CannotGraphError(f"arguments and parameters are on {found}; not on one GPU")

    @contextmanager
    def recording(self, device: torch.device) -> Iterator[_seeds.SeedTable]:
        """What is needed while passes run and are recorded; the generators stay as they are.

        cuBLAS sets a workspace aside for each thread and stream (32 MiB on an H100), so backward
        passes run on this thread.
        """
        seeds = _seeds.SeedTable(device)
        generator = torch.cuda.default_generators[device.index]
        before, rounding = generator.clone_state(), _seeds.rounding_state()
        offset = generator.get_offset()
        try:
            with (
                torch.cuda.device(device),
                seeds.used_by_operators(),
                torch.autograd.set_multithreading_enabled(False),
            ):
                yield seeds
            generator.set_offset(offset)
        except BaseException:
            generator.graphsafe_set_state(before)  # the present state is that of a recording
            raise
        finally:
            _seeds.set_rounding_state(rounding)
            _free_workspaces()  # that of the graphs stays theirs: no one else uses their pool

    def warm_up(self, run: Callable[[], Any]) -> None:
        side, present = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(present)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                run()
        present.wait_stream(side)
        _free_workspaces()

    def record(
        self, run: Callable[[], list[Tensor | None]]
    ) -> tuple[list[Tensor | None], Callable[[], None]]:
        """The tensors that `run` returns, and what computes them anew into the same memory."""
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                nothing_freed(),
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                found = run()
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            reason = str(error).partition("\n")[0]
            raise CannotGraphError(
                f"a pass waits for the device or does what no graph can: {reason}"
            ) from error
        self.pool = graph.pool()
        return found, graph.replay


def _free_workspaces() -> None:
    """Those of streams on which passes were launched; one that is wanted again is made anew."""
    if _torch.WORKSPACES.values is not None:
        _torch.WORKSPACES.values[0]()


@contextmanager
def nothing_freed() -> Iterator[None]:
    """Garbage is collected before, and not within: a graph of the past that goes ends a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
