"""The command `packlight`.

Each subcommand is a function `_add_...` that adds its parser, and the function which that parser
runs. Only the latter imports what it runs on, so that `packlight --help` waits for no more than
`import packlight`.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from packlight._version import __version__
from packlight.errors import PacklightError

# Characters of an error. It repeats what was given, which may be anything.
_LONGEST = 500


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}..."
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`. A user's mistake is one line on stderr and exit status 2."""
    parser = Parser(
        prog="packlight",
        description="Train and fine-tune PyTorch models with a fraction of the activation memory.",
    )
    parser.add_argument("--version", action="version", version=f"packlight {__version__}")
    # A subcommand's parser has the class of this one.
    subcommands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for add in (
        _add_fit,
        _add_profile,
        _add_convert,
        _add_gradient_error,
        _add_codebook,
        _add_calibrate,
        _add_demo,
        _add_doctor,
        _add_env,
    ):
        add(subcommands)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        own = subcommands.choices[arguments.command]
        own.error(_unrecognized(unknown, own.format_usage()))
    try:
        arguments.run(arguments)
    except PacklightError as error:
        parser.exit(2, f"packlight {arguments.command}: error: {error}\n")
    except KeyboardInterrupt:
        # 128 + SIGINT, as shells have it.
        parser.exit(130, f"packlight {arguments.command}: interrupted\n")
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted; Python's own flush at exit must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(128 + 13)


# ---- packlight fit and packlight calibrate -------------------------------------------------------


def _add_fit(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "fit",
        help="print whether training a model fits a GPU, and what makes it fit",
        description=(
            "Foretell the peak of memory and the time of a training step on a GPU, without the GPU,"
            " the weights or a run: as PyTorch trains, with checkpointing, with packlight, and by"
            " the fastest plan that fits; and the largest batch and the longest sequence of each."
        ),
    )
    _add_model_and_input(parser)
    parser.add_argument(
        "--gpu", metavar="GPU", help="24GiB, or a card's name, H100 (default: the GPU that is here)"
    )
    parser.add_argument(
        "--optimizer",
        choices=_OPTIMIZERS,
        default="adamw",
        metavar="NAME",
        help=f"{', '.join(_OPTIMIZERS)} (default: adamw)",
    )
    parser.add_argument(
        "--lora",
        metavar="SETTINGS",
        help="adapters of PEFT: r=16,targets=all-linear,alpha=32,dropout=0.05",
    )
    parser.add_argument(
        "--load-in-4bit", action="store_true", help="frozen weights of 4 bits, as bitsandbytes has"
    )
    parser.add_argument(
        "--head",
        action="store_true",
        help="take for given that losses are computed by chunks (default: where there is a head of"
        " a language model)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="no search for the largest batch and sequence"
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="write the plan to this TOML")
    _add_degrees(parser)
    _add_configuration(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page: the front, and memory over time"
    )
    parser.set_defaults(run=_fit)


def _add_degrees(parser: argparse.ArgumentParser) -> None:
    """Those of `packlight.Parallel`."""
    group = parser.add_argument_group("parallel runs, of which a rank is foretold")
    for name, text in {
        "replicate": "data-parallel ranks that have all weights (DDP, HSDP)",
        "shard": "data-parallel ranks that have shards (FSDP2)",
        "tensor": "ranks among which Linears are cut",
        "context": "ranks among which a sequence is cut",
        "pipeline": "stages of blocks",
        "microbatches": "parts of the batch (default: a row each in a pipeline)",
        "expert": "ranks among which experts are spread",
    }.items():
        group.add_argument(f"--{name}", type=_positive, metavar="N", help=text)
    group.add_argument(
        "--no-sequence", action="store_true", help="tensor parallel without cut tokens"
    )
    group.add_argument(
        "--no-loss-parallel", action="store_true", help="tensor parallel gathers logits"
    )
    group.add_argument(
        "--no-reshard", action="store_true", help="weights stay gathered after the forward pass"
    )
    group.add_argument(
        "--imbalance", type=float, default=1.0, metavar="F", help="of tokens among experts"
    )
    group.add_argument(
        "--shard-dtype", metavar="TYPE", help="of shards, gradients and optimiser: fp32"
    )


def _unrecognized(words: Sequence[str], usage: str) -> str:
    """What no option takes, with the options of a subcommand that are spelt alike."""
    options = re.findall(r"--[a-z0-9-]+", usage)
    near = [
        option
        for word in words
        for option in difflib.get_close_matches(word.partition("=")[0], options, n=1, cutoff=0.7)
    ]
    hint = f" (near: {', '.join(near)})" if near else ""
    return f"unrecognized arguments: {' '.join(words)}{hint}"


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text[:20]} is not a positive whole number")
    return int(text[:20])


