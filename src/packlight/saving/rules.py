"""By which method the tensors of an operation are packed."""

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.autograd.graph import Node

from packlight._torch import graph
from packlight.errors import InputError
from packlight.quantiser import Quantiser
from packlight.saving.lossless import COMPARED, operation_of
from packlight.saving.norms import NORMS

CHECKPOINT = "checkpoint"  # the name for inputs of checkpoints, which have no node

# A compiled region shows neither its operations nor its casts and views of weights.
COMPILED = "CompiledFunctionBackward"

# Operators that set a workspace aside, of a format that only they know.
WORKSPACES = ("MkldnnRnn", "CudnnRnn", "ThnnFused", "MiopenRnn")

# Operations that stay exact: a softmax is small where its error is largest, and the gradient begins
# at a loss. Names of functions are for losses that torch composes of elementary operations.
_EXACT = (
    "*Softmax*",
    "softmax",
    "*Logsumexp*",
    "*Loss*",
    "*CrossEntropy*",
    "*_loss",
    "*cross_entropy*",
    "kl_div",
    # Inputs of a checkpoint: the recomputation must see what the forward pass saw.
    CHECKPOINT,
)

# Operations whose derivative has no bound near 0 or at the end of their domain: there a step of the
# quantiser turns a large gradient into any other, or into NaN. They stay exact too.
_UNBOUNDED = (
    "Log", "Log2", "Log10", "Log1P", "Logit", "Xlogy", "Sqrt", "Rsqrt", "Reciprocal", "Hypot",
    "Tan", "Atan2", "Acos", "Acosh", "Asin", "Atanh", "Erfinv", "Angle", "Polar", "Copysign",
    "Remainder", "Fmod", "Prod", "Cumprod", "Norm", "Dist", "Cdist", "EuclideanDist", "Pdist",
    "Renorm", "Std", "StdMean", "WeightNormInterface", "Digamma", "Lgamma", "Polygamma", "Mvlgamma",
    "Igamma", "Igammac", "StandardGamma", "Special*", "Linalg*", "Cholesky*", "TriangularSolve",
    "Ormqr", "LuUnpack",
)  # fmt: skip

# Operations that compare the tensors they save, or take exponentials of differences. Exact too.
_COMPARING = (
    "Aminmax", "Fmax", "Fmin", "IndexReduce", "ScatterReduce", "SegmentReduce", "Nextafter",
    "Nansum", "Logaddexp*", "Logcumsumexp", "FakeQuantizeLearnable*", "Foreach*",
)  # fmt: skip

# Single tensors that stay exact: denominators, limits, positions to sample at, biases of scores
# (masks with infinities), and statistics, which torch differentiates like results.
_EXACT_SLOTS = {
    **dict.fromkeys(NORMS, ("result1", "result2")),
    "FusedRmsNorm": ("result1",),
    "Div": ("other",),
    "Addcdiv": ("tensor2",),
    "GridSampler2D": ("grid",),
    "GridSampler2DCpuFallback": ("grid",),
    "GridSampler3D": ("grid",),
    "CudnnGridSampler": ("grid",),
    "ScaledDotProductFlashAttentionForCpu": ("attn_mask",),
    "ScaledDotProductEfficientAttention": ("attn_bias",),
    "ScaledDotProductCudnnAttention": ("attn_bias",),
    "ScaledDotProductFusedAttentionOverrideable": ("attn_bias",),
    "EfficientAttention": ("bias",),
}

# What makes an operation exact, for a reader, and by which operations.
_REASONS = {
    "attention that no kernel took keeps its probabilities": ("SafeSoftmax",),
    "the gradient begins at a loss": ("LogSoftmax", "*Loss*", "*CrossEntropy*"),
    "a softmax is small where its error is largest": ("*Softmax", "*Logsumexp*"),
    "a recomputation sees what the forward pass saw": (CHECKPOINT,),
    "its derivative has no bound": _UNBOUNDED,
    "it compares what it keeps": (*_COMPARING, *COMPARED),
}


def why_exact(node: str) -> str:
    """Why an operation's tensors stay exact where nothing else is said; empty for others."""
    operation = operation_of(node)
    for reason, patterns in _REASONS.items():
        if any(fnmatchcase(operation, pattern) for pattern in patterns):
            return reason
    return "a denominator, a limit or a statistic" if operation in _EXACT_SLOTS else ""


# Scores are exponentials of products of two packed tensors: they take `Quantiser.for_scores`.
_ATTENTION = (
    "ScaledDotProduct*",
    "scaled_dot_product_attention",  # its composition of matmuls, on the "math" backend
    "*FlashAttention*",
    "*EfficientAttention*",
    "FlashAttn*",
    "FlexAttention*",
)

# Gradients that sum over the pixels of a channel, neighbours in memory: `Quantiser.for_pixels`.
_OF_PIXELS = ("*Conv*", "*BatchNorm*", "*GroupNorm*", "*InstanceNorm*")

