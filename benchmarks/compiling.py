"""How long a model takes to compile, and its steps then, beside the plain model.

    python -m benchmarks.compiling llama functional [--layers 4] [--device cuda] [--backend NAME]

Prints one line of JSON: CPU seconds of the first step (the process's own and those of compilers
that it starts), milliseconds of a step, and the cosine of its gradient with the uncompiled plain
model's. A process measures one model in one way, since a second compilation finds much done; with
`--launched` the model takes a launched step before, so Triton has its kernels already.
"""

import argparse
import copy
import fcntl
import json
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import packlight

WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "default": {},
    "functional": {"functional": True},
}


def model_of(name: str, layers: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    heads = max(2, width // 64)
    common: dict[str, Any] = {"vocab_size": 1024, "use_cache": False}
    models: Any = transformers
    if name == "llama":
        config = models.LlamaConfig(
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            **common,
        )
        return models.LlamaForCausalLM(config)  # type: ignore[no-any-return]
    if name == "gpt2":
        config = models.GPT2Config(n_embd=width, n_layer=layers, n_head=heads, **common)
        return models.GPT2LMHeadModel(config)  # type: ignore[no-any-return]
    config = models.T5Config(
        d_model=width,
        d_kv=64,
        d_ff=2 * width,
        num_layers=layers // 2,
        num_heads=heads,
        decoder_start_token_id=0,
        **common,
    )
    return models.T5ForConditionalGeneration(config)  # type: ignore[no-any-return]


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("llama", "gpt2", "t5"))
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs=2, default=(8, 512))
    parser.add_argument("--second", type=int, nargs=2, help="a second shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turn", help="a file that processes lock while they time steps")
    parser.add_argument("--launched", action="store_true", help="a launched step before")
    given = parser.parse_args()

    def step(run: Any, shape: tuple[int, int]) -> None:
        torch.manual_seed(1)
        ids = torch.randint(0, 1024, tuple(shape), device=given.device)
        with torch.autocast(given.device, dtype=torch.bfloat16):
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()

    def done() -> None:
        if given.device == "cuda":
            torch.cuda.synchronize()

    plain = model_of(given.model, given.layers, given.width).to(given.device).train()
    for module in plain.modules():  # so that gradients can be compared
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if given.model == "gpt2":
        blocks: Any = plain.transformer
        for block in blocks.h:
            block.attn.config.attn_pdrop = 0.0
    model: Any = copy.deepcopy(plain)
    options = WAYS[given.way]
    if options is not None:
        packlight.convert(model, packlight.GroupQuant(bits=4), **options)
    compiled = torch.compile(model, backend=given.backend)
    step(plain, given.tokens)
    if given.launched:
        step(model, given.tokens)
    done()

    start, clock = cpu_seconds(), time.perf_counter()
    step(compiled, given.tokens)
    if given.second:
        step(compiled, given.second)
        step(compiled, given.second)
    done()
    seconds, wall = cpu_seconds() - start, time.perf_counter() - clock

    model.zero_grad()
    step(compiled, given.tokens)
    ours, theirs = (
        torch.cat([p.grad.flatten().double() for p in each.parameters() if p.grad is not None])
        for each in (model, plain)
    )
    cosine = float(nn.functional.cosine_similarity(ours, theirs, dim=0))

    turn = None if given.turn is None else Path(given.turn).open("w")  # noqa: SIM115
    if turn is not None:
        fcntl.flock(turn, fcntl.LOCK_EX)
    times = []
    for _ in range(given.steps):
        clock = time.perf_counter()
        step(compiled, given.tokens)
        done()
        times.append(1000 * (time.perf_counter() - clock))
    row = {
        "model": given.model,
        "way": given.way,
        "layers": given.layers,
        "launched": given.launched,
        "backend": given.backend,
        "compile_cpu_s": round(seconds, 2),
        "compile_wall_s": round(wall, 2),
        "step_ms": round(statistics.median(times), 3),
        "cosine": round(cosine, 6),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "threads": os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", ""),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
