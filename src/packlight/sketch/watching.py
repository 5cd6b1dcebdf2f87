"""What a layer read and what came back to it, while a model trains."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Takes x [..., features] and the gradient of the output, features last too.
Taker = Callable[[Tensor, Tensor], None]


def watch(module: nn.Module, begin: Callable[[Tensor], Taker | None]) -> RemovableHandle:
    """At every pass in which the weight gets a gradient, `begin` is given what the layer read.

    What it returns is called when the gradient of the output arrives, if the input is still what
    was read. Nothing of the training changes. Passes in compiled code are not seen.
    """

    def after_forward(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        weight = module.weight
        if torch.compiler.is_compiling() or not module.training:
            return
        if not (isinstance(weight, Tensor) and weight.requires_grad and output.requires_grad):
            return
        read: Tensor = args[0] if args else next(iter(kwargs.values()))
        taker = begin(read)
        if taker is not None:
            _take_later(taker, read.detach(), output, _features_axis(module))

    return module.register_forward_hook(after_forward, with_kwargs=True)


def _features_axis(module: nn.Module) -> int:
    """The axis of the features of input and output."""
    if isinstance(module, nn.Conv2d):
        return -3
    return -2 if isinstance(module, nn.Conv1d) else -1


def _take_later(taker: Taker, read: Tensor, output: Tensor, axis: int) -> None:
    version = read._version

    def on_gradient(grad_output: Tensor) -> None:
        if read._version == version:
            with torch.no_grad():
                taker(read.movedim(axis, -1), grad_output.movedim(axis, -1))

    output.register_hook(on_gradient)
