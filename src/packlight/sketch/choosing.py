"""`choose`: how many rows each layer's sketch needs to be no noisier than the batch is."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import Tensor, nn

from packlight import _swap, graphs, integrations, sharing
from packlight.batches import call
from packlight.errors import CannotConvertError, InputError
from packlight.method import NotConverted, find_rule
from packlight.profile.restoring import left_as_found
from packlight.profile.scene import scene_of
from packlight.report.names import condensed
from packlight.report.printing import new_table, render
from packlight.report.words import human_bytes
from packlight.selectors import Choice, Selector, kind_of, name_selector
from packlight.sketch.method import Kind, Sketch
from packlight.sketch.reference import kept_bytes
from packlight.sketch.variances import Variances
from packlight.sketch.watching import Taker, watch

# Shares that are tried, from nearly all rows down to one in 256; neighbours are 4% apart.
_SHARES = tuple(round(2 ** (-step / 16), 4) for step in range(1, 129))
# A ratio of 1 is reached at a half by `rows`, but for the rounding of sums.
_EXCESS = 1 + 1e-9


class ChosenLayer(NamedTuple):
    """What was chosen for a layer, and what it gives on the batches that were seen."""

    name: str
    method: Sketch | None  # None: its input is kept exactly
    tokens: int  # of the largest pass
    rows: int  # p there; all tokens where there is no method
    ratio: float  # sketch variance over sample variance; without a method, the best that there is
    exact_bytes: int  # of the input, a batch; 0 where a layer before it keeps the same tensor
    kept_bytes: int  # of the sketch in its place
    note: str = ""  # why it is left exact, or whose sketch it shares


class ChosenRows(Mapping[Selector, Choice]):
    """What `choose` returns: methods by layer, for `convert` and `save_methods`; prints as a table.

    `layers` has a `ChosenLayer` for each layer that was looked at.
    """

    def __init__(self, ratio: float, layers: tuple[ChosenLayer, ...]) -> None:
        self.ratio = ratio
        self.layers = layers
        self._methods: dict[Selector, Choice] = {
            name_selector(layer.name): layer.method for layer in layers
        }

    def __getitem__(self, selector: Selector) -> Choice:
        return self._methods[selector]

    def __iter__(self) -> Iterator[Selector]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    def __repr__(self) -> str:
        return f"ChosenRows(ratio={self.ratio}, layers=<{len(self.layers)}>)"

    def __str__(self) -> str:
        return render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        sketched = sum(layer.method is not None for layer in self.layers)
        yield Text(
            f"{sketched} of {len(self.layers)} layers sketched, with at most {self.ratio:g} times"
            " the variance of the batch"
        )
        table = new_table()
        for column in ("layer", "kind", "rows", "ratio", "input", "kept"):
            table.add_column(column, justify="left" if column in ("layer", "kind") else "right")
        exact: dict[str, list[str]] = {}
        for layer in self.layers:
            kind = "exact" if layer.method is None else layer.method.kind
            ratio = f"{layer.ratio:.3g}" if math.isfinite(layer.ratio) else ""
            sizes = [human_bytes(layer.exact_bytes), human_bytes(layer.kept_bytes)]
            if layer.tokens and not layer.exact_bytes:
                sizes = ["", "shared"]
            if layer.method is None:
                exact.setdefault(layer.note, []).append(layer.name)
            rows = f"{layer.rows} of {layer.tokens}"
            table.add_row(Text(layer.name), kind, rows, ratio, *sizes)
        yield table
        for note, names in exact.items():
            yield Text(f"{note}: {', '.join(condensed(names))}")
        before = sum(layer.exact_bytes for layer in self.layers)
        after = sum(layer.kept_bytes for layer in self.layers)
        yield Text(f"inputs of these layers: {human_bytes(before)}, kept: {human_bytes(after)}")


def choose(
    model: nn.Module,
    batches: Iterable[Any],
    ratio: float = 1.0,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    kinds: Sequence[Kind] = ("rows", "srht"),
) -> ChosenRows:
    """Rows of a sketch for each layer: as few as keep its variance at `ratio` times the batch's.

        chosen = packlight.sketch.choose(model, batches, loss=loss)
        print(chosen)
        packlight.convert(model, chosen)
        packlight.save_methods(chosen, "methods.toml")

    Runs each batch forward and backward once and sums, layer by layer, the `variance` of the
    sketches and `sample_variance` over the batches. A layer takes the kind and the share of rows
    that keep fewest with a ratio of the sums of at most `ratio`; shares that are tried lie 4%
    apart. Layers that read one tensor share a sketch, so they take one kind and one share, that of
    the layer that needs most. A layer that no share below all rows brings to the ratio is left
    exact, and so are those that read the same tensor.

    A ratio of 1 makes the variance of the weight gradients twice what it is, 0.1 makes it a tenth
    larger. `rows` needs a share of 1 / (1 + ratio), whatever the data are; what other kinds need
    depends on them.

    Looked at are the layers that `Sketch` has a rule for, in training mode, whose weights take
    gradients; also of a model that is converted or graphed already. Parameters' `.grad`, buffers
    and random numbers are left as they were.

    Args:
        model: in training mode.
        batches: what `loss` takes; without one, what the model takes: a mapping of keywords, a
            tuple or list of arguments, or one argument. Few are enough, of the size of training.
        ratio: of the sketch's variance to the batch's own.
        loss: runs the model on a batch and returns the loss that is trained. Left out, the model's
            output is the loss, or has it as its attribute `loss`.
        kinds: of sketches to choose from. With `dct` and `dft` choosing takes a while.

    Raises `InputError` where there is no loss, and where no gradient of a layer arrived.

    >>> import torch, packlight
    >>> model = torch.nn.Linear(8, 4)
    >>> batches = [torch.randn(64, 8)]
    >>> loss = lambda x: model(x).square().sum()
    >>> packlight.sketch.choose(model, batches, loss=loss, kinds=["rows"]).layers[0].rows
    32
    """
    if not 0 < ratio < math.inf:
        raise InputError(
            f"ratio={ratio!r} is no number above 0; 1 doubles the batch's own variance"
        )
    if not kinds:
        raise InputError("kinds is empty; ['rows', 'srht'] are the ones to begin with")
    for kind in kinds:
        Sketch(kind=kind)
    integrations.load()
    with graphs.set_aside(model):
        seen = {name: _Seen(kinds) for name in _names_of_layers(model)}
        groups = _Groups(seen)
        count = _look(model, batches, loss, seen, groups)
    if not any(layer.passes for layer in seen.values()):
        raise InputError(
            f"no gradient came to a layer of {type(model).__name__} in {count} batches that a"
            " sketch can serve: a Linear or a pointwise convolution in training mode whose weight"
            " takes gradients, outside of compiled code"
        )
    return ChosenRows(ratio, tuple(_chosen(seen, groups, ratio * _EXCESS, count)))


# --- What is seen.


def _look(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor] | None,
    seen: dict[str, "_Seen"],
    groups: "_Groups",
) -> int:
    """Runs the batches under hooks; how many there were."""
    count = 0
    handles = [watch(model.get_submodule(name), _reading(name, seen, groups)) for name in seen]
    try:
        for batch in batches:
            scene = scene_of(model, None, (batch,), {})
            with left_as_found(scene), torch.enable_grad():
                for parameter in scene.parameters:
                    parameter.grad = None  # or the gradient that is there would be added to
                (_own_loss(model, batch) if loss is None else loss(batch)).backward()
            groups.end_batch()
            count += 1
    finally:
        for handle in handles:
            handle.remove()
    return count


def _names_of_layers(model: nn.Module) -> list[str]:
    """The layers with trained weights that `Sketch` has a rule for."""
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not (isinstance(weight, Tensor) and weight.requires_grad):
            continue
        rule = find_rule(Sketch(), kind_of(module))
        try:
            if rule is not None:
                rule(Sketch(), _swap.plain(module))
                found.append(name)
        except (CannotConvertError, NotConverted):
            continue  # as a convolution that is not pointwise
    return found


class _Seen:
    """Sums over the passes of one layer."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self.kinds = kinds
        self.passes = 0
        self.tokens = 0  # of the largest pass
        self.all_tokens = 0
        self.row_bytes = 0  # of the input
        self.rows = [0] * len(_SHARES)  # of all passes, by share
        self._own: list[Tensor] = []
        self._sketched: list[Tensor] = []  # [kinds, shares] each

    def take(self, x: Tensor, grad_output: Tensor) -> None:
        of = Variances(x, grad_output)
        self.passes += 1
        self.tokens = max(self.tokens, of.tokens)
        self.all_tokens += of.tokens
        # Under autocast what torch keeps is a copy in the dtype in which it computes.
        self.row_bytes = x.shape[-1] * grad_output.element_size()
        self._own.append(of.of_sample)
        counts = [Sketch(share).row_count(of.tokens) for share in _SHARES]
        self.rows = [sum(pair) for pair in zip(self.rows, counts, strict=True)]
        self._sketched.append(torch.stack([_curve(of, kind, counts) for kind in self.kinds]))

    def fewest(self, ratios: Tensor, limit: float) -> tuple[int, int] | None:
        """Kind and share with the fewest rows of those that reach the limit, if any does.

        Where `min_rows` of a sketch makes shares alike, it is the largest of them.
        """
        reaching = (ratios <= limit).nonzero().tolist()
        found = min(((self.rows[place], kind, place) for kind, place in reaching), default=None)
        return None if found is None else found[1:]

    def ratios(self) -> Tensor:
        """[kinds, shares] on the CPU; infinite where there is nothing to compare with."""
        shape = len(self.kinds), len(_SHARES)
        if not self.passes:
            return torch.full(shape, math.inf, dtype=torch.float64)
        own = torch.stack(self._own).sum().cpu()
        sketched = torch.stack(self._sketched).sum(0).cpu()
        return torch.where(own > 0, sketched / own, math.inf)


