"""`profile`: one forward pass, and who keeps how many bytes of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight.batches import arguments_of
from packlight.errors import InputError
from packlight.profile.allocator import AllocatorMeter, backward_targets, measured_peak
from packlight.profile.counting import find_kept
from packlight.profile.recording import Recorder
from packlight.profile.restoring import left_as_found
from packlight.profile.scene import name_of, scene_of
from packlight.report import MemoryReport


def profile(
    model: Callable[..., Any],
    /,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    **kwargs: Any,
) -> MemoryReport:
    """Run `model(*inputs, **kwargs)` once and report what is kept for the backward pass.

    The batch may also be one mapping of keywords, as a tokenizer or a collator makes it.

    `loss`, if given, is called on the model's output and returns a scalar; what it keeps is counted
    under the path "(loss)". The model may be any callable; modules and tensors that a function
    refers to by name are found and named after its variables.

    What is counted:

    - A storage counts once, whole, however many operations keep it and however small the view they
      keep. It is counted where it was kept first; `KeptTensor.holders` lists every operation.
    - Only what is still kept after the forward pass: nothing of `no_grad` regions, detached
      branches and checkpointed regions (of those, the inputs count, which checkpointing keeps).
    - Parameters, buffers, tensors that modules hold as attributes, and the inputs are counted
      apart and are in no row. Copies of them are activations: autocast's half-precision copy of a
      weight is memory that the forward pass adds.
    - What other saved-tensor hooks keep (`save_on_cpu`, `packlight.saving`), whether they are
      active around this call or inside the model, if it is a tensor or a structure of tensors.
    - What a Python `autograd.Function` keeps as attributes of `ctx`, as fused losses keep finished
      gradients, where its node can be reached from the output.

    The model runs in the mode it is in (`train` or `eval`), with gradients enabled, under the
    caller's autocast. On a CUDA device a backward pass follows, of the loss or else of the sum of
    the floating-point outputs, to measure `peak_bytes`; the peak is None where re-entrant
    checkpointing forbids it or the memory does not suffice. The allocator's peak statistic is
    reset. On the meta device nothing is computed, and the bytes are those of a real device as far
    as PyTorch picks the same kernels there.

    Everything is left as it was: random number generators (of torch, Python and NumPy), buffers,
    `.grad`, plain attributes of the modules, hooks, also if the forward pass raises. Autocast's
    cache of weight copies is emptied, so that each profile counts the copies anew. Exceptions
    are a `torch.Generator` of the model's own, inputs that the model overwrites, and a model that
    itself calls `backward`, which adds to a `.grad` that is there.

    Limits: what hooks keep in files or closures, and what selective checkpointing sets aside, is
    not seen; on a CUDA device `allocated_bytes` has it. An operation whose graph node cannot be
    reached from the output is named "unknown". A module compiled by `torch.compile` is one line.
    Profile the module inside `DistributedDataParallel`, whose backward cannot run apart from
    `.grad`.

    Raises `InputError` for a model or loss that cannot be called, a loss that is no scalar, and
    parameters that a lazy module has not initialised yet.
    """
    _check(model, loss)
    inputs, kwargs = arguments_of(model, *inputs, **kwargs)
    scene = scene_of(model, loss, inputs, kwargs)
    with (
        left_as_found(scene),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        meter = AllocatorMeter(scene.cuda_devices())
        recorder = Recorder(scene)
        output, value = recorder.run(lambda: model(*inputs, **kwargs), loss)
        allocated = meter.grown()
        findings = find_kept(scene, recorder, (output, value))
        del recorder
        targets = backward_targets(output if loss is None else value)
        del output, value
        peak = measured_peak(meter, targets, scene, findings.reentrant)
    return MemoryReport(
        model=name_of(model),
        rows=findings.rows,
        parameter_bytes=findings.parameter_bytes,
        buffer_bytes=findings.buffer_bytes,
        input_bytes=findings.input_bytes,
        allocated_bytes=allocated,
        peak_bytes=peak,
        module_types=scene.types_above(findings.rows),
    )


def _check(model: object, loss: object) -> None:
    if not callable(model):
        raise InputError(
            f"model is a {type(model).__name__}, which cannot be called; pass an nn.Module or a "
            "function, and the arguments of the call after it: profile(model, batch)"
        )
    if loss is not None and not callable(loss):
        raise InputError(
            f"loss is a {type(loss).__name__}, which cannot be called; pass a function of the "
            "model's output that returns a scalar: loss=lambda output: output.mean()"
        )
