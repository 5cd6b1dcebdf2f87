"""`saving`: packs what any operation of any model keeps for its backward pass.

A pair of saved-tensor hooks: where autograd saves a tensor it gets a holder, and the backward pass
gets back what the holder stands for. Nothing of the model changes, and no forward value.

- `saver.py`: when a tensor is packed, which is as soon as the operation that saved it is known.
- `rules.py`: which operation is packed by which method, and what stays exact.
- `lossless.py`: operations that need a side, a sign or a shape, and no values.
- `norms.py`, `activations.py`: inputs that are packed by what their operation makes of them.
- `tensors.py`: which tensors are packed. `packing.py`: packs, and notes on tensors.
- `kept.py`: what is kept in place of a tensor. `graph.py`: what torch tells of its graph.

A tensor is packed once for all operations: the pack is noted on the tensor (`sharing.py`, weakly:
it lives as long as a graph or layer that holds it), and the next operation or packlight layer that
keeps the tensor finds it there. A view that is a whole dense tensor in another shape or order
stands for that tensor, and so does the copy that autocast makes of an argument; any other view is
packed by itself.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from packlight import _torch
from packlight._seeds import follow_generator
from packlight._torch import graph
from packlight.errors import InputError
from packlight.quantiser import Quantiser
from packlight.saving.kept import unpack
from packlight.saving.rules import Rules
from packlight.saving.saver import Saver, SavingMode

__all__ = ["saving"]


@contextlib.contextmanager
def saving(
    method: Quantiser,
    *,
    min_bytes: int = 4096,
    skip: Callable[[Tensor], bool] | None = None,
    overrides: Mapping[str, Quantiser | None] | None = None,
) -> Iterator[None]:
    """Within this context, forward passes keep packs for their backward passes, of any operation.

    Every floating tensor of 32 or 16 bits that an operation keeps is packed as `method` says, once
    however many operations keep it, at `bits + 32 / group_size` bits an element; masks take one
    bit an element. Backward passes may run inside or outside the context. Forward values are
    those of torch. Gradients are approximate: each tensor x that an operation kept is x~ in its
    backward, with |x~ - x| below one step of its group, and E[x~] = x with stochastic rounding. So
    an operation whose gradient is linear in what it kept (a matmul, a convolution) passes on an
    unbiased one, and one whose gradient is not (an activation, a norm) a biased one. The user's
    random numbers are not touched.

    Exact, in fewer bits:

    - one bit where the backward pass needs the side of a limit (ReLU, leaky ReLU, ReLU6, hardtanh,
      hardsigmoid, hardshrink, softshrink, threshold, RReLU, clamp, amax, amin, max and min), in
      place too; two where it needs a sign (abs, maximum, minimum); none where it needs a shape
      (pooling, reflected and replicated padding, gather);
    - a bit beside the pack where it needs the side of 0, and values on one side only (PReLU, SELU).

    Kept exactly:

    - leaves that require gradients (parameters), frozen `nn.Parameter`s, and views and casts of
      such. A weight that is computed (weight norm, a merged adapter) is an activation here;
    - what has no gradient history where a torch operation keeps it: data, buffers, masks with
      infinities, frozen weights under autocast, statistics of norms and attention (and the floating
      mask that dropout makes on the CPU). Somebody holds most of these anyway;
    - what operations keep whose derivative has no bound: log, sqrt, rsqrt, reciprocal, powers but
      those of 1, 2, 3 and so on, denominators, norms, acos, atan2, linear algebra, the grid of
      grid_sample;
    - tensors with infinities, NaNs or huge values (1e9; 65504 in float16), as far as can be told
      without making a GPU wait: all on the CPU, on a GPU what `masked_fill` or `where` filled with
      a number, and biases of attention. An infinity elsewhere on a GPU makes its group NaN;
    - float64, complex, integer, sparse and nested tensors, tensor subclasses;
    - all that a packlight layer keeps: packed already, or exact for a reason;
    - softmax, logsumexp and losses, inputs of checkpoints, and tensors below `min_bytes`;
    - what was saved by an operation that was not found, as the last `autograd.Function` in the
      context is not if nothing reads its result there.

    A Python `autograd.Function` makes what it keeps without history. There, what has at most 1/16
    of the elements of the largest tensor it keeps, bytes included (codes), is taken for statistics,
    and what has at least 16 times the elements of its largest output for the finished gradients of
    a loss: both are kept exactly, and so is all that a Function keeps in a graph of its own.

    The queries, keys, values and output of attention are packed at 8 bits. The input of a norm is
    packed normalised, in units of its deviation, since rstd multiplies its error, and that of an
    activation (ELU, CELU, SELU, erf, GELU, GLU, hardswish, logsigmoid, Mish, SiLU, softplus) within
    the limits beyond which the derivative is constant, so that a mask leaves its neighbours a step.
    Both are packs of their own, which no other operation reads. Kept exactly is the input of an RMS
    norm that torch composes of elementary operations (on the CPU) if its rows are no whole groups.

    Args:
        method: how tensors are packed.
        min_bytes: smaller tensors are kept as they are.
        skip: called with a tensor that may be packed; True keeps it exactly.
        overrides: methods, or None for exact, by patterns (as in `fnmatch`) of operations. An
            operation is named as `packlight.profile` reports it, "GeluBackward0", or by the torch
            function called, "gelu"; "checkpoint" is the inputs of checkpoints. The first pattern
            that matches counts, before the defaults above: `{"*Softmax*": GroupQuant(bits=8)}`.
            What takes fewer bits without loss does so under any method.

    Raises `InputError` where an override names no operation, at the end of the context, since a
    name may be that of a Function that is defined there.

    A tensor that is modified in place after it was saved: where torch would raise, a pack still
    gives the gradient of the value at save time. What is kept exactly raises as torch does.

    `create_graph=True` raises `DoubleBackwardError`: packs are not differentiable. Of nested
    contexts, and of other saved-tensor hooks, the innermost wins; inside a checkpointed block that
    is the checkpoint, which keeps nothing there. `torch.func` transforms refuse any hooks.

    Functions compiled by `torch.compile` may be called within the context: the tensors that cross
    to their backward are packed as they leave the forward, at 8 bits unless
    `overrides={"CompiledFunctionBackward": ...}` says otherwise, since softmax and attention cannot
    be told apart there. Values keep their side of 0, which a ReLU's backward takes from them: those
    less than a step from it are rounded to their own side. Norms there have no packs of their own.
    Buffers and data are packed too. Masks with infinities stay exact: on a GPU
    they are told by their shape, (T, T) or (B, 1, T, S). The context cannot be entered inside a
    compiled function: that raises `InputError`.

    Masks: bool everywhere; uint8 that holds only 0 and 1 on the CPU, since the look at the values
    would make a GPU wait.
    """
    _check(method, min_bytes, skip, overrides)
    rules = Rules(method, overrides or {})
    saver = Saver(rules, min_bytes, skip)
    follow_generator()
    hooks = saved_tensors_hooks(_torch.untraced(saver.pack), _torch.untraced(unpack))
    with hooks, SavingMode(saver):
        try:
            yield
        finally:
            saver.settle()
    if saver.has_saved:
        rules.check_patterns()


def _check(method: object, min_bytes: object, skip: object, overrides: object) -> None:
    if _torch.is_traced_or_between():
        raise InputError(
            "saving(...) was entered inside a function that torch.compile compiles; enter it"
            " outside, around the call of the compiled function"
        )
    if not graph.is_readable():
        raise InputError(
            f"saving(...) cannot tell which operation saves a tensor in torch {torch.__version__};"
            " convert the model instead, with packlight.convert"
        )
    if not isinstance(method, Quantiser):
        raise InputError(f"method={method!r} is no quantiser; try GroupQuant(bits=4)")
    if not isinstance(min_bytes, int) or isinstance(min_bytes, bool) or min_bytes < 0:
        raise InputError(f"min_bytes={min_bytes!r} is not a number of bytes, 0 or more")
    if skip is not None and not callable(skip):
        raise InputError(f"skip={skip!r} cannot be called; pass a function of a tensor, or None")
    if overrides is None:
        return
    if not isinstance(overrides, Mapping):
        raise InputError(f"overrides={overrides!r} is not a mapping of patterns to methods")
    for pattern, value in overrides.items():
        if not isinstance(pattern, str):
            raise InputError(f"overrides: {pattern!r} is not a string; name an autograd node")
        if value is not None and not isinstance(value, Quantiser):
            raise InputError(
                f"overrides[{pattern!r}]={value!r} is neither a quantiser nor None (exact)"
            )
