"""ResNet-18, a pre-activation ResNet of 29 layers and a small ViT on CIFAR-10, exact and with
packed activations: do they still train.

    python -m benchmarks.run --suite train --data shared/data --filter cifar

The pre-activation ResNet is that of the paper on approximate activations (1901.07988), of twice the
width and a sixth of the blocks: `--filter cifar/preact29`. Its first and last layers are exact.

Every method sees the same weights, batches and schedule for a seed. A row a run goes to
`results/cifar.jsonl`: loss and test accuracy an epoch, bytes kept for the backward pass of one
batch, peak memory, seconds. `few-bit 3, calibrated` fits its codebooks to what the activations read
(`packlight.fewbit.calibrate`) after the first epoch and after every fifth; its row has the mean
error of the gradient with the default codebooks and with the calibrated ones. Reads
`cifar10/train-*.parquet` and `cifar10/test.parquet` with columns `image` (an encoded image) and
`label`, for which it needs pyarrow and pillow, or `cifar10.npz`, which needs pillow only: `python
-m benchmarks.cifar shared/data/cifar10 cifar10.npz` writes it. On a GPU: bf16 autocast, channels
last, each step a CUDA graph.
"""

import argparse
import functools
import io
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import rows
from packlight import (
    DEFAULT_METHODS,
    FewBit,
    FixedPoint,
    GroupQuant,
    Inverted,
    Sketch,
    convert,
    profile,
)
from packlight.cli import Parser
from packlight.fewbit import calibrate
from packlight.selectors import Methods
from tests.blocks import PreNormBlock, Stack
from tests.graphs import captured
from tests.resnets import KITS, preactivation_resnet, resnet18

# --- The networks.


