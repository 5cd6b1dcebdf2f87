"""`predict`: what a model would keep for its backward pass, without running it.

Model and inputs are copied onto fake tensors (`_torch/fakes.py`), which have a shape, a dtype and a
device and no values, and the copy is profiled. So nothing is computed and no memory used, and a
model that does not fit can be looked at. Small inputs keep their values: lengths, labels, and
masks, of which models keep none that is all ones.
"""

import copy
import importlib
import logging
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from packlight import _torch
from packlight._swap import restore
from packlight._torch.attributes import CALL_MODULE, FAKES_LOGGER, plain_attributes, slots
from packlight.batches import arguments_of
from packlight.errors import InputError, PacklightError
from packlight.parallel import Parallel, checked
from packlight.profile import profile
from packlight.profile.lines import is_internal, short_path
from packlight.report import MemoryDifference, MemoryReport

__all__ = ["predict", "predict_change"]


def predict(
    model: nn.Module,
    /,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    device: str | torch.device | None = None,
    parallel: Parallel | None = None,
    **kwargs: Any,
) -> MemoryReport:
    """What `packlight.profile(model, *inputs, loss=loss, **kwargs)` would report, without a run.

    The batch may also be one mapping of keywords, as a tokenizer or a collator makes it.

    Model and inputs may lie on any device, fake ones and "meta" among them, where a model of any
    size costs nothing: `with torch.device("meta"): model = Llama(config)`. `device` says where the
    run is imagined to be (None: where the tensors are, and the CPU for those on "meta"). What
    PyTorch keeps differs between devices: the mask of a dropout, for instance, is a byte an element
    on a GPU and a scaled copy on the CPU.

    Nothing is computed and nothing of the model changes. `allocated_bytes` and `peak_bytes` are
    None. Bytes are those of a run on the same device as far as PyTorch's fake kernels say truly
    what the real ones return: within 3% for every module of `torch.nn` on a CPU, most to the byte.
    Exceptions are recurrent layers on a GPU, without the memory that cuDNN reserves.

    `parallel` has degrees of parallelism: then the inputs are the batch of a data-parallel rank,
    and the report is of the pass of one micro-batch on a rank, with parts of layers and of tokens
    as `Parallel` says. Stages of a pipeline are for `packlight.plan` and `packlight fit`, which
    count the micro-batches that are alive.

    Activations are taken for finite numbers: `isfinite`, `isnan` and such have an answer. Inputs of
    up to a million elements that are on the device keep their values, and so does what is computed
    of them and of constants alone: lengths, labels, masks.

    Raises `InputError` for what is no module, for a degree that does not divide what it should, for
    nested tensors, for a device that is not there (autograd cannot do without it), and for a model
    whose forward pass depends on other values
    (`.item()`, `nonzero`): naming the operation and the line. Profile a run of that one.

    >>> import torch, packlight
    >>> with torch.device("meta"):
    ...     model = torch.nn.Sequential(torch.nn.Linear(4096, 16384), torch.nn.GELU())
    >>> packlight.predict(model, torch.empty(2048, 4096, device="meta")).activation_bytes
    134217728
    """
    changes: list[Callable[[nn.Module], None]] = [lambda _: None]
    if parallel is None:
        (report,) = _predict(model, inputs, kwargs, loss, device, changes)
        return report
    _check_model(model)
    from packlight.planner.cutting import predicted_pass

    batch = arguments_of(model, *inputs, **kwargs)
    with predicted_pass(model, batch, checked(parallel)) as (part, cut):
        given, named = part
        (report,) = _predict(model, given, named, loss, device, [cut])
    return report


