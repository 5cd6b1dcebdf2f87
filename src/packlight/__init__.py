"""packlight: train and fine-tune PyTorch models with a fraction of the activation memory."""

from packlight import fewbit, groupquant, head, inverted, layers, recompute, sketch
from packlight._library import use_reference
from packlight._seeds import manual_seed, rounding_state, set_rounding_state
from packlight._version import __version__
from packlight.conversion import Conversion
from packlight.convert import DEFAULT_METHODS, DEFAULT_REST, convert, revert
from packlight.errors import (
    CannotConvertError,
    CannotGraphError,
    DoubleBackwardError,
    InfeasibleBudgetError,
    InputError,
    MissingDependencyError,
    ModifiedWeightError,
    NothingMatchedError,
    PacklightError,
)
from packlight.fewbit import Codebook, FewBit, fit_codebook
from packlight.gradient_error import gradient_error
from packlight.graphs import graphed, launched
from packlight.groupquant import FixedPoint, GroupQuant
from packlight.inverted import Inverted
from packlight.method import Method
from packlight.method_files import load_methods, save_methods
from packlight.pack import Grade
from packlight.parallel import Parallel
from packlight.planner.planner import plan
from packlight.planner.result import Plan
from packlight.predict import predict
from packlight.profile import MemoryReport, profile
from packlight.quantiser import Quantiser
from packlight.recompute import Checkpoint, Offload, Tiles
from packlight.report.gradients import GradientReport
from packlight.saving import saving
from packlight.sketch import Sketch

__all__ = [
    "DEFAULT_METHODS",
    "DEFAULT_REST",
    "CannotConvertError",
    "CannotGraphError",
    "Checkpoint",
    "Codebook",
    "Conversion",
    "DoubleBackwardError",
    "FewBit",
    "FixedPoint",
    "Grade",
    "GradientReport",
    "GroupQuant",
    "InfeasibleBudgetError",
    "InputError",
    "Inverted",
    "MemoryReport",
    "Method",
    "MissingDependencyError",
    "ModifiedWeightError",
    "NothingMatchedError",
    "Offload",
    "PacklightError",
    "Parallel",
    "Plan",
    "Quantiser",
    "Sketch",
    "Tiles",
    "__version__",
    "convert",
    "fewbit",
    "fit_codebook",
    "gradient_error",
    "graphed",
    "groupquant",
    "head",
    "inverted",
    "launched",
    "layers",
    "load_methods",
    "manual_seed",
    "plan",
    "predict",
    "profile",
    "recompute",
    "revert",
    "rounding_state",
    "save_methods",
    "saving",
    "set_rounding_state",
    "sketch",
    "use_reference",
]
