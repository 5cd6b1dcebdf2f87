"""What packs cost gradients: by code and bits, on made-up tensors and on those of real models.

    python -m benchmarks.pack_errors --data shared/data/glue

Runs on a CPU in minutes. A row a code and case goes to `results/pack_errors.jsonl`:

- `normal`: a Linear's input of normal values. `error` is |dW~ - dW| / |dW|, here as everywhere.
- `outliers`: the same with 3% of the channels 60 times larger; `ordinary` is the error in the
  columns of the others.
- `mean`: normal values about 10; `error_squared` is that of a value, in variances.
- `MiniLM, Linears`: the inputs of the encoder's Linears on a batch of MRPC, fine-tuning's first,
  mean over layers; `of_minmax` is the share of the error of min-max codes at the same bits.
- `MiniLM, attention` and `GPT, attention`: errors of dq, dk and dv of attention that runs once more
  on its packs, mean over layers. The GPT is that of `packlight demo`, trained for a while.

Errors are of one draw: each is a norm over thousands of values.
"""

import argparse
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
from packlight import GroupQuant, manual_seed
from packlight.cli import Parser, demo
from packlight.layers.attention import scaled_dot_product_attention
from packlight.quantiser import new_pack

BITS = (4, 3, 2)
CODES: dict[str, dict[str, Any]] = {
    "minmax": {"rounding": "stochastic"},
    "offset": {"rounding": "offset"},
    "rotated": {"code": "rotated"},
    "scaled": {"code": "scaled"},
}
BATCH = 16
# Of the GPT whose attention is looked at.
GPT = {"layers": 4, "width": 256, "heads": 4, "context": 128, "batch": 16, "steps": 200}


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


def made_up(code: str, bits: int) -> Iterator[dict[str, Any]]:
    keeps, product = method(code, bits), normal()
    yield {"case": "normal", "error": error_of(product, keeps)}
    outliers, ordinary = with_outliers(product)
    errors = {"error": error_of(outliers, keeps)}
    yield {"case": "outliers", **errors, "ordinary": error_of(outliers, keeps, ordinary)}
    far = product.x + 10
    squared = (decoded(far, keeps) - far).square().mean() / far.var()
    yield {"case": "mean", "error_squared": float(squared)}


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

    def gradients(self, keeps: GroupQuant | None) -> list[Tensor]:
        *parts, mask = self.inputs
        given = [part.detach().requires_grad_() for part in parts if part is not None]
        if keeps is None:
            y = F.scaled_dot_product_attention(*given, mask, is_causal=self.is_causal)
        else:
            y = scaled_dot_product_attention(*given, mask, is_causal=self.is_causal, method=keeps)
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


def attention_errors(calls: Sequence[Call], keeps: GroupQuant) -> dict[str, float]:
    errors: dict[str, list[float]] = {"dq": [], "dk": [], "dv": []}
    for call in calls:
        pairs = zip(call.gradients(keeps), call.gradients(None), strict=True)
        for own, (dx, exact) in zip(errors.values(), pairs, strict=True):
            own.append(relative(dx, exact))
    return {name: statistics.fmean(own) for name, own in errors.items()}


def minilm(folder: pathlib.Path) -> tuple[nn.Module, Callable[[], Tensor]]:
    """MiniLM with a new classifier, without dropout, and its loss on a batch of MRPC."""
    store = glue.Store(glue.tokenised(folder, glue.minilm(), ["mrpc"]))
    model = store.model(0).eval()
    batch = next(glue.batches(store.split("mrpc", "train"), np.arange(BATCH), "cpu"))
    return model.base_model.encoder, lambda: model(**batch).loss


def gpt() -> Callable[[], Tensor]:
    """The loss of a GPT that has trained for a while, on held-out text."""
    text, settings = demo.load_text(), demo.make_settings("cpu", seed=0, **GPT)
    trained: list[nn.Module] = []
    demo.train(lambda model, _: trained.append(model), text, settings)
    inputs, targets = demo.validation_batches(text, settings)[0]
    return lambda: demo.loss_of(trained[0](inputs), targets)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmarks.pack_errors", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, help="folder of mrpc-*.parquet")
    parser.add_argument("--gpt", action="store_true", help="train the GPT too, in two minutes")
    parser.add_argument("--codes", nargs="+", default=[*CODES], choices=[*CODES])
    parser.add_argument("--bits", nargs="+", type=int, default=[*BITS], choices=BITS)
    parser.add_argument("--out", type=pathlib.Path, default=rows.RESULTS / "pack_errors.jsonl")
    options = parser.parse_args(argv)
    manual_seed(0)
    products, calls = [], {}
    if options.data is not None:
        model, loss = minilm(options.data)
        products = linears(model, loss)
        calls["MiniLM, attention"] = attentions(loss)
    if options.gpt:
        calls["GPT, attention"] = attentions(gpt())
    run(options, products, calls)


def run(options: argparse.Namespace, products: list[Product], calls: dict[str, list[Call]]) -> None:
    settings = rows.settings("cpu")

    def write(code: str, bits: int, row: dict[str, Any]) -> None:
        row = {"case": row.pop("case"), "code": code, "bits": bits, **row}
        rows.append(options.out, {**row, **settings})
        print(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else str(v) for k, v in row.items()))

    for bits in options.bits:
        today = None
        if products:
            today = [error_of(product, method("minmax", bits)) for product in products]
        for code in options.codes:
            keeps = method(code, bits)
            for row in made_up(code, bits):
                write(code, bits, row)
            if today is not None:
                errors = today
                if code != "minmax":
                    errors = [error_of(product, keeps) for product in products]
                error = statistics.fmean(errors)
                shares = {"error": error, "of_minmax": error / statistics.fmean(today)}
                write(code, bits, {"case": "MiniLM, Linears", **shares})
            for case, found in calls.items():
                if bits > 2 and code != "scaled":  # attention refuses 2, and scales no channels
                    write(code, bits, {"case": case, **attention_errors(found, keeps)})


if __name__ == "__main__":
    main()
