"""A model that was loaded, and what is known of it before anything runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from packlight.cli.models.inputs import shape_text, short_dtype


@dataclass(frozen=True)
class LoadedModel:
    """A model, what it is called with, and the task that a head was made for."""

    text: str
    model: nn.Module
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    batch: Any = None  # the inputs of a function in Python, as it returned them
    loss: Callable[..., Tensor] | None = None  # of model and batch, if that function brought one

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of the parameters, without "torch."."""
        found = dict.fromkeys(parameter.dtype for parameter in self.model.parameters())
        return tuple(short_dtype(dtype) for dtype in found)

    @property
    def has_dropout(self) -> bool:
        """Whether a layer of torch's drops something out, as far as layers tell."""
        layers = (module for module in self.model.modules() if isinstance(module, nn.Dropout))
        return self.model.training and any(layer.p > 0 for layer in layers)

    @property
    def inputs_text(self) -> str:
        """For reading: "input_ids 1x512 int64", and of positions the shapes alone."""
        named = self.inputs().items()
        return ", ".join(text if name.isdigit() else f"{name} {text}" for name, text in named)

    def inputs(self) -> dict[str, str]:
        """Shape and dtype of each tensor among the inputs, "1x512 int64", by name or position."""
        named = {str(place): value for place, value in enumerate(self.arguments)} | self.keywords
        return {
            name: f"{shape_text(value.shape)} {short_dtype(value.dtype)}"
            for name, value in named.items()
            if isinstance(value, Tensor)
        }