def _fit(arguments: argparse.Namespace) -> None:
    from packlight.cli import fitting

    fitting.run_fit(arguments)


def _add_calibrate(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "calibrate",
        help="measure the GPU that is here, for the times that plans are made by",
        description=(
            "Time the operators of small networks on the GPU that is here, in a minute, or two"
            " where kernels are not compiled yet, and keep their rates in the user's cache, for"
            " fit and packlight.plan."
        ),
    )
    parser.add_argument("--out", metavar="FILE", help="write the rates to this file instead")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> None:
    from packlight.cli import fitting

    fitting.run_calibrate(arguments)


# ---- packlight profile and packlight convert -----------------------------------------------------


def _add_profile(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "profile",
        help="print what a model keeps for its backward pass, by module, without running it",
        description=(
            "Predict which modules of a model keep how many bytes for the backward pass. Nothing "
            "is computed and no weights are made, so models of any size take seconds. With "
            "methods, print it before and after a conversion."
        ),
    )
    _add_model(parser)
    parser.add_argument("--depth", type=_positive, metavar="N", help="print N levels of modules")
    parser.set_defaults(run=_profile)


def _profile(arguments: argparse.Namespace) -> None:
    from packlight.cli import commands

    commands.profile(arguments)


def _add_convert(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "convert",
        help="try a set of methods on a model, and write them to a file for training",
        description=(
            "Print which layers of a model a set of methods converts, which not and why, and the "
            "bytes kept for the backward pass before and after. With --out, write the methods to a "
            "file that training reads: packlight.convert(model, packlight.load_methods(FILE))."
        ),
    )
    _add_model(parser)
    result = parser.add_mutually_exclusive_group()
    result.add_argument(
        "--dry-run", action="store_true", help="print only, write no methods, as without --out"
    )
    result.add_argument("--out", type=Path, metavar="FILE", help="write the methods to this TOML")
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    from packlight.cli import commands

    commands.convert_model(arguments)


def _add_model(parser: argparse.ArgumentParser) -> None:
    """What `profile` and `convert` both take, of models that have no values."""
    _add_model_and_input(parser)
    _add_methods(parser)
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="where the run is imagined to be; it must be there (default: cuda if there is a GPU)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page to look at in a browser"
    )
    parser.add_argument(
        "--gpu",
        metavar="GPU",
        help="24GiB, or a card's name, whose memory the page draws beside that of a step (default:"
        " the GPU that is here)",
    )


