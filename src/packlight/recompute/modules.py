"""What modules become: those that run in tiles, and blocks that are checkpointed."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from packlight._checks import is_taken
from packlight.errors import InputError
from packlight.recompute.functional import checkpoint
from packlight.recompute.method import OfBlocks, Tiles
from packlight.recompute.tiles import in_tiles

ATTRIBUTE = "_packlight_recompute"


class Checkpointed(nn.Module):
    """A block that runs again in the backward pass; its hooks do so too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = super().__call__
        method: OfBlocks | None = vars(self).get(ATTRIBUTE)
        # A module that is made of the class later was not converted.
        if method is None or not self.training:
            return call(*args, **kwargs)
        return checkpoint(call, *args, keep=method.kept_by, offload=method.offloads, **kwargs)


class Tiled(nn.Module):
    """A module that works on each position by itself, by tiles of positions."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain: Callable[..., Any] = super().forward
        method: Tiles | None = vars(self).get(ATTRIBUTE)
        # The parameters of DataParallel's replicas are none.
        if method is None or not self.training or getattr(self, "_is_replica", False):
            return plain(*args, **kwargs)
        given = (*args, *kwargs.values())
        if len(given) != 1 or not isinstance(given[0], Tensor):
            raise InputError(
                f"a {type(self).__name__} that runs in tiles takes one tensor, got {len(given)}"
                " arguments; leave it to torch (None as its method)"
            )
        x = given[0]
        if x.dim() < 2 or x.numel() == 0 or not is_taken(x):
            return plain(x)
        return in_tiles(self, plain, x, method)
