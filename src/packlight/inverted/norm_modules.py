"""Inverted norms under torch.nn's own names: each is its torch class, keeping its output.

Constructor, attributes, `state_dict` and printing are torch.nn's. In `eval()` the plain torch
operation runs. What is kept, and how exact the gradient is, stands in `norms.py`.

**Ill-posed channels.** A layer must know for which channels of its weights x_hat cannot be had from
the output (`ill_posed`). To know it reads the weights, which waits for the device, so it remembers
the answer: it looks at its first forward pass in training, after `load_state_dict`, `to` and the
like, and then once RECHECK_AFTER passes have gone by, at the first pass after a change of the
weights. Between two looks a channel may drift past the limit: its x_hat then has the error
u (|x_hat| + |beta / gamma|) of its present weights, and is NaN at a gamma of exactly 0.

`refresh()` looks at once. It is for where a layer does not look by itself: in a compiled region,
which keeps what held when it was traced; in a captured CUDA graph; and where weights change without
a new version (`weight.data`, FSDP's all-gather). `offset_limit` replaces the limit on
|beta / gamma|: set it on a layer, then call `refresh()`.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from packlight import _torch
from packlight._torch import constant_while_traced
from packlight.errors import InputError
from packlight.inverted import norms
from packlight.inverted.norm_ill_posed import WELL_POSED, Verdict, verdict_of_weights, worst_error
from packlight.layers.twin import Twin, start_batch

RECHECK_AFTER = 64


@dataclasses.dataclass
class _Seen:
    """What a layer last saw in its weights, by the dtype in which the output is kept."""

    verdicts: dict[torch.dtype, Verdict] = dataclasses.field(default_factory=dict)
    version: tuple[int, ...] = ()
    forwards: int = 0
    # Channels that captured CUDA graphs read.
    captured: list[Verdict] = dataclasses.field(default_factory=list)


class InvertedNorm(Twin):
    """What the layers share: the verdict on their weights, and when to look again."""

    is_one_node = False  # the tracer looks at the weights, and keeps what it saw
    offset_limit: float | None = None
    _seen: _Seen | None = None  # on the class too, for a module that was given this class

    def refresh(self) -> None:
        """Look at the weights now for which channels must be kept exactly. Waits for the device."""
        seen = self._seen
        if seen is None:
            self._seen = seen = _Seen()
        with torch.no_grad():
            for dtype in seen.verdicts or self._usual_dtypes():
                new = verdict_of_weights(*self._affine(), dtype, self.offset_limit)
                if not _same(seen.verdicts.get(dtype), new):  # the same tensor, where it can be
                    seen.verdicts[dtype] = new
        seen.version, seen.forwards = self._weight_version(), 0

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        return getattr(self, "weight", None), getattr(self, "bias", None)

    def _usual_dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.float32, torch.bfloat16, torch.float16)

    def _weight_version(self) -> tuple[int, ...]:
        return tuple(p._version for p in self._affine() if p is not None)

    def _verdict(self, dtype: torch.dtype) -> Verdict:
        """What to keep exactly in this forward pass."""
        weight, bias = self._affine()
        if weight is None and bias is None:
            return WELL_POSED
        if _torch.is_traced():
            self._look_while_traced(dtype)
            return self._seen.verdicts[dtype]  # type: ignore[union-attr]
        capturing = _is_capturing(bias if weight is None else weight)
        seen = self._seen
        if seen is None or dtype not in seen.verdicts:
            if capturing:
                raise InputError(
                    f"{type(self).__name__} has not looked at its weights yet and cannot while a"
                    " CUDA graph is captured; run a forward pass before, or call refresh()"
                )
            self._look(dtype)
            seen = self._seen
        elif not capturing:
            # At a new version only: a checkpoint's recomputation must see what its forward saw.
            seen.forwards += 1
            version = self._weight_version()
            if version != seen.version and seen.forwards >= RECHECK_AFTER:
                self.refresh()
            seen.version = version
        assert seen is not None
        verdict = seen.verdicts[dtype]
        if capturing:
            seen.captured.append(verdict)
        return verdict

    def _look(self, dtype: torch.dtype) -> None:
        """Look at the weights for outputs kept in one more dtype."""
        if self._seen is None:
            self._seen = _Seen(version=self._weight_version())
        self._seen.verdicts[dtype] = verdict_of_weights(*self._affine(), dtype, self.offset_limit)

    @constant_while_traced
    def _look_while_traced(self, dtype: torch.dtype) -> None:
        """Runs as torch.compile traces, with the weights' values: looks unless it has before."""
        if self._seen is None or dtype not in self._seen.verdicts:
            with _torch.with_values():
                self._look(dtype)

    def _forget(self) -> None:
        if self._seen is not None:
            self._seen = _Seen(captured=self._seen.captured)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._forget()
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_seen"}


