"""The command line, as a user types it: what works, and what is refused in one line."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from packlight import __version__, demo
from packlight.cli import main

ARGUMENTS = "--steps 2 --layers 1 --width 32 --heads 2 --context 16 --batch 2 --device cpu"
TINY = ARGUMENTS.split()


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr with which a command ends."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    return captured.err


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What --help or --version prints, its line breaks taken out."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_names_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    printed = shown(["--help"], capsys)
    assert "demo" in printed
    assert "env" in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(["--version"], capsys) == f"packlight {__version__}"


def test_help_of_the_demo_states_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    _, printed = shown(["demo", "--help"], capsys).split("options:")
    for option in ("--bits", "--device", "--out", "--seed", "--no-plot"):
        assert option in printed
    for name, value in demo.DEFAULTS["cpu"].items():
        stated = re.search(rf"--{name} N.*?\(default: (\d+)[^0-9)]*, (\d+)", printed)
        assert stated is not None, name
        assert [int(number) for number in stated.groups()] == [value, demo.DEFAULTS["cuda"][name]]


def test_a_demo_writes_a_picture_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["demo", *TINY, "--bits", "2", "--seed", "5", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "FewBit: GELU keeps 0.25" in printed
    # Paths are printed unbroken, for copying.
    assert str(tmp_path / "demo.png") in printed
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    settings = json.loads((tmp_path / "demo.json").read_text())["settings"]
    assert settings["bits"] == 2
    assert settings["seed"] == 5
    assert settings["steps"] == 2


def test_a_demo_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    line = fails(["demo", *TINY, "--out", str(tmp_path)], capsys)
    assert line.startswith("packlight demo: error: ")
    assert "pip install 'packlight[plot]'" in line
    main(["demo", *TINY, "--out", str(tmp_path), "--no-plot"])
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "steps=0 is not a positive whole number"),
        ("--steps two", "argument --steps: invalid int value: 'two'"),
        ("--layers -1", "layers=-1 is not a positive whole number"),
        ("--width 30 --heads 4", "width=30 is not divisible by heads=4"),
        ("--batch 1.5", "argument --batch: invalid int value: '1.5'"),
        ("--bits 9", "bits=9 is not a whole number from 1 to 8"),
        ("--seed -1", "seed=-1 is not a whole number"),
        ("--device gpu", "device='gpu' is not a device of this demo"),
        ("--device cuda:99", "device='cuda:99' does not exist"),
        ("--colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(["demo", *arguments.split()], capsys)
    assert line.startswith("packlight")
    assert message in line


def test_a_wrong_or_missing_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'dmeo'" in fails(["dmeo"], capsys)
    assert "packlight --help" in fails([], capsys)


def test_a_file_in_place_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    line = fails(["demo", *TINY, "--no-plot", "--out", str(tmp_path / "taken")], capsys)
    assert "cannot be made" in line


def test_an_interruption_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(["demo", *TINY])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "packlight demo: interrupted\n"


def test_env_prints_versions(capsys: pytest.CaptureFixture[str]) -> None:
    main(["env"])
    assert f"packlight: {__version__}" in capsys.readouterr().out
    main(["env", "--json"])
    assert json.loads(capsys.readouterr().out)["packlight"] == __version__


def test_the_package_runs_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["packlight", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("packlight", run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"packlight {__version__}\n"
