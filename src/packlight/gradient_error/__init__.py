"""`gradient_error`: how far a conversion moves the gradients of each layer, on a batch."""

from packlight.gradient_error.measuring import gradient_error

__all__ = ["gradient_error"]
