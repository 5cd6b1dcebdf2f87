"""LoRA of an 8B on a base of 4 bits: fits a card of 24 GB, without running anything twice.

python examples/qlora.py
python examples/qlora.py --tiny
"""

import peft
import torch
import transformers
from common import arguments, parse, rows, training_arguments

from packlight.integrations.transformers import PacklightCallback

options = parse(arguments(__doc__, "meta-llama/Llama-3.1-8B"))

model = transformers.AutoModelForCausalLM.from_pretrained(
    options.model,
    dtype=torch.bfloat16,
    quantization_config=transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
)
model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))

transformers.Trainer(
    model,
    training_arguments(options, optim="adamw_torch" if options.tiny else "adamw_8bit"),
    train_dataset=rows(options.model, options.length, 64),
    callbacks=[PacklightCallback(head=True)],
).train()
