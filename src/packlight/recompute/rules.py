"""Which modules are checkpointed, and which run in tiles."""

import copy
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from packlight import _torch
from packlight._classes import joined
from packlight.method import Method, NotConverted, Rule, Swap, rule_finder
from packlight.recompute.functional import checkpoint
from packlight.recompute.method import OfBlocks, Tiles
from packlight.recompute.modules import ATTRIBUTE, Checkpointed, Tiled
from packlight.selectors import Layer, kind_of


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    if issubclass(method, OfBlocks):
        return _checkpointed
    return _tiled if issubclass(method, Tiles) else None


# ---- blocks --------------------------------------------------------------------------------------

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_LISTS = (nn.ModuleList, nn.Sequential)
_BLOCKS_OF_TORCH = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


def blocks_of(layers: Iterable[Layer]) -> set[nn.Module]:
    """The blocks of a model: modules of one class in a list, more than one, the outermost.

    A plain `Sequential` is one in a `ModuleList` of such that have children of the same classes.
    """
    found: dict[nn.Module, None] = {}
    for layer in layers:
        children = list(layer.module.children()) if isinstance(layer.module, _LISTS) else []
        kinds = {kind_of(child) for child in children}
        if len(children) < 2 or len(kinds) > 1:
            continue
        if _may_be_a_block(kinds.pop(), children[0]) or (
            isinstance(layer.module, nn.ModuleList) and _are_alike(children)
        ):
            found.update(dict.fromkeys(children))
    inner = {part for block in found for part in block.modules() if part is not block}
    return set(found) - inner


def _may_be_a_block(kind: type[nn.Module], module: nn.Module) -> bool:
    of_torch = kind.__module__.startswith("torch.nn.") and kind not in _BLOCKS_OF_TORCH
    return not of_torch and any(True for _ in module.children())


def _are_alike(children: Sequence[nn.Module]) -> bool:
    """Whether they are Sequentials of the same layers, and not of blocks: those are stages."""
    if any(kind_of(child) is not nn.Sequential for child in children):
        return False
    first, *others = (tuple(map(kind_of, child.children())) for child in children)
    return (
        len(first) > 1
        and all(other == first for other in others)
        and not any(
            first.count(kind_of(part)) > 1 and _may_be_a_block(kind_of(part), part)
            for part in children[0].children()
        )
    )


def _checkpointed(method: OfBlocks, module: nn.Module) -> Swap:
    if isinstance(module, _CONTAINERS):
        raise NotConverted("a list of modules, which has no forward; pick the modules in it")
    if any(isinstance(part, _BATCH_NORMS) for part in module.modules()):
        raise NotConverted(
            "it has batch norms, whose running statistics would count each batch twice"
        )
    if _checkpoints_itself(module):
        # With the arguments that it knows not to repeat: caches of keys and values.
        return Swap(
            type(module),
            {
                "gradient_checkpointing": True,
                "_gradient_checkpointing_func": _Function(method),
                ATTRIBUTE: method,
            },
        )
    return Swap(joined(Checkpointed, type(module)), {ATTRIBUTE: method})


class _Function:
    """`checkpoint` as a layer of transformers calls it; copied and pickled with the layer."""

    def __init__(self, method: OfBlocks) -> None:
        self.method = method

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        method = self.method
        return checkpoint(function, *args, keep=method.kept_by, offload=method.offloads, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Function) and other.method == self.method

    def __hash__(self) -> int:
        return hash(self.method)


def _checkpoints_itself(module: nn.Module) -> bool:
    """Whether it is a layer of transformers that is told by an attribute to checkpoint itself."""
    layers: Any = sys.modules.get("transformers.modeling_layers")
    return isinstance(module, getattr(layers, "GradientCheckpointingLayer", ()))


# ---- tiles ---------------------------------------------------------------------------------------

# By names, as packages have their own: experts are given tokens by what all tokens ask for.
_ROUTING = re.compile("Mo[eE]$|Mo[eE](Block|Layer|Gate)|SparseMoe|Experts|Router|TopK")
_BY_SAMPLE = ("DropPath", "StochasticDepth", "Dropout1d", "Dropout2d", "Dropout3d")
_NORMS = ("LayerNorm", "RMSNorm")
_ADAPTERS = "peft."


def _tiled(method: Tiles, module: nn.Module) -> Swap:
    if reason := why_not_by_position(module):
        raise NotConverted(reason)
    return Swap(joined(Tiled, type(module)), {ATTRIBUTE: method})


