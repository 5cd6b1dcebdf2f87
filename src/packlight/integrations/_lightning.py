"""What the callbacks for `lightning` and `pytorch_lightning` share; each has a class of its own."""

from collections.abc import Mapping
from typing import Any

from packlight._seeds import rounding_state, set_rounding_state
from packlight.convert import revert
from packlight.integrations._converting import Converting


class ConvertingFit(Converting):
    """Converts a `LightningModule` before it trains, and logs what a training step keeps.

    Conversion happens in the `setup` of a fit, before the strategy wraps the module for several
    devices. Parameters are the same objects as before and `state_dict` has the same keys, so
    checkpoints are plain ones.

    The first batch of each fit that keeps anything is measured, up to its first backward pass:
    `kept_bytes` is what autograd keeps of it, logged as "packlight_kept_bytes", on a GPU with
    "packlight_peak_bytes" beside it.

    Checkpoints hold where the stream of rounding is, so a resumed fit is the uninterrupted one, bit
    for bit, wherever the plain module is: Lightning saves no state of torch's generators, of which
    dropout and shuffled loaders draw.
    """

    _logged = False
    _rounding: Mapping[str, int | None] = {}  # of the checkpoint from which a fit goes on

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._plan(pl_module)
            self._convert(pl_module)
            self.kept_bytes, self._logged, self._reported = None, False, False

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not when training begins: another callback may draw until now.
        rounding, self._rounding = self._rounding, {}
        set_rounding_state(rounding)
        self._start_measuring(pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self._stop_measuring()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_measuring()
        if self.kept_bytes is not None and not self._logged:
            self._logged = True
            for name, size in self._measured().items():
                pl_module.log(name, float(size))
        if trainer.is_global_zero:
            self._report_once(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"rounding": rounding_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rounding = state_dict.get("rounding", {})

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stop_measuring()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self.revert_at_end:
            revert(pl_module)
