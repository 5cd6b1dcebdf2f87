"""The errors that packlight raises: each names the value, what was expected, and the next step."""


class PacklightError(Exception):
    """Base of all errors raised by packlight."""


class InputError(PacklightError, ValueError):
    """An argument or a tensor that cannot be used: wrong value, dtype, shape or device."""


class DoubleBackwardError(PacklightError, RuntimeError):
    """A second derivative was asked of a layer that keeps too little to form one."""


class ModifiedWeightError(PacklightError, RuntimeError):
    """A layer's weight, or a mask, was modified between its forward and its backward pass."""


class MissingDependencyError(PacklightError, ImportError):
    """An optional package is needed for this call and is not installed."""


class CannotConvertError(PacklightError, ValueError):
    """A layer that a method has a rule for, and that cannot be converted all the same."""


class NothingMatchedError(PacklightError, ValueError):
    """A conversion that would have changed nothing."""


class CannotGraphError(PacklightError, RuntimeError):
    """A pass of a model that no CUDA graph can do again."""


class InfeasibleBudgetError(PacklightError, ValueError):
    """A number of bytes into which no plan makes a training step fit."""
