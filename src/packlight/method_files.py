"""Methods as text: `parse_methods` for one, `load_methods` and `save_methods` for TOML files.

A file has one table, of selectors and methods, in the order in which `packlight.convert` looks at
them, and before it may say what becomes of the rest:

    rest = "GroupQuant(8)"
    [methods]
    lm_head = "None"
    GELU = "FewBit(3)"
    "encoder.*.fc2" = "Sketch(rows=0.2)"
    "*" = "FixedPoint(4), GroupQuant(4)"
"""

import ast
import difflib
import inspect
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from packlight._files import read_text, write_text
from packlight.convert import DEFAULT_METHODS
from packlight.errors import InputError
from packlight.fewbit.codebook import Codebook
from packlight.method import ELSEWHERE, Method, method_kinds
from packlight.quantiser import Quantiser
from packlight.saving.rest import Given, check_rest
from packlight.selectors import EVERYTHING, Choice, Methods, Selector

__all__ = ["load_methods", "parse_methods", "save_methods"]


def parse_methods(text: str) -> Choice:
    """The methods that a text names.

    `FewBit(3)` or `GroupQuant(bits=4)`, several with commas between them, `None` (leave alone) or
    `default` (`packlight.DEFAULT_METHODS`), which may stand among several. The text is
    read, not run: arguments are plain values, methods, and of `FewBit` a codebook with its own,
    `FewBit(codebook=Codebook(1, (0.0,), (0.0, 1.0)))`.

    Raises `InputError` for anything else, naming the methods there are.
    """
    if len(text) > _LONGEST:
        raise InputError(f"{text[:40]!r}... is no method: it has {len(text)} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if any(_is_too_large(node) for node in ast.walk(tree)):
            raise InputError(f"{shortened(text)} is no method: it has a number beyond 64 bits")
        return _choice(tree, text)
    except (SyntaxError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise InputError(f"{shortened(text)} is no method ({reason}); {_expected()}") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        # A null character.
        raise InputError(f"{shortened(text)} is no method ({error}); {_expected()}") from error


# Characters of a text. Methods take a few dozen, an 8-bit codebook or a histogram six thousand.
_LONGEST = 100_000


def _is_too_large(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and is_beyond_64_bits(node.value)


def is_beyond_64_bits(value: object) -> bool:
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def shortened(text: str, quotes: str = "'") -> str:
    text = text if len(text) <= 100 else text[:97] + "..."
    return repr(text) if quotes else text


def _choice(tree: ast.expr, text: str) -> Choice:
    if isinstance(tree, ast.Constant) and tree.value is None:
        return None
    parts = tree.elts if isinstance(tree, ast.Tuple) else [tree]
    methods = tuple(method for part in parts for method in _methods(part))
    if not methods:
        raise InputError(f"{text!r} is no method; {_expected()}")
    return methods[0] if len(methods) == 1 else methods


def _methods(tree: ast.expr) -> tuple[Method, ...]:
    if isinstance(tree, ast.Name) and tree.id == "default":
        return DEFAULT_METHODS
    return (_method(tree),)


def format_methods(choice: Choice) -> str:
    """The inverse of `parse_methods`."""
    if choice is None:
        return "None"
    methods = (choice,) if isinstance(choice, Method) else tuple(choice)
    text = ", ".join(map(repr, methods))
    # A method of the user's own may hold what has no plain text.
    if parse_methods(text) != (methods[0] if len(methods) == 1 else methods):
        raise InputError(f"{text} cannot be written: read again, it would be another method")
    return text


def _expected() -> str:
    known = ", ".join(sorted(method_kinds()))
    return f"expected None, default, or a method with its arguments, FewBit(3); methods: {known}"


def _method(tree: ast.expr) -> Method:
    text = ast.unparse(tree)
    called = tree.func if isinstance(tree, ast.Call) else tree
    if not isinstance(called, ast.Name):
        raise InputError(f"{text!r} is no method; {_expected()}")
    kind = _kind(called.id)
    if not isinstance(tree, ast.Call):
        raise InputError(f"{text!r} lacks its parentheses: {_signature(kind)}")
    made: Method = _called(kind, tree, text)
    return made


def _called(kind: type[Any], tree: ast.Call, text: str) -> Any:
    values = [_value(node, text) for node in tree.args]
    fields = {str(node.arg): _value(node.value, text) for node in tree.keywords}
    try:
        return kind(*values, **fields)
    except TypeError as error:
        raise InputError(f"{shortened(text, '')} does not fit {_signature(kind)}") from error
    except InputError as error:
        raise InputError(f"{shortened(text, '')}: {error}") from error


def _kind(name: str) -> type[Method]:
    kind = method_kinds(name).get(name)
    if kind is None:
        near = difflib.get_close_matches(name, method_kinds(), n=1)
        hint = f" (near: {near[0]})" if near else ""
        raise InputError(f"unknown method {name!r}{hint}; {_expected()}. {ELSEWHERE}")
    return kind


def _is_kind(name: str) -> bool:
    return name in method_kinds(name)


def _signature(kind: type[Any]) -> str:
    parameters = inspect.signature(kind).parameters.values()
    shown = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return f"{kind.__name__}({', '.join(map(str, shown))})"


# What an argument of a method may be, beside plain values.
_VALUES = {"Codebook": Codebook}


def _value(tree: ast.expr, text: str) -> Any:
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        if tree.func.id in _VALUES:
            return _called(_VALUES[tree.func.id], tree, ast.unparse(tree))
        if _is_kind(tree.func.id):
            return _method(tree)
    try:
        return ast.literal_eval(tree)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{shortened(text, '')}: {shortened(ast.unparse(tree), '')} is no plain value; expected"
            " a number, a text in quotes, True, False or None"
        ) from error


# ---- files ---------------------------------------------------------------------------------------


class FiledMethods(dict[Selector, Choice]):
    """The methods of a file, and what it says of the rest and of heads: `convert` takes all three
    from here.
    """

    rest: Given = "auto"
    head: bool = False


def load_methods(path: str | os.PathLike[str]) -> FiledMethods:
    """The methods in a TOML file, for `packlight.convert`.

    A line `rest = "GroupQuant(8)"` above the table is the argument `rest` of `convert`, where a
    call gives none, and `head = true` is `head=True`. The file has one table `[methods]`. Keys are
    selectors: the name of a module type, `GELU` or `"torch.nn.GELU"`, or a pattern of names,
    `"encoder.*.fc2"`; a key with dots or stars needs quotes. Values are texts: `"FewBit(3)"`,
    several methods with commas between them, `"None"` or `"default"`. The first selector that
    matches a layer counts.

    Raises `InputError` for a file that cannot be read, naming the line.

    >>> import pathlib, tempfile, packlight
    >>> path = pathlib.Path(tempfile.mkdtemp(), "methods.toml")
    >>> _ = path.write_text('[methods]\\nGELU = "FewBit(2)"\\n"lm_head" = "None"\\n')
    >>> packlight.load_methods(path)
    {'GELU': FewBit(bits=2), 'lm_head': None}
    """
    text = read_text(path)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # Beside tomllib's own: an integer of thousands of digits, thousands of brackets.
        raise InputError(_located(path, text, str(error))) from error
    if text.startswith(_HEADER) and _END not in text.splitlines():
        raise InputError(f"{path} is cut off: its last line, {_END!r}, is missing; save it again")
    table = data.pop("methods", None)
    rest, head = data.pop("rest", "auto"), data.pop("head", False)
    if not isinstance(head, bool):
        line = _line(text, ("head",))
        raise InputError(f"{path}:{line}: head is {head!r}; expected true or false")
    for key in data:
        line = _line(text, (key,))
        raise InputError(
            f"{path}:{line}: {key!r} is not known; expected one table, [methods], and rest and head"
        )
    if not isinstance(table, dict) or not table:
        raise InputError(f'{path}: no methods; expected [methods] and lines such as GELU = "..."')
    methods = FiledMethods()
    methods.head = head
    try:
        methods.rest = parse_rest(rest)
    except InputError as error:
        raise InputError(f"{path}:{_line(text, ('rest',))}: rest: {error}") from error
    for selector, value in table.items():
        try:
            methods[selector] = _entry(selector, value)
        except InputError as error:
            line = _line(text, ("methods", selector))
            raise InputError(f"{path}:{line}: {error}") from error
    return methods


def parse_rest(text: object) -> Given:
    """The argument `rest` of `convert` that a text stands for; raises `InputError` for others."""
    if text == "auto":
        return "auto"
    choice = parse_methods(text) if isinstance(text, str) else text
    if choice is None and text is not None:
        return None
    if not isinstance(choice, Quantiser):
        raise InputError(f'{text!r} is no quantiser; expected "GroupQuant(8)", "None" or "auto"')
    return choice


def save_methods(methods: Methods, path: str | os.PathLike[str], rest: Given = "auto") -> None:
    """Write methods, as `packlight.convert` takes them, to a TOML file for `load_methods`.

    `rest` is the argument of `convert`; "auto" is that of methods which `load_methods` gave. Where
    they, or a `Plan`, ask for losses by chunks, the file does so too.

    Module types are written by their qualified names. What is loaded selects the same layers by the
    same methods. Raises `InputError` for predicates, which no text stands for.
    """
    entries = methods if isinstance(methods, Mapping) else {EVERYTHING: methods}
    lines = [
        f"{_toml_text(_selector_text(selector))} = {_toml_text(format_methods(choice))}"
        for selector, choice in entries.items()
    ]
    rest = getattr(methods, "rest", rest) if rest == "auto" else rest
    check_rest(rest)
    above = [] if rest == "auto" else [f"rest = {_toml_text(format_methods(rest))}"]
    if getattr(methods, "head", False):
        above.append("head = true")
    lines = [*above, "[methods]", *lines]
    write_text(path, "\n".join([_HEADER + _HINT, *lines, _END, ""]))


# A file that begins so is one of ours, and is whole only with its end. One written by hand needs
# neither: of a file that is cut off at a line, nothing else tells.
_HEADER = "# Methods for packlight.convert, from here to the line of the end."
_HINT = " The first match counts."
_END = "# The end."


def _located(path: str | os.PathLike[str], text: str, message: str) -> str:
    """A message of tomllib with its line in front."""
    found = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    if found is None:
        return f"{path}: {message}"
    line = found[1] or text.count("\n") + 1
    return f'{path}:{line}: {message[: found.start()]}; a line is SELECTOR = "METHOD"'


def _line(text: str, keys: Sequence[str]) -> int:
    """The line on which a key's value is complete, in a text that is TOML."""
    lines = text.replace("\r\n", "\n").split("\n")
    header, statement = "", ""
    for number, line in enumerate(lines, start=1):
        statement += f"{line}\n"
        # In the middle of a value of several lines, only what may close it is worth a try.
        if statement.count("\n") > 1 and not re.search(r"\'\'\'|\"\"\"|[]}]", line):
            continue
        try:
            data: Any = tomllib.loads(header + statement)
        except tomllib.TOMLDecodeError:
            continue
        for key in keys:
            data = data.get(key) if isinstance(data, dict) else None
        if data is not None:
            return number
        if line.lstrip().startswith("["):
            header = statement
        statement = ""
    return len(lines)


def _entry(selector: str, value: object) -> Choice:
    if isinstance(value, dict):
        path = selector
        while isinstance(value, dict) and value:
            inner, value = next(iter(value.items()))
            path = f"{path}.{inner}"
        raise InputError(f'{path} has dots, so it needs quotes: "{path}" = ...')
    if not isinstance(value, str):
        shown = "a huge number" if is_beyond_64_bits(value) else repr(value)[:100]
        raise InputError(f'{selector} is {shown}; expected a text, such as "FewBit(3)"')
    return parse_methods(value)


def _selector_text(selector: Selector) -> str:
    if isinstance(selector, str):
        return selector
    if not isinstance(selector, type):
        raise InputError(
            f"selector {selector!r} is a predicate, which cannot be written; use a pattern of names"
        )
    if getattr(nn, selector.__name__, None) is selector:
        return f"torch.nn.{selector.__name__}"
    return f"{selector.__module__}.{selector.__qualname__}"


def _toml_text(text: str) -> str:
    """A TOML basic string. JSON escapes all that TOML wants escaped, but for one character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
