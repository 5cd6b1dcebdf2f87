"""CUDA graphs: what the GPU alone takes, without the time of launching."""

from collections.abc import Callable
from typing import TypeVar

import torch

from packlight.graphs.recorder import nothing_freed

_T = TypeVar("_T")


def captured(run: Callable[[], _T], warm_up: int = 1) -> tuple[torch.cuda.CUDAGraph, _T]:
    """`run` as a graph, and what it returned: tensors that each replay writes anew.

    It runs on another stream first, as capturing asks for. Raises RuntimeError where it does what a
    graph cannot hold.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with nothing_freed(), torch.cuda.graph(graph):
        result = run()
    return graph, result