class ViT(nn.Module):
    """A vision transformer for 32x32 images: 64 patches, mean pooling."""

    def __init__(self, width: int = 192, layers: int = 6, heads: int = 6) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, stride=4)
        self.position = nn.Parameter(torch.randn(64, width) * 0.02)
        self.blocks = Stack([PreNormBlock(width, heads, False, 0.1) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


# What `convert` is given; those of `KITS` are built with their layers.
CONVERSIONS: dict[str, Methods] = {
    "few-bit 3": FewBit(3),
    # Outputs of batch norms are overwritten, by ReLUs and residual sums.
    "inverted": {nn.BatchNorm2d: None, "*": Inverted()},
    "default": DEFAULT_METHODS,
}
VIT_CONVERSIONS: dict[str, Methods] = {
    **{f"group{bits}": (GroupQuant(bits, code="minmax"), FewBit(3)) for bits in (8, 4, 2)},
    **{f"rotated{bits}": (GroupQuant(bits, code="rotated"), FewBit(3)) for bits in (4, 3, 2)},
    **{name: method for name, method in CONVERSIONS.items() if name != "default"},
    "sketch 0.2": {nn.Linear: Sketch(0.2)},
}
# The head reads one row an image, and most of what 2 bits move of the whole gradient is its own.
EXACT_ENDS = ", exact ends"
VIT_CONVERSIONS["rotated2" + EXACT_ENDS] = VIT_CONVERSIONS["rotated2"]
CALIBRATED = "few-bit 3, calibrated"
VIT_CONVERSIONS[CALIBRATED] = FewBit(3)  # in the first epoch
CALIBRATE_EVERY = 5  # epochs, and once after the first
# By the paper's rule, by our window, and by packs of each tensor's own.
PREACT_CONVERSIONS: dict[str, Methods] = {
    "fixed8 window 3": (FixedPoint(8, window=3), GroupQuant(8)),
    "fixed4 window 3": (FixedPoint(4, window=3), GroupQuant(4)),
    "fixed4": (FixedPoint(4), GroupQuant(4)),
    "group4": GroupQuant(4),
}
RUNS = {
    "resnet18": [*KITS, *CONVERSIONS],
    "preact29": ["exact", *PREACT_CONVERSIONS],
    "vit": ["exact", *VIT_CONVERSIONS],
}
BATCH = 256
# The images at hand are JPEG copies of CIFAR-10, which cost about 3 points: 40 epochs end at 91.4%.
EPOCHS = {"resnet18": 60, "preact29": 12, "vit": 30}
# Of SGD, and of AdamW for the ViT, which SGD does not train.
LEARNING_RATES = {"resnet18": 0.2, "preact29": 0.2, "vit": 1e-3}


def network(name: str, method: str) -> nn.Module:
    model: nn.Module
    if name == "resnet18":
        model, conversions = resnet18(KITS.get(method, KITS["exact"])), CONVERSIONS
    elif name == "preact29":
        model, conversions = preactivation_resnet(3, width=2), PREACT_CONVERSIONS
    else:
        model, conversions = ViT(), VIT_CONVERSIONS
    if method in conversions:
        exact_ends = name == "preact29" or method.endswith(EXACT_ENDS)
        convert(model, conversions[method], functional=True, exact_ends=exact_ends)
    return model


# --- The data.


class Data(NamedTuple):
    """All images, uint8 [n, 3, 32, 32], and their labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


class Encoded(NamedTuple):
    """Images as files are, and their labels."""

    images: list[bytes]
    labels: list[int]


def _of_parquet(paths: list[pathlib.Path]) -> Encoded:
    import pyarrow.parquet  # only this script needs it

    encoded = Encoded([], [])
    for path in paths:
        table = pyarrow.parquet.read_table(path)
        encoded.images.extend(table["image"].to_pylist())
        encoded.labels.extend(table["label"].to_pylist())
    return encoded


def _of_npz(path: pathlib.Path, split: str) -> Encoded:
    with np.load(path) as file:
        data, ends = file[f"{split}_bytes"], np.cumsum(file[f"{split}_sizes"])
        images = [part.tobytes() for part in np.split(data, ends[:-1])]
        return Encoded(images, file[f"{split}_labels"].tolist())


def read_encoded(path: pathlib.Path) -> dict[str, Encoded]:
    """Training and test images of a folder of parquet files, or of what `repack` wrote."""
    if path.suffix == ".npz":
        return {split: _of_npz(path, split) for split in ("train", "test")}
    shards = sorted(path.glob("train-*.parquet"))
    if not shards:
        raise FileNotFoundError(f"{path} holds no train-*.parquet; say where they are")
    return {"train": _of_parquet(shards), "test": _of_parquet([path / "test.parquet"])}


def repack(encoded: dict[str, Encoded], path: pathlib.Path) -> None:
    """Writes one file that NumPy reads, for a machine without pyarrow."""
    arrays = {}
    for split, (images, labels) in encoded.items():
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(images), np.uint8)
        arrays[f"{split}_sizes"] = np.array([len(image) for image in images])
        arrays[f"{split}_labels"] = np.array(labels)
    np.savez_compressed(path, **arrays)  # the headers of the files are alike


def _decode(encoded: Encoded, limit: int | None) -> tuple[Tensor, Tensor]:
    from PIL import Image

    files = (io.BytesIO(image) for image in encoded.images[:limit])
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels.contiguous(), torch.tensor(encoded.labels[:limit])


def decode(encoded: dict[str, Encoded], device: str, limit: int | None = None) -> Data:
    """The data set on the device; `limit` images a split, for trying things out."""
    tensors = (*_decode(encoded["train"], limit), *_decode(encoded["test"], limit))
    return Data(*(tensor.to(device) for tensor in tensors))


def _normalise(images: Tensor) -> Tensor:
    mean, std = images.new_tensor([[125.3, 122.9, 113.9], [62.5, 61.9, 66.5]], dtype=torch.float32)
    images = (images.float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return images.contiguous(memory_format=torch.channels_last)


def batches(data: Data, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of whole batches, augmented.

    Random crops of the image padded by 4, half of them mirrored, and a square of 11 x 11 around a
    random pixel set to the mean of all images (cutout; DeVries and Taylor, 2017).
    """
    device, count, pixels = data.train.device, len(data.train), torch.arange(32)
    padded = F.pad(data.train.float(), [4] * 4, mode="reflect").to(torch.uint8)
    order = torch.randperm(count, generator=generator, device=device)
    pixels = pixels.to(device)
    for chosen in order.split(size):
        if len(chosen) < size:
            return
        shift = torch.randint(9, (2, size, 1), generator=generator, device=device)
        y, x = shift[0] + pixels, shift[1] + pixels
        mirrored = torch.rand(size, 1, generator=generator, device=device) < 0.5
        x = torch.where(mirrored, x.flip(1), x)
        images = padded[chosen[:, None, None], :, y[:, :, None], x[:, None, :]]
        centre = torch.randint(32, (2, size, 1), generator=generator, device=device)
        cut_y, cut_x = ((pixels - centre).abs() <= 5).unbind()
        images = _normalise(images.permute(0, 3, 1, 2))
        images.masked_fill_((cut_y[:, :, None] & cut_x[:, None, :])[:, None], 0)
        yield images, data.train_labels[chosen]


# --- A run.


def accuracy(model: nn.Module, data: Data, size: int, device: str) -> float:
    """Share of the test images that the model puts into their class."""
    model.eval()
    right = 0
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        for images, labels in zip(data.test.split(size), data.test_labels.split(size), strict=True):
            right += int((model(_normalise(images)).argmax(1) == labels).sum())
    model.train()
    return right / len(data.test)


def replayed(
    run: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """`run` as a CUDA graph, which takes what the GPU takes: launching small images takes longer.

    The gradients that the capture leaves in the parameters are written anew by each replay.
    """
    inputs = images.clone(), labels.clone()
    graph, loss = captured(lambda: run(*inputs), warm_up=3)

    def replay(images: Tensor, labels: Tensor) -> Tensor:
        inputs[0].copy_(images)
        inputs[1].copy_(labels)
        graph.replay()
        return loss

    return replay


def calibrated(model: nn.Module, samples: Sequence[Tensor], epoch: int) -> dict[str, Any]:
    """Converts the model anew by codebooks of what its activations read, and says what that gains.

    The samples are augmented images.
    """
    calibration = calibrate(model, samples)
    convert(model, {**calibration, "*": FewBit(3)}, functional=True)
    layers = calibration.layers
    return {
        "epoch": epoch,
        "default_error": statistics.fmean(layer.default_error for layer in layers),
        "error": statistics.fmean(layer.error for layer in layers),
    }


def is_calibrated_before(epoch: int, method: str) -> bool:
    return method == CALIBRATED and epoch > 0 and (epoch == 1 or epoch % CALIBRATE_EVERY == 0)


def train(name: str, method: str, seed: int, data: Data, epochs: int) -> dict[str, Any]:
    """Trains once and returns what goes into the row."""
    device = data.train.device.type
    torch.manual_seed(seed)
    model = network(name, method).to(device, memory_format=torch.channels_last)
    generator = torch.Generator(device).manual_seed(seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    rate = LEARNING_RATES[name]
    if name != "vit":
        groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0}]
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
    else:
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0}]
        optimizer = torch.optim.AdamW(groups, lr=rate)
    steps = len(data.train) // BATCH * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.25, cycle_momentum=False
    )
    in_bf16 = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    images, labels = next(batches(data, BATCH, torch.Generator(device).manual_seed(seed)))
    with in_bf16:
        kept = profile(model, images).activation_bytes

    def gradients(images: Tensor, labels: Tensor) -> Tensor:
        """The loss; its gradients are left in the parameters."""
        with in_bf16:
            output = model(images)
        loss = F.cross_entropy(output.float(), labels, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def started_run() -> Callable[[Tensor, Tensor], Tensor]:
        return replayed(gradients, images, labels) if device == "cuda" else gradients

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = started_run()
    losses, accuracies, calibrations, seconds = [], [], [], 0.0
    for epoch in range(epochs):
        if is_calibrated_before(epoch, method):
            some = batches(data, BATCH, torch.Generator(device).manual_seed(seed + epoch))
            with in_bf16:
                samples = [batch for batch, _ in itertools.islice(some, 4)]
                calibrations.append(calibrated(model, samples, epoch))
            run = started_run()
        started, total, count = time.perf_counter(), torch.zeros((), device=device), 0
        for images, labels in batches(data, BATCH, generator):
            total += run(images, labels)
            optimizer.step()
            schedule.step()
            count += 1
        losses.append(total.item() / count)
        seconds += time.perf_counter() - started  # the loss was waited for
        accuracies.append(accuracy(model, data, BATCH, device))
        print(
            f"{name}, {method}, seed {seed}, epoch {epoch + 1:2d}: loss {losses[-1]:.3f},"
            f" accuracy {accuracies[-1]:.4f}, {seconds:.0f} s",
            flush=True,
        )
    return {
        **({"calibrations": calibrations} if calibrations else {}),
        "lr": rate,
        "loss": losses,
        "accuracy": accuracies,
        "kept_bytes": kept,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "train_seconds": seconds,
    }


@functools.lru_cache(maxsize=1)
def data_of(folder: pathlib.Path, device: str, limit: int | None) -> Data:
    packed = folder / "cifar10.npz"
    return decode(read_encoded(packed if packed.exists() else folder / "cifar10"), device, limit)


def cases(options: argparse.Namespace) -> list[rows.Case]:
    """Every method for all networks, seed by seed. `--limit` tries it out: two epochs."""

    def run(name: str, method: str, seed: int, epochs: int) -> dict[str, Any]:
        return train(
            name, method, seed, data_of(options.data, options.device, options.limit), epochs
        )

    found = []
    for seed, name in itertools.product(options.seeds, RUNS):
        epochs = options.epochs or (2 if options.limit else EPOCHS[name])
        for method in RUNS[name]:
            key = {"model": name, "method": method, "seed": seed}
            key |= {"epochs": epochs, "batch": BATCH, "limit": options.limit}
            title = f"cifar/{name}/{method}/{seed}"
            found.append(
                rows.Case(
                    title,
                    "cifar.jsonl",
                    key,
                    functools.partial(run, name, method, seed, epochs),
                    1.5 * epochs,
                )
            )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmarks.cifar", description="Write CIFAR-10 as one file for NumPy.")
    parser.add_argument("source", type=pathlib.Path, help="folder of parquet files, or .npz file")
    parser.add_argument("target", type=pathlib.Path, help="the .npz file to write")
    options = parser.parse_args(argv)
    try:
        repack(read_encoded(options.source), options.target)
    except (OSError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
