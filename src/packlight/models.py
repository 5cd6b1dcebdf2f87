"""Models by a text, as the command line takes them: made on the meta device, with their inputs.

A text is `hf:TYPE` (a model of transformers with the default configuration of its type), a
directory with a `config.json`, `hf:OWNER/NAME` (the configuration on the Hugging Face hub), or
`MODULE:NAME` (Python: a module, or a function that returns one, alone or with its inputs). Weights
are never read.
"""

import ast
import difflib
import importlib
import inspect
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from packlight._files import read_text
from packlight.errors import InputError, MissingDependencyError
from packlight.method_files import is_beyond_64_bits, shortened

__all__ = ["DTYPES", "TASKS", "Inputs", "LoadedModel", "load_model", "parse_inputs", "parse_value"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model on the meta device, what it is called with, and the task that a head was made for."""

    text: str
    model: nn.Module
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    task: str | None = None

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of the parameters, without "torch."."""
        found = dict.fromkeys(parameter.dtype for parameter in self.model.parameters())
        return tuple(_short(dtype) for dtype in found)

    @property
    def has_dropout(self) -> bool:
        """Whether a layer of torch's drops something out, as far as layers tell."""
        layers = (module for module in self.model.modules() if isinstance(module, nn.Dropout))
        return self.model.training and any(layer.p > 0 for layer in layers)

    def inputs(self) -> dict[str, str]:
        """Shape and dtype of each tensor among the inputs, "1x512 int64", by name or position."""
        named = {str(place): value for place, value in enumerate(self.arguments)} | self.keywords
        return {
            name: f"{_shape_text(value.shape)} {_short(value.dtype)}"
            for name, value in named.items()
            if isinstance(value, Tensor)
        }


def load_model(
    text: str,
    inputs: "Inputs | None" = None,
    *,
    task: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """The model that a text stands for, on the meta device, with the inputs to call it with.

    `task` picks the head of a model of transformers (None: the one it is usually trained with);
    labels are among its inputs, so the loss is part of the forward pass. `config` changes its
    configuration, or is passed to a function by name. `dtype` is that of the parameters.

    Raises `InputError` for what is not there or cannot be made, `MissingDependencyError` where
    transformers is needed and not installed.
    """
    inputs = inputs or Inputs()
    if text.startswith("hf:") or (text and Path(text).is_dir()):
        return _from_transformers(text, inputs, task, config or {}, dtype)
    module, colon, name = text.partition(":")
    if not (colon and re.fullmatch(r"[\w.]+", module) and re.fullmatch(r"[\w.]+", name)):
        raise InputError(
            f"unknown model {shortened(text)}; expected hf:TYPE (such as hf:roberta), a"
            " directory with a config.json, or MODULE:NAME in Python"
        )
    if task is not None:
        raise InputError(f"a task is for models of transformers, and {text} makes its own model")
    return _from_python(text, module, name, inputs, config or {}, dtype)


# ---- what is asked for ---------------------------------------------------------------------------

# What a size counts. Defaults: batch 1, sequence 512 or the longest, image as in the configuration.
SIZES = ("batch", "sequence", "image")

_SHAPE = re.compile(r"(\d+(?:x\d+)*)(?::(\w+))?")


class Shape(NamedTuple):
    """A tensor to be made as an input; None as dtype is that of the model's parameters."""

    sizes: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Inputs:
    """Sizes by name, from which inputs are made, or the shapes of the positional inputs."""

    sizes: dict[str, int] = field(default_factory=dict)
    shapes: tuple[Shape, ...] = ()


def parse_inputs(texts: Iterable[str]) -> Inputs:
    """`batch=8,sequence=1024`, or shapes: `8x3x224x224`, `8x128:int64`."""
    sizes: dict[str, int] = {}
    shapes: list[Shape] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, equals, value = part.partition("=")
        if equals:
            _check_size(name, value, sizes)
            sizes[name] = int(value)
        else:
            shapes.append(_shape(part))
    if sizes and shapes:
        raise InputError("an input is either sizes, batch=8,sequence=1024, or shapes, 8x3x224x224")
    return Inputs(sizes, tuple(shapes))


def _check_size(name: str, value: str, sizes: Mapping[str, int]) -> None:
    if name not in SIZES:
        raise InputError(
            f"unknown size {shortened(name)}; expected {', '.join(SIZES)}, or a shape, 8x128"
        )
    if name in sizes:
        raise InputError(f"{name} is given twice")
    if not re.fullmatch(r"0*[1-9]\d*", value):
        raise InputError(f"{name}={value[:_DIGITS]} is not a positive whole number")
    _size(value)


def _shape(text: str) -> Shape:
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise InputError(
            f"input {shortened(text)} is neither a size, batch=8, nor a shape, 8x3x224x224"
            " or 8x128:int64"
        )
    sizes = tuple(map(_size, found[1].split("x")))
    if found[2] is None:
        return Shape(sizes, None)
    dtype = DTYPES.get(found[2], getattr(torch, found[2], None))
    if not isinstance(dtype, torch.dtype):
        raise InputError(
            f"input {shortened(text)}: {found[2]} is no dtype; such as int64, float32, bf16"
        )
    return Shape(sizes, dtype)


# Digits of a size: no tensor has more elements in one dimension than fit into nine.
_DIGITS = 9


def _size(digits: str) -> int:
    if len(digits.lstrip("0")) > _DIGITS:
        raise InputError(f"a size of {len(digits)} digits is too large; at most {_DIGITS} fit")
    return int(digits)


def _input(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if math.prod(shape) > 2**56:
        raise InputError(f"an input of {_shape_text(shape)} has more elements than any memory")
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def parse_value(text: str) -> Any:
    """The value of a configuration's entry: a Python literal, or else the text itself."""
    try:
        value = ast.literal_eval(text)
        if is_beyond_64_bits(value):
            raise InputError(f"{shortened(text)} is a number beyond 64 bits")
        return value
    except InputError:
        raise
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        if len(text) > 1000:
            raise InputError(f"{shortened(text)} has {len(text)} characters") from None
        return {"true": True, "false": False, "null": None}.get(text, text)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


# ---- Python --------------------------------------------------------------------------------------


def _from_python(
    text: str,
    module: str,
    name: str,
    inputs: Inputs,
    config: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> LoadedModel:
    with _current_directory_importable():
        made = _called(text, _attribute(module, name), config)
    model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{text} returned a {type(made).__name__}; expected an nn.Module, or a pair of a module"
            " and its inputs"
        )
    if dtype is not None:
        model = model.to(dtype)
    if given is None:
        arguments, keywords = _made_inputs(text, model, inputs)
    elif inputs.sizes or inputs.shapes:
        raise InputError(f"{text} brings its own inputs, so --input has no use")
    else:
        arguments, keywords = _given_inputs(given, dtype)
    return LoadedModel(text, model, arguments, keywords)


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    """As `python -m` has it; a script such as `packlight` only sees what is installed."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)


def _attribute(module: str, name: str) -> Any:
    try:
        value: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise InputError(f"importing {module} failed: {brief(error)}") from error
        raise InputError(
            f"no module {error.name!r}, neither in this directory nor installed"
        ) from error
    except Exception as error:  # someone's module: anything can happen
        raise InputError(f"importing {module} failed: {brief(error)}") from error
    for part in name.split("."):
        if not hasattr(value, part):
            near = difflib.get_close_matches(part, dir(value), n=3)
            hint = f" (near: {', '.join(near)})" if near else ""
            raise InputError(f"{module} has no {part!r}{hint}")
        value = getattr(value, part)
    return value


def _called(text: str, value: Any, config: Mapping[str, Any]) -> Any:
    if isinstance(value, nn.Module):
        if config:
            raise InputError(f"{text} is a module already, so there is nothing to configure")
        return value
    if not callable(value):
        raise InputError(f"{text} is a {type(value).__name__}; expected a function or a module")
    try:
        inspect.signature(value).bind(**config)
    except (TypeError, ValueError) as error:
        # ValueError: a type of Python's own that tells nothing of its arguments.
        raise InputError(f"{text} cannot be called so: {error}") from error
    try:
        with torch.device("meta"):
            return value(**config)
    except Exception as error:  # someone's function: anything can happen
        raise InputError(
            f"{text} cannot be made on the meta device: {brief(error)}; what needs values can stand"
            ' inside `with torch.device("cpu"):`'
        ) from error


def _given_inputs(given: Any, dtype: torch.dtype | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as a function returned them: keywords, positional ones, or one alone."""

    def cast(value: Any) -> Any:
        is_cast = dtype is not None and isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_cast else value

    if isinstance(given, Mapping):
        return (), {name: cast(value) for name, value in given.items()}
    values = given if isinstance(given, tuple | list) else (given,)
    return tuple(cast(value) for value in values), {}


def _made_inputs(
    text: str, model: nn.Module, inputs: Inputs
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs.shapes:
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        shapes = [(shape.sizes, shape.dtype or own) for shape in inputs.shapes]
        return tuple(_input(sizes, dtype) for sizes, dtype in shapes), {}
    if _is_pretrained(model):
        return (), _sized_inputs(model, None, inputs.sizes)
    raise InputError(
        f"{text} has no inputs; give their shapes, --input 8x3x224x224 or --input 8x128:int64, or"
        " return a pair of the module and its inputs"
    )


def _is_pretrained(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


# ---- transformers --------------------------------------------------------------------------------


class _Task(NamedTuple):
    """A head of transformers: its auto class, and the labels, per sequence or per token."""

    auto: str
    labels: tuple[str, ...]
    per_token: bool = False


# In the order in which they are tried where none is asked for.
TASKS = {
    "seq2seq-lm": _Task("AutoModelForSeq2SeqLM", ("labels",), per_token=True),
    "masked-lm": _Task("AutoModelForMaskedLM", ("labels",), per_token=True),
    "causal-lm": _Task("AutoModelForCausalLM", ("labels",), per_token=True),
    "image-classification": _Task("AutoModelForImageClassification", ("labels",)),
    "base": _Task("AutoModel", ()),
    "sequence-classification": _Task("AutoModelForSequenceClassification", ("labels",)),
    "token-classification": _Task("AutoModelForTokenClassification", ("labels",), per_token=True),
    "question-answering": _Task(
        "AutoModelForQuestionAnswering", ("start_positions", "end_positions")
    ),
}


def _from_transformers(
    text: str,
    inputs: Inputs,
    task: str | None,
    config: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> LoadedModel:
    if inputs.shapes:
        raise InputError(
            f"{text} takes sizes, --input batch=8,sequence=1024, from which its inputs are made"
        )
    transformers = _transformers()
    settings, chosen = _configuration(transformers, text, config)
    options = {**_NO_CODE, **chosen}
    task = _task(transformers, text, settings, task)
    if dtype is not None:
        options["dtype"] = dtype
    auto = getattr(transformers, TASKS[task].auto)
    try:
        with torch.device("meta"):
            model = auto.from_config(settings, **options)
    except Exception as error:  # the constructors of hundreds of models
        raise InputError(f"{text} cannot be made: {brief(error)}") from error
    # from_config leaves the mode to the class.
    model.train()
    return LoadedModel(text, model, (), _sized_inputs(model, task, inputs.sizes), task)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "models by their configuration need transformers; install it with: pip install"
            " 'transformers>=5'"
        ) from error
    return transformers


# Left out, transformers asks at the terminal whether to run code that came with a configuration.
_NO_CODE = {"trust_remote_code": False}

# Entries that are options of the model's making and not of its configuration.
_OPTIONS = ("attn_implementation", "experts_implementation")


def _configuration(
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
        hint = f"near: {', '.join(near)}" if near else f"there are {', '.join(types)}"
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
    settings = transformers.AutoConfig.from_pretrained(name, **_NO_CODE, **changes)
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


def _task(transformers: Any, text: str, settings: Any, task: str | None) -> str:
    """The task asked for, or else what the configuration was trained for, or is usually."""
    mappings = {name: getattr(transformers, row.auto)._model_mapping for name, row in TASKS.items()}
    possible = [name for name, mapping in mappings.items() if type(settings) in mapping]
    if task in possible:
        return task
    if task is not None or not possible:
        wanted = f"no head for {task}" if task else "no head that is known here"
        raise InputError(
            f"{text} ({type(settings).__name__}) has {wanted}; it has"
            f" {', '.join(possible) or 'none of ' + ', '.join(TASKS)}"
        )
    for architecture in settings.architectures or ():
        for name in possible:
            kinds = mappings[name][type(settings)]
            kinds = kinds if isinstance(kinds, tuple) else (kinds,)
            if architecture in (kind.__name__ for kind in kinds):
                return name
    return possible[0]


def _sized_inputs(model: Any, task: str | None, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Inputs and labels for a model of transformers. Values do not matter; lengths do."""
    name = model.main_input_name
    batch = sizes.get("batch", 1)
    if name == "input_ids":
        _check_sizes(model, sizes, ("batch", "sequence"))
        shape: tuple[int, ...] = (batch, _sequence(model, sizes.get("sequence")))
        tensors = {name: _input(shape, torch.int64)}
    elif name == "pixel_values":
        _check_sizes(model, sizes, ("batch", "image"))
        shape = (batch, _entry(model.config, "num_channels") or 3, *_image(model, sizes))
        tensors = {name: _input(shape, model.dtype)}
    else:
        raise InputError(
            f"{type(model).__name__} takes {name}, which cannot be made from sizes; write a"
            " function that returns a pair of model and inputs, and give it as MODULE:NAME"
        )
    if task == "seq2seq-lm":
        # Else made from the labels, for which a plain configuration lacks the first token.
        tensors["decoder_input_ids"] = _input(shape, torch.int64)
    if task is not None:
        label = TASKS[task]
        label_shape = shape if label.per_token else shape[:1]
        for key in label.labels:
            tensors[key] = _input(label_shape, torch.int64)
    return tensors


def _check_sizes(model: nn.Module, sizes: Mapping[str, int], known: tuple[str, ...]) -> None:
    if unknown := [name for name in sizes if name not in known]:
        raise InputError(
            f"{type(model).__name__} has no {' or '.join(unknown)} among its sizes; it has"
            f" {' and '.join(known)}"
        )


_SEQUENCE = 512


def _sequence(model: nn.Module, asked: int | None) -> int:
    """The length asked for, if the model's table of positions has so many."""
    tables = [
        (name, module.num_embeddings - _reserved(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        # Rotary and relative positions have no such table, and no end; pictures have their own.
        and re.search(r"position|\bwpe$", name.rpartition(".")[2])
        and not re.search(r"vision|visual|image|audio", name)
    ]
    name, longest = min(tables, key=lambda table: table[1], default=("", None))
    if asked is None:
        return min(_SEQUENCE, longest or _SEQUENCE)
    if longest is not None and asked > longest:
        raise InputError(
            f"sequence={asked} is longer than the {longest} positions of {name}; raise"
            " max_position_embeddings by --config"
        )
    return asked


def _reserved(table: nn.Embedding) -> int:
    """Positions that stand for no token: RoBERTa counts from behind its padding, BART from 2."""
    if (offset := getattr(table, "offset", None)) is not None:
        return int(offset)
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _image(model: Any, sizes: Mapping[str, int]) -> tuple[int, int]:
    usual = _entry(model.config, "image_size") or 224
    size = sizes.get("image", usual)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _entry(config: Any, name: str) -> Any:
    """None where there is none, and where it differs by layer, which Gemma 4's raises for."""
    return vars(config).get(name)


# ---- failures ------------------------------------------------------------------------------------


def brief(error: BaseException) -> str:
    """An error in one line: its type, its first words, and the last line outside of torch."""
    words = " ".join(str(error).split())
    shown = words if len(words) <= _WORDS else words[: _WORDS - 3] + "..."
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith(_OWN)]
    where = f" ({os.path.basename(outside[-1].filename)}:{outside[-1].lineno})" if outside else ""
    return f"{type(error).__name__}: {shown}{where}"


_WORDS = 300
_OWN = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(__file__) + os.sep,
    os.path.dirname(importlib.__file__) + os.sep,
    "<frozen importlib",
)
