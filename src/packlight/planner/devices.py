"""What the planner knows of devices: figures of data sheets, and what of them kernels reach."""

import dataclasses
import functools
import json
import os
import pathlib
import re
from typing import Any, Self

import torch

from packlight._files import read_text, write_text
from packlight.errors import InputError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device and its host reach, measured by `packlight calibrate`.

    - `factors`: by operators, how many times as long they take as the figures of the data sheet
      say: the longer of arithmetic and traffic. Attention has one for either.
    - `others`, `others_packlight`: the same for operators that are not listed.
    - `copies`: the same for copies between the device and pinned memory of the host.
    - `kernel_us`: from one kernel to the next, where they compute next to nothing.
    - `host_us`, `host_us_packlight`, `module_us`: of the CPU, for an operator and for a call of a
      module.
    - `hooks_us`: what an operator takes more where hooks see what it saves, as in checkpoints.
    - `workspace`: bytes that cuBLAS takes at its first product and holds.
    - `source`: which device, which versions.
    """

    factors: dict[str, float] = dataclasses.field(hash=False)
    others: float
    others_packlight: float
    copies: float
    kernel_us: float
    host_us: float
    host_us_packlight: float
    module_us: float
    hooks_us: float
    workspace: int
    source: str

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(**data)


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU: its figures by its data sheet, and the rates that it reaches.

    `flops` are operations a second of products by the dtype's bits, `bandwidth` and `link`, which
    is to the host one way, bytes a second.
    """

    name: str
    memory: int
    bandwidth: float
    link: float
    flops_16: float
    flops_32: float
    multiprocessors: int
    rates: Rates
    measured: bool

    def flops(self, dtype: torch.dtype) -> float:
        return self.flops_16 if dtype in (torch.float16, torch.bfloat16) else self.flops_32


# Data sheets: GiB that CUDA shows, TB/s, GB/s of PCIe one way, dense TFLOP/s of 16 bits with sums
# in float32, and of float32 without TF32, which torch leaves off, and multiprocessors.
_SHEETS = {
    "H200": (139.8, 4.8, 63, 989, 67, 132),
    "H100": (79.1, 3.35, 63, 989, 67, 132),
    "B200": (178.3, 8.0, 63, 2250, 75, 148),
    "A100 80GB": (79.1, 2.04, 31.5, 312, 19.5, 108),
    "A100 40GB": (39.4, 1.56, 31.5, 312, 19.5, 108),
    "A6000": (47.4, 0.768, 31.5, 155, 38.7, 84),
    "L40S": (44.4, 0.864, 31.5, 362, 91.6, 142),
    "L4": (22.0, 0.3, 31.5, 121, 30.3, 58),
    "A10G": (22.1, 0.6, 31.5, 70, 35, 80),
    "T4": (14.6, 0.32, 15.8, 65, 8.1, 40),
    "RTX 5090": (31.4, 1.79, 63, 210, 105, 170),
    "RTX 4090": (23.5, 1.01, 31.5, 165, 82.6, 128),
    "RTX 4080": (15.6, 0.717, 31.5, 97, 48.7, 76),
    "RTX 4070 Ti": (11.6, 0.504, 31.5, 80, 40.1, 60),
    "RTX 4060 Ti 16GB": (15.6, 0.288, 15.8, 44, 22.1, 34),
    "RTX 3090": (23.6, 0.936, 31.5, 71, 35.6, 82),
    "RTX 3060": (11.6, 0.36, 31.5, 25, 12.7, 28),
}
_FORM = 3  # of `Rates`, so that files of other forms are not read
_DATA = pathlib.Path(__file__).with_name("rates.json")
# The workspace of cuBLAS and cuBLASLt: 32 MiB each on Hopper and later, 8 MiB and a bit before.
_WORKSPACE = 2 * 2**25
_WORKSPACE_BEFORE = 2 * 8519680
_BY_HOPPER = ("H200", "H100", "B200")
_MEASURED = "H200"  # whose rates others are given


def device_of(text: str | None) -> Device:
    """A device by its name, by bytes ("24GiB", of a device like an H200), or that which is here."""
    if text is None:
        if not torch.cuda.is_available():
            raise InputError(
                "there is no GPU here to plan for; name one: " + ", ".join(_SHEETS) + ", or a"
                " number of bytes, 24GiB"
            )
        return _present()
    # "4090" is a card, and not so many bytes.
    is_card = re.fullmatch(r"\d{4}", text) and any(text in name for name in _SHEETS)
    if not is_card and (size := parse_bytes(text)) is not None:
        if size < 2**20:
            raise InputError(f"a device of {size} bytes trains nothing; say which unit, as 24GiB")
        return dataclasses.replace(_named(_MEASURED), name=text, memory=size, measured=False)
    wanted = _squeezed(text)
    names = [name for name in _SHEETS if _squeezed(name) == wanted] or [
        name for name in _SHEETS if wanted in _squeezed(name) or _squeezed(name) in wanted
    ]
    if not names:
        raise InputError(
            f"unknown device {text!r}; known: {', '.join(_SHEETS)}; or a number of bytes, 24GiB"
        )
    return _named(names[0])


def _squeezed(text: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", text.lower())


def _named(name: str) -> Device:
    gib, bandwidth, link, flops_16, flops_32, multiprocessors = _SHEETS[name]
    known = _known_rates()
    rates = known.get(name)
    measured = rates is not None
    if rates is None:
        workspace = _WORKSPACE if name in _BY_HOPPER else _WORKSPACE_BEFORE
        rates = dataclasses.replace(known[_MEASURED], workspace=workspace)
    speeds = (1e12 * bandwidth, 1e9 * link, 1e12 * flops_16, 1e12 * flops_32)
    return Device(name, int(gib * _GIB), *speeds, multiprocessors, rates, measured)


def _present() -> Device:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        found = device_of(properties.name)
    except InputError:
        found = dataclasses.replace(_named(_MEASURED), name=properties.name, measured=False)
    return dataclasses.replace(found, memory=properties.total_memory)


@functools.cache
def _known_rates() -> dict[str, Rates]:
    """Rates that ship, and over them those that were calibrated here."""
    own = cache()
    found: dict[str, Any] = json.loads(read_text(own)) if own.exists() else {}
    return _shipped() | {name: Rates.from_dict(data) for name, data in found.items()}


def _shipped() -> dict[str, Rates]:
    found: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))
    return {name: Rates.from_dict(data) for name, data in found.items()}


def shipped_rates() -> Rates:
    """Those by which devices are judged that nobody has calibrated."""
    return _shipped()[_MEASURED]


def cache() -> pathlib.Path:
    """The file of rates that were calibrated here."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    version = torch.__version__.split("+")[0]
    return pathlib.Path(base, "packlight", f"rates-{_FORM}-torch{version}.json")


def save_rates(name: str, rates: Rates, path: pathlib.Path) -> None:
    known = json.loads(read_text(path)) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**known, name: dataclasses.asdict(rates)}, indent=1) + "\n")
    _known_rates.cache_clear()


_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}


def parse_bytes(text: str) -> int | None:
    """The bytes that a text such as "22GiB" says; None for any other text."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = None if found is None else _UNITS.get(found[2].lower())
    return None if found is None or unit is None else int(float(found[1]) * unit)
