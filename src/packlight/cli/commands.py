"""What `packlight profile` and `packlight convert` do, once their arguments are parsed."""

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from packlight.cli.models import DTYPES, LoadedModel, brief, load_model, parse_inputs, parse_value
from packlight.conversion import Conversion
from packlight.conversion import brief as brief_method
from packlight.convert import convert
from packlight.errors import InputError, PacklightError
from packlight.method_files import (
    FiledMethods,
    load_methods,
    parse_methods,
    parse_rest,
    save_methods,
    shortened,
)
from packlight.planner import devices
from packlight.planner.devices import Device
from packlight.planner.fit import usable
from packlight.planner.optimizers import optimizer_of
from packlight.planner.page import steps
from packlight.planner.timeline import Timeline
from packlight.planner.walk import Walker
from packlight.predict import failing_module, predict
from packlight.report import MemoryReport, check_depth
from packlight.saving.rest import Given
from packlight.selectors import EVERYTHING, Choice, Selector

# As `convert` takes them, in the order in which they count.
Chosen = dict[Selector, Choice]


@dataclass
class Answer:
    """What is known of a model: with methods, also what becomes of it."""

    loaded: LoadedModel
    device: torch.device
    before: MemoryReport | None = None
    after: MemoryReport | None = None
    conversion: Conversion | None = None
    steps: dict[str, Timeline] = field(default_factory=dict)
    why_no_steps: str | None = None

    def heading(self) -> str:
        loaded = self.loaded
        task = f" for {loaded.task}" if loaded.task else ""
        dtypes = " and ".join(loaded.dtypes) or "no dtype"
        lines = [
            f"{loaded.text}: {type(loaded.model).__name__}{task}, "
            f"{_count(loaded.parameters)} parameters in {dtypes}",
            f"predicted for one batch ({loaded.inputs_text or 'no tensors'}) as on {self.device}",
        ]
        if self.device.type == "cpu" and loaded.has_dropout:
            # A mask of a byte an element there, a scaled copy here; and attention with dropout,
            # which is one kernel there, keeps all its scores here.
            lines.append("it has dropout, for which a GPU keeps less, most of all in attention")
        return "\n".join(lines)

    def about(self) -> dict[str, str]:
        """What a page says was predicted."""
        loaded = self.loaded
        of = f"{type(loaded.model).__name__} {loaded.task or ''}".rstrip()
        facts = {
            "model": f"{loaded.text} ({of})",
            "parameters": f"{_count(loaded.parameters)} in {' and '.join(loaded.dtypes)}",
            "batch": loaded.inputs_text or "no tensors",
        }
        if self.conversion is not None:
            methods = dict.fromkeys(brief_method(row.method) for row in self.conversion.replaced)
            rest = (
                []
                if self.conversion.rest is None
                else [f"the rest by {brief_method(self.conversion.rest)}"]
            )
            heads = ["losses of heads by chunks"] if self.conversion.heads else []
            facts["methods"] = ", ".join([*methods, *rest, *heads]) or "none"
        return {**facts, "how": "predicted, without a run"}

    def to_dict(self) -> dict[str, Any]:
        loaded = self.loaded
        return {
            "model": loaded.text,
            "class": type(loaded.model).__name__,
            "task": loaded.task,
            "parameters": loaded.parameters,
            "dtypes": list(loaded.dtypes),
            "inputs": loaded.inputs(),
            "device": str(self.device),
            "before": _report_data(self.before),
            "after": _report_data(self.after),
            "conversion": None if self.conversion is None else self.conversion.to_dict(),
        }


def profile(arguments: argparse.Namespace) -> None:
    """`packlight profile`: what is kept for the backward pass, and what with methods."""
    check_depth(arguments.depth)
    chosen = chosen_methods(arguments.method, arguments.methods)
    answer = _loaded(arguments)
    answer.before = _predicted(answer, arguments)
    _walk(answer, arguments)
    if chosen or arguments.head:
        answer.conversion = _converted(answer, chosen, arguments)
        answer.after = _predicted(answer, arguments)
        _walk(answer, arguments)
    _write_html(answer, arguments)
    if arguments.json:
        _print_json(answer)
        return
    print(answer.heading())
    if answer.after is None:
        print(answer.before.to_text(arguments.depth))
    else:
        print((answer.before - answer.after).to_text(arguments.depth))
    if arguments.html is not None:
        print(f"{arguments.html} written")


