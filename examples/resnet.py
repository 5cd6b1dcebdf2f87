"""A ResNet of torchvision: batch norm, ReLU and convolution share one code. On a GPU, a graph.

python examples/resnet.py
python examples/resnet.py --tiny
"""

import argparse

import torch
import torch.nn.functional as F
import torchvision

import packlight

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, as in CI")
options = parser.parse_args()
make, size, device = torchvision.models.resnet50, 224, "cuda"
if options.tiny:
    make, size, device = torchvision.models.resnet18, 32, "cpu"
    options.batch, options.steps = 8, 2

torch.manual_seed(0)
model = make(num_classes=10).to(device, memory_format=torch.channels_last)
images = torch.randn(options.batch, 3, size, size, device=device)
labels = torch.arange(options.batch, device=device) % 10

print(packlight.convert(model).bytes(images))
if device == "cuda":
    packlight.graphed(model)  # its many small layers take longer to launch than to run

optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for step in range(options.steps):
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
