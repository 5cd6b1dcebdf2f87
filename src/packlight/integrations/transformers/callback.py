"""A callback for `transformers.Trainer`."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from packlight._seeds import rounding_state, set_rounding_state
from packlight.convert import revert
from packlight.following import is_patched
from packlight.integrations._converting import Converting

_ROUNDING = "PacklightRounding"


class PacklightCallback(Converting, TrainerCallback):
    """Converts the model of a `Trainer` before it trains, and logs what a forward pass keeps.

    Conversion happens when the `Trainer` is made, so before it wraps the model for several devices,
    or else when training begins. Parameters are the same objects as before and `state_dict` has the
    same keys, so checkpoints are plain ones, and `from_pretrained` gives the plain model.

    The first step of each training that keeps anything is measured, up to its first backward pass:
    `kept_bytes` is what autograd keeps of it, with a loss that the `Trainer` computes, and the next
    log has it as "packlight_kept_bytes". Under `torch.compile` the first step, which
    has the hooks of the measurement, is compiled apart from the others.

    Checkpoints hold where the stream of rounding is, in `trainer_state.json`, so a resumed training
    rounds as an uninterrupted one does.
    """

    _logged = False
    _converted: nn.Module | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if kwargs.get("model") is not None:  # none where the Trainer has `model_init`
            self._convert(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_measuring()  # of a training that an exception ended
        self._convert(kwargs["model"])
        self.kept_bytes, self._logged = None, False
        if state.global_step:  # resumed
            set_rounding_state(state.stateful_callbacks.get(_ROUNDING, {}).get("attributes", {}))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start_measuring(kwargs["model"])

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_measuring()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_measuring()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_measuring()
        # As the state of a callback of its own: the `Trainer` would make this one anew of its
        # state, and methods have no place in one.
        state.stateful_callbacks[_ROUNDING] = {"args": {}, "attributes": rounding_state()}

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self._logged or self.kept_bytes is None or logs is None:
            return
        logs["packlight_kept_bytes"] = self.kept_bytes
        state.log_history[-1]["packlight_kept_bytes"] = self.kept_bytes  # a copy of the logs
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
