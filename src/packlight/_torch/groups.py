"""A process group of many ranks in one process, in which nothing is sent.

Collectives on tensors without values need none: a group says how many ranks there are and which
this one is.
"""

import contextlib
from collections.abc import Iterator

import torch

from packlight._torch.capabilities import look_up
from packlight.errors import InputError


@contextlib.contextmanager
def imagined_group(ranks: int) -> Iterator[None]:
    """Within, this process is rank 0 of so many.

    Raises `InputError` in a process that has a group, which torch allows one of, and where torch
    has no group without a network.
    """
    dist = torch.distributed
    if not dist.is_available() or None in (look_up(_FAKE), look_up(_STORE)):
        raise InputError(
            f"torch {torch.__version__} has no process group without a network as packlight knows"
            " it, so that tensor parallel cannot be foretold"
        )
    if dist.is_initialized():
        raise InputError(
            "tensor parallel is foretold in a process group that is imagined, and torch allows one"
            " group: call this before torch.distributed.init_process_group"
        )
    dist.init_process_group("fake", store=look_up(_STORE)(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


# Its import tells torch of the backend "fake".
_STORE = "torch.distributed:HashStore"
_FAKE = "torch.testing._internal.distributed.fake_pg:FakeStore"
