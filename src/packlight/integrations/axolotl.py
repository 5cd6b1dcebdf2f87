"""Axolotl: two keys of its YAML file convert the model that it trains.

    plugins:
      - packlight.integrations.axolotl.PacklightPlugin
    packlight:
      methods: GroupQuant(4), FewBit(3)
      head: true

The plugin hands Axolotl's trainer the callback of `packlight.integrations.transformers`. So the
model is converted when it has its adapters and before anything is wrapped around it, whichever
trainer Axolotl takes, and checkpoints, logs and resumed trainings are as with that callback.
"""

from typing import Any

from pydantic import BaseModel, field_validator

from packlight.integrations._options import imported, read_options
from packlight.integrations.transformers import PacklightCallback

_ENGINE = "axolotl"
# Axolotl turns these on by itself. They are forwards on the instances of layers, which keep what
# they keep.
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class PacklightArgs(BaseModel):
    """The key `packlight` of a configuration of Axolotl's."""

    packlight: dict[str, Any] | None = None

    @field_validator("packlight")
    @classmethod
    def _is_readable(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        read_options(given, _ENGINE)  # raises where the configuration is read
        return given


class PacklightPlugin(imported("axolotl.integrations.base").BasePlugin):  # type: ignore[misc]
    """Converts the model that Axolotl trains, by the options below the key `packlight`.

    `methods` (a text or the path of a file), `rest`, `head`, `functional`, `exact_ends`, `strict`,
    `memory`, `device`, `measure`, `report` and `revert_at_end` are as for
    `packlight.integrations.transformers.PacklightCallback`.

    Axolotl's own kernels for LoRA, which it turns on where a configuration says nothing of them,
    stay off: they keep activations exactly. With one that is turned on, `convert` refuses the layer
    that it is in, and says so.

    Raises `InputError`, naming the option, for one that is unknown or has a wrong value.
    """

    def register(self, cfg: Any) -> None:
        for name in _KERNELS:
            if cfg.get(name) is None:
                cfg[name] = False

    def get_input_args(self) -> str:
        return f"{__name__}.{PacklightArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[PacklightCallback]:
        return [PacklightCallback(**read_options(cfg.get("packlight"), _ENGINE))]
