"""A ViT of timm in a loop of one's own, with the gradient's error beside the batch's noise.

python examples/vit.py
python examples/vit.py --tiny
"""

import argparse

import timm
import torch
import torch.nn.functional as F

import packlight

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="vit_base_patch16_224")
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, as in CI")
options = parser.parse_args()
size, device = 224, "cuda"
if options.tiny:
    options.model, options.batch, options.steps, size, device = (
        "vit_tiny_patch16_224",
        4,
        2,
        32,
        "cpu",
    )

torch.manual_seed(0)
model = timm.create_model(options.model, num_classes=10, img_size=size).to(device)
images = torch.randn(options.batch, 3, size, size, device=device)
labels = torch.arange(options.batch, device=device) % 10


def loss_of(model, batch):
    with torch.autocast(device, torch.bfloat16, enabled=not options.tiny):
        return F.cross_entropy(model(batch[0]).float(), batch[1])


error = packlight.gradient_error(model, (images, labels), packlight.GroupQuant(4), loss=loss_of)
print(error.sentence())
print(packlight.convert(model).bytes(images))

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for step in range(options.steps):
    loss = loss_of(model, (images, labels))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
