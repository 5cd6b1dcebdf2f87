"""accelerate: an `Accelerator` that converts a model before it prepares it.

    from packlight.integrations.accelerate import Accelerator  # in place of accelerate's

    accelerator = Accelerator(packlight={"methods": "GroupQuant(4), FewBit(3)"})
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

So a model is converted before DDP, FSDP2 with or without its activation checkpoints, DeepSpeed or
`torch.compile` come around it, whatever `accelerate config` or `accelerate launch` say.
"""

import json
import weakref
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

from packlight._seeds import rounding_state, set_rounding_state
from packlight.integrations._converting import Converting, first_rows, maker_of
from packlight.integrations._options import read_options


class Accelerator(accelerate.Accelerator):  # type: ignore[misc]
    """`accelerate.Accelerator` whose `prepare` converts models first.

    Parameters are the same objects as before and `state_dict` has the same keys, so checkpoints are
    plain ones. `save_state` puts beside them where the stream of rounding is, a file a process, and
    `load_state` goes on from there where it finds one.

    What autograd keeps of the first training pass of the prepared model is measured, and printed by
    the first `accelerator.backward`.
    """

    def __init__(self, *args: Any, packlight: Any = None, **kwargs: Any) -> None:
        """
        Args:
            args: as for `accelerate.Accelerator`.
            packlight: options by name, or `methods` as a text alone: `methods` (a text or the path
                of a file), `rest`, `head`, `functional`, `exact_ends` and `strict` as for
                `packlight.convert`; `memory`, `device`, `measure` and `report` as for
                `packlight.integrations.transformers.PacklightCallback`. With `memory`, a plan is
                made for the first rows of the first loader that is prepared with the model.
            kwargs: as for `accelerate.Accelerator`.

        Raises `InputError`, naming the option, for one that is unknown or has a wrong value.
        """
        super().__init__(*args, **kwargs)
        self.packlight = Converting(**read_options(packlight, "accelerate"))
        self._converted: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.register_save_state_pre_hook(self._save_rounding)
        self.register_load_state_pre_hook(self._load_rounding)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        models = [each for each in args if isinstance(each, nn.Module)]
        batch, optimizer = None, None
        if models and self.packlight.memory is not None:  # rows are made for a plan alone
            # The first of each: loaders of evaluation come after that of training.
            loader = next((x for x in args if isinstance(x, torch.utils.data.DataLoader)), None)
            trainer = next((x for x in args if isinstance(x, torch.optim.Optimizer)), None)
            batch = first_rows(loader)
            optimizer = maker_of(trainer)
        for model in models:
            self._convert(model, batch, optimizer)
        prepared = super().prepare(*args, **kwargs)
        if models and self.packlight.measure:  # its parameters are those of the prepared one by now
            self._measure_first_pass(self._models[-1])
        return prepared

    def _measure_first_pass(self, model: nn.Module) -> None:
        """Hooks on saved tensors are on within that pass alone: it may be far off, or not come."""
        handles: list[Any] = []

        def begin(*_: Any) -> None:
            if model.training and torch.is_grad_enabled():
                self.packlight._start_measuring(model)

        def end(*_: Any) -> None:
            self.packlight._stop_measuring()
            if self.packlight.kept_bytes is not None:
                for handle in handles:
                    handle.remove()

        handles.append(model.register_forward_pre_hook(begin))
        handles.append(model.register_forward_hook(end, always_call=True))

    def prepare_model(
        self,
        model: nn.Module,
        device_placement: bool | None = None,
        evaluation_mode: bool = False,
    ) -> nn.Module:
        # That of `prepare` is converted by now, and may have something around it.
        if not evaluation_mode and self._converted.isdisjoint(model.modules()):
            self._convert(model)
        prepared: nn.Module = super().prepare_model(model, device_placement, evaluation_mode)
        return prepared

    def _convert(self, model: nn.Module, batch: Any = None, optimizer: Any = None) -> None:
        with self.autocast():
            self.packlight._plan(model, batch, optimizer)
        self.packlight._convert(model)
        self._converted.add(model)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        super().backward(loss, **kwargs)
        if self.is_main_process and self._models:
            self.packlight._report_once(self._models[-1])

    def _save_rounding(self, models: Any, weights: Any, folder: str) -> None:
        self._rounding(folder).write_text(json.dumps(rounding_state()), encoding="utf-8")

    def _load_rounding(self, models: Any, folder: str) -> None:
        if (path := self._rounding(folder)).exists():  # not of a training without packlight
            set_rounding_state(json.loads(path.read_text(encoding="utf-8")))

    def _rounding(self, folder: str) -> Path:
        return Path(folder, f"packlight_rounding_{self.process_index}.json")