def predict_change(
    model: nn.Module,
    /,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> MemoryDifference:
    """What a converted model would keep beside what it would keep as it was; see `predict`."""
    after, before = _predict(model, inputs, kwargs, loss, device, [lambda _: None, restore_all])
    return before - after


def restore_all(model: nn.Module) -> None:
    """Makes every module of a copy what it was before a conversion."""
    for module in model.modules():
        restore(module)


def _predict(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Any], Tensor] | None,
    device: str | torch.device | None,
    changes: list[Callable[[nn.Module], None]],
) -> list[MemoryReport]:
    """One report after each of the changes, which are made to a fake copy of the model."""
    _check_model(model)
    inputs, kwargs = arguments_of(model, *inputs, **kwargs)
    fakes = fake_tensors()
    mode = fakes.Fakes()
    _check_device(device)
    fake, fake_inputs, fake_kwargs = copied(mode, device, model, inputs, kwargs)
    reports = []
    for change in changes:
        change(fake)
        with imagining(inputs), fakes.FakeFunctionMode(), mode:
            reports.append(profile(fake, *fake_inputs, loss=loss, **fake_kwargs))
    return reports


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}, of which no copy without values can be made; pass"
            " an nn.Module, or profile a run of it"
        )


@contextmanager
def imagining(inputs: tuple[Any, ...] = ()) -> Iterator[None]:
    """Within, someone's model runs without values: torch logs no failure, and errors say where."""
    logger = logging.getLogger(FAKES_LOGGER)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except fake_tensors().NEEDS_VALUES as error:
        raise InputError(needs_values(error)) from error
    except PacklightError:
        raise
    except Exception as error:  # someone's model: anything can happen
        module = failing_module(error)
        error.add_note(
            f"The forward pass{f' of {module}' if module else ''} failed where packlight ran it"
            " without values, on this batch."
        )
        if len(inputs) == 1 and isinstance(inputs[0], tuple | list):
            kind = type(inputs[0]).__name__
            error.add_note(f"The {kind} was passed as one argument; *batch passes what is in it.")
        raise
    finally:
        logger.setLevel(level)


def _check_device(device: object) -> None:
    try:
        torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        if device is not None:
            raise InputError(
                f"device={device!r} is no device of torch's, such as 'cpu' or 'cuda'; a card that a"
                " plan is for is named in packlight.plan(device=...)"
            ) from error


def fake_tensors() -> Any:
    """What makes tensors without values; its import reads much of torch's inside."""
    try:
        return importlib.import_module("packlight._torch.fakes")
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"torch {torch.__version__} has no tensors without values as packlight knows them"
            f" ({error}); use packlight.profile, which runs the model"
        ) from error


