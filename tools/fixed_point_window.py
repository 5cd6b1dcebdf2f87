"""How wide the window of fixed-point codes should be: errors of gradients in a network that learns.

    python -m tools.fixed_point_window --data FOLDER

A ResNet-18 of a quarter of the width learns CIFAR-10 (`benchmarks/cifar.py`, the same data) for a
while. Then, on one batch, the gradients by codes of 4 and 8 bits for windows of several widths are
set beside the exact ones: relative error, and the length along the exact gradient, means over
layers. What is cut off shortens gradients; coarse bins add noise.
"""

import argparse
import pathlib
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cifar
from packlight.groupquant import fixed_point
from tests.resnets import KITS, resnet18

WIDTHS = {4: (5, 6, 7, 8, 9, 10, 12, 16), 8: (6, 8, 10, 12, 16, 20, 24, 32)}


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def learn(model: nn.Module, data: cifar.Data, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, cycle_momentum=False)
    generator = torch.Generator().manual_seed(0)
    while True:
        for images, labels in cifar.batches(data, 128, generator):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
            steps -= 1
            if steps == 0:
                return


def compare(found: list[Tensor], exact: list[Tensor], name: str, dim: int) -> str:
    pairs = [(a, b) for a, b in zip(found, exact, strict=True) if b.dim() == dim]
    error = statistics.fmean(((a - b).norm() / b.norm()).item() for a, b in pairs)
    length = statistics.fmean(((a * b).sum() / (b * b).sum()).item() for a, b in pairs)
    return f"  {name} off by {error:.4f}, length {length:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    torch.manual_seed(0)
    data = cifar.data_of(options.data, "cpu", 30_000)
    exact = resnet18(KITS["exact"], 16)
    learn(exact, data, options.steps)
    batch = next(cifar.batches(data, 128, torch.Generator().manual_seed(5)))
    truth = gradients(exact, *batch)
    for bits, widths in WIDTHS.items():
        model = resnet18(KITS[f"fixed{bits}"], 16)
        for width in widths:
            for layer in model.modules():
                if isinstance(layer, fixed_point.BatchNorm2d):
                    layer.window = width / 2
            model.load_state_dict(exact.state_dict())
            found = gradients(model, *batch)
            print(
                f"{bits} bits, {width:2d} standard deviations:"
                + compare(found, truth, "convolutions", 4)
                + compare(found, truth, "batch norms", 1)
            )


if __name__ == "__main__":
    main()
