"""A backward pass in two, for a block's input and for its weights, beside the whole one.

Zero-bubble schedules of a pipeline run them so. Prints a line of JSON for each way. The pass of the
weights starts at nodes of Functions, which torch 2.11 refuses; it is null there.

    python -m benchmarks.user.split_backward
"""

import argparse
import json
import statistics
import time

import torch
import transformers
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

import packlight
from packlight import GroupQuant, _torch

NEWER = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)


def block_of(width: int, heads: int):
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=8,
    )
    torch.manual_seed(0)
    model = transformers.LlamaModel(config).train()
    return model.layers[0], model.rotary_emb


def timed(function, kind: str) -> float:
    if kind == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if kind == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def measure(block, turns, shape, kind, dtype, rounds, is_eager):
    """Median milliseconds of the whole pass, of that of the input and of that of the weights."""
    x = torch.randn(shape, device=kind, dtype=dtype, requires_grad=True)
    dy = torch.randn(shape, device=kind, dtype=dtype)
    whole, of_input, of_weights = [], [], []
    gradients = []
    for _ in range(rounds):
        block.zero_grad()
        x.grad = None
        packlight.manual_seed(1)
        y = block(x, position_embeddings=turns)
        whole.append(timed(lambda y=y: y.backward(dy), kind))
        of_x = x.grad
        gradients = [p.grad for p in block.parameters()]
        block.zero_grad()
        x.grad = None
        packlight.manual_seed(1)
        y, groups = block(x, position_embeddings=turns), []

        def for_input(y=y, groups=groups):
            groups.extend(stage_backward_input([y], [dy], [x], block.parameters())[1])

        of_input.append(timed(for_input, kind))
        found = [(x.grad, of_x)]
        if NEWER or is_eager:
            weights = block.parameters()
            of_weights.append(
                timed(lambda to=weights, groups=groups: stage_backward_weight(to, groups), kind)
            )
            found += zip([p.grad for p in block.parameters()], gradients, strict=True)
    worst = max(float((a - b).float().norm() / b.float().norm()) for a, b in found)
    times = (each[rounds // 3 :] for each in (whole, of_input, of_weights))
    return worst, *(round(statistics.median(each), 3) if each else None for each in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    shape = (options.batch, options.tokens, options.width)
    for way in ("eager", "packs", "packs, not asked"):
        block, rotary = block_of(options.width, options.width // 64)
        block, rotary = block.to(kind, dtype), rotary.to(kind)
        places = torch.arange(options.tokens, device=kind)[None]
        turns = rotary(torch.empty(0, device=kind, dtype=dtype), places)
        if way != "eager":
            packlight.convert(block, GroupQuant())
        values = _torch.NEEDED.values
        if way == "packs, not asked":
            _torch.NEEDED.values = None
        worst, whole, of_input, of_weights = measure(
            block, turns, shape, kind, dtype, options.rounds, way == "eager"
        )
        _torch.NEEDED.values = values
        row = {
            "case": "split_backward", "way": way, "shape": shape, "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if kind == "cuda" else "cpu",
            "whole_ms": whole, "of_input_ms": of_input, "of_weights_ms": of_weights,
            "worst_difference": worst,
        }  # fmt: skip
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
