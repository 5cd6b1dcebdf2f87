"""`saving`: packs what any operation of any model keeps for its backward pass.

A pair of saved-tensor hooks: autograd saves a holder in place of a tensor, and the backward pass
gets the tensor that the holder stands for. The model does not change, nor does any forward value.

- `saver.py`: when a tensor is packed: as soon as the operation that saved it is known.
- `rules.py`: by which method the tensors of an operation are packed, and what stays exact.
- `lossless.py`: operations that need a side, a sign or a shape, and no values.
- `norms.py`, `activations.py`: inputs that are transformed before they are packed.
- `tensors.py`: which tensors are packed. `packing.py`: packs, and notes on tensors.
- `rest.py`: `rest=` of `convert`, the same within the forward passes of a converted model.
- `kept.py`: what is saved in place of a tensor. `_torch/graph.py`: what torch shows of its graph.

A tensor is packed once for all operations: a note on the tensor refers to the pack (`sharing.py`,
weakly: the pack lives as long as a graph or a layer that holds it), and the next operation or
packlight layer that saves the tensor finds it. A view that is a whole dense tensor in another shape
or order shares the pack of that tensor, and so does the copy that autocast makes of an argument.
Any other view is packed by itself.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from packlight import _torch
from packlight._seeds import follow_generator
from packlight._torch import graph
from packlight.errors import InputError
from packlight.method import check_is_value
from packlight.quantiser import Quantiser
from packlight.saving.rules import Rules
from packlight.saving.saver import Saver

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

    Every floating tensor of 32 or 16 bits that an operation saves is packed by `method`, once
    however many operations save it. `GroupQuant` takes `bits + 32 / group_size` bits an element;
    masks take one bit. Backward passes may run inside or outside the context. Forward values are
    torch's. Gradients are approximate: in the backward pass x~ stands for a saved tensor x. Under
    `GroupQuant` |x~ - x| is below one step of the group, and E[x~] = x with stochastic rounding. So
    an operation whose gradient is linear in what it saved (a matmul, a convolution) has an unbiased
    gradient, and an operation whose gradient is not (an activation, a norm) a biased one. The
    user's random numbers are not touched.

    Exact, in fewer bits:

    - one bit if the backward pass needs the side of a limit (ReLU, leaky ReLU, ReLU6, hardtanh,
      hardsigmoid, hardshrink, softshrink, threshold, RReLU, clamp, amax, amin, max and min), in
      place too; two if it needs a sign (abs, maximum, minimum); none if it needs a shape (pooling,
      reflected and replicated padding, gather);
    - a bit beside the pack if it needs the side of 0, and values on one side only (PReLU, SELU).

    Saved exactly:

    - leaves that require gradients (parameters), frozen `nn.Parameter`s, and views and casts of
      such. A weight that is computed (weight norm, a merged adapter) is an activation here;
    - tensors without gradient history that a torch operation saves: data, buffers, masks with
      infinities, frozen weights under autocast, statistics of norms and attention (and the floating
      mask that dropout makes on the CPU). Most of these are held by something else anyway;
    - tensors of operations whose derivative has no bound: log, sqrt, rsqrt, reciprocal, powers with
      exponents other than 1, 2, 3 and so on, denominators, norms, acos, atan2, linear algebra, the
      grid of grid_sample;
    - inputs of batch norms of fewer than 16 values a channel, whose gradient is what is left of
      sums that cancel;
    - tensors with infinities, NaNs or huge values (1e9; 65504 in float16), as far as is known
      without making a GPU wait: all such tensors on the CPU; on a GPU those that `masked_fill` or
      `where` filled with a number, and biases of attention. Any other infinity on a GPU makes its
      group NaN;
    - float64, complex, integer, sparse and nested tensors, tensor subclasses;
    - all that a packlight layer saves: packed already, or exact for a reason;
    - softmax, logsumexp and losses, inputs of checkpoints, and tensors below `min_bytes`;
    - tensors of an operation that was not found. The last `autograd.Function` in the context is not
      found if nothing reads its result there.

    The tensors that a Python `autograd.Function` saves have no history. A tensor with at most 1/16
    of the elements of the largest that the Function saves, bytes included (codes), counts as
    statistics. A tensor with at least 16 times the elements of the largest output counts as a
    finished gradient of a loss. Both are saved exactly, and so is all that a Function saves in a
    graph of its own.

    The queries, keys, values and output of attention are packed by a finer method
    (`Quantiser.for_scores`; 8 bits of `GroupQuant`), and so are those of functions of other
    packages that save several, and may take exponentials of their products. The input of a norm is
    packed normalised, in units of its deviation, since rstd multiplies its error. The input of an
    activation (ELU, CELU, SELU, erf, GELU, GLU, hardswish, logsigmoid, Mish, SiLU, softplus) is
    packed within the limits beyond which the derivative is constant, so that a mask leaves its
    neighbours a step. No other operation reads these two packs. The input of an RMS norm that torch
    composes of elementary operations (on the CPU) is saved exactly if a group would hold parts of
    several rows.

    Args:
        method: how tensors are packed.
        min_bytes: smaller tensors are saved as they are.
        skip: called with a tensor that may be packed; True saves it exactly.
        overrides: methods, or None for exact, by patterns (as in `fnmatch`) of operations. The name
            of an operation is the one that `packlight.profile` reports, "GeluBackward0", or that of
            the torch function called, "gelu"; "checkpoint" is for the inputs of checkpoints. The
            first pattern that matches counts, before the defaults above:
            `{"*Softmax*": GroupQuant(bits=8)}`. Tensors that take fewer bits without loss do so
            under any method.

    Raises `InputError` if an override names no operation. It does so at the end of the context,
    since the name may be that of a Function that is defined within.

    A tensor may be modified in place after it was saved, where torch would raise: its pack still
    gives the gradient of the value at save time. A tensor that is saved exactly raises as torch
    does.

    `create_graph=True` raises `DoubleBackwardError`: packs are not differentiable. Of nested
    contexts, and of other saved-tensor hooks, the innermost wins; inside a checkpointed block that
    is the checkpoint, which keeps nothing there. `torch.func` transforms refuse any hooks.

    Functions compiled by `torch.compile` may be called within the context. The tensors that cross
    to their backward pass are packed as they leave the forward pass. They take the finer method of
    attention, since attention and softmax cannot be recognised there, unless
    `overrides={"CompiledFunctionBackward": ...}` gives another. Values keep their side of 0, which
    the backward pass of a ReLU takes from them: values less than a step from 0 are rounded to their
    own side. Inputs of norms are packed like any tensor. Buffers and data are packed too. Masks
    with infinities stay exact: on a GPU they are recognised by their shape, (T, T) or (B, 1, T, S).
    The context cannot be entered inside a compiled function: that raises `InputError`.

    Masks are bool tensors everywhere, and on the CPU uint8 tensors of 0 and 1. On a GPU a look at
    the values of a uint8 tensor would make the GPU wait.
    """
    _check(method, min_bytes, skip, overrides)
    rules = Rules(method, overrides or {})
    saver = Saver(rules, min_bytes, skip)
    follow_generator()
    with saver.active():
        yield
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
    check_is_value(method)
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
        if value is not None:
            check_is_value(value)
