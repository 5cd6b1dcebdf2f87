"""The errors of gradients by which plans are chosen are those that a model has."""

import pytest
import torch
from torch import Tensor, nn

import packlight
from packlight.planner import menu


def _gradients(model: nn.Module, ids: Tensor) -> Tensor:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def language() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=512, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).train(), torch.randint(
        0, 512, (2, 64)
    )


@pytest.mark.parametrize(
    ("option", "outside"),
    [
        (menu.EXACT, menu.EXACT),
        (menu.CHECKPOINTED, menu.EXACT),
        (menu.OFFLOADED, menu.EXACT),
        (menu.CHECKPOINTED_8, menu.EXACT),
        (menu.PACKED_8, menu.PACKED_8),
        (menu.PACKED_4, menu.PACKED_4),
        (menu.PACKED_3, menu.PACKED_3),
        (menu.PACKED_2, menu.PACKED_2),
        (menu.OFFLOADED_TILED, menu.PACKED_4),
    ],
    ids=lambda option: option.name,
)
def test_errors_are_those_of_a_language_model(
    language: tuple[nn.Module, Tensor], option: menu.Option, outside: menu.Option
) -> None:
    model, ids = language
    exact = _gradients(model, ids)
    blocks = [f"model.layers.{index}" for index in range(8)]
    methods = menu.selectors(dict.fromkeys(blocks, option), outside)
    if any(choice is not None for choice in methods.values()):
        packlight.convert(model, methods, functional=True, strict=False)
    torch.manual_seed(0)
    error = float((_gradients(model, ids) - exact).norm() / exact.norm())
    packlight.revert(model)
    assert error == pytest.approx(option.error, rel=0.2, abs=1e-6)
