"""What the callbacks for `lightning` and `pytorch_lightning` share; each has a class of its own."""

from typing import Any

from packlight.conversion import Conversion
from packlight.convert import DEFAULT_METHODS, Methods, convert, revert
from packlight.integrations._measure import KeptBytes


class Converting:
    """Converts a `LightningModule` before it trains, and logs what a training step keeps.

    Conversion happens in the `setup` of a fit, before the strategy wraps the module for several
    devices. Parameters are the same objects as before and `state_dict` has the same keys, so
    checkpoints are plain ones.

    The forward pass of the first batch of each fit is measured, up to its backward pass:
    `kept_bytes` is what autograd keeps of it, logged as "packlight_kept_bytes".

    Args:
        methods: as for `packlight.convert`.
        strict: as for `packlight.convert`.
        functional: as for `packlight.convert`.
        revert_at_end: whether the module is as it was before when the fit has ended.
        measure: False for no measurement.

    Attributes:
        conversion: what `packlight.convert` returned; None before.
        kept_bytes: what the first batch of the last fit kept; None before.
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
        super().__init__()
        self.methods = methods
        self.strict = strict
        self.functional = functional
        self.revert_at_end = revert_at_end
        self.measure = measure
        self.conversion: Conversion | None = None
        self.kept_bytes: int | None = None
        self._measure: KeptBytes | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self.conversion = convert(
                pl_module, self.methods, strict=self.strict, functional=self.functional
            )
            self.kept_bytes = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.measure and self.kept_bytes is None:
            self._measure = KeptBytes(pl_module)
            self._measure.__enter__()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self._stop_measuring()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_measuring()
        if batch_idx == 0 and self.kept_bytes is not None:
            pl_module.log("packlight_kept_bytes", float(self.kept_bytes))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stop_measuring()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self.revert_at_end:
            revert(pl_module)

    def _stop_measuring(self) -> None:
        if self._measure is not None:
            self._measure.__exit__()
            self.kept_bytes = self._measure.bytes
            self._measure = None
