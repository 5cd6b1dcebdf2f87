"""What `packlight fit`, `packlight plan` and `packlight calibrate` do."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from packlight.cli.commands import autocast_of, loaded_model, quiet
from packlight.cli.models import DTYPES, LoadedModel, brief
from packlight.cli.models.transformers import positions
from packlight.errors import InfeasibleBudgetError, InputError, PacklightError
from packlight.parallel import Parallel
from packlight.planner import devices
from packlight.planner.adapted import in_4_bits, lora_settings, with_lora
from packlight.planner.fit import Fit, fit
from packlight.planner.optimizers import optimizer_of


def run_fit(arguments: argparse.Namespace) -> None:
    """`packlight fit`: does training fit, and how large may batch and sequence be."""
    device = devices.device_of(arguments.gpu)
    loaded = _loaded(arguments)
    found = _foretold(arguments, loaded, device)
    if arguments.plan is not None and found.plan is not None:
        found.plan.save(arguments.plan)
    if arguments.html is not None:
        from packlight.planner.page import write_fit

        write_fit(found, arguments.html)
    print(json.dumps(found.to_dict(), indent=1) if arguments.json else found)
    if arguments.plan is not None and found.plan is None:
        raise InfeasibleBudgetError(f"{arguments.plan} is not written, since no plan fits")


def _loaded(arguments: argparse.Namespace) -> LoadedModel:
    loaded = loaded_model(arguments)
    if arguments.load_in_4bit:
        in_4_bits(loaded.model)
    if arguments.lora is None:
        return loaded
    with quiet():
        adapted = with_lora(loaded.model, lora_settings(_settings(arguments.lora)))
    return LoadedModel(
        loaded.text, adapted, loaded.arguments, loaded.keywords, loaded.task, loaded.batch
    )


def _settings(text: str) -> dict[str, str]:
    """`r=16,targets=all-linear`."""
    found = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"--lora {part} is not NAME=VALUE, such as r=16")
        found[name.strip()] = value.strip()
    return found


def _foretold(arguments: argparse.Namespace, loaded: LoadedModel, device: devices.Device) -> Fit:
    try:
        with quiet(), autocast_of(arguments, torch.device("cpu")):
            return fit(
                _title(arguments, loaded),
                loaded.model,
                loaded.arguments,
                loaded.keywords,
                device,
                optimizer_of(arguments.optimizer),
                head=True if arguments.head else None,
                sizes=not arguments.quick,
                longest=positions(loaded.model)[1],
                plan_file=None if arguments.plan is None else str(arguments.plan),
                parallel=_parallel(arguments),
            )
    except PacklightError:
        raise
    except Exception as error:  # someone's model: anything can happen
        raise InputError(f"a step of {loaded.text} cannot be foretold: {brief(error)}") from error


def _parallel(arguments: argparse.Namespace) -> Parallel:
    given = {name: getattr(arguments, name) for name in _DEGREES}
    dtype = arguments.shard_dtype
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--shard-dtype {dtype} is none of {', '.join(DTYPES)}")
    return Parallel(
        **{name: value for name, value in given.items() if value is not None},
        sequence=not arguments.no_sequence,
        loss=not arguments.no_loss_parallel,
        reshard=not arguments.no_reshard,
        imbalance=arguments.imbalance,
        shard_dtype=None if dtype is None else DTYPES[dtype],
    )


_DEGREES = ("replicate", "shard", "tensor", "context", "pipeline", "microbatches", "expert")


def _title(arguments: argparse.Namespace, loaded: LoadedModel) -> str:
    # Two of 4 bits lie in a byte.
    count = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in loaded.model.parameters())
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    extras = [
        "weights of 4 bits" if arguments.load_in_4bit else "",
        f"LoRA {arguments.lora}" if arguments.lora is not None else "",
        f"autocast {arguments.autocast}" if arguments.autocast else "",
        arguments.optimizer,
    ]
    return (
        f"{loaded.text}: {type(loaded.model).__name__}, {count:,} parameters in"
        f" {' and '.join(loaded.dtypes)}, {trained:,} of them trained; {loaded.inputs_text};"
        f" {', '.join(filter(None, extras))}"
    )


def run_calibrate(arguments: argparse.Namespace) -> None:
    """`packlight calibrate`: measures the GPU that is here, and keeps what it finds."""
    from packlight.planner.calibrate import calibrate

    if not torch.cuda.is_available():
        raise InputError("there is no GPU here to measure")
    device = devices.device_of(None)
    path = Path(arguments.out) if arguments.out is not None else devices.cache()
    rates = calibrate(device)
    devices.save_rates(device.name, rates, path)
    summary: dict[str, Any] = {"device": device.name, "file": str(path), "source": rates.source}
    print(
        json.dumps(summary) if arguments.json else f"{device.name}: {rates.source}; {path} written"
    )
