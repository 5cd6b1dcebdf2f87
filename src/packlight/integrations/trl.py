"""TRL: options of packlight among those of a script, on its command line and in its YAML file.

    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, PacklightConfig))
    script, training, model, packlight = parser.parse_args_and_config()
    SFTTrainer(..., callbacks=packlight.callbacks())

and in the file, `packlight_methods: GroupQuant(4), FewBit(3)`, or on the command line,
`--packlight_methods "GroupQuant(4), FewBit(3)"`. `transformers.HfArgumentParser` takes it alike.
"""

import dataclasses
from typing import Any

from packlight.integrations._options import read_options
from packlight.integrations.transformers import PacklightCallback


def _option(text: str, default: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class PacklightConfig:
    """Options of packlight; `callbacks` makes of them what a trainer takes.

    Raises `InputError`, naming the option, for a value that it does not take, before a model is
    loaded.
    """

    packlight_methods: str | None = _option(
        "What keeps less, 'GroupQuant(4), FewBit(3)', or the path of a file of methods; 'off' for"
        " a training without packlight.",
        "default",
    )
    packlight_rest: str | None = _option("What becomes of the rest: a quantiser, 'None' or 'auto'.")
    packlight_head: str | None = _option("'true' for losses by chunks, or a selector of heads.")
    packlight_memory: str | None = _option("Plan for this peak: '22GiB', or a share, '0.3'.")
    packlight_device: str | None = _option("The card that the plan is for, 'RTX 4090'.")

    def __post_init__(self) -> None:
        self.callbacks()

    def callbacks(self) -> list[PacklightCallback]:
        """The callback for `Trainer(callbacks=)`; none with `packlight_methods="off"`."""
        if self.packlight_methods in ("off", False):  # to YAML a bare off is false
            return []
        given = {
            field.name.removeprefix("packlight_"): getattr(self, field.name)
            for field in dataclasses.fields(self)
        }
        return [PacklightCallback(**read_options(given, "trl"))]
