"""Direct preference optimisation with TRL and LoRA. The reference is the model without adapters.

python examples/dpo.py
python examples/dpo.py --tiny
"""

import datasets
import peft
import trl
from common import arguments, parse, settings

from packlight.integrations.transformers import PacklightCallback

options = parse(arguments(__doc__, "meta-llama/Llama-3.1-8B"))
pairs = [
    {"prompt": f"What is {a} + {b}? ", "chosen": f"{a + b}.", "rejected": f"{a + b + 1}."}
    for a in range(10)
    for b in range(10)
]

trl.DPOTrainer(
    options.model,
    args=trl.DPOConfig(
        **settings(options), max_length=options.length, gradient_checkpointing=False
    ),
    train_dataset=datasets.Dataset.from_list(pairs),
    peft_config=peft.LoraConfig(r=16, target_modules="all-linear"),
    callbacks=[PacklightCallback()],
).train()