def convert_model(arguments: argparse.Namespace) -> None:
    """`packlight convert`: what a conversion does to a model, and the file to do it in training."""
    chosen = chosen_methods(arguments.method, arguments.methods)
    if not chosen:
        chosen[EVERYTHING] = parse_methods("default")
    answer = _loaded(arguments)
    # A model that cannot be predicted can be converted all the same.
    unknown = None
    try:
        answer.before = _predicted(answer, arguments)
        _walk(answer, arguments)
    except PacklightError as error:
        unknown = str(error)
    answer.conversion = _converted(answer, chosen, arguments)
    if answer.before is not None:
        answer.after = _predicted(answer, arguments)
        _walk(answer, arguments)
        _write_html(answer, arguments)
    elif arguments.html is not None:
        raise InputError(str(unknown))
    if arguments.out is not None:
        save_methods(chosen, arguments.out, rest_of(arguments))
    if unknown is not None:
        sys.stderr.write(f"packlight convert: bytes are not known: {unknown}\n")
    if arguments.json:
        _print_json(answer)
    else:
        _print_conversion(answer, arguments)


def _print_conversion(answer: Answer, arguments: argparse.Namespace) -> None:
    print(answer.heading())
    print(answer.conversion)
    if answer.conversion and answer.before and answer.after:
        print(answer.conversion.left_of(answer.before - answer.after))
    if arguments.html is not None:
        print(f"{arguments.html} written")
    if arguments.out is not None:
        print(f"{arguments.out} written; in training:")
        options = "" if arguments.functional else ", functional=False"
        options += f", head={arguments.head!r}" if arguments.head else ""
        options += ", exact_ends=True" if arguments.exact_ends else ""
        options += "" if arguments.strict else ", strict=False"
        print(f'packlight.convert(model, packlight.load_methods("{arguments.out}"){options})')


def chosen_methods(texts: Iterable[str], path: Path | None) -> FiledMethods:
    """Methods of the command line and behind them those of a file, which they overrule."""
    chosen: Chosen = {}
    for text in texts:
        selector, choice = _chosen(text)
        if selector in chosen:
            raise InputError(
                f"--method {shortened(text)}: {selector!r} is given twice; a layer takes the"
                " first of several methods that can convert it:"
                " 'Linear=FixedPoint(4), GroupQuant(4)'"
            )
        chosen[selector] = choice
    filed = FiledMethods() if path is None else load_methods(path)
    found = FiledMethods({**chosen, **{key: filed[key] for key in filed if key not in chosen}})
    found.rest, found.head = filed.rest, filed.head
    return found


def rest_of(arguments: argparse.Namespace) -> Given:
    """What --rest says; "auto" leaves it to the methods."""
    try:
        return "auto" if arguments.rest is None else parse_rest(arguments.rest)
    except InputError as error:
        raise InputError(f"--rest {shortened(arguments.rest)}: {error}") from error


def _chosen(text: str) -> tuple[str, Choice]:
    """`SELECTOR=METHOD`, or a method for all layers. A method's own "=" stands in parentheses."""
    head, parenthesis, _ = text.partition("(")
    selector, equals, method = text.partition("=")
    if not equals or (parenthesis and "=" not in head):
        selector, method = EVERYTHING, text
    selector = selector.strip()
    if not selector:
        raise InputError(f"--method {shortened(text)} has no selector; write 'GELU=FewBit(3)'")
    try:
        return selector, parse_methods(method)
    except InputError as error:
        raise InputError(f"--method {shortened(text)}: {error}") from error


# ---- steps ---------------------------------------------------------------------------------------


def _loaded(arguments: argparse.Namespace) -> Answer:
    device = device_of(arguments.device)
    return Answer(loaded_model(arguments), device)


def loaded_model(arguments: argparse.Namespace) -> LoadedModel:
    """The model of a command line, without values, with its inputs."""
    named = {"batch": arguments.batch, "sequence": arguments.sequence}
    sizes = [f"{name}={value}" for name, value in named.items() if value is not None]
    return load_model(
        arguments.model,
        parse_inputs([*arguments.input, *sizes]),
        task=arguments.task,
        config=parsed_config(arguments.config),
        dtype=None if arguments.dtype is None else DTYPES[arguments.dtype],
    )


def parsed_config(texts: Iterable[str]) -> dict[str, Any]:
    """Values by their names, of texts NAME=VALUE."""
    config: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(
                f"--config {shortened(text)} is not NAME=VALUE, such as num_hidden_layers=4"
            )
        config[name] = parse_value(value)
    return config


