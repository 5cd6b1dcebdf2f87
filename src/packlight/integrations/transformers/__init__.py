"""Layers of Hugging Face transformers, and a callback for its `Trainer`.

`packlight.convert` imports this where the program has imported transformers. docs/integrations.md
says what each class becomes.
"""

import warnings
from typing import TYPE_CHECKING, Any

import transformers

if TYPE_CHECKING:
    from packlight.integrations.transformers.callback import PacklightCallback

__all__ = ["PacklightCallback"]

_OLDEST = 5

if int(transformers.__version__.partition(".")[0]) >= _OLDEST:
    # Each registers its rules.
    from packlight.integrations.transformers import (  # noqa: F401
        activations,
        attention,
        blocks,
        feed_forward,
        gated,
        linear,
        masks,
        norms,
        outputs,
        resnet,
    )
else:
    warnings.warn(
        f"packlight has rules for transformers from version {_OLDEST}, and this is"
        f" {transformers.__version__}: its own layers are left alone",
        stacklevel=2,
    )


def __getattr__(name: str) -> Any:
    """The callback, which alone needs the modules of `Trainer`."""
    if name == "PacklightCallback":
        from packlight.integrations.transformers.callback import PacklightCallback

        return PacklightCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
