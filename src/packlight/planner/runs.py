"""Blocks that are alike and follow each other: three of them are walked, for all.

What a block keeps, takes and frees is that of the block before it. So of a run of alike blocks the
first, the second and the last are walked, and the second's part of the timeline stands for all
between. The copy that is walked never has the others.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable

from torch import nn

from packlight._torch.attributes import plain_attributes
from packlight.recompute.rules import blocks_of
from packlight.selectors import layers_of

_FEWEST = 5  # blocks of a run, for that to be worth it
_WALKED = 3


@dataclasses.dataclass(frozen=True)
class Run:
    """Alike blocks of a list, of which three stand in the copy; or one block by itself.

    `names` are those in the model. In the copy the run begins at place `at` of the list.
    """

    names: tuple[str, ...]
    container: str
    at: int

    @property
    def places(self) -> int:
        """How many blocks are walked."""
        return min(len(self.names), _WALKED)

    @property
    def extra(self) -> int:
        """How many blocks are not walked."""
        return len(self.names) - self.places

    def stands_for(self, place: int) -> tuple[str, ...]:
        """The blocks for which a walked one stands."""
        if place == 1:
            return self.names[1:-1]
        return self.names[:1] if place == 0 else self.names[-1:]

    def walked(self, place: int) -> str:
        """The name in the copy of the first, the second or the last block."""
        return f"{self.container}.{self.at + place}" if self.container else str(self.at + place)


def lists_of_blocks(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """The lists of a model that hold its blocks, by name, if all that they hold are blocks."""
    blocks = blocks_of(layers_of(model))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 0
        and all(child in blocks for child in module)
    }


def runs_of(model: nn.Module, choice: Callable[[str], Hashable] = lambda name: None) -> list[Run]:
    """The blocks of a model in runs. `choice` tells blocks apart by their names."""
    found = []
    for container, blocks in lists_of_blocks(model).items():
        names = [
            f"{container}.{index}" if container else str(index) for index in range(len(blocks))
        ]
        kinds = [
            (signature(block), choice(name)) for name, block in zip(names, blocks, strict=True)
        ]
        start = place = 0
        while start < len(names):
            end = start + 1
            while end < len(names) and kinds[end] == kinds[start]:
                end += 1
            alike = names[start:end]
            for group in [alike] if len(alike) >= _FEWEST else [[name] for name in alike]:
                found.append(Run(tuple(group), container, place))
                place += found[-1].places
            start = end
    return found


def signature(block: nn.Module) -> Hashable:
    """What two blocks have in common if their steps allocate alike."""
    parameters = tuple(
        (name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()
    )
    attributes = tuple(
        (path, type(module), name, value)
        for path, module in block.named_modules()
        for name, value in sorted(plain_attributes(module).items())
        if isinstance(value, bool | int | float | str) and not _counts(name)
    )
    return (repr(block), parameters, attributes)


def _counts(name: str) -> bool:
    """Whether an attribute says which of the blocks it is."""
    return any(part in name.lower() for part in ("idx", "index", "layer_id", "layer_number"))


def shortened(model: nn.Module, runs: Iterable[Run]) -> None:
    """Takes the blocks out of a copy that are not walked: all of a run but three."""
    by_container: dict[str, list[Run]] = {}
    for run in runs:
        by_container.setdefault(run.container, []).append(run)
    for container, of_it in by_container.items():
        blocks = model.get_submodule(container)
        left_out = {name for run in of_it if run.extra for name in run.names[2:-1]}
        left = [
            child
            for key, child in blocks.named_children()
            if (f"{container}.{key}" if container else key) not in left_out
        ]
        blocks._modules.clear()
        blocks._modules.update({str(place): child for place, child in enumerate(left)})
