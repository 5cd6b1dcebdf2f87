"""The command `packlight`.

Each subcommand is a function `_add_...` that adds its parser, and the function which that parser
runs. Only the latter imports what it runs on, so that `packlight --help` waits for no more than
`import packlight`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from packlight._version import __version__
from packlight.errors import PacklightError


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`. A user's mistake is one line on stderr and exit status 2."""
    parser = _Parser(
        prog="packlight",
        description="Train and fine-tune PyTorch models with a fraction of the activation memory.",
    )
    parser.add_argument("--version", action="version", version=f"packlight {__version__}")
    # A subcommand's parser has the class of this one.
    subcommands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for add in (_add_demo, _add_env):
        add(subcommands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except PacklightError as error:
        parser.exit(2, f"packlight {arguments.command}: error: {error}\n")
    except KeyboardInterrupt:
        # 128 + SIGINT, as shells have it.
        parser.exit(130, f"packlight {arguments.command}: interrupted\n")


# ---- packlight demo ------------------------------------------------------------------------------


def _add_demo(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "demo",
        help="train a small GPT with and without packlight, and compare",
        description=(
            "Train a small GPT on the source text of Python's standard library, once with plain "
            "PyTorch and once with packlight; print a table, save a picture and the numbers."
        ),
    )
    # The defaults stand in packlight.demo.DEFAULTS; a test compares them with these texts.
    for name, text in (
        ("steps", "training steps (default: 160 on a CPU, 400 on a GPU)"),
        ("layers", "transformer blocks (default: 4, 12)"),
        ("width", "width of the model, a multiple of the heads (default: 128, 768)"),
        ("heads", "attention heads (default: 4, 12)"),
        ("context", "bytes of text that the model sees (default: 128, 512)"),
        ("batch", "texts in a batch (default: 16, 32)"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    parser.add_argument(
        "--bits",
        type=int,
        default=3,
        metavar="K",
        help="bits an element that packlight's GELU keeps, 1 to 8 (default: 3)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is a GPU)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("packlight-demo"),
        metavar="DIR",
        help="folder for demo.png and demo.json (default: packlight-demo)",
    )
    parser.add_argument("--no-plot", action="store_true", help="no picture, so no matplotlib")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    from packlight import demo

    names = ("device", "bits", "seed", "steps", "layers", "width", "heads", "context", "batch")
    settings = demo.make_settings(**{name: getattr(arguments, name) for name in names})
    demo.run(settings, arguments.out, plot=not arguments.no_plot)


# ---- packlight env -------------------------------------------------------------------------------


def _add_env(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "env",
        help="print versions and devices, for a bug report",
        description="Print what a bug report needs: versions, devices, environment variables.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_env)


def _env(arguments: argparse.Namespace) -> None:
    from packlight import env

    sys.stdout.write(env.as_json() if arguments.json else env.as_text())