# Names of Functions of other packages; an override may name one before its package is imported.
_OF_PACKAGES = ("FlashAttnFuncBackward", "FlashAttnVarlenFuncBackward", "FlexAttentionBackward")


class Rules:
    """The methods of operations: first the user's overrides, then the defaults."""

    def __init__(self, method: Quantiser, overrides: Mapping[str, Quantiser | None]) -> None:
        fine = method.for_scores()
        self.overrides = dict(overrides)
        self.defaults: dict[str, Quantiser | None] = {
            **dict.fromkeys(_EXACT),
            **dict.fromkeys(_ATTENTION, fine),
            **dict.fromkeys(_OF_PIXELS, method.for_pixels()),
            COMPILED: fine.for_pixels(),  # of whatever operations; a ReLU's side is in its codes
            "*": method.for_functions(),
        }
        self.unknown = fine.for_functions()
        self.known: dict[tuple[str, str], tuple[Quantiser | None, bool]] = {}

    def method(
        self, name: str, function: str, slot: str = "", node: Node | None = None
    ) -> Quantiser | None:
        """The method for a tensor that a node saves under the name `slot`; None is exact.

        `name` is the name of the node, `function` that of the torch function that was called.
        """
        method, is_override = self._of_operation(name, function)
        operation = operation_of(name)
        if is_override:
            return method
        exact = slot in _EXACT_SLOTS.get(operation, ())
        if operation == "Pow":
            exact = not _is_a_power(graph.saved_number(node, "exponent"))
        elif operation in ("Clamp", "ClampMin", "ClampMax"):  # limits may be tensors
            exact = any(graph.saves_tensor(node, limit) for limit in ("min", "max"))
        return None if exact else method

    def method_of_code(self, name: str, function: str, several: bool) -> Quantiser | None:
        """The method for a tensor that a Function saves, or a compiled region; None is exact.

        By no less than attention where it saves several: it may take exponentials of products of
        what it keeps, less a statistic, whatever its name.
        """
        method, is_override = self._of_operation(name, function)
        is_of_anything = several and not is_override and method is self.defaults["*"]
        return self.unknown if is_of_anything else method

    def asks_for_slots(self, name: str) -> bool:
        """Whether the method depends on which of its tensors an operation saves."""
        return operation_of(name) in (*_EXACT_SLOTS, "Pow", "Clamp", "ClampMin", "ClampMax")

    def _of_operation(self, node: str, function: str) -> tuple[Quantiser | None, bool]:
        """The method, and whether an override gives it."""
        if (node, function) not in self.known:
            self.known[node, function] = self._look_up(node, function)
        return self.known[node, function]

    def _look_up(self, node: str, function: str) -> tuple[Quantiser | None, bool]:
        for pattern, method in self.overrides.items():
            if fnmatchcase(node, pattern) or fnmatchcase(function, pattern):
                return method, True
        operation = operation_of(node)
        if any(fnmatchcase(operation, pattern) for pattern in (*_UNBOUNDED, *_COMPARING)):
            return None, False
        for pattern, method in self.defaults.items():
            if fnmatchcase(node, pattern) or fnmatchcase(function, pattern):
                return method, False
        raise AssertionError("the last default matches everything")

    def check_patterns(self) -> None:
        """Raises if an override names no operation that was seen or that exists."""
        if not graph.node_names():
            return  # the names of torch's nodes are not known
        seen = {name for names in self.known for name in names}
        for pattern in self.overrides:
            if not _matches(pattern, seen) and not _matches(pattern, _names()):
                nearest = _nearest(pattern, seen | _names())
                raise InputError(
                    f"overrides: no operation is named {pattern!r}; name a node as"
                    " packlight.profile reports it, or a torch function"
                    + (f", such as {', '.join(nearest)}" if nearest else "")
                )


def _is_a_power(exponent: object) -> bool:
    """Whether the derivative of x ** exponent is bounded near 0, on both sides."""
    return isinstance(exponent, int | float) and exponent >= 1 and exponent == int(exponent)


def _matches(pattern: str, names: frozenset[str] | set[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _names() -> frozenset[str]:
    """Names of all operations that exist now: a Function may be defined at any time."""
    functions = {f"{function.__name__}Backward" for function in graph.functions()}
    named_here = {*_OF_PACKAGES, CHECKPOINT, COMPILED}
    return graph.node_names() | _function_names() | functions | named_here


def _function_names() -> frozenset[str]:
    places = (torch, torch.nn.functional, Tensor, torch.linalg, torch.special, torch.fft)
    return frozenset(name for place in places for name in dir(place) if name[0] != "_")


def _nearest(pattern: str, names: set[str] | frozenset[str]) -> list[str]:
    """The names of which a pattern may be a misspelling."""
    wanted = operation_of(pattern.strip("*")).lower()
    stems: dict[str, str] = {}
    for name in sorted(names):
        stems.setdefault(operation_of(name).lower(), name)
    return [stems[stem] for stem in difflib.get_close_matches(wanted, stems)]