def _add_model_and_input(parser: argparse.ArgumentParser) -> None:
    """A model without values, by a text, and what it is called with."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hf:TYPE (transformers' default configuration of roberta, llama, vit, ...), "
        "hf:OWNER/NAME, a directory with a config.json, or MODULE:NAME, a Python function that "
        "returns a module or a pair of a module and its inputs",
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SIZES",
        help="batch=8,sequence=1024 or batch=8,image=384 for transformers (default: batch 1, "
        "sequence 512); for MODULE:NAME without inputs, their shapes: 8x3x224x224 or 8x128:int64",
    )
    parser.add_argument("--batch", type=_positive, metavar="N", help="short for --input batch=N")
    parser.add_argument(
        "--sequence", type=_positive, metavar="N", help="short for --input sequence=N"
    )
    parser.add_argument(
        "--task",
        choices=_TASKS,
        metavar="TASK",
        help=f"the head of a model of transformers: {', '.join(_TASKS)} (default: what the "
        "configuration names, or the first of these that there is)",
    )


def _add_methods(parser: argparse.ArgumentParser) -> None:
    """What all three take that convert a model."""
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="SELECTOR=METHOD",
        help="'GELU=FewBit(3)', '*.fc2=Sketch(rows=0.2)', 'lm_head=None', 'default'; the selector "
        "is the name of a module type or a pattern of module names; the first match counts",
    )
    parser.add_argument(
        "--methods", type=Path, metavar="FILE", help="methods in a TOML file, behind those above"
    )
    parser.add_argument(
        "--functional",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="calls of torch functions in the model's own code as well (default), or layers alone",
    )
    parser.add_argument(
        "--rest",
        metavar="METHOD",
        help="packs what no rule is for: 'GroupQuant(8)', 'None' (default: that of the file, or "
        "else a default for the default methods)",
    )
    parser.add_argument(
        "--head",
        nargs="?",
        const=True,
        default=False,
        metavar="SELECTOR",
        help="losses of heads by chunks, without all logits: of the output embeddings of a model "
        "of transformers, or of the Linear layers that SELECTOR picks",
    )
    parser.add_argument(
        "--exact-ends",
        action="store_true",
        help="the first and the last Linear or convolution stay as they are",
    )
    parser.add_argument(
        "--no-strict",
        dest="strict",
        action="store_false",
        help="go on past layers that cannot be converted and selectors that match nothing",
    )
    _add_configuration(parser)


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    """How a model is made, and what it runs under."""
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="num_hidden_layers=4: changes the configuration, or is passed to the function",
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="of the parameters (default: the model's)")
    parser.add_argument("--autocast", choices=("bf16", "fp16"), help="run under torch.autocast")


# As in packlight.cli.models, which is not imported for --help; a test compares them.
_DTYPES = ("fp32", "bf16", "fp16")
_OPTIMIZERS = ("adamw", "adamw-8bit", "paged", "sgd", "adafactor")
_TASKS = (
    "seq2seq-lm",
    "masked-lm",
    "causal-lm",
    "image-classification",
    "base",
    "sequence-classification",
    "token-classification",
    "question-answering",
)


# ---- packlight codebook --------------------------------------------------------------------------


def _add_codebook(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "codebook",
        help="fit few-bit codes to the derivative of a function, and print or draw them",
        description=(
            "Fit the borders and levels that stand for the derivative of an elementwise function "
            "in a few bits, and print them as a table and as a method."
        ),
    )
    parser.add_argument(
        "function",
        metavar="FUNCTION",
        help="gelu, silu, tanh, ... or MODULE:NAME, a Python function of a float64 tensor that "
        "autograd can differentiate",
    )
    parser.add_argument("--bits", type=int, default=3, metavar="K", help="1 to 8 (default: 3)")
    parser.add_argument(
        "--weight",
        default="normal:3",
        metavar="W",
        help="where the derivative is to be near: uniform, normal:SIGMA, or a .npy file of samples "
        "(default: normal:3, as of the codebooks that packlight ships)",
    )
    parser.add_argument(
        "--domain",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="default: -10 10, or what holds the samples; symmetries are looked for about its "
        "middle",
    )
    parser.add_argument(
        "--objective",
        choices=("derivative", "primitive"),
        default="derivative",
        help="what is to be near: the derivative, or the function itself (default: derivative)",
    )
    parser.add_argument(
        "--pin-tails",
        action="store_true",
        help="fix the outermost levels at the limits of the derivative, where it has some",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it: .png, .svg, .pdf")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_codebook)


def _codebook(arguments: argparse.Namespace) -> None:
    from packlight.cli import codebook

    codebook.codebook(arguments)


# ---- packlight gradient-error --------------------------------------------------------------------


def _add_gradient_error(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "gradient-error",
        help="print how far methods move a model's gradients on a batch, beside the batch's noise",
        description=(
            "Run a model on a batch, exactly, on two halves of the batch, and converted, and print "
            "for each layer the error of the gradient of its weights beside the noise that the "
            "batch itself gives it."
        ),
    )
    parser.add_argument(
        "model",
        metavar="MODULE:NAME",
        help="a Python function that returns a module and its batch, or a module, its batch and a "
        "loss: a function of both",
    )
    _add_methods(parser)
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="METHOD",
        help="'GroupQuant(2)': another conversion, beside that by --method and --methods",
    )
    parser.add_argument(
        "--draws", type=int, default=4, metavar="N", help="passes by each method (default: 4)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="default: cuda if there is a GPU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture")
    parser.set_defaults(run=_gradient_error)


def _gradient_error(arguments: argparse.Namespace) -> None:
    from packlight.cli import gradients

    gradients.gradients(arguments)


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
    # The defaults stand in packlight.cli.demo.DEFAULTS; a test compares them with these texts.
    for name, text in (
        ("steps", "training steps (default: 70 on a CPU, 400 on a GPU)"),
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
        default=4,
        metavar="K",
        help="bits an element that packlight's GELU keeps, 1 to 8 (default: 4)",
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
    from packlight.cli import demo

    names = ("device", "bits", "seed", "steps", "layers", "width", "heads", "context", "batch")
    settings = demo.make_settings(**{name: getattr(arguments, name) for name in names})
    demo.run(settings, arguments.out, plot=not arguments.no_plot)


# ---- packlight doctor ----------------------------------------------------------------------------


def _add_doctor(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "doctor",
        help="try a kernel of each kind on this machine, and print what is wrong or missing",
        description=(
            "Compare the gradients of one operator of each kind with torch's, and on a GPU those "
            "of its kernel with its plain-PyTorch reference; print versions, launch times and what "
            "is not supported here, as one block to copy. Exit status 1 if a check fails."
        ),
    )
    parser.add_argument("--device", metavar="DEVICE", help="default: cuda if there is a GPU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    from packlight.cli.doctor import doctor

    sys.exit(doctor(arguments))


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
