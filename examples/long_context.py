"""The longest sequence: every block runs again from 8 bits of its input, MLPs run by tiles.

python examples/long_context.py --length 262144       # an 8B with LoRA, on a card of 80 GB
python examples/long_context.py --tiny
"""

import peft
import transformers
from common import arguments, parse, rows, training_arguments

from packlight import DEFAULT_METHODS, Checkpoint, Tiles
from packlight.integrations.transformers import PacklightCallback

options = parse(arguments(__doc__, "meta-llama/Llama-3.1-8B"))

model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))

methods = (Checkpoint(), Tiles(tokens=16 if options.tiny else 2048), *DEFAULT_METHODS)
transformers.Trainer(
    model,
    training_arguments(options),  # without gradient_checkpointing: it would take the blocks' place
    train_dataset=rows(options.model, options.length, 4),
    callbacks=[PacklightCallback(methods, head=True)],
).train()
