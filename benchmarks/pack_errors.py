"""What packs cost gradients: by code and bits, on made-up tensors and on those of real models.

    python -m benchmarks.pack_errors --data shared/data/glue

Runs on a CPU in minutes. A row a code and case goes to `results/pack_errors.jsonl`:

- `normal`: a Linear's input of normal values. `error` is |dW~ - dW| / |dW|, here as everywhere.
- `outliers`: the same with 3% of the channels 60 times larger; `ordinary` is the error in the
  columns of the others.
- `mean`: normal values about 10; `error_squared` is that of a value, in variances.
- `MiniLM, Linears`: the inputs of the encoder's Linears on a batch of MRPC, fine-tuning's first,
  mean over layers; `of_minmax` is the share of the error of min-max codes at the same bits.
- `MiniLM, all gradients`: of the whole model converted by `GroupQuant` and `FewBit(3)`, covering
  calls, with `packlight.gradient_error`; `of_noise` is the error in the batch's own noise.
- `MiniLM, attention` and `GPT, attention`: errors of dq, dk and dv of attention that runs once more
  on its packs, mean over layers; at 8 bits also in the form that keeps the output and a statistic a
  row (`again` says which). The GPT is that of `packlight demo`, trained for a while.

Errors are of one draw: each is a norm over thousands of values.
"""

import argparse
import math
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import glue, rows
from packlight import FewBit, GroupQuant, gradient_error, manual_seed
from packlight.cli import Parser, demo
from packlight.layers.attention import scaled_dot_product_attention
from packlight.quantiser import new_pack

BITS = (4, 3, 2)
CODES: dict[str, dict[str, Any]] = {
    "minmax": {"code": "minmax", "rounding": "stochastic"},
    "offset": {"code": "minmax", "rounding": "offset"},
    "rotated": {"code": "rotated"},
    "scaled": {"code": "scaled"},
}
BATCH = 16
# Of the GPT whose attention is looked at.
GPT = {"layers": 4, "width": 192, "heads": 3, "context": 128, "batch": 8, "steps": 150}


def method(code: str, bits: int) -> GroupQuant:
    return GroupQuant(bits, **CODES[code])


def decoded(x: Tensor, keeps: GroupQuant) -> Tensor:
    pack = new_pack(x, keeps)
    return pack.rebuild(x.dtype, *pack.tensors)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


class Product(NamedTuple):
    """What a Linear read, and the gradient of what it made, as rows."""

    x: Tensor
    dy: Tensor

    def gradient(self, x: Tensor) -> Tensor:
        return self.dy.t() @ x


def error_of(product: Product, keeps: GroupQuant, columns: Tensor | slice = slice(None)) -> float:
    """Of the weight gradient, in these columns."""
    found = product.gradient(decoded(product.x, keeps))
    return relative(found[:, columns], product.gradient(product.x)[:, columns])


def errors_of(products: Sequence[Product], keeps: GroupQuant) -> float:
    return statistics.fmean(error_of(product, keeps) for product in products)


# --- Tensors that are made up.


