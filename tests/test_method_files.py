"""Methods as text: what is read, what is refused and how, and files that come back as written."""

import dataclasses
import errno
import os
import string
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import packlight
from packlight import FewBit, FixedPoint, GroupQuant, InputError, Inverted, Sketch
from packlight.method import Method
from packlight.method_files import _toml_text, format_methods, parse_methods


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FewBit(3)", FewBit(3)),
        (" FewBit(bits = 2) ", FewBit(2)),
        ("Inverted()", Inverted()),
        ("Sketch(0.1, kind='rows', max_rows=None)", Sketch(rows=0.1, kind="rows")),
        ("FixedPoint(4), GroupQuant(8)", (FixedPoint(4), GroupQuant(8))),
        ("(FewBit(1),)", FewBit(1)),
        ("None", None),
        ("default", packlight.DEFAULT_METHODS),
    ],
)
def test_texts(text, expected):
    assert parse_methods(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no method"),
        ("()", r"'\(\)' is no method; expected None, default, or a method"),
        ("3", "'3' is no method"),
        ("FewBit", r"lacks its parentheses: FewBit\(bits=3, weight=None, codebook=None\)"),
        ("FewBit(3", r"'\(' was never closed"),
        (
            "FewBitt(3)",
            r"unknown method 'FewBitt' \(near: FewBit\).*FewBit, FixedPoint, GroupQuant.* One of"
            r" another package is known once .* imported, or installed .* group packlight.methods$",
        ),
        ("FewBit(9)", r"FewBit\(9\): bits=9 is not a whole number from 1 to 8"),
        ("FewBit(3, None, None, 4)", r"does not fit FewBit\(bits=3, weight=None, codebook=None\)"),
        ("GroupQuant(b=3)", r"does not fit GroupQuant\(bits=4, group_size=128, rounding='stoch"),
        ("FewBit(bits)", "bits is no plain value"),
        ("FewBit(*[3])", "no plain value"),
        ("FewBit(**{'bits': 3})", "does not fit"),
        ("GroupQuant({[]: 1})", "no plain value"),
        ("FewBit(open('x'))", "no plain value"),
        ("__import__('os').getcwd()", "is no method"),
        ("default()", "unknown method 'default'"),
        ("lambda: 0", "is no method"),
        ("FewBit(3)\0", "null"),
        ("(" * 300, "too many nested parentheses"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_methods(text)


@pytest.mark.parametrize(
    "choice",
    [None, FewBit(2), Sketch(rows=64, max_rows=128), (FixedPoint(8), Inverted()), (FewBit(1),)],
    ids=str,
)
def test_text_of_a_choice(choice):
    expected = choice[0] if isinstance(choice, tuple) and len(choice) == 1 else choice
    assert parse_methods(format_methods(choice)) == expected


def test_a_method_whose_text_is_another_method_s_is_refused(monkeypatch):
    monkeypatch.setattr(Method, "_kinds", dict(Method._kinds))

    @dataclasses.dataclass(frozen=True)
    class Secret(Method):
        bits: int = 3
        hidden: int = dataclasses.field(default=0, repr=False)

    Secret.__qualname__ = "Secret"  # as of a module's own class
    assert parse_methods(format_methods(Secret(2))) == Secret(2)
    for choice in (Secret(2, hidden=1), (FewBit(3), Secret(2, hidden=1))):
        with pytest.raises(InputError, match=r"Secret\(bits=2\) cannot be written: read again"):
            format_methods(choice)


# ---- files ---------------------------------------------------------------------------------------


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "methods.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file(tmp_path):
    path = written(
        tmp_path,
        "# of a language model\n[methods]\nlm_head = 'None'\n\"*.fc2\" = 'Sketch(rows=0.1)'\n"
        "'torch.nn.GELU' = 'FewBit(2)'\n'*' = 'default'\n",
    )
    methods = packlight.load_methods(path)
    assert methods == {
        "lm_head": None,
        "*.fc2": Sketch(rows=0.1),
        "torch.nn.GELU": FewBit(2),
        "*": packlight.DEFAULT_METHODS,
    }
    assert list(methods) == ["lm_head", "*.fc2", "torch.nn.GELU", "*"]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("[methods]\nGELU = FewBit(3)\n", 2, "Invalid value"),
        ("[methods\n", 1, "Expected"),
        ("[methods]\n*.fc2 = 'FewBit(3)'\n", 2, "Invalid statement"),
        ("[methods]\n\nGELU = '''\nFewBit(3)", 4, "Expected"),
        ("[methods]\nA = 'None'\nA = 'None'\n", 3, "Cannot overwrite a value"),
        (
            "[methods]\nA = 'None'\n\n# B\nGELU = 'FewBi(3)'\nC='None'\n",
            5,
            "unknown method 'FewBi'",
        ),
        ("[methods]\nA = 'None'\nGELU = 'FewBit(9)'", 3, "bits=9"),
        ("[methods]\nA = '''\nNone'''\nB = '''FewBit(\n12)'''\nC = 3\n", 5, "bits=12"),
        ("[methods]\nA = 3\n", 2, "A is 3; expected a text"),
        ("[methods]\nencoder.fc2 = 'None'\n", 2, "encoder.fc2 has dots, so it needs quotes"),
        ("[methods]\nA = 'None'\n[other]\nb = 1\n", 3, "'other' is not known"),
        ("GELU = 'FewBit(3)'\n", 1, "'GELU' is not known; expected one table"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, text, line, message):
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        packlight.load_methods(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[methods]\n", "methods = 3\n"])
def test_a_file_without_methods(tmp_path, text):
    with pytest.raises(InputError, match="no methods; expected"):
        packlight.load_methods(written(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        packlight.load_methods(tmp_path / "none.toml")
    path = tmp_path / "latin.toml"
    path.write_bytes(b"[methods]\n# \xe9\n")
    with pytest.raises(InputError, match=r"latin.toml:2: not UTF-8"):
        packlight.load_methods(path)
    with pytest.raises(InputError, match="cannot be written"):
        packlight.save_methods(FewBit(), tmp_path)


def many(count=400):
    return {f"blocks.{number}.fc": FewBit(1 + number % 8) for number in range(count)}


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    path = tmp_path / "methods.toml"
    packlight.save_methods(many(40), path)
    text = path.read_text()
    assert packlight.load_methods(path) == many(40)
    for length in range(len(text) - 1):
        path.write_text(text[:length])
        with pytest.raises(InputError, match=r"^[^\n]*$"):
            packlight.load_methods(path)
    path.write_text(text.replace("\n", "\r\n"))
    assert packlight.load_methods(path) == many(40)
    # A line more or less is for its owner to decide.
    path.write_text(text.replace('"blocks.3.fc" = "FewBit(bits=4)"\n', 'Linear = "None"\n'))
    assert packlight.load_methods(path).keys() == many(40).keys() - {"blocks.3.fc"} | {"Linear"}


def test_the_line_is_found_in_time_that_grows_with_the_file(tmp_path):
    path = tmp_path / "methods.toml"
    packlight.save_methods(many(20_000), path)
    text = path.read_text().replace("# The end.", '"last" = "FewBi(3)"\n# The end.')
    path.write_text(text)
    start = time.perf_counter()
    with pytest.raises(InputError, match=r":20003: unknown method"):
        packlight.load_methods(path)
    assert time.perf_counter() - start < 20


def full_disk(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_an_error_leaves_the_file_that_was_there(tmp_path, monkeypatch, stage):
    path = tmp_path / "methods.toml"
    packlight.save_methods(FewBit(2), path)
    path.chmod(0o640)
    monkeypatch.setattr(*((os, stage) if stage == "fsync" else (Path, stage)), full_disk)
    with pytest.raises(InputError, match=r"methods.toml cannot be written: No space left"):
        packlight.save_methods(many(), path)
    monkeypatch.undo()
    assert packlight.load_methods(path) == {"*": FewBit(2)}
    assert [file.name for file in tmp_path.iterdir()] == ["methods.toml"]
    link = tmp_path / "link.toml"
    link.symlink_to(path)
    packlight.save_methods(FewBit(1), link)
    assert link.is_symlink()
    assert packlight.load_methods(path) == {"*": FewBit(1)}
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_is_no_file(tmp_path):
    pipe, large = tmp_path / "pipe", tmp_path / "large"
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate(2**40)
    for path in ("/dev/zero", pipe, tmp_path, large, tmp_path / "none" / "x", "a\0b", "x" * 5000):
        with pytest.raises(InputError, match="cannot be read") as caught:
            packlight.load_methods(path)
        assert "\n" not in str(caught.value)
    for path in ("/dev/full", pipe, tmp_path, tmp_path / "none" / "x", "a\0b", "x" * 5000):
        with pytest.raises(InputError, match="cannot be written") as caught:
            packlight.save_methods(FewBit(2), path)
        assert "\n" not in str(caught.value)
    assert pipe.is_fifo()


HUGE = "9" * 5000


@pytest.mark.parametrize(
    "text",
    [
        f"FewBit({HUGE})", f"FewBit(0x{HUGE})", f"FewBit(-0x{HUGE})", f"FewBit({'9' * 25})",
        HUGE, f"{HUGE}()", "FewBit(" + "1+" * 4000 + "1)", "FewBit(" + "-" * 9000 + "1)",
        "FewBit(" + "[" * 5000 + ")", f"{'a.' * 4000}b()", "FewBit(bits=" + "9" * 20_000 + ")",
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_huge_numbers_and_texts_are_one_short_line(tmp_path, text):
    with pytest.raises(InputError) as caught:
        parse_methods(text)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError) as caught:
        packlight.load_methods(written(tmp_path, f"[methods]\nGELU = '{text}'\n"))
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("value", [HUGE, f"0x{HUGE}", "[" * 5000, f"[{'1,' * 5000}]", "9" * 25])
def test_values_that_are_no_texts(tmp_path, value):
    with pytest.raises(InputError) as caught:
        packlight.load_methods(written(tmp_path, f"[methods]\nGELU = {value}\n"))
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


class Local(nn.Linear):
    """A layer type of someone's own."""


def test_what_is_saved_selects_the_same(tmp_path):
    path = tmp_path / "methods.toml"
    methods = {"0": None, nn.GELU: FewBit(2), Local: None, "*": [FixedPoint(4), GroupQuant(8)]}
    packlight.save_methods(methods, path)
    loaded = packlight.load_methods(path)
    assert list(loaded) == ["0", "torch.nn.GELU", f"{__name__}.Local", "*"]

    def model():
        return nn.Sequential(nn.Linear(4, 4), nn.GELU(), Local(4, 4), nn.Linear(4, 4))

    first, second = packlight.convert(model(), methods), packlight.convert(model(), loaded)
    assert [row.names for row in first.replaced] == [("1",), ("3",)]
    assert first.replaced == second.replaced
    assert first.skipped == second.skipped


@pytest.mark.parametrize("methods", [FewBit(2), [FixedPoint(4), FewBit(2)]], ids=str)
def test_methods_for_all_layers_are_saved(tmp_path, methods):
    path = tmp_path / "methods.toml"
    packlight.save_methods(methods, path)
    assert packlight.load_methods(path) == {
        "*": methods if isinstance(methods, FewBit) else tuple(methods)
    }


def test_predicates_are_not_saved(tmp_path):
    with pytest.raises(InputError, match="predicate, which cannot be written"):
        packlight.save_methods({lambda name, module: True: None}, tmp_path / "methods.toml")


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(string.printable)))
def test_any_text_comes_back_from_toml(text):
    assert tomllib.loads(f"{_toml_text(text)} = {_toml_text(text)}") == {text: text}


# ---- texts as selectors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "selector", ["GELU", "torch.nn.GELU", "torch.nn.modules.activation.GELU", "1", "?"]
)
def test_a_text_selects_by_type_or_name(selector):
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    conversion = packlight.convert(model, {selector: FewBit(2)})
    assert [row.names for row in conversion.replaced] == [("1",)]


def test_a_type_of_another_module_is_not_selected():
    model = nn.Sequential(nn.GELU())
    with pytest.raises(
        packlight.NothingMatchedError, match=r"'GLEU' matches no module.*near: GELU"
    ):
        packlight.convert(model, {"GLEU": FewBit(2)})
    with pytest.raises(packlight.NothingMatchedError, match="matches no module"):
        packlight.convert(model, {"torch.GELU": FewBit(2)})


def test_a_converted_layer_is_selected_by_the_type_that_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    packlight.convert(model, {"GELU": FewBit(2)})
    conversion = packlight.convert(model, {"GELU": FewBit(1)})
    assert [row.method for row in conversion.replaced] == [FewBit(1)]


def test_a_file_may_ask_for_losses_by_chunks(tmp_path):
    path = tmp_path / "methods.toml"
    path.write_text('head = true\n[methods]\n"*" = "default"\n')
    methods = packlight.load_methods(path)
    assert methods.head is True
    packlight.save_methods(methods, path)
    assert packlight.load_methods(path).head is True
    path.write_text('[methods]\n"*" = "default"\n')
    assert packlight.load_methods(path).head is False
    path.write_text('head = 3\n[methods]\n"*" = "default"\n')
    with pytest.raises(InputError, match="1: head is 3; expected true or false"):
        packlight.load_methods(path)
