"""`MemoryReport`, what `packlight.profile` found: it prints, plots, subtracts and saves itself."""

from packlight.report.memory import Holding, KeptTensor, MemoryDifference, MemoryReport
from packlight.report.words import check_depth, human_bytes

__all__ = [
    "Holding",
    "KeptTensor",
    "MemoryDifference",
    "MemoryReport",
    "check_depth",
    "human_bytes",
]