def _same(a: Verdict | None, b: Verdict) -> bool:
    if a is None or a.channels is None or b.channels is None:
        return a == b
    return a.plain == b.plain and torch.equal(a.channels, b.channels)


def _is_capturing(parameter: Tensor | None) -> bool:
    on_cuda = parameter is not None and parameter.is_cuda
    return on_cuda and torch.cuda.is_current_stream_capturing()


def gradient_error(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, float]:
    """The worst relative error of x_hat that the current weights imply, by name of inverted norm.

    It is u (1 + max |beta / gamma|) over the channels that the layer does not keep exactly, with u
    half a unit of `dtype`, in which the output is kept (None: the dtype of the weights): the error
    of x_hat beside x_hat's own standard deviation of 1. dgamma = sum dy x_hat has this error
    relative to sum |dy|; that of dx is far less, since x_hat enters with the factor mean(g x_hat).
    Infinite where a gamma has become 0 since the layer last looked; 0 where more than half of the
    channels are ill-posed, so that torch's own norm runs. Waits for the device.
    """
    errors = {}
    for name, module in model.named_modules():
        if not isinstance(module, InvertedNorm):
            continue
        weight, bias = module._affine()
        given = bias if weight is None else weight
        kept = dtype or (torch.float32 if given is None else given.dtype)
        seen = module._seen
        verdict = None if seen is None else seen.verdicts.get(kept)
        if verdict is None:
            verdict = verdict_of_weights(weight, bias, kept, module.offset_limit)
        errors[name] = worst_error(weight, bias, kept, verdict)
    return errors


# --- The layers. Constructors are torch's.


class LayerNorm(InvertedNorm, nn.LayerNorm):
    """`torch.nn.LayerNorm`; keeps its output and 32 bits a row, exact to rounding."""

    def training_forward(self, input: Tensor) -> Tensor:
        given = (tuple(self.normalized_shape), self.weight, self.bias, self.eps)
        return norms.row_norm(input, *given, True, self._verdict)


class RMSNorm(InvertedNorm, nn.RMSNorm):
    """`torch.nn.RMSNorm`; keeps its output and 32 bits a row, exact to rounding."""

    def training_forward(self, x: Tensor) -> Tensor:
        given = (tuple(self.normalized_shape), self.weight, None, self.eps)
        return norms.row_norm(x, *given, False, self._verdict)


class GroupNorm(InvertedNorm, nn.GroupNorm):
    """`torch.nn.GroupNorm`; keeps its output and 32 bits a group, exact to rounding."""

    def training_forward(self, input: Tensor) -> Tensor:
        given = (self.num_groups, self.weight, self.bias, self.eps)
        return norms.group_norm_by_verdict(input, *given, self._verdict)


class _BatchNorm(InvertedNorm, nn.modules.batchnorm._NormBase):
    """`nn.SyncBatchNorm.convert_sync_batchnorm` makes torch's own SyncBatchNorm of it."""

    def training_forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        return norms.batch_norm_by_verdict(input, **start_batch(self), find_verdict=self._verdict)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`; keeps its output and 32 bits a channel, exact to rounding."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`; keeps its output and 32 bits a channel, exact to rounding."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`; keeps its output and 32 bits a channel, exact to rounding."""


class _InstanceNorm(InvertedNorm, nn.modules.instancenorm._InstanceNorm):
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super()._apply_instance_norm(input)  # type: ignore[no-untyped-call]
            return plain
        return norms.instance_norm_by_verdict(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            True,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
            self._verdict,
        )


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d`; keeps its output and 32 bits an instance, exact to rounding."""


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d`; keeps its output and 32 bits an instance, exact to rounding."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d`; keeps its output and 32 bits an instance, exact to rounding."""
