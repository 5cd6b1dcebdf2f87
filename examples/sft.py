"""Supervised fine-tuning with TRL and LoRA: one callback more than without packlight.

python examples/sft.py
python examples/sft.py --tiny
"""

import datasets
import peft
import trl
from common import arguments, parse, settings, text

from packlight.integrations.transformers import PacklightCallback

options = parse(arguments(__doc__, "meta-llama/Llama-3.1-8B"))
data = datasets.Dataset.from_list([{"text": part} for part in text().split("\n\n\n")[:500]])

trl.SFTTrainer(
    options.model,
    # TRL checkpoints blocks unless told not to: packlight is there in its place.
    args=trl.SFTConfig(
        **settings(options), max_length=options.length, gradient_checkpointing=False
    ),
    train_dataset=data,
    peft_config=peft.LoraConfig(r=16, target_modules="all-linear"),
    callbacks=[PacklightCallback()],
).train()
