"""`profile`: which module and which operation keeps how many bytes for the backward pass.

The forward pass runs under saved-tensor hooks. The pack hook gives autograd a small holder object
instead of the tensor, and the profile keeps only a weak reference to it: a holder that is still
alive after the forward pass is a tensor that is kept. The module comes from a stack that forward
hooks maintain, the operation from a walk over the graph, which looks at what each node saved
without unpacking it.
"""

from packlight.profile.profiling import profile
from packlight.report import Holding, KeptTensor, MemoryDifference, MemoryReport

__all__ = ["Holding", "KeptTensor", "MemoryDifference", "MemoryReport", "profile"]
