"""Heads that never hold all logits: the loss of a vocabulary, chunk by chunk.

Logits and their log-softmax are most of what a small language model keeps once its layers are
converted. `packlight.convert(model, head=True)` has the heads of a model hand out `LazyLogits`,
of which a cross-entropy is computed by chunks; whatever else is done with them computes them.
`linear_cross_entropy` is the loss itself, for code that calls it.
"""

import packlight.head.following  # noqa: F401  writes the table of what is followed
from packlight.head.functional import linear_cross_entropy
from packlight.head.lazy import LazyLogits

__all__ = ["LazyLogits", "linear_cross_entropy"]
