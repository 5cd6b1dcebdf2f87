"""What the callbacks of all trainers share: they convert a model, and measure what it keeps."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from packlight.batches import several
from packlight.conversion import Conversion
from packlight.convert import DEFAULT_METHODS, convert
from packlight.errors import InputError
from packlight.integrations._measure import KeptBytes
from packlight.planner.planner import OptimizerOf, plan
from packlight.planner.result import Plan
from packlight.remedies import advice
from packlight.report import human_bytes
from packlight.saving.rest import Given
from packlight.selectors import Methods, Selector


class Converting:
    """A callback's arguments and results; when it does what is its own business."""

    def __init__(
        self,
        methods: Methods = DEFAULT_METHODS,
        *,
        strict: bool = True,
        functional: bool = True,
        rest: Given = "auto",
        head: bool | Selector = False,
        exact_ends: bool = False,
        memory: int | float | str | None = None,
        batch: Any = None,
        device: str | None = None,
        revert_at_end: bool = False,
        measure: bool = True,
        report: bool = True,
    ) -> None:
        """
        Args:
            methods: as for `packlight.convert`: a method, methods, a mapping, what
                `packlight.load_methods` read, or a `packlight.Plan`.
            strict: as for `packlight.convert`.
            functional: as for `packlight.convert`.
            rest: as for `packlight.convert`.
            head: as for `packlight.convert`.
            exact_ends: as for `packlight.convert`.
            memory: bytes at the peak of a step, "22GiB", or a share of what plain training keeps:
                the model is converted by a `packlight.plan` for it, in place of `methods`.
            batch: what the plan is for, as large as any batch of the training: what the model is
                called with, a tensor, several, or one mapping of keywords. None: the first rows of
                a Trainer's data.
            device: the card that the plan is for; None: the one that is here.
            revert_at_end: whether the model is as it was before when training has ended. Saving
                needs no such thing: keys and tensors of `state_dict` are the plain model's.
            measure: False for no measurement.
            report: whether to print, once and in the main process, what was converted, what a step
                keeps, and what would help.

        Attributes:
            conversion: what `packlight.convert` returned; None before.
            plan: what `packlight.plan` returned; None without `memory`.
            kept_bytes: what autograd kept of the pass that was measured last, from its beginning to
                its backward pass, so with the loss wherever it is computed; None before. A pass
                that keeps nothing, without gradients, is none to measure.
        """
        super().__init__()  # the trainer's own class
        if memory is None and (batch is not None or device is not None):
            raise InputError("batch= and device= are of a plan: give memory= as well")
        self.methods = methods
        self.strict = strict
        self.functional = functional
        self.rest = rest
        self.head = head
        self.exact_ends = exact_ends
        self.memory = memory
        self.batch = batch
        self.device = device
        self.revert_at_end = revert_at_end
        self.measure = measure
        self.report = report
        self.plan: Plan | None = None
        self.conversion: Conversion | None = None
        self.kept_bytes: int | None = None
        self._measuring: KeptBytes | None = None
        self._reported = False

    def _plan(
        self, model: nn.Module, batch: Any = None, optimizer: OptimizerOf | None = None
    ) -> None:
        """The methods are those of a plan for the batch that was given, or else for `batch`."""
        if self.memory is None or self.plan is not None:
            return
        batch = batch if self.batch is None else self.batch
        if batch is None:
            raise InputError(
                f"memory={self.memory!r} needs a batch to plan for; give batch=, what the model is "
                "called with, or methods=packlight.plan(...)"
            )
        self.plan = plan(
            model, *several(batch), memory=self.memory, optimizer=optimizer, device=self.device
        )

    def _convert(self, model: nn.Module) -> None:
        self.conversion = convert(
            model,
            self.methods if self.plan is None else self.plan,
            strict=self.strict,
            functional=self.functional,
            rest=self.rest,
            head=self.head,
            exact_ends=self.exact_ends,
        )

    def _start_measuring(self, model: nn.Module) -> None:
        self._stop_measuring()
        if self.measure and self.kept_bytes is None:
            self._measuring = KeptBytes(model)
            self._measuring.__enter__()

    def _stop_measuring(self) -> None:
        if self._measuring is not None:
            measured, self._measuring = self._measuring, None
            measured.__exit__()
            self.kept_bytes = measured.bytes or None

    @property
    def peak_bytes(self) -> int | None:
        """The most that CUDA's allocator has had allocated on its device; None without one."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None

    def _measured(self) -> dict[str, int]:
        """What a log says, once a step was measured."""
        found = {"packlight_kept_bytes": self.kept_bytes, "packlight_peak_bytes": self.peak_bytes}
        return {name: size for name, size in found.items() if size is not None}

    def _report_once(self, model: nn.Module) -> None:
        """Prints after the first step of a training that was measured, or was not to be."""
        if self._reported or (self.measure and self.kept_bytes is None):
            return
        self._reported = True
        if self.report:
            print("\n".join(self._lines(model)))

    def _lines(self, model: nn.Module) -> list[str]:
        assert self.conversion is not None
        lines = [str(self.conversion).partition("\n")[0]]
        if self.plan is not None:
            lines.append(self.plan.sentence())
        if self.kept_bytes is not None:
            peak = "" if self.peak_bytes is None else f", peak {human_bytes(self.peak_bytes)}"
            lines.append(f"a step keeps {human_bytes(self.kept_bytes)} for its backward pass{peak}")
        lines += [f"would help: {each}" for each in advice(model, self.conversion)]
        return [f"packlight: {line}" for line in lines]


def first_rows(loader: Any) -> dict[str, Any] | None:
    """The first rows of a loader's data as a batch of keywords; None where there is none such."""
    rows: Any = getattr(loader, "dataset", None)
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if loader is None or size is None or isinstance(rows, torch.utils.data.IterableDataset):
        return None
    count = min(size, len(rows))
    with torch.random.fork_rng(devices=[]):  # a collator may draw, and training must not see it
        batch = loader.collate_fn([rows[place] for place in range(count)])
    return dict(batch) if isinstance(batch, Mapping) else None


def maker_of(optimizer: torch.optim.Optimizer | None) -> OptimizerOf | None:
    """What makes an optimiser like this one, for other parameters."""
    # accelerate's is around it
    inner: torch.optim.Optimizer | None = getattr(optimizer, "optimizer", optimizer)
    if inner is None:
        return None
    known = inspect.signature(type(inner).__init__).parameters
    return partial(type(inner), **{name: x for name, x in inner.defaults.items() if name in known})
