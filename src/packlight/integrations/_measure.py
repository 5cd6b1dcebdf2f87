"""How many bytes the forward passes of a training step keep, for the callbacks of trainers."""

from collections.abc import Iterable
from types import TracebackType

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class KeptBytes:
    """Counts what autograd keeps while it is entered: unique storages, parameters apart.

    Keeps nothing alive, so it is for one forward pass: of two, the second may take the memory that
    the first has freed. Of checkpointed regions their inputs count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._apart = {_place(parameter) for parameter in _held_by(model)}
        self._sizes: dict[tuple[int, int], int] = {}
        self._hooks = saved_tensors_hooks(self._count, _unchanged)

    def _count(self, tensor: Tensor) -> Tensor:
        place = _place(tensor)
        if place not in self._apart:
            self._sizes[place] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def __enter__(self) -> "KeptBytes":
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _held_by(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _place(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
