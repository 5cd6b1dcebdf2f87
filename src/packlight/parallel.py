"""`Parallel`: over how many ranks a training step is spread, and in which ways."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from packlight.errors import InputError

_DEGREES = ("replicate", "shard", "tensor", "context", "pipeline", "expert")
_FLAGS = ("sequence", "loss", "reshard")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Degrees of parallelism, by the names that torchtitan has for them.

    A run has `replicate x shard x context x tensor x pipeline` ranks. A model's inputs are the
    batch of one data-parallel rank; context parallel divides its tokens and the pipeline its rows.

    - `replicate`: data parallel with all weights on each rank (DDP), or HSDP beside `shard`.
    - `shard`: FSDP2, each block and what is around blocks by itself. Shards lie over `shard x
      context` ranks.
    - `tensor`: Linears cut by columns and by rows. `sequence` says whether what is between them is
      cut by tokens, `loss` whether the loss is computed on shards of logits, or gathers them.
    - `context`: tokens of a sequence, with keys and values passed on in attention.
    - `pipeline`: stages of alike numbers of blocks, by the schedule 1F1B; `microbatches`, one for
      each row where it is None, are the parts of the batch. Without a pipeline, an accumulation of
      gradients.
    - `expert`: experts of mixtures, over ranks of the other kinds, of which `shard x context x
      tensor` are a multiple of it. `imbalance` is how many times as many tokens as others have the
      experts of this rank get.
    - `reshard`: whether weights are let go of after the forward pass. A pipeline keeps them, as
      `torch.distributed.pipelining` does.
    - `shard_dtype`: of shards of weights, of their gradients and of what the optimiser sees, where
      it is not that of the model, which is then FSDP's `MixedPrecisionPolicy(param_dtype)`.
    - `cuts`: "colwise" or "rowwise" by names of Linears with wildcards, as transformers has them
      in `tp_plan`; None: that of the model.

    >>> Parallel(shard=8, tensor=2).ranks
    16
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    sequence: bool = True
    loss: bool = True
    context: int = 1
    pipeline: int = 1
    microbatches: int | None = None
    expert: int = 1
    imbalance: float = 1.0
    reshard: bool = True
    shard_dtype: torch.dtype | None = None
    cuts: Mapping[str, str] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name in _DEGREES:
            self._check_count(name, getattr(self, name))
        if self.microbatches is not None:
            self._check_count("microbatches", self.microbatches)
            if self.microbatches < self.pipeline:
                raise InputError(
                    f"microbatches={self.microbatches} leave stages of pipeline={self.pipeline}"
                    " without work"
                )
        if self.within % self.expert:
            raise InputError(
                f"expert={self.expert} does not divide shard x context x tensor = {self.within}"
            )
        if self.shard_dtype is not None and self.shards == 1:
            raise InputError("shard_dtype is of shards, and shard x context is 1")
        self._check_others(self.imbalance, self.shard_dtype, self.cuts)
        for name in _FLAGS:
            if not isinstance(flag := getattr(self, name), bool):
                raise InputError(f"{name}={flag!r} is neither True nor False")

    @staticmethod
    def _check_others(imbalance: object, dtype: object, cuts: object) -> None:
        if not isinstance(imbalance, int | float) or not 1 <= imbalance < math.inf:
            raise InputError(f"imbalance={imbalance!r} is no number or below 1, which is balance")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InputError(f"shard_dtype={dtype!r} is no dtype such as torch.float32")
        if cuts is not None and not isinstance(cuts, Mapping):
            raise InputError(f'cuts={cuts!r} is no mapping such as {{"blocks.*.up": "colwise"}}')

    @staticmethod
    def _check_count(name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}={value!r} is not a positive whole number")

    @property
    def within(self) -> int:
        """Ranks of one stage that have no weights in common but for experts."""
        return self.shard * self.context * self.tensor

    @property
    def shards(self) -> int:
        """Ranks over which FSDP2 shards."""
        return self.shard * self.context

    @property
    def ranks(self) -> int:
        return self.replicate * self.within * self.pipeline

    @property
    def reshards(self) -> bool:
        return self.reshard and self.pipeline == 1

    def count_of_microbatches(self, rows: int | None) -> int:
        """For a batch of so many rows."""
        if self.microbatches is not None:
            return self.microbatches
        return 1 if self.pipeline == 1 or rows is None else rows

    def alive(self, stage: int, microbatches: int) -> int:
        """Micro-batches whose packs a stage has at once at most: by 1F1B the first has most."""
        return min(self.pipeline - stage, microbatches)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as for JSON."""
        found = {name: getattr(self, name) for name in (*_DEGREES, "ranks", *_FLAGS)}
        dtype = self.shard_dtype
        named = None if dtype is None else str(dtype).removeprefix("torch.")
        return {**found, "imbalance": self.imbalance, "shard_dtype": named}

    def __str__(self) -> str:
        degrees = [f"{name} {value}" for name in _DEGREES if (value := getattr(self, name)) != 1]
        return ", ".join(degrees) or "one rank"


ONE_RANK = Parallel()


def checked(parallel: object) -> Parallel:
    if parallel is None:
        return ONE_RANK
    if not isinstance(parallel, Parallel):
        raise InputError(f"parallel is a {type(parallel).__name__}; expected packlight.Parallel")
    return parallel


def divided(what: str, count: int, name: str, degree: int) -> int:
    """A part of so many things; raises where the degree does not divide them."""
    if count % degree:
        raise InputError(f"{name}={degree} does not divide {what}, of which there are {count}")
    return count // degree


def check_heads(model: nn.Module, parallel: Parallel) -> None:
    """Raises where the heads of attention, as its configuration counts them, are not divided."""
    config: Any = getattr(model, "config", None)
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None)
        if isinstance(count, int):
            divided(name, count, "tensor", parallel.tensor)
