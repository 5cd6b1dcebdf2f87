"""A loop of accelerate with packlight: another `Accelerator`, and nothing else.

accelerate launch examples/accelerated.py
accelerate launch --use_fsdp --fsdp_version 2 examples/accelerated.py
python examples/accelerated.py --tiny
"""

import torch
import transformers
from common import arguments, parse, rows

from packlight.integrations.accelerate import Accelerator

options = parse(arguments(__doc__, "meta-llama/Llama-3.2-1B"))
accelerator = Accelerator(
    mixed_precision="no" if options.tiny else "bf16",
    cpu=options.tiny,
    packlight={"head": True},  # and, say, "methods": "GroupQuant(4), FewBit(3)"
)
model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
data = rows(options.model, options.length, options.batch * options.steps)
loader = torch.utils.data.DataLoader(data, batch_size=options.batch)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for step, batch in enumerate(loader):
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step}: loss {loss.item():.3f}")
