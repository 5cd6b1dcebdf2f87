"""A line of torchtitan's command; its way to a sharded model is in `tests/parallel/titan.py`."""

import copy

import pytest
import torch

import packlight
from packlight import GroupQuant

if torch.__version__ < "2.13":
    pytest.skip("torchtitan 0.3 is of torch 2.13", allow_module_level=True)

from torchtitan.config.manager import ConfigManager
from torchtitan.config.override import OverrideConfig, apply_overrides, parse_cli_imports
from torchtitan.models.common import RMSNorm
from torchtitan.models.common import linear as titan_linear
from torchtitan.models.llama3 import model_registry

LINE = "packlight.integrations.torchtitan.convert"


def titan(line):
    """A Llama of torchtitan's by a line of its command, and the configuration it had before."""
    spec = model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:1]
    config = spec.model
    entries = parse_cli_imports([line])
    apply_overrides(OverrideConfig(imports=entries), spec)
    return config, spec.model


def test_a_line_of_torchtitan_converts():
    before, config = titan(f'{LINE}={{"methods": "GroupQuant(4)"}}')
    assert config is before  # the trainer has a name for it
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    with torch.device("meta"):
        model = config.build()
    model.verify_module_protocol()
    for layer, plain in [(model.lm_head, titan_linear.Linear), (model.norm, RMSNorm)]:
        assert isinstance(layer, plain)
        assert layer.method == GroupQuant(4)
    exact = model_registry("debugmodel").model
    exact.layers = exact.layers[:1]
    with torch.device("meta"):
        plain = exact.build()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert packlight.revert(model) > 0
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_its_command_takes_the_line():
    given = ["--module", "llama3", "--config", "llama3_debugmodel", "--override.imports"]
    given += [f'{LINE}={{"methods": "GroupQuant(4), FewBit(3)"}}', "activation-checkpoint:none"]
    config = ConfigManager().parse_args(given)
    config.model_spec.model.layers = config.model_spec.model.layers[:1]
    (said,) = apply_overrides(config.override, config)
    assert said.startswith(f"[Override] {LINE}: model_spec.model Llama3Model.Config")
    with torch.device("meta"):
        model = config.model_spec.model.build()
    assert model.norm.method == GroupQuant(4)
    assert config.activation_checkpoint is None


def test_a_layer_of_torchtitan_with_a_forward_of_its_own_stays():
    config = {"in_features": 64, "out_features": 64, "bias": True}
    kinds = (titan_linear.Linear, titan_linear.ScaledBiasRowwiseLinear)
    layers = torch.nn.Sequential(*(kind.Config(**config).build() for kind in kinds))
    conversion = packlight.convert(layers, GroupQuant(4), functional=False)
    assert [row.names for row in conversion.replaced] == [("0",)]
    assert [row.names for row in conversion.skipped] == [("1",)]


def test_torchtitan_names_a_wrong_option():
    with pytest.raises(packlight.InputError, match="torchtitan: packlight has no option 'metods'"):
        titan(f'{LINE}={{"metods": "GroupQuant(4)"}}')
    with pytest.raises(packlight.InputError, match=r"no option memory .* as torchtitan converts"):
        titan(f'{LINE}={{"memory": 0.3}}')
    with pytest.raises(packlight.InputError, match="no option head here: torchtitan has losses"):
        titan(f'{LINE}={{"head": true}}')
