"""Configurations of transformers: with changes, and none that fetches or runs a stranger's code."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packlight._files import read_text
from packlight.cli.models.failures import brief
from packlight.errors import InputError
from packlight.method_files import is_beyond_64_bits, shortened

# Left out, transformers asks at the terminal whether to run code that came with a configuration.
NO_CODE = {"trust_remote_code": False}

# Entries that are options of the model's making and not of its configuration.
_OPTIONS = ("attn_implementation", "experts_implementation")


def configuration(
    transformers: Any, text: str, changes: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The configuration with its changes, and options for `from_config`."""
    options = {name: value for name, value in changes.items() if name in _OPTIONS}
    changes = {name: value for name, value in changes.items() if name not in _OPTIONS}
    try:
        plain = _plain_configuration(transformers, text, {})
        for name in changes:
            if not hasattr(plain, name):
                names = [key for key in plain.to_dict() if not key.startswith("_")]
                near = difflib.get_close_matches(name, names, n=3)
                hint = f" (near: {', '.join(near)})" if near else f"; it has {', '.join(names)}"
                raise InputError(f"the configuration of {text} has no {name!r}{hint}")
        settings = _plain_configuration(transformers, text, changes)
        _check_numbers(text, settings.to_dict())
        return settings, options
    except InputError:
        raise
    except Exception as error:  # configurations check themselves, each in its own way
        raise InputError(f"the configuration of {text} is refused: {brief(error)}") from error


def _plain_configuration(transformers: Any, text: str, changes: Mapping[str, Any]) -> Any:
    name = text.removeprefix("hf:")
    if Path(text).is_dir():
        if not (Path(text) / "config.json").is_file():
            raise InputError(f"directory {text} has no config.json")
        entries = _json(Path(text) / "config.json")
        return _stranger(transformers, text, entries, changes)
    if "/" in name:
        entries, _ = transformers.PreTrainedConfig.get_config_dict(name)
        return _stranger(transformers, name, entries, changes)
    types = list(transformers.CONFIG_MAPPING)
    if name not in types:
        near = difflib.get_close_matches(name, types, n=5)
        some = f"there are {len(types)}, such as {', '.join(types[:5])}"
        hint = f"near: {', '.join(near)}" if near else some
        raise InputError(f"transformers {transformers.__version__} has no model {name!r}; {hint}")
    return transformers.AutoConfig.for_model(name, **changes)


def _json(path: Path) -> Any:
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is refused: {brief(error)}") from error


def _stranger(transformers: Any, name: str, entries: Any, changes: Mapping[str, Any]) -> Any:
    """A configuration that someone else may have written: it fetches nothing and runs no code."""
    if not isinstance(entries, dict):
        raise InputError(f"the configuration of {name} is no JSON object")
    _check_numbers(name, entries)
    for key, value, beside in _nested(entries):
        if what := _fetched(key, value, beside):
            raise InputError(
                f"the configuration of {name} names {what} to fetch, {key}={shortened(str(value))};"
                " remove the entry, or make the model by a function: MODULE:NAME"
            )
    settings = transformers.AutoConfig.from_pretrained(name, **NO_CODE, **changes)
    # Models make parts of themselves by configurations inside, for which nobody refuses code.
    pending = [settings]
    while pending:
        attributes = vars(pending.pop())
        attributes.pop("auto_map", None)
        pending += [v for v in attributes.values() if isinstance(v, transformers.PreTrainedConfig)]
    return settings


def _nested(entries: Any) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """All entries of a configuration and those in it: name, value, and the mapping around it.

    What stands in a mapping of kernels by part is named as the mapping.
    """
    pending: list[tuple[str, Any]] = [("", entries)]
    while pending:
        outer, value = pending.pop()
        if isinstance(value, Mapping):
            for key, inner in value.items():
                name = outer if _is_kernel(outer) else key
                yield name, inner, value
                pending.append((name, inner))
        elif isinstance(value, list):
            pending += [(outer, inner) for inner in value]


def _is_kernel(key: str) -> bool:
    return key.strip("_").removesuffix("_internal") in _OPTIONS


# Of attention and of experts. Others are fetched from a hub, at once or where they are missing.
_PLAIN_KERNELS = ("eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm", None)


def _fetched(key: str, value: Any, beside: Mapping[str, Any]) -> str:
    """What an entry would fetch; empty for none."""
    if _is_kernel(key) and not isinstance(value, Mapping) and value not in _PLAIN_KERNELS:
        return "a kernel"
    if key in ("use_kernels", "kernel_config") and value:
        return "kernels"
    if key in ("use_timm_backbone", "use_pretrained_backbone", "pretrained", "backbone_checkpoint"):
        return "a backbone" if value else ""
    # timm knows architectures by plain names, and fetches what is named by a scheme or an owner.
    if key in ("backbone", "architecture") and isinstance(value, str) and value:
        is_plain = re.fullmatch(r"[\w.-]+", value) is not None
        by_timm = key == "architecture" or beside.get("model_type") == "timm_backbone"
        return "" if is_plain and by_timm else "a backbone"
    return ""


# Models of more layers or experts are not made, since each takes memory, on "meta" too.
_MOST_LAYERS = 10_000


def _check_numbers(text: str, entries: Any) -> None:
    for key, value, _ in _nested(entries):
        if not isinstance(value, int):
            continue
        is_count = re.search(r"(layers?|blocks|experts|depth)$", key) is not None
        if is_beyond_64_bits(value) or (is_count and value > _MOST_LAYERS):
            shown = "a number beyond 64 bits" if is_beyond_64_bits(value) else f"{value}, too large"
            raise InputError(f"the configuration of {text} has {key}: {shown}")