def copied(
    mode: Any,
    device: str | torch.device | None,
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    shared: Mapping[int, Any] = types.MappingProxyType({}),
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Model and inputs with fake tensors; `shared` is that of `copied_model`."""
    with _Copying(mode, None if device is None else torch.device(device)) as copying:
        fake, memo = copied_model(model, shared)
        copying.keeps_floats = True
        fake_inputs, fake_kwargs = copy.deepcopy((inputs, kwargs), memo)
    return fake, fake_inputs, fake_kwargs


def copied_inputs(
    mode: Any, device: str | torch.device | None, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs with fake tensors in place of large ones."""
    with _Copying(mode, None if device is None else torch.device(device)) as copying:
        copying.keeps_floats = True
        fakes: tuple[tuple[Any, ...], dict[str, Any]] = copy.deepcopy((inputs, kwargs))
    return fakes


def copied_model(
    model: nn.Module, shared: Mapping[int, Any] = types.MappingProxyType({})
) -> tuple[nn.Module, dict[int, Any]]:
    """A copy of a model, and what each object in it became, by id, as `copy.deepcopy` has it.

    `shared` has what takes the place of copies, by the id of what it stands for.
    """
    try:
        return _copy(model, dict(shared))
    except InputError:
        raise
    except Exception:  # noqa: BLE001 - someone's objects: anything can happen
        return _copy(model, {**shared, **{id(value): value for value in _not_copied(model)}})


def _copy(model: nn.Module, memo: dict[int, Any]) -> tuple[nn.Module, dict[int, Any]]:
    made = copy.deepcopy(model, memo)
    for module in model.modules():
        copied = memo.get(id(module), module)
        for slot, value in slots(module) if copied is not module else ():
            slot.__set__(copied, copy.deepcopy(value, memo))
    return made, memo


def _not_copied(model: nn.Module) -> Iterator[Any]:
    """What modules hold and refuses a copy: locks, files, configurations. It is shared instead."""
    for module in model.modules():
        for value in (*plain_attributes(module).values(), *(value for _, value in slots(module))):
            try:
                copy.deepcopy(value, {id(inner): inner for inner in model.modules()})
            except InputError:
                raise
            except Exception:  # noqa: BLE001 - as above
                yield value


class _Copying(TorchFunctionMode):
    """Has `copy.deepcopy` give fake tensors in place of copies."""

    def __init__(self, mode: Any, device: torch.device | None) -> None:
        super().__init__()
        self.mode = mode
        self.device = device
        # Of inputs, not of buffers: those are statistics, which the forward pass changes.
        self.keeps_floats = False

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.clone:  # what `Parameter.__deepcopy__` calls
            return self.fake(args[0])
        if func is Tensor.__deepcopy__ and not self.keeps_values(args[0]):
            tensor, memo = args
            if id(tensor) not in memo:
                fake = self.fake(tensor)
                if isinstance(tensor, nn.Parameter):  # a fake one
                    fake = nn.Parameter(fake, tensor.requires_grad)
                memo[id(tensor)] = fake
            return memo[id(tensor)]
        with _torch.without_torch_functions():
            return func(*args, **(kwargs or {}))

    def keeps_values(self, tensor: Tensor) -> bool:
        """Whether it is small data: lengths, labels, masks. No weight, and nothing with a graph."""
        if type(tensor) is not Tensor or tensor.requires_grad or tensor.is_nested:
            return False
        if tensor.is_floating_point() and not self.keeps_floats:
            return False
        is_dense = tensor.layout is torch.strided
        return (
            is_dense and tensor.device == self.device_of(tensor) and fake_tensors().is_small(tensor)
        )

    def device_of(self, tensor: Tensor) -> torch.device:
        """Where the tensor is imagined to be."""
        if self.device is not None:
            return self.device
        return torch.device("cpu") if tensor.device.type == "meta" else tensor.device

    def fake(self, tensor: Tensor) -> Tensor:
        if tensor.is_nested:
            raise InputError(
                "a nested tensor cannot be copied without its values; pass a padded one, or use"
                " packlight.profile, which runs the model"
            )
        device = self.device_of(tensor)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(
                f"device {device} is not there, and autograd does not work without it; predict for"
                " the CPU: device='cpu'"
            )
        if tensor.device == device and not _torch.is_fake(tensor):
            fake: Tensor = self.mode.from_tensor(tensor, static_shapes=True)
            return fake
        with _torch.without_torch_functions(), self.mode:
            return torch.empty_strided(
                tensor.shape,
                tensor.stride(),
                dtype=tensor.dtype,
                device=device,
                requires_grad=tensor.requires_grad,
            )


def needs_values(error: BaseException) -> str:
    operation = getattr(error, "func", error)
    lines = [
        f"{short_path(frame.filename)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not is_internal(frame.filename)
    ]
    where = f" at {lines[-1]}" if lines else ""
    module = failing_module(error)
    where += f" in {module}" if module else ""
    return (
        f"{operation}{where} needs the values of a tensor, and a prediction has none; use"
        " packlight.profile, which runs the model"
    )


def failing_module(error: BaseException) -> str:
    """The innermost module whose forward pass an error went through: "blocks.0.mlp (MLP)"."""
    running: list[nn.Module] = []
    frame = error.__traceback__
    while frame is not None:
        caller = _torch.variable_of(frame.tb_frame, "self")
        if frame.tb_frame.f_code is CALL_MODULE and isinstance(caller, nn.Module):
            running.append(caller)
        frame = frame.tb_next
    if not running:
        return ""
    names = {module: name for name, module in running[0].named_modules()}
    kind = type(running[-1]).__name__
    return f"{names.get(running[-1]) or 'the model itself'} ({kind})"
