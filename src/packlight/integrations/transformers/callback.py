"""A callback for `transformers.Trainer`."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from packlight.conversion import Conversion
from packlight.convert import DEFAULT_METHODS, Methods, convert, revert
from packlight.integrations._measure import KeptBytes


class PacklightCallback(TrainerCallback):
    """Converts the model of a `Trainer` before it trains, and logs what a forward pass keeps.

    Conversion happens when the `Trainer` is made, so before it wraps the model for several devices,
    or else when training begins. Parameters are the same objects as before and `state_dict` has the
    same keys, so checkpoints are plain ones, and `from_pretrained` gives the plain model.

    The first forward pass of each training is measured: `kept_bytes` is what autograd keeps of it,
    and the first log has it as "packlight_kept_bytes".

    Args:
        methods: as for `packlight.convert`.
        strict: as for `packlight.convert`.
        functional: as for `packlight.convert`.
        revert_at_end: whether the model is as it was before when training has ended.
        measure: False for no measurement. Under `torch.compile` the first step, which has its
            hooks, is compiled apart from the others.

    Attributes:
        conversion: what `packlight.convert` returned; None before.
        kept_bytes: what the first forward pass of the last training kept; None before.
    """

    def __init__(
        self,
        methods: Methods = DEFAULT_METHODS,
        *,
        strict: bool = True,
        functional: bool = False,
        revert_at_end: bool = False,
        measure: bool = True,
    ) -> None:
        self.methods = methods
        self.strict = strict
        self.functional = functional
        self.revert_at_end = revert_at_end
        self.measure = measure
        self.conversion: Conversion | None = None
        self.kept_bytes: int | None = None
        self._logged = False
        self._converted: nn.Module | None = None
        self._handles: list[Any] = []

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if kwargs.get("model") is not None:  # none where the Trainer has `model_init`
            self._convert(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self._convert(model)
        if self.measure:
            self._measure_once(model)

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
        if self._converted is model:
            return
        self.conversion = convert(
            model, self.methods, strict=self.strict, functional=self.functional
        )
        self._converted = model

    def _measure_once(self, model: nn.Module) -> None:
        """Has hooks of the model count what its next forward pass with gradients keeps."""
        self.kept_bytes, self._logged = None, False
        self._stop_measuring()
        measure = KeptBytes(model)

        def enter(module: nn.Module, args: Any) -> None:
            measure.__enter__()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            measure.__exit__()
            self.kept_bytes = measure.bytes
            self._stop_measuring()

        self._handles = [
            model.register_forward_pre_hook(enter),
            model.register_forward_hook(leave, always_call=True),
        ]

    def _stop_measuring(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
