"""Modules that work on each position by itself, in tiles of positions.

Two Functions share the work. `_Keep` is the identity, and keeps x. `_Run` computes y, keeps
nothing, and asks `_Keep`, the node before it in the graph, for x when its gradient has come. So x
is kept before anything is computed, and a checkpoint around the module, which recomputes up to the
last tensor that was kept, stops there.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from packlight import _torch
from packlight._checks import autocasts, refuse_second_derivative
from packlight.calls import uncovered
from packlight.errors import CannotGraphError, InputError, ModifiedWeightError
from packlight.packing.layout import compute_dtype
from packlight.quantiser import pack_input, worth_packing
from packlight.recompute.method import Tiles

Forward = Callable[[Tensor], Tensor]


def in_tiles(module: nn.Module, forward: Forward, x: Tensor, method: Tiles) -> Tensor:
    """`forward(x)`, the forward of a module on x [..., tokens, width], by tiles of tokens."""
    if torch.compiler.is_dynamo_compiling():
        traced: Tensor = uncovered(_traced, forward, x, method.tokens)
        return traced
    body = _Body(module, forward, method.tokens)
    wanted = torch.is_grad_enabled() and (x.requires_grad or bool(body.parameters))
    y: Tensor = uncovered(_kept_and_run if wanted else _run, body, x, method)
    return y


def _traced(forward: Forward, x: Tensor, tokens: int) -> Tensor:
    """The same for the tracer of torch.compile, which knows checkpoints."""
    tiles = [
        torch.utils.checkpoint.checkpoint(forward, tile, use_reentrant=False)
        for tile in x.reshape(_tile_shape(x, -1)).split(tokens, -2)
    ]
    y = torch.cat(tiles, -2)
    return y.view(*x.shape[:-1], y.shape[-1])


def _tile_shape(x: Tensor, tokens: int) -> tuple[int, ...]:
    """Of a tile of `x`: as many dimensions, of which all but the last two are 1."""
    return (*[1] * (x.dim() - 2), tokens, x.shape[-1])


def _run(body: "_Body", x: Tensor, method: Tiles) -> Tensor:
    with torch.no_grad():
        return body.outputs(x)


def _kept_and_run(body: "_Body", x: Tensor, method: Tiles) -> Tensor:
    rebuild: Callable[..., Tensor] = _itself
    tensors: tuple[Tensor | None, ...] = (x,)
    if method.keep is not None and worth_packing(x, method.keep):
        kept = pack_input(x, method.keep)
        rebuild, tensors = kept.rebuild, kept.tensors
    # Where x has no gradient the node is there all the same, for a parameter that gets none of it.
    anchor = None if x.requires_grad else body.parameters[0]
    held = _apply_keep(x, anchor, rebuild, *tensors)
    y: Tensor = _apply_run(held, body, x.requires_grad, *body.parameters)
    return y


def _itself(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x


class _Keep(torch.autograd.Function):
    """x; keeps what x comes back from."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.rebuild = rebuild
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None) -> Any:
        return dx, None, None, *[None] * (len(ctx.needs_input_grad) - 3)


class _Run(torch.autograd.Function):
    """y = f(x) by tiles; keeps nothing but how f was called."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, body: "_Body", wants_dx: bool, *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.body, ctx.wants_dx, ctx.dtype = body, wants_dx, x.dtype
        ctx.setting = _Setting(x, body.module)
        ctx.versions = body.versions()
        return body.outputs(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        refuse_second_derivative("its input, and computes the rest again,")
        count = len(ctx.needs_input_grad)
        if dy is None:
            return (None,) * count
        keep = ctx.next_functions[0][0]
        tensors = keep.saved_tensors
        if not _the_same(ctx.versions, ctx.body.versions()):
            raise ModifiedWeightError(
                "a parameter of a module that runs in tiles was modified or replaced, as by an"
                " optimizer's step, between the module's forward and its backward pass, which runs"
                " it again; step after the backward pass, or run the forward pass again afterwards"
            )
        x = keep.rebuild(ctx.dtype, *tensors)
        with ctx.setting.again():
            wanted = (ctx.wants_dx, *ctx.needs_input_grad[3:])
            dx, *gradients = ctx.body.gradients(x, dy, wanted, _is_ours(x, tensors))
        return dx, None, None, *gradients


_apply_keep: Callable[..., Tensor] = _torch.applied(_Keep)
_apply_run: Callable[..., Tensor] = _torch.applied(_Run)


def _is_ours(x: Tensor, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether x was made for this backward pass, so that its gradient may take its place."""
    memory = x.untyped_storage()._cdata
    return all(kept is None or kept.untyped_storage()._cdata != memory for kept in tensors)


