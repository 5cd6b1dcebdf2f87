"""packlight: train and fine-tune PyTorch models with a fraction of the activation memory."""

from packlight._version import __version__

__all__ = ["__version__"]
