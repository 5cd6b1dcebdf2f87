"""A model as one of several ranks has it: Linears on shards of columns and rows, some experts.

Tensor and sequence parallel are torch's own, DTensors on a mesh of a group in which nothing is sent
(`_torch/groups.py`), so what a rank keeps is what layers on shards keep (`packlight.sharded`).
Where tokens are cut, the inputs of what holds column-wise Linears are gathered once for all of
them, norms run on tokens, and row-wise Linears scatter their sums by tokens. Embedding and head are
cut by words.

Experts are modules with `num_experts` and weights [experts, ..]. A rank has some of them, and where
tokens are balanced it gets as many rows as it sends. What it sends and gets is counted for an
all-to-all before experts and one after, with which mixtures train at scale.

Sources: Megatron-LM, arXiv 1909.08053; sequence parallel, arXiv 2205.05198; experts, GShard, arXiv
2006.16668.
"""

import contextlib
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from packlight._torch.groups import imagined_group
from packlight.errors import InputError
from packlight.parallel import Parallel, check_heads, divided
from packlight.planner.parts import batch_and_length, part_of_a_rank
from packlight.planner.runs import runs_of

Told = Callable[[str, float], None]  # by what kind, and how many bytes

_COLUMNS = ("colwise", "colwise_rep", "colwise_gather_output")
_ROWS = ("rowwise", "rowwise_rep")
_WHOLE = ("replicated_with_grad_allreduce", "sequence_parallel")


@contextlib.contextmanager
def group_for(parallel: Parallel) -> Iterator[None]:
    """The group that a model is cut in, while it is looked at."""
    if parallel.tensor == 1:
        yield
        return
    with imagined_group(parallel.tensor):
        from torch.distributed.tensor.parallel import loss_parallel

        with loss_parallel() if parallel.loss else contextlib.nullcontext():
            yield


@contextlib.contextmanager
def predicted_pass(
    model: nn.Module, given: Any, parallel: Parallel
) -> Iterator[tuple[Any, Callable[[nn.Module], None]]]:
    """For `packlight.predict`: what a pass on a rank is given, and what cuts a model's copy."""
    if parallel.pipeline > 1:
        raise InputError(
            "predict looks at one pass, and a pipeline has several at once; packlight.plan and"
            " packlight fit count them"
        )
    microbatches = parallel.count_of_microbatches(batch_and_length(*given)[0])
    blocks = [name for run in runs_of(model) for name in run.names]
    with group_for(parallel):
        yield (
            part_of_a_rank(given, parallel, microbatches),
            lambda copy: cut(copy, parallel, blocks, lambda kind, size: None),
        )


def cut(model: nn.Module, parallel: Parallel, blocks: list[str], told: Told) -> None:
    """Makes a copy of a model on fake tensors that of a rank; `told` hears of what experts send."""
    mixtures = _spread_experts(model, parallel, told)
    if parallel.tensor > 1:
        _cut_linears(model, parallel, blocks, mixtures)


# ---- tensor and sequence parallel ----------------------------------------------------------------