class _Setting:
    """Under which autocast a forward pass ran, and which random numbers it drew."""

    def __init__(self, x: Tensor, module: nn.Module) -> None:
        self.kind = x.device.type
        self.casts = autocasts(self.kind)
        self.dtype = torch.get_autocast_dtype(self.kind) if self.casts else None
        self.caches = torch.is_autocast_cache_enabled()
        self.random: Tensor | None = None
        self.device: torch.device | None = None
        if _torch.is_fake(x) or x.is_meta:
            return  # nothing is computed of it
        self.random = torch.get_rng_state()
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            if any(isinstance(part, nn.Dropout) and part.p for part in module.modules()):
                raise CannotGraphError(
                    "a module that runs in tiles has a dropout, whose masks a CUDA graph cannot"
                    " draw twice; set its p to 0, or leave the module to torch (None as its method)"
                )
        elif x.is_cuda:
            self.device = x.device
            self.random_there = torch.cuda.get_rng_state(x.device)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The same autocast and the same random numbers."""
        with contextlib.ExitStack() as stack:
            if self.random is not None:
                devices = [] if self.device is None else [self.device]
                stack.enter_context(torch.random.fork_rng(devices))
                torch.set_rng_state(self.random)
                if self.device is not None:
                    torch.cuda.set_rng_state(self.random_there, self.device)
            if self.kind != "meta":
                cast = torch.autocast(
                    self.kind, self.dtype, enabled=self.casts, cache_enabled=self.caches
                )
                stack.enter_context(cast)
            yield


class _Body:
    """What runs by tiles: a module's forward, and its trained parameters."""

    def __init__(self, module: nn.Module, forward: Forward, tokens: int) -> None:
        self.module, self.forward, self.tokens = module, forward, tokens

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained. They are not held here: that would look like a saved tensor."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def versions(self) -> list[tuple[int, int, int]]:
        """Which parameters there are, where they lie, and how often each was written to."""
        return [
            (
                id(p),
                p.data_ptr() if type(p) is nn.Parameter else 0,
                0 if p.is_inference() else p._version,
            )
            for p in self.module.parameters()
        ]

    def tiles(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The same tile of tensors of as many positions, as views."""
        rows = [x.reshape(_tile_shape(x, -1)) for x in tensors]
        for start in range(0, rows[0].shape[-2], self.tokens):
            size = min(self.tokens, rows[0].shape[-2] - start)
            yield tuple(x.narrow(-2, start, size) for x in rows)

    def outputs(self, x: Tensor) -> Tensor:
        """y; gradients are off."""
        y: Tensor | None = None
        start = 0
        for (tile,) in self.tiles(x):
            part = self.forward(tile)
            _check_output(part, tile)
            if y is None:
                y = part.new_empty((*x.shape[:-1], part.shape[-1]))
                rows = y.view(-1, part.shape[-1])
            rows[start : start + tile.shape[-2]] = part.flatten(0, -2)
            start += tile.shape[-2]
        assert y is not None
        if autocasts(x.device.type):
            # It would hand the casts made here, which have no gradients, to later uses of a weight.
            torch.clear_autocast_cache()
        return y

    def gradients(
        self, x: Tensor, dy: Tensor, wanted: tuple[bool, ...], may_write: bool
    ) -> list[Tensor | None]:
        """With respect to x, then to the parameters; None where nothing depends on one.

        With `may_write` that of x takes the memory of x.
        """
        rows = x if x.is_contiguous() else x.contiguous()
        dx = None
        if wanted[0]:
            dx = rows if may_write or rows is not x else torch.empty_like(rows)
        several = rows.numel() > self.tokens * rows.shape[-1]
        parameters = self.parameters
        sums = [_Sum(p, several) for p in parameters]
        with self._stand_ins(parameters) as leaves, torch.enable_grad():
            leaves = [leaf for leaf, want in zip(leaves, wanted[1:], strict=True) if want]
            needed = [one for one, want in zip(sums, wanted[1:], strict=True) if want]
            for tile, dy_tile, *into in self.tiles(rows, dy, *([] if dx is None else [dx])):
                part = tile.detach().requires_grad_(wanted[0])
                y = self.forward(part)
                inputs = [*([part] if into else []), *leaves]
                found: tuple[Tensor | None, ...] = (None,) * len(inputs)
                if y.requires_grad:
                    found = torch.autograd.grad(y, inputs, dy_tile, allow_unused=True)
                del y
                with torch.no_grad():
                    for written in into:
                        first, *found_rest = found
                        found = tuple(found_rest)
                        written.zero_() if first is None else written.copy_(first)
                    for one, gradient in zip(needed, found, strict=True):
                        one.add(gradient)
        return [dx, *(one.result() for one in sums)]

    @contextlib.contextmanager
    def _stand_ins(self, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Other leaves in the places of parameters, whose hooks are to see one gradient."""
        made = {id(p): nn.Parameter(p.detach()) for p in parameters}
        places = [
            (module._parameters, name, p)
            for module in self.module.modules()
            for name, p in module._parameters.items()
            if p is not None and id(p) in made
        ]
        try:
            for holder, name, p in places:
                holder[name] = made[id(p)]
            yield list(made.values())
        finally:
            for holder, name, p in places:
                holder[name] = p


def _the_same(before: list[tuple[int, int, int]], now: list[tuple[int, int, int]]) -> bool:
    """Whether parameters are those that were there, or others in the same memory.

    As the stand-ins with which a pass is recorded, and a parameter that FSDP gathers once more.
    """
    return len(before) == len(now) and all(
        version == other_version and (one == other or (where and where == other_where))
        for (one, where, version), (other, other_where, other_version) in zip(
            before, now, strict=True
        )
    )


class _Sum:
    """A parameter's gradient over tiles, in 32 bits at least where there are several."""

    def __init__(self, parameter: Tensor, several: bool) -> None:
        self.parameter, self.several = parameter, several
        self.total: Tensor | None = None

    def add(self, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        if not self.several:
            self.total = gradient
        elif self.total is None:
            self.total = gradient.to(compute_dtype(gradient), copy=True)
        else:
            self.total.add_(gradient)

    def result(self) -> Tensor | None:
        return None if self.total is None else self.total.to(self.parameter.dtype)


def _check_output(y: object, x: Tensor) -> None:
    if isinstance(y, Tensor) and y.shape[:-1] == x.shape[:-1]:
        return
    found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
    raise InputError(
        f"a module that runs in tiles gave {found} for a tile {tuple(x.shape)}; one tensor with the"
        " same positions is expected, so leave the module to torch (None as its method)"
    )
