"""packlight: train and fine-tune PyTorch models with a fraction of the activation memory."""

from packlight import fewbit, groupquant, inverted
from packlight._library import use_reference
from packlight._version import __version__
from packlight.errors import (
    DoubleBackwardError,
    InputError,
    MissingDependencyError,
    PacklightError,
)
from packlight.fewbit import Codebook, FewBit, fit_codebook
from packlight.groupquant import FixedPoint, GroupQuant
from packlight.inverted import Inverted
from packlight.method import Method
from packlight.profile import MemoryReport, profile
from packlight.saving import saving

__all__ = [
    "Codebook",
    "DoubleBackwardError",
    "FewBit",
    "FixedPoint",
    "GroupQuant",
    "InputError",
    "Inverted",
    "MemoryReport",
    "Method",
    "MissingDependencyError",
    "PacklightError",
    "__version__",
    "fewbit",
    "fit_codebook",
    "groupquant",
    "inverted",
    "profile",
    "saving",
    "use_reference",
]
