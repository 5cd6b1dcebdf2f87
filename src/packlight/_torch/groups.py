"""A process group of many ranks in one process, in which nothing is sent.

Collectives on tensors without values need none: a group says how many ranks there are and which
this one is.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from packlight._torch.capabilities import RANKS, SHAPES
from packlight._torch.modes import unseen_by_modes
from packlight.errors import InputError


@contextlib.contextmanager
def imagined_group(ranks: int) -> Iterator[None]:
    """Within, this process is rank 0 of so many.

    Raises `InputError` in a process that has a group, which torch allows one of, and where torch
    has no group without a network.
    """
    if RANKS.values is None:
        raise InputError(
            f"torch {torch.__version__} has no process group without a network as packlight knows"
            " it, so that tensor parallel cannot be foretold"
        )
    if torch.distributed.is_initialized():
        raise InputError(
            "tensor parallel is foretold in a process group that is imagined, and torch allows one"
            " group: call this before torch.distributed.init_process_group"
        )
    store = RANKS.values[0]()
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=ranks)
    try:
        with _shapes_unseen():
            yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _shapes_unseen() -> Iterator[None]:
    """Within, no mode sees the operators by which DTensors find the shapes of whole results.

    They run on tensors without values of the whole size, as no rank has them.
    """
    if SHAPES.values is None:
        yield
        return
    propagator, found = SHAPES.values

    def unseen(self: Any, schema: Any) -> Any:
        with unseen_by_modes():
            return found(self, schema)

    propagator._propagate_tensor_meta_non_cached = unseen
    try:
        yield
    finally:
        propagator._propagate_tensor_meta_non_cached = found
