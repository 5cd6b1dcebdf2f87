"""Train a small GPT on real text, with plain PyTorch and with packlight's methods, and compare.

Nothing in it knows of packlight but `VARIANTS` (`model.py`), which says how each run changes the
model, and `kept_bytes` (`training.py`), which asks `packlight.profile` what the model keeps for the
backward pass.

    packlight demo                    # a run a method, a table, a picture
    packlight demo --bits 2 --seed 1
"""

from packlight.cli.demo.comparison import check_length, run
from packlight.cli.demo.model import GPT, MLP, VARIANTS
from packlight.cli.demo.picture import (
    GELU_COLOUR,
    OTHER_COLOURS,
    RUN_COLOURS,
    save_picture,
    smoothed,
)
from packlight.cli.demo.report import gelu_elements, print_report
from packlight.cli.demo.settings import DEFAULTS, Settings, check_device, make_settings
from packlight.cli.demo.text import (
    Text,
    load_text,
    training_batches,
    validation_batches,
    windows,
)
from packlight.cli.demo.training import Result, learning_rate, loss_of, train

__all__ = [
    "DEFAULTS",
    "GELU_COLOUR",
    "GPT",
    "MLP",
    "OTHER_COLOURS",
    "RUN_COLOURS",
    "VARIANTS",
    "Result",
    "Settings",
    "Text",
    "check_device",
    "check_length",
    "gelu_elements",
    "learning_rate",
    "load_text",
    "loss_of",
    "make_settings",
    "print_report",
    "run",
    "save_picture",
    "smoothed",
    "train",
    "training_batches",
    "validation_batches",
    "windows",
]
