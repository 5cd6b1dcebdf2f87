"""The demo's settings: what its runs have in common."""

import dataclasses

import torch

from packlight.errors import InputError
from packlight.fewbit.method import check_bits

# On 2 CPU cores under 2 minutes for all runs.
DEFAULTS = {
    "cpu": {"steps": 70, "layers": 4, "width": 128, "heads": 4, "context": 128, "batch": 16},
    "cuda": {"steps": 400, "layers": 12, "width": 768, "heads": 12, "context": 512, "batch": 32},
}


# Of any of the choices; what does not fit into memory is found out later.
_MOST = 10**6


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the two runs have in common. Raises `InputError` for values that cannot work."""

    steps: int
    layers: int
    width: int
    heads: int
    context: int
    batch: int
    bits: int
    device: str
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "layers", "width", "heads", "context", "batch"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name}={value} is not a positive whole number")
            if value > _MOST:
                raise InputError(f"{name}={value} is too large; expected at most {_MOST}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed} is not a whole number from 0 to 2^63 - 1")
        if self.width % self.heads:
            raise InputError(
                f"width={self.width} is not divisible by heads={self.heads}; "
                "choose a multiple, or another number of heads"
            )
        check_bits(self.bits)

    @property
    def autocast(self) -> bool:
        """Whether to compute in bfloat16: on GPUs that have it."""
        return self.device != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False)


def make_settings(
    device: str | None = None, bits: int = 3, seed: int = 0, **choices: int | None
) -> Settings:
    """Settings with the device's defaults for every choice left out or None."""
    name = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = {key: value for key, value in choices.items() if value is not None}
    values = {**DEFAULTS["cpu" if name == "cpu" else "cuda"], **chosen}
    return Settings(**values, bits=bits, device=name, seed=seed)


def check_device(name: str) -> str:
    """`name` if this machine has that device, else an `InputError`."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device={name!r} is not a device of this demo; use cpu, cuda or cuda:1")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(
            f"device={name!r} does not exist: PyTorch sees {count} CUDA devices; "
            "use another one or cpu"
        )
    return "cpu" if device.type == "cpu" else name
