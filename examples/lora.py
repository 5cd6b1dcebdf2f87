"""LoRA of an 8B with a Trainer. In bf16 its weights alone are 15 GiB; on 24 GB take qlora.py.

python examples/lora.py
python examples/lora.py --memory 22GiB     # a plan for that peak
python examples/lora.py --tiny
"""

import peft
import transformers
from common import arguments, parse, rows, training_arguments

from packlight.integrations.transformers import PacklightCallback

parser = arguments(__doc__, "meta-llama/Llama-3.1-8B")
parser.add_argument("--memory", help="bytes at the peak of a step, such as 22GiB")
parser.add_argument("--gpu", help="the card that the plan is for, if it is not here")
options = parse(parser)

model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))

callback = PacklightCallback(head=True, memory=options.memory, device=options.gpu)
trainer = transformers.Trainer(
    model,
    training_arguments(options),
    train_dataset=rows(options.model, options.length, 64),
    callbacks=[callback],
)
trainer.train()
trainer.save_model(options.out / "adapters")  # as PEFT reads them, with or without packlight