def normal(width: int = 512, tokens: int = 1024) -> Product:
    generator = torch.Generator().manual_seed(0)
    return Product(*(torch.randn(tokens, n, generator=generator) for n in (width, width // 2)))


def with_outliers(product: Product) -> tuple[Product, Tensor]:
    """3% of the channels 60 times larger, and which channels the others are."""
    width = product.x.shape[1]
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(1))[: width * 3 // 100]
    scale = torch.ones(width)
    scale[chosen] = 60
    return product._replace(x=product.x * scale), scale == 1


def made_up(keeps: GroupQuant) -> dict[str, dict[str, float]]:
    """Errors by case."""
    product = normal()
    outliers, ordinary = with_outliers(product)
    far = product.x + 10
    squared = (decoded(far, keeps) - far).square().mean() / far.var()
    return {
        "normal": {"error": error_of(product, keeps)},
        "outliers": {
            "error": error_of(outliers, keeps),
            "ordinary": error_of(outliers, keeps, ordinary),
        },
        "mean": {"error_squared": float(squared)},
    }


# --- Tensors of models.


def linears(model: nn.Module, loss: Callable[[], Tensor]) -> list[Product]:
    """Inputs and gradients of the model's Linears in a pass."""
    found: list[list[Tensor]] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)
        found.append([x])
        output.register_hook(lambda dy, own=found[-1]: own.append(dy.flatten(0, -2)))

    hooks = [m.register_forward_hook(look) for m in model.modules() if type(m) is nn.Linear]
    loss().backward()
    for hook in hooks:
        hook.remove()
    return [Product(*pair) for pair in found]


class Call(NamedTuple):
    """A call of attention: query, key, value and mask, whether it is causal, and the gradient."""

    inputs: list[Tensor | None]
    is_causal: bool
    dy: Tensor

    def gradients(self, keeps: GroupQuant | None, again: bool | None = None) -> list[Tensor]:
        *parts, mask = self.inputs
        given = [part.detach().requires_grad_() for part in parts if part is not None]
        if keeps is None:
            y = F.scaled_dot_product_attention(*given, mask, is_causal=self.is_causal)
        else:
            y = scaled_dot_product_attention(
                *given, mask, is_causal=self.is_causal, method=keeps, recompute=again
            )
        return list(torch.autograd.grad(y, given, self.dy))


@contextmanager
def watched(calls: list[list[Any]]) -> Iterator[None]:
    """Has calls of torch's attention noted, and the gradients of what they made."""
    torchs = F.scaled_dot_product_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **given: Any
    ) -> Any:
        y = torchs(q, k, v, attn_mask, **given)
        calls.append([[q, k, v, attn_mask], bool(given.get("is_causal"))])
        y.register_hook(calls[-1].append)
        return y

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = torchs


def attentions(loss: Callable[[], Tensor]) -> list[Call]:
    calls: list[list[Any]] = []
    with watched(calls):
        loss().backward()
    return [Call(*call) for call in calls]


def attention_errors(
    calls: Sequence[Call], keeps: GroupQuant, again: bool | None = None
) -> dict[str, float]:
    errors: dict[str, list[float]] = {"dq": [], "dk": [], "dv": []}
    for call in calls:
        pairs = zip(call.gradients(keeps, again), call.gradients(None), strict=True)
        for own, (dx, exact) in zip(errors.values(), pairs, strict=True):
            own.append(relative(dx, exact))
    return {name: statistics.fmean(own) for name, own in errors.items()}


def minilm(data: pathlib.Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """MiniLM with a new classifier, without dropout, and a batch of MRPC."""
    packed = data.suffix == ".npz"
    arrays = {} if packed else glue.tokenised(data, glue.minilm(), ["mrpc"])
    store = glue.Store.read(data) if packed else glue.Store(arrays)
    batch = next(glue.batches(store.split("mrpc", "train"), np.arange(BATCH), "cpu"))
    return store.model(0).eval(), batch


def shares_of_noise(
    model: nn.Module, batch: dict[str, Tensor], keeps: Sequence[GroupQuant]
) -> list[dict[str, float]]:
    """The error of all gradients of a converted model, and that in the batch's own noise."""
    conversions = [(one, FewBit(3)) for one in keeps]
    report = gradient_error(model.train(), batch, *conversions, draws=1, functional=True)
    whole = report.whole
    return [
        {"error": weights.error, "of_noise": whole.of_noise(number) or math.nan}
        for number, weights in enumerate(whole.weights)
    ]


def gpt() -> Callable[[], Tensor]:
    """The loss of a GPT that has trained for a while, on held-out text."""
    text, settings = demo.load_text(), demo.make_settings("cpu", seed=0, **GPT)
    trained: list[nn.Module] = []
    demo.train(lambda model, _: trained.append(model), text, settings)
    for block in trained[0].blocks:  # torch's function as it is when it is called
        block.attention.attend = lambda *given, **named: F.scaled_dot_product_attention(
            *given, **named
        )
    inputs, targets = demo.validation_batches(text, settings)[0]
    return lambda: demo.loss_of(trained[0](inputs), targets)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmarks.pack_errors", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        help="folder of mrpc-*.parquet, or what benchmarks.glue --repack wrote",
    )
    parser.add_argument("--gpt", action="store_true", help="train the GPT too, in two minutes")
    parser.add_argument("--codes", nargs="+", default=[*CODES], choices=[*CODES])
    parser.add_argument("--bits", nargs="+", type=int, default=[*BITS], choices=BITS)
    parser.add_argument("--out", type=pathlib.Path, default=rows.RESULTS / "pack_errors.jsonl")
    options = parser.parse_args(argv)
    manual_seed(0)
    run(options)


def run(options: argparse.Namespace) -> None:
    settings = rows.settings("cpu")
    combinations = [(code, bits) for bits in options.bits for code in options.codes]

    def write(case: str, code: str, bits: int, errors: dict[str, Any]) -> None:
        rows.append(options.out, {"case": case, "code": code, "bits": bits, **errors, **settings})
        shown = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
        print(f"{case}, {code}, {bits} bits: {shown}", flush=True)

    for code, bits in combinations:
        for case, errors in made_up(method(code, bits)).items():
            write(case, code, bits, errors)
    calls: dict[str, list[Call]] = {}
    if options.data is not None:
        model, batch = minilm(options.data)
        products = linears(model.base_model.encoder, lambda: model(**batch).loss)
        calls["MiniLM, attention"] = attentions(lambda: model(**batch).loss)
        for bits in options.bits:
            today = errors_of(products, method("minmax", bits))
            for code in options.codes:
                error = today if code == "minmax" else errors_of(products, method(code, bits))
                write("MiniLM, Linears", code, bits, {"error": error, "of_minmax": error / today})
        shares = shares_of_noise(model, batch, [method(*each) for each in combinations])
        for (code, bits), share in zip(combinations, shares, strict=True):
            write("MiniLM, all gradients", code, bits, share)
    if options.gpt:
        calls["GPT, attention"] = attentions(gpt())
    for case, found in calls.items():
        for code, bits in combinations:
            if bits > 2 and code != "scaled":  # attention refuses 2, and scales no channels
                write(case, code, bits, attention_errors(found, method(code, bits)))
        for again in (False, True):
            errors = attention_errors(found, method("minmax", 8), again)
            write(case, "minmax", 8, {**errors, "again": again})


if __name__ == "__main__":
    main()
