"""Layers of Hugging Face transformers, and a callback for its `Trainer`.

`packlight.convert` imports this where the program has imported transformers. docs/integrations.md
says what each class becomes.
"""

from typing import TYPE_CHECKING, Any

from packlight.integrations.transformers import activations, attention, gated, linear, norms

if TYPE_CHECKING:
    from packlight.integrations.transformers.callback import PacklightCallback

__all__ = ["PacklightCallback", "activations", "attention", "gated", "linear", "norms"]


def __getattr__(name: str) -> Any:
    """The callback, which alone needs the modules of `Trainer`."""
    if name == "PacklightCallback":
        from packlight.integrations.transformers.callback import PacklightCallback

        return PacklightCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
