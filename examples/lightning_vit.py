"""A LightningModule with a ViT of timm: a callback, and nothing else.

python examples/lightning_vit.py
python examples/lightning_vit.py --tiny
"""

import argparse

import lightning
import timm
import torch
import torch.nn.functional as F

from packlight.integrations.lightning import PacklightCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="vit_base_patch16_224")
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, as in CI")
options = parser.parse_args()
size = 224
if options.tiny:
    options.model, options.batch, options.steps, size = "vit_tiny_patch16_224", 4, 2, 32


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = timm.create_model(options.model, num_classes=10, img_size=size)

    def training_step(self, batch, index):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


count = options.batch * options.steps
data = torch.utils.data.TensorDataset(torch.randn(count, 3, size, size), torch.arange(count) % 10)
callback = PacklightCallback()
lightning.Trainer(
    max_steps=options.steps,
    accelerator="cpu" if options.tiny else "auto",
    precision="32-true" if options.tiny else "bf16-mixed",
    callbacks=[callback],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=not options.tiny,
    enable_model_summary=False,
).fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=options.batch))
