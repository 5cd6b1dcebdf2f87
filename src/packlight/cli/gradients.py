"""What `packlight gradient-error` does, once its arguments are parsed."""

import argparse
from collections.abc import Sequence

import torch

from packlight.cli.commands import (
    Chosen,
    autocast_of,
    chosen_methods,
    device_of,
    parsed_config,
    quiet,
    rest_of,
    with_options,
)
from packlight.cli.models import DTYPES, LoadedModel, brief, load_model, parse_inputs
from packlight.errors import InputError, PacklightError
from packlight.gradient_error import gradient_error
from packlight.report.gradients import GradientReport


def gradients(arguments: argparse.Namespace) -> None:
    """`packlight gradient-error`: errors of gradients beside the noise of a batch."""
    chosen = chosen_methods(arguments.method, arguments.methods)
    compared = [chosen_methods([text], None) for text in arguments.compare]
    if chosen or compared:  # further conversions are beside the default where no other is named
        compared.insert(0, chosen or chosen_methods(["default"], None))
    device = device_of(arguments.device)
    loaded = load_model(
        arguments.model,
        parse_inputs(()),
        config=parsed_config(arguments.config),
        dtype=None if arguments.dtype is None else DTYPES[arguments.dtype],
        device=str(device),
    )
    report = _measured(loaded, compared, device, arguments)
    if arguments.plot is not None:
        report.plot(arguments.plot)
    if arguments.json:
        print(report.to_json())
        return
    print(report)
    if arguments.plot is not None:
        print(f"{arguments.plot} written")


def _measured(
    loaded: LoadedModel,
    compared: Sequence[Chosen],
    device: torch.device,
    arguments: argparse.Namespace,
) -> GradientReport:
    with quiet(), autocast_of(arguments, device):
        try:
            return gradient_error(
                loaded.model,
                loaded.batch,
                *compared,
                loss=loaded.loss,
                draws=arguments.draws,
                strict=arguments.strict,
                functional=arguments.functional,
                rest=rest_of(arguments),
                head=arguments.head,
            )
        except PacklightError as error:
            raise with_options(error) from error
        except Exception as error:  # someone's model: anything can happen
            raise InputError(f"a pass of {loaded.text} failed: {brief(error)}") from error
