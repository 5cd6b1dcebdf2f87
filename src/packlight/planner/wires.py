"""What operators of a rank send to others, and tensors of which a rank has a part.

Bytes are those that a rank sends with the algorithms of a ring. Of n ranks, with the bytes s of
what a rank gives: an all-gather sends s (n - 1), a reduce-scatter s (n - 1) / n, an all-reduce
twice that, and an all-to-all s (n - 1) / n.

Source: the factors of bandwidth in the performance page of nccl-tests.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from packlight.errors import InputError
from packlight.parallel import Parallel
from packlight.profile.tensors import inner_tensors

_GROUPS = ("_c10d_functional", "c10d")


def is_on_shards(kind: type) -> bool:
    """Whether it is the class of a DTensor."""
    return kind.__module__.startswith("torch.distributed.tensor")


def local_parts(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors, and of those on shards what this rank has."""
    for tensor in tensors:
        if is_on_shards(type(tensor)):
            yield from inner_tensors(tensor)
        else:
            yield tensor


def local_bytes(tensor: Tensor) -> int:
    return sum(part.numel() * part.element_size() for part in local_parts([tensor]))


def all_gathered(size: float, ranks: int) -> float:
    """Bytes that a rank sends for all to have the whole, which is of this size."""
    return size * (ranks - 1) / ranks


def all_reduced(size: float, ranks: int) -> float:
    return 2 * size * (ranks - 1) / ranks


def on_the_wires(
    func: Any, args: Sequence[Any], parallel: Parallel
) -> tuple[float, dict[str, float]]:
    """How many times as long as here an operator runs, and what it sends, by the degree.

    Attention under context parallel has a part of the tokens here; its queries see those of all
    ranks, half of them where it is causal, since tokens are dealt out evenly. It gathers keys and
    values, once more in the backward pass, and reduces their gradients.
    """
    name = func.overloadpacket.__name__
    if func.namespace in _GROUPS:
        return 1.0, {"tensor": _collective(name, args, parallel.tensor)}
    if parallel.context > 1 and name.startswith("_scaled_dot_product"):
        backward = name.endswith("backward")
        key, value = args[2:4] if backward else args[1:3]
        size = (local_bytes(key) + local_bytes(value)) * (parallel.context - 1)
        return float(parallel.context), {"context": 2.0 * size if backward else float(size)}
    return 1.0, {}


def _collective(name: str, args: Sequence[Any], ranks: int) -> float:
    if name.startswith("wait"):
        return 0.0
    if name.startswith(("all_gather", "_allgather_base")):
        given = args[1] if name.startswith("_allgather_base") else args[0]
        return all_gathered(ranks * local_bytes(given), ranks)
    if name.startswith("reduce_scatter"):
        return all_gathered(local_bytes(args[0]), ranks)
    if name.startswith("all_reduce"):
        return all_reduced(local_bytes(args[0]), ranks)
    raise InputError(f"the model calls {name} over ranks, whose bytes are not known")
