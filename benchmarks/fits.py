"""The table of docs/fit.md: which card is enough for which model, and by what.

    python -m benchmarks.fits > table.md

Nothing runs on a GPU: models are made without values and their steps are walked. A cell says what
the plainest choice is that fits; "-" where none does. Shapes are those of the configurations that
are published with the models; text models have no mask and one sequence of 2048 tokens, bfloat16
weights and fused AdamW where all weights are trained, and LoRA of rank 16 on all Linears else.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from packlight.cli.models import load_model, parse_inputs
from packlight.planner.adapted import in_4_bits, lora_settings, with_lora
from packlight.planner.devices import device_of
from packlight.planner.fit import choices, usable
from packlight.planner.optimizers import OPTIMIZERS
from packlight.planner.study import Study
from packlight.report.words import human_bytes

CARDS = ("RTX 4060 Ti 16GB", "RTX 4090", "L40S", "H100", "H200")


class Row(NamedTuple):
    title: str
    kind: str
    shape: dict[str, Any]
    inputs: str = "batch=1,sequence=2048"
    trained: str = "all"  # or "LoRA", or "QLoRA": adapters on weights of 4 bits
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = False


def _llama(
    hidden: int, inner: int, layers: int, heads: int, groups: int, words: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": words,
        "max_position_embeddings": 131072, "use_cache": False,
    }  # fmt: skip


_SMALL = _llama(2048, 8192, 16, 32, 8, 128256)
_SMOL = _llama(2048, 8192, 24, 32, 32, 49152)
_8B = _llama(4096, 14336, 32, 32, 8, 128256)
_70B = _llama(8192, 28672, 80, 64, 8, 128256)
_QWEN_7B = _llama(3584, 18944, 28, 28, 4, 152064)
_QWEN_HALF = _llama(896, 4864, 24, 14, 2, 151936)
_IMAGES = "batch=64"

ROWS = (
    Row("RoBERTa-base, 32 x 128, autocast", "roberta", {"max_position_embeddings": 514},
        "batch=32,sequence=128", dtype=torch.float32, autocast=True),
    Row("GPT-2 medium, 4 x 1024, autocast", "gpt2",
        {"n_embd": 1024, "n_layer": 24, "n_head": 16, "use_cache": False},
        "batch=4,sequence=1024", dtype=torch.float32, autocast=True),
    Row("ViT-B/16, 64 images, autocast", "vit", {}, _IMAGES, dtype=torch.float32, autocast=True),
    Row("ViT-L/16, 64 images, autocast", "vit",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16}, _IMAGES, dtype=torch.float32, autocast=True),
    Row("Qwen2.5-0.5B", "qwen2", _QWEN_HALF),
    Row("Llama-3.2-1B", "llama", _SMALL),
    Row("SmolLM2-1.7B", "llama", _SMOL),
    Row("Qwen2.5-7B, LoRA", "qwen2", _QWEN_7B, trained="LoRA"),
    Row("Qwen2.5-7B, QLoRA", "qwen2", _QWEN_7B, trained="QLoRA"),
    Row("Llama-3.1-8B, LoRA", "llama", _8B, trained="LoRA"),
    Row("Llama-3.1-8B, QLoRA", "llama", _8B, trained="QLoRA"),
    Row("Llama-3.1-8B, LoRA, 8192 tokens", "llama", _8B, "batch=1,sequence=8192", "LoRA"),
    Row("Llama-3.1-70B, QLoRA", "llama", _70B, trained="QLoRA"),
)  # fmt: skip


def peaks(row: Row) -> dict[str, int]:
    """Bytes at the peak of each choice, the plainest first."""
    loaded = load_model(
        f"hf:{row.kind}", parse_inputs([row.inputs]), config=row.shape, dtype=row.dtype
    )
    model: nn.Module = loaded.model
    if row.trained == "QLoRA":
        in_4_bits(model)
    if row.trained != "all":
        model = with_lora(model, lora_settings({"r": "16"}))
    optimizer = OPTIMIZERS["adamw"]
    with torch.autocast("cpu", torch.bfloat16, enabled=row.autocast):
        study = Study(model, (), loaded.keywords, device_of("H100"), None, optimizer)
        return {
            choice.name: study.walked(choice.option, choice.outside, choice.head).timeline.peak
            for choice in choices(study.head, transformers=True)
        }


def main() -> None:
    cards = [device_of(card) for card in CARDS]
    words = {"PyTorch": "plain", "packlight, tiles": "tiles"}
    print(f"| model | {' | '.join(card.name for card in cards)} | peaks of the choices |")
    print("| --- " * (len(cards) + 2) + "|")
    for row in ROWS:
        found = peaks(row)
        cells = []
        for card in cards:
            room = usable(card.memory)
            fitting = [words.get(name, name) for name, peak in found.items() if peak <= room]
            cells.append(fitting[0] if fitting else "-")
        least = ", ".join(human_bytes(peak) for peak in found.values())
        print(f"| {row.title} | {' | '.join(cells)} | {least} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