def autocast_of(arguments: argparse.Namespace, device: torch.device) -> AbstractContextManager[Any]:
    """The context that --autocast asks for."""
    if arguments.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, DTYPES[arguments.autocast])


def _predicted(answer: Answer, arguments: argparse.Namespace) -> MemoryReport:
    loaded, device = answer.loaded, answer.device
    with quiet(), autocast_of(arguments, device):
        try:
            return predict(loaded.model, *loaded.arguments, device=device, **loaded.keywords)
        except PacklightError:
            raise
        except Exception as error:  # someone's model: anything can happen
            module = failing_module(error)
            where = f" in {module}" if module else ""
            raise InputError(
                f"the forward pass of {loaded.text} failed{where}: {brief(error)}; if it works on"
                " real tensors, packlight.profile can measure it"
            ) from error


def _converted(answer: Answer, chosen: Chosen, arguments: argparse.Namespace) -> Conversion:
    try:
        return convert(
            answer.loaded.model,
            chosen,
            strict=arguments.strict,
            functional=arguments.functional,
            rest=rest_of(arguments),
            head=arguments.head,
            exact_ends=arguments.exact_ends,
        )
    except PacklightError as error:
        raise with_options(error) from error


def with_options(error: PacklightError) -> PacklightError:
    """The error with options by the names that they have here, which are others than in Python."""
    text = str(error).replace("strict=False", "--no-strict")
    text = text.replace("functional=False", "--no-functional").replace("head=True", "--head")
    return type(error)(text)


def device_of(text: str | None) -> torch.device:
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise InputError(f"unknown device {text!r}; expected cpu or cuda")
    device = torch.device(text)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {text} is not there, and this needs it; try --device cpu")
    return device


@contextmanager
def quiet() -> Iterator[None]:
    """Without what other packages log and warn of on the way; errors are reported by us."""
    logger = logging.getLogger("transformers")
    level = logger.level
    with warnings.catch_warnings():
        # Of packages to each other: what PEFT asks transformers for has another name by now.
        warnings.simplefilter("ignore", FutureWarning)
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


# ---- the page ------------------------------------------------------------------------------------

_IMAGINED = "H200"  # the device of steps where no other is named or there


def _card(arguments: argparse.Namespace) -> tuple[Device, bool]:
    """The device of steps, and whether it is someone's, with a budget."""
    known = arguments.gpu is not None or torch.cuda.is_available()
    return devices.device_of(arguments.gpu if known else _IMAGINED), known


def _walk(answer: Answer, arguments: argparse.Namespace) -> None:
    """A step with what is there of the conversion, for the page."""
    if arguments.html is None:
        return
    loaded, (card, _) = answer.loaded, _card(arguments)
    name = "as PyTorch trains it" if answer.conversion is None else "converted"
    adamw = optimizer_of("adamw")
    walker = Walker(loaded.model, loaded.arguments, loaded.keywords, None, adamw)
    try:
        with quiet(), autocast_of(arguments, torch.device("cpu")):
            answer.steps[name] = walker.walk(card).timeline
    except InputError as error:  # as where nothing is trained, of which there is a report still
        answer.why_no_steps = str(error)


def _write_html(answer: Answer, arguments: argparse.Namespace) -> None:
    if arguments.html is None or answer.before is None:
        return
    card, known = _card(arguments)
    of = f"Foretold of a step with fused AdamW on {card.name}; packlight fit has other choices."
    if answer.why_no_steps is not None:
        of = f"A step cannot be foretold: {answer.why_no_steps}."
    elif not known:
        of += " --gpu draws the memory of a card of yours as a line."
    further = steps(answer.steps, usable(card.memory) if known else None, of)
    shown = answer.before if answer.after is None else answer.before - answer.after
    shown.to_html(arguments.html, answer.about(), further=further)


# ---- words ---------------------------------------------------------------------------------------


def _print_json(answer: Answer) -> None:
    print(json.dumps(answer.to_dict(), indent=1))


def _report_data(report: MemoryReport | None) -> dict[str, Any] | None:
    """What `MemoryReport.from_json` reads."""
    return None if report is None else json.loads(report.to_json())


def _count(number: int) -> str:
    for scale, name in ((10**9, "billion"), (10**6, "million")):
        if number >= scale:
            return f"{number / scale:.3g} {name}"
    return f"{number:,}"