def _curve(of: Variances, kind: Kind, rows: Sequence[int]) -> Tensor:
    """The variance at each number of rows, infinite where that would be all tokens."""
    variance = of.of(kind)
    found = {count: variance(count) for count in set(rows) if count < of.tokens}
    nothing = of.of_sample.new_full((), math.inf)
    return torch.stack([found.get(count, nothing) for count in rows])


def _reading(
    name: str, seen: dict[str, _Seen], groups: "_Groups"
) -> Callable[[Tensor], Taker | None]:
    def begin(read: Tensor) -> Taker:
        groups.note(name, read)
        return seen[name].take

    return begin


class _Groups:
    """Layers that read one tensor, in any of the batches. A view counts as what it is a view of."""

    def __init__(self, names: Iterable[str]) -> None:
        self._group = {name: [name] for name in names}
        self._reads: list[tuple[Tensor, str]] = []

    def note(self, name: str, read: Tensor) -> None:
        source = sharing.source_of(read)
        self._reads.append((source if source._base is None else source._base, name))

    def end_batch(self) -> None:
        # All of these tensors are alive, so that no two have one identity.
        first: dict[int, str] = {}
        for tensor, name in self._reads:
            self._join(first.setdefault(id(tensor), name), name)
        self._reads.clear()

    def _join(self, one: str, other: str) -> None:
        into, gone = self._group[one], self._group[other]
        if into is not gone:
            into.extend(gone)
            self._group.update(dict.fromkeys(gone, into))

    def of(self, name: str) -> list[str]:
        return self._group[name]


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    output = call(model, batch)
    found = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise InputError(
            f"the output of {type(model).__name__} is no loss and has none; give the loss that is"
            " trained: loss=lambda batch: F.cross_entropy(model(batch[0]), batch[1])"
        )
    return found


