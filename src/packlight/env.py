"""`python -m packlight.env`: what a bug report needs to say about the machine.

The versions of packages other than torch come from their metadata, without importing them.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import torch

from packlight import _torch
from packlight._library import kernels_available
from packlight._version import __version__

PACKAGES = (
    *("triton", "numpy", "scipy", "rich", "matplotlib"),
    *("transformers", "peft", "accelerate", "lightning", "timm", "torchvision"),
)

# Those that change which code runs or how much memory is held.
VARIABLES = (
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
)


def collect() -> dict[str, Any]:
    """Strings, and dictionaries and lists of strings: the answers by their names."""
    return {
        "packlight": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch built for": _build(),
        "cuDNN": str(torch.backends.cudnn.version() or "none"),
        "NVIDIA driver": _driver(),
        "GPUs": [_gpu(index) for index in range(torch.cuda.device_count())] or "none",
        "kernels": _kernels(),
        "packages": {name: _version(name) for name in PACKAGES},
        "capabilities": {
            each.name: "yes" if each else f"no: {each.without}" for each in _torch.CAPABILITIES
        },
        "environment": {name: os.environ.get(name, "not set") for name in VARIABLES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    memory = f"{properties.total_memory / 2**30:.1f} GiB"
    return f"{properties.name}, compute capability {capability}, {memory}"


def _driver() -> str:
    """The driver's version, which torch does not know."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "nvidia-smi not found"
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {error}"
    versions = sorted(set(answer.stdout.split("\n")) - {""})
    return ", ".join(version.strip() for version in versions) or "none"


def _kernels() -> str:
    """Whether packlight's operators run as Triton kernels here, and why not."""
    if not torch.cuda.is_available():
        return "not used: no CUDA device"
    return "used" if kernels_available() else "not used: Triton is not installed"


def as_text() -> str:
    """The answers as lines of a name and a value."""
    lines = []
    for name, answer in collect().items():
        if isinstance(answer, dict):
            lines += [f"{inner}: {value}" for inner, value in answer.items()]
        elif isinstance(answer, list):
            lines += [f"GPU {index}: {value}" for index, value in enumerate(answer)]
        else:
            lines.append(f"{name}: {answer}")
    return "\n".join(lines) + "\n"


def as_json() -> str:
    """The answers as a JSON object."""
    return json.dumps(collect(), indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m packlight.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="as JSON")
    sys.stdout.write(as_json() if parser.parse_args().json else as_text())


if __name__ == "__main__":
    main()
