"""Models of transformers by their configurations: the head, and inputs with labels."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from packlight.cli.models.configurations import NO_CODE, configuration
from packlight.cli.models.failures import brief
from packlight.cli.models.inputs import Inputs, input_of
from packlight.cli.models.loaded import LoadedModel
from packlight.errors import InputError, MissingDependencyError


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


def from_transformers(
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
    settings, chosen = configuration(transformers, text, config)
    options = {**NO_CODE, **chosen}
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
    return LoadedModel(text, model, (), sized_inputs(model, task, inputs.sizes), task)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "models by their configuration need transformers; install it with: pip install"
            " 'transformers>=5'"
        ) from error
    return transformers


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


def sized_inputs(model: Any, task: str | None, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Inputs and labels for a model of transformers. Values do not matter; lengths do."""
    name = model.main_input_name
    batch = sizes.get("batch", 1)
    if name == "input_ids":
        _check_sizes(model, sizes, ("batch", "sequence"))
        shape: tuple[int, ...] = (batch, _sequence(model, sizes.get("sequence")))
        tensors = {name: input_of(shape, torch.int64)}
    elif name == "pixel_values":
        _check_sizes(model, sizes, ("batch", "image"))
        shape = (batch, _entry(model.config, "num_channels") or 3, *_image(model, sizes))
        tensors = {name: input_of(shape, model.dtype)}
    else:
        raise InputError(
            f"{type(model).__name__} takes {name}, which cannot be made from sizes; write a"
            " function that returns a pair of model and inputs, and give it as MODULE:NAME"
        )
    if task == "seq2seq-lm":
        # Else made from the labels, for which a plain configuration lacks the first token.
        tensors["decoder_input_ids"] = input_of(shape, torch.int64)
    if task is not None:
        label = TASKS[task]
        label_shape = shape if label.per_token else shape[:1]
        for key in label.labels:
            tensors[key] = input_of(label_shape, torch.int64)
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
    name, longest = positions(model)
    if asked is None:
        return min(_SEQUENCE, longest or _SEQUENCE)
    if longest is not None and asked > longest:
        raise InputError(
            f"sequence={asked} is longer than the {longest} positions of {name}; raise"
            " max_position_embeddings by --config"
        )
    return asked


def positions(model: nn.Module) -> tuple[str, int | None]:
    """The shortest table of positions of a model, by name, and how many it has for tokens."""
    tables = [
        (name, module.num_embeddings - _reserved(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        # Rotary and relative positions have no such table, and no end; pictures have their own.
        and re.search(r"position|\bwpe$", name.rpartition(".")[2])
        and not re.search(r"vision|visual|image|audio", name)
    ]
    return min(tables, key=lambda table: table[1], default=("", None))


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
