"""How many bytes a training step keeps for its first backward pass, for callbacks of trainers."""

import weakref
from collections.abc import Iterable
from types import TracebackType

from torch import Tensor, nn

from packlight._torch.autograd import Hooks
from packlight._torch.hooks import around_hooks
from packlight.profile.recording import Kept, unpack
from packlight.profile.tensors import storages, tensors_in


class KeptBytes:
    """Counts what autograd keeps while it is entered: unique storages, parameters apart.

    Passes without gradients keep nothing. The count ends where the first backward pass begins, so
    it is of the first passes that keep, with the losses computed of them. Of checkpointed regions
    their inputs count. Keeps nothing alive.
    """

    def __init__(self, model: nn.Module) -> None:
        self._apart = {storage.key for tensor in _held_by(model) for storage in storages(tensor)}
        self._kept: list[weakref.ref[Kept]] = []
        self._final: int | None = None
        self._hooks = around_hooks(self._pack, self._unpack)

    @property
    def bytes(self) -> int:
        return self._alive() if self._final is None else self._final

    def _pack(self, tensor: Tensor, hooks: Hooks | None) -> Kept:
        kept = Kept(tensor, hooks)
        if self._final is None:
            self._kept.append(weakref.ref(kept))
        return kept

    def _unpack(self, kept: Kept) -> Tensor:
        if self._final is None:  # the first node that needs what it kept; all is still there
            self._final = self._alive()
            self._kept.clear()
        return unpack(kept)

    def _alive(self) -> int:
        alive = [kept for kept in (reference() for reference in self._kept) if kept is not None]
        sizes = {
            storage.key: storage.bytes
            for kept in alive
            for tensor in tensors_in(kept.packed)
            for storage in storages(tensor)
        }
        return sum(size for key, size in sizes.items() if key not in self._apart)

    def __enter__(self) -> "KeptBytes":
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if self._final is None:
            self._final = self._alive()
        self._hooks.__exit__(None, None, None)


def _held_by(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