def _cut_linears(
    model: nn.Module, parallel: Parallel, blocks: list[str], mixtures: list[str]
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    by_tokens = parallel.sequence
    check_heads(model, parallel)
    if by_tokens and not blocks:
        raise InputError(
            f"{type(model).__name__} has no list of blocks, at whose first one tokens are cut;"
            " Parallel(sequence=False) leaves them whole"
        )
    found = dict(_linears(model, parallel, mixtures))
    tokens = Shard(1) if by_tokens else Replicate()
    styles: dict[str, Any] = {}
    for name, how in found.items():
        if how in _ROWS:
            styles[name] = RowwiseParallel(output_layouts=tokens)
        elif _inside(name, blocks):
            styles[name] = ColwiseParallel()
        else:  # a head
            logits = Shard(-1) if parallel.loss else Replicate()
            styles[name] = ColwiseParallel(
                input_layouts=tokens, output_layouts=logits, use_local_output=not parallel.loss
            )
    mesh = init_device_mesh("cpu", (parallel.tensor,))
    tied = _tied(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and not _inside(name, blocks):
            divided(f"words of {name}", module.num_embeddings, "tensor", parallel.tensor)
            styles[name] = RowwiseParallel(input_layouts=Replicate())
    if by_tokens:
        linears: dict[str, Any] = dict(model.named_modules())
        widths = {linears[name].in_features for name, how in found.items() if how in _COLUMNS}
        for name, module in model.named_modules():
            if _is_norm(module, widths) and not any(_inside(name, [other]) for other in mixtures):
                styles[name] = SequenceParallel()
        parents = {
            name.rpartition(".")[0]
            for name, how in found.items()
            if how in _COLUMNS and _inside(name, blocks)
        }
        for name in parents:
            parent = model.get_submodule(name)
            parent.register_forward_pre_hook(_Gathers(mesh), with_kwargs=True)
        styles[blocks[0]] = PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True
        )
    parallelize_module(model, mesh, styles)
    for head, embedding in tied:
        model.get_submodule(head).weight = model.get_submodule(embedding).weight


def _linears(
    model: nn.Module, parallel: Parallel, mixtures: list[str]
) -> Iterator[tuple[str, str]]:
    """The Linears to be cut, and how; raises where that cannot be."""
    given: Mapping[str, str] | None = parallel.cuts
    if given is None:
        given = getattr(model, "tp_plan", None)
    if not given:
        raise InputError(
            f"tensor={parallel.tensor} needs to know which Linears are cut: {type(model).__name__}"
            ' has no tp_plan; pass Parallel(cuts={"blocks.*.up": "colwise", "blocks.*.down":'
            ' "rowwise"})'
        )
    any_found = False
    for name, module in model.named_modules():
        how = next((how for glob, how in given.items() if fnmatch.fnmatchcase(name, glob)), None)
        if how is None or how in _WHOLE or any(_inside(name, [other]) for other in mixtures):
            continue
        if how not in _COLUMNS + _ROWS or not isinstance(module, nn.Linear):
            if how == "embedding_rowwise":
                continue
            raise InputError(
                f"{name}, a {type(module).__name__}, is to be cut {how}; Linears can be cut"
                " colwise or rowwise"
            )
        width = module.out_features if how in _COLUMNS else module.in_features
        what = "columns" if how in _COLUMNS else "rows"
        divided(f"{what} of {name}", width, "tensor", parallel.tensor)
        any_found = True
        yield name, how
    if not any_found:
        raise InputError(f"no Linear has a name in {', '.join(given)}")


def _inside(name: str, parents: list[str]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def _is_norm(module: nn.Module, widths: set[int]) -> bool:
    """Whether it is a norm of all features, that runs between what is cut."""
    if "Norm" not in type(module).__name__:
        return False
    shapes = [p.shape for p in module.parameters(recurse=False)]
    return bool(shapes) and all(len(shape) == 1 and shape[0] in widths for shape in shapes)


def _tied(model: nn.Module) -> list[tuple[str, str]]:
    """Heads that have the weight of an embedding."""
    embeddings = {
        id(module.weight): name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    return [
        (name, embeddings[id(module.weight)])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) in embeddings
    ]


class _Gathers:
    """Has a module read tokens of all ranks; features are in the last of three dimensions."""

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tuple(map(self.gathered, args)), {k: self.gathered(v) for k, v in kwargs.items()}

    def gathered(self, x: Any) -> Any:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if not isinstance(x, Tensor) or x.dim() != 3 or not x.is_floating_point():
            return x
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, (Shard(1),), run_check=False)
        return x.redistribute(placements=(Replicate(),))


# ---- experts -------------------------------------------------------------------------------------


def _spread_experts(model: nn.Module, parallel: Parallel, told: Told) -> list[str]:
    """Has modules of experts hold those of a rank, and returns the names of mixtures."""
    mixtures = []
    for name, module in model.named_modules():
        count = getattr(module, "num_experts", None)
        stacks = [
            (key, weight)
            for key, weight in module.named_parameters(recurse=False)
            if weight.dim() >= 2 and weight.shape[0] == count
        ]
        if not isinstance(count, int) or len(stacks) < 2:  # a router has one
            continue
        mixtures.append(name.rpartition(".")[0])
        if parallel.expert == 1:
            continue
        own = divided(f"experts of {name}", count, "expert", parallel.expert)
        for key, weight in stacks:
            part = weight.detach()[:own].clone()
            setattr(module, key, nn.Parameter(part, weight.requires_grad))
        module.num_experts = own
        dispatches = _Dispatches(parallel, told)
        module.register_forward_pre_hook(dispatches)
        module.register_forward_hook(dispatches.combined)
    if parallel.expert > 1 and not mixtures:
        raise InputError(
            f"expert={parallel.expert}, but {type(model).__name__} has no module with `num_experts`"
            " and weights of that many experts"
        )
    return mixtures


class _Dispatches:
    """Has experts read the rows that a rank gets, and tells what it sends for them.

    The arguments of experts are rows [tokens, width], and for each the numbers of its experts and
    their weights. A token goes to each of its experts and comes back, and so do gradients.
    """

    def __init__(self, parallel: Parallel, told: Told) -> None:
        self.parallel, self.told = parallel, told

    def __call__(self, module: Any, args: Any) -> Any:
        rows = [x for x in args if isinstance(x, Tensor) and x.dim() == 2]
        if len(rows) != len(args) or len({x.shape[0] for x in rows}) != 1:
            raise InputError(
                f"{type(module).__name__} does not read rows, their experts and weights, so that"
                " what goes to other ranks is not known"
            )
        hidden, index = rows[:2]
        size = hidden.numel() * hidden.element_size() * index.shape[1]
        sent = 2 * size * (1 - 1 / self.parallel.expert)
        self.told("expert", sent)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.told("expert", sent))
        self.rows = hidden.shape[0]
        more = math.ceil((self.parallel.imbalance - 1) * self.rows)
        return tuple(F.pad(x, (0, 0, 0, more)) for x in rows) if more else args

    def combined(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The rows that this rank sent."""
        return output[: self.rows] if output.shape[0] > self.rows else output