def why_not_by_position(module: nn.Module) -> str | None:
    """Why a module is no MLP that works on each position by itself; None if it is one."""
    if _adapts(module):
        return "it is an adapter; the MLP around it may run in tiles"
    for part in module.modules():
        name = kind_of(part).__name__
        if _ROUTING.search(name):
            return f"it has a {name}, which routes tokens to experts; tiles would route by tile"
        if isinstance(part, _BATCH_NORMS):
            return f"it has a {name}, which normalises over the batch"
        if name in _BY_SAMPLE:
            return f"it has a {name}, which draws by sample or channel, and not by position"
        own = any(True for _ in part.parameters(recurse=False))
        if own and not (_is_linear(part) or _adapts(part) or name.endswith(_NORMS)):
            return f"it has a {name}, which is not known to work on each position by itself"
    linears = [part for part in module.modules() if _is_linear(part)]
    if len(linears) < 2:
        return "it is no MLP of two Linear layers or more"
    return _tried(module, linears[0])


def _adapts(module: nn.Module) -> bool:
    kind = kind_of(module)
    # Their parameters may be in dictionaries of torch's.
    return kind.__module__.startswith(_ADAPTERS) or kind in (nn.ParameterDict, nn.ParameterList)


def _is_linear(module: nn.Module) -> bool:
    # A layer of PEFT's is one around another; transformers' `Conv1D` is a Linear by another name.
    if isinstance(module, nn.Linear):
        return True
    kind = kind_of(module)
    return f"{kind.__module__}.{kind.__name__}" == "transformers.pytorch_utils.Conv1D"


# What a class of modules does, by what its modules print: the same code with the same parts.
_answers: "weakref.WeakKeyDictionary[type[nn.Module], dict[str, str | None]]"
_answers = weakref.WeakKeyDictionary()


def _tried(module: nn.Module, first: nn.Module) -> str | None:
    """Why a module does not work on each position by itself, tried on two times three of them."""
    needed = [
        parameter
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(needed) != 1:
        return f"its forward takes {len(needed)} arguments; tiles are of one tensor"
    answers = _answers.setdefault(kind_of(module), {})
    hollow = any(_torch.is_fake(p) or p.is_meta for p in module.parameters())
    text = f"{'no values' if hollow else ''}{module!r}"
    if text not in answers:
        answers[text] = _outcome(module, first, _by_operators if hollow else _by_values)
    return answers[text]


def _outcome(
    module: nn.Module, first: nn.Module, look: Callable[[nn.Module, Tensor], str | None]
) -> str | None:
    """Why a copy of a module, which shares its tensors, does not work by position."""
    width = getattr(first, "in_features", None) or getattr(first, "nx", None)
    if not isinstance(width, int):
        return f"the width of its input is not known from its {kind_of(first).__name__}"
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    floating = [p for p in module.parameters() if p.is_floating_point()]
    dtype = floating[0].dtype if floating else torch.float32
    one = next(module.parameters()).detach()
    try:
        x = one.new_ones((2, 3, width), dtype=dtype)
        with torch.no_grad():
            return look(copy.deepcopy(module, tensors).eval(), x)
    except Exception as error:  # noqa: BLE001  it is code of the user's, called in its own way
        return f"it does not run on a tensor {(2, 3, width)}: {type(error).__name__}: {error}"


_NO_POSITIONS = "its output is not one tensor with the positions of its input"


def _has_positions(y: object, x: Tensor) -> bool:
    return isinstance(y, Tensor) and y.shape[:-1] == x.shape[:-1]


def _by_values(probe: nn.Module, x: Tensor) -> str | None:
    values = torch.linspace(-1, 1, x.numel(), device=x.device).sin().mul(2)
    x = values.to(x.dtype).view(x.shape)
    y = probe(x)
    if not _has_positions(y, x):
        return _NO_POSITIONS
    for place in ((0, 0), (1, 1)):
        others = 1 - 3 * x
        others[place] = x[place]
        # Bit for bit: a row of a product is what it is, whatever the other rows hold.
        if not torch.equal(probe(others)[place], y[place]):
            return "its output at one position depends on others"
    return None


# Operators of MLPs beside those that work element by element. A mean is one of the last dimension;
# a fake tensor asks the dispatcher for its device.
_BY_ROWS = {
    "_to_copy", "_unsafe_view", "addmm", "alias", "chunk", "clone", "detach", "device", "linear",
    "mean", "mm", "native_layer_norm", "new_empty", "reshape", "split", "split_with_sizes", "t",
    "view",
}  # fmt: skip


def _is_by_rows(operator: Any, args: tuple[Any, ...]) -> bool:
    name = operator.overloadpacket.__name__
    rows = name in _BY_ROWS and (name != "mean" or list(args[1:2]) == [[-1]])
    return rows or torch.Tag.pointwise in operator.tags


def _by_operators(probe: nn.Module, x: Tensor) -> str | None:
    """Of a model without values, which cannot be tried: by what its code calls."""
    found = _torch.with_operators(probe, x)
    if found is None:
        return "it has no values to try it with"
    y, called = found
    for operator, args in called:
        if not _is_by_rows(operator, args):
            name = operator.overloadpacket.__name__
            return f"it has no values to try it with, and calls {name}"
    return None if _has_positions(y, x) else _NO_POSITIONS
