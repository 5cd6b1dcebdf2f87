"""Rotary position embedding of transformers by one kernel each way.

Files of models have a function of their own for it, `apply_rotary_pos_emb`, most with Llama's code.
Where a model's attention is converted, that function is given another in its place, in the file of
the model. The other does as before except where calls are covered (`functional=True`), in training
and on a GPU. Its results are the same numbers.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from packlight import _torch
from packlight._checks import is_taken
from packlight.calls import covers_now, uncovered
from packlight.integrations._copies import is_copy, once_a_class
from packlight.rotary.functional import fits, rotate

NAME = "apply_rotary_pos_emb"
_DEVICES = ("cuda",)  # elsewhere there is no kernel to gain by


# --- The code that is known, as transformers has it. Never run: `is_copy` compares with it.


def _rotate_half(x: Any) -> Any:
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def _llama(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)  # type: ignore[name-defined]  # noqa: F821
    k_embed = (k * cos) + (rotate_half(k) * sin)  # type: ignore[name-defined]  # noqa: F821
    return q_embed, k_embed


# --- What takes its place.


def use_one_kernel(kind: type[nn.Module]) -> None:
    """Has the file of an attention module's class rotate by one kernel, if its code is known."""
    code = _torch.code_of(kind.forward)
    if code is None or NAME not in code.co_names:
        return
    names: dict[str, Any] = kind.forward.__globals__
    theirs, half = names.get(NAME), names.get("rotate_half")
    if half is None or getattr(theirs, "__wrapped__", None) is not None:
        return
    known = types.FunctionType(_code_of(_llama), {"rotate_half": half})
    if is_copy(half, _rotate_half) and is_copy(theirs, known):
        names[NAME] = _by_one_kernel(theirs)


def function_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """What an attention module with code of its own rotates query and key by."""
    rotates: Callable[..., tuple[Tensor, Tensor]] = _names(type(module))[NAME]
    return rotates  # looked up each time, since it may have been replaced since


@once_a_class
def _names(kind: type[nn.Module]) -> dict[str, Any]:
    """The names of the file that the code of an attention module, converted or not, is in."""
    plain = (base for base in kind.__mro__ if not base.__module__.startswith("packlight."))
    forward: Any = next(vars(base)["forward"] for base in plain if "forward" in vars(base))
    return inspect.unwrap(forward).__globals__  # type: ignore[no-any-return]


def _code_of(function: Any) -> types.CodeType:
    code = _torch.code_of(function)
    assert isinstance(code, types.CodeType)
    return code


def _by_one_kernel(theirs: Any) -> Any:
    @functools.wraps(theirs)
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        # Of what is compiled the compiler makes one kernel.
        if not torch.compiler.is_dynamo_compiling() and unsqueeze_dim == 1 and covers_now():
            rotated: tuple[Tensor, Tensor] | None = uncovered(_rotated, q, k, cos, sin)
            if rotated is not None:
                return rotated
        found: tuple[Tensor, Tensor] = theirs(q, k, cos, sin, unsqueeze_dim)
        return found

    return apply_rotary_pos_emb


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    if q.device.type in _DEVICES and fits(q, k, cos, sin) and is_taken(q):
        return rotate(q, k, cos, sin)
    return None
