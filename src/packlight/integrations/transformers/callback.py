"""A callback for `transformers.Trainer`."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from packlight._seeds import rounding_state, set_rounding_state
from packlight.convert import revert
from packlight.following import is_patched
from packlight.integrations._converting import Converting, first_rows, maker_of

_ROUNDING = "PacklightRounding"


class PacklightCallback(Converting, TrainerCallback):
    """Converts the model of a `Trainer` before it trains, and logs what a forward pass keeps.

    Conversion happens when the `Trainer` is made, so before it wraps the model for several devices,
    or else when training begins. Parameters are the same objects as before and `state_dict` has the
    same keys, so checkpoints are plain ones, and `from_pretrained` gives the plain model.

    The first step of each training that keeps anything is measured, up to its first backward pass:
    `kept_bytes` is what autograd keeps of it, with a loss that the `Trainer` computes, and the next
    log has it as "packlight_kept_bytes", on a GPU with "packlight_peak_bytes" beside it. Under
    `torch.compile` the first step, which has the hooks of the measurement, is compiled apart from
    the others.

    Checkpoints hold where the stream of rounding is, in `trainer_state.json`, so a resumed training
    is the uninterrupted one, bit for bit, wherever the plain `Trainer` is. Of several processes the
    file holds the stream of the first, which is that of all whose model draws alike.
    """

    _logged = False
    _converted: nn.Module | None = None
    _rounding: Mapping[str, int | None] = {}  # of the checkpoint from which a training goes on

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs.get("model")  # None where the Trainer has `model_init`
        if model is not None and (self.memory is None or self.batch is not None):
            self._plan(model)
            self._convert(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_measuring()  # of a training that an exception ended
        model = kwargs["model"]
        if self.memory is not None and self.plan is None:
            with _autocast_of(args, model):
                rows = first_rows(kwargs.get("train_dataloader"))
                self._plan(model.train(), rows, maker_of(kwargs.get("optimizer")))
        self._convert(model)
        self.kept_bytes, self._logged, self._reported = None, False, False
        resumed = state.stateful_callbacks if state.global_step else {}
        self._rounding = resumed.get(_ROUNDING, {}).get("attributes", {})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not when training begins: an evaluation or another callback may draw until now.
        rounding, self._rounding = self._rounding, {}
        set_rounding_state(rounding)
        self._start_measuring(kwargs["model"])

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_measuring()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_measuring()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_measuring()
        if state.is_world_process_zero:
            self._report_once(kwargs["model"])
        self._note_rounding(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note_rounding(state)  # which comes before a checkpoint is saved, and may draw

    def _note_rounding(self, state: Any) -> None:
        # As the state of a callback of its own: the `Trainer` would make this one anew of its
        # state, and methods have no place in one.
        state.stateful_callbacks[_ROUNDING] = {"args": {}, "attributes": rounding_state()}

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self._logged or self.kept_bytes is None or logs is None:
            return
        logs |= self._measured()
        state.log_history[-1] |= self._measured()  # a copy of the logs
        self._logged = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_measuring()
        if self.revert_at_end:
            revert(kwargs["model"])
            self._converted = None

    def _convert(self, model: nn.Module) -> None:
        # A `Trainer` with `use_liger_kernel=True` applies Liger-Kernel when training begins.
        if self._converted is not model or any(map(is_patched, model.modules())):
            super()._convert(model)
            self._converted = model


def _autocast_of(args: Any, model: nn.Module) -> AbstractContextManager[Any]:
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return nullcontext() if dtype is None else torch.autocast(device, dtype)
