"""Models by a text, as the command line takes them: made on the meta device, with their inputs.

A text is `hf:TYPE` (a model of transformers with the default configuration of its type), a
directory with a `config.json`, `hf:OWNER/NAME` (the configuration on the Hugging Face hub), or
`MODULE:NAME` (Python: a module, or a function that returns one, alone or with its inputs). Weights
are never read.
"""

from packlight.cli.models.failures import brief
from packlight.cli.models.inputs import DTYPES, Inputs, Shape, parse_inputs, parse_value
from packlight.cli.models.loaded import LoadedModel
from packlight.cli.models.loading import load_model
from packlight.cli.models.transformers import TASKS

__all__ = [
    "DTYPES",
    "TASKS",
    "Inputs",
    "LoadedModel",
    "Shape",
    "brief",
    "load_model",
    "parse_inputs",
    "parse_value",
]
