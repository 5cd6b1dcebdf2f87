"""All weights of a 1B in a loop of one's own, resumed bit for bit from its checkpoint.

python examples/full.py
python examples/full.py --resume           # goes on from out/checkpoint.pt
python examples/full.py --tiny
"""

import torch
import transformers
from common import arguments, parse, rows

import packlight

parser = arguments(__doc__, "meta-llama/Llama-3.2-1B")
parser.add_argument("--resume", action="store_true")
options = parse(parser)
device = "cpu" if options.tiny else "cuda"

torch.manual_seed(0)
dtype = torch.float32 if options.tiny else torch.bfloat16
model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device)
conversion = packlight.convert(model.train(), head=True)
print(conversion)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

step, checkpoint = 0, options.out / "checkpoint.pt"
if options.resume:
    saved = torch.load(checkpoint)
    step = saved["step"]
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["torch"])
    packlight.set_rounding_state(saved["rounding"])

data = rows(options.model, options.length, 64)
while step < options.steps:
    first = step * options.batch % len(data)
    batch = torch.stack([row["input_ids"] for row in data[first : first + options.batch]])
    batch = batch.to(device)
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    print(f"step {step}: loss {loss.item():.6f}")
    if step == options.steps // 2:
        options.out.mkdir(exist_ok=True)
        torch.save(
            {
                "step": step,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "torch": torch.get_rng_state(),
                "rounding": packlight.rounding_state(),
            },
            checkpoint,
        )

model.save_pretrained(options.out / "model")  # loads without packlight