# --- What is chosen.


def _chosen(
    seen: dict[str, _Seen], groups: _Groups, limit: float, batches: int
) -> Iterator[ChosenLayer]:
    ratios = {name: layer.ratios() for name, layer in seen.items()}
    for name, layer in seen.items():
        group = groups.of(name)
        # A layer needs as many rows as the neediest of those that read the same tensor.
        worst = torch.stack([ratios[member] for member in group]).amax(0)
        found = seen[group[0]].fewest(worst, limit)
        first = next(member for member in seen if member in group)
        exact = layer.all_tokens * layer.row_bytes // batches if name == first else 0
        if found is None:
            note = _why_exact(ratios[name], limit, layer)
            best = ratios[name].min().item()
            yield ChosenLayer(name, None, layer.tokens, layer.tokens, best, exact, exact, note)
            continue
        kind, place = found
        method = Sketch(_SHARES[place], layer.kinds[kind])
        rows = method.row_count(layer.tokens)
        kept = kept_bytes(method.kind, rows, layer.row_bytes, 1) * layer.passes // batches
        note = "" if name == first else f"shares that of {first!r}"
        reached = ratios[name][kind, place].item()
        kept = kept if name == first else 0
        yield ChosenLayer(name, method, layer.tokens, rows, reached, exact, kept, note)


def _why_exact(ratios: Tensor, limit: float, layer: _Seen) -> str:
    if not layer.passes:
        return "left exact, since no gradient came in these batches"
    if layer.rows[-1] >= layer.all_tokens:
        return f"left exact, with no more than {Sketch().min_rows} tokens"
    if ratios.min() == math.inf:
        return "left exact, since the gradient has no noise in these batches"
    if not (ratios <= limit).any():
        return "left exact, since nearly all rows do not reach the ratio"
    return "left exact, as others are that read the same input"
