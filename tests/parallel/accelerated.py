"""accelerate's FSDP2 plugin around a model that its `Accelerator` of packlight converts.

Gradients of two processes beside those of one, with and without the plugin's activation
checkpoints, with weights of one process given to all, and state dicts. Run by `accelerate launch`,
or as RANK of WORLD_SIZE processes.
"""

import os
import sys

import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

import packlight
from packlight.integrations.accelerate import Accelerator

OPTIONS = {"methods": "GroupQuant(8, group_size=32, rounding='nearest'), FewBit(8)"}
ROWS = 2


def make():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, **heads, use_cache=False)
    ).train()


def loss_of(model, batch):
    return model(input_ids=batch, labels=batch).loss


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def grads(model):
    named = model.named_parameters()
    return {n.replace("_checkpoint_wrapped_module.", ""): whole(p.grad) for n, p in named}


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True, packlight={**OPTIONS, "report": False})
    count, rank = accelerator.num_processes, accelerator.process_index
    assert count == int(os.environ["WORLD_SIZE"])
    ids = torch.randint(0, 64, (ROWS * count, 32), generator=torch.Generator().manual_seed(1))
    mine = ids[ROWS * rank : ROWS * (rank + 1)]

    one = make()
    plain_bytes = packlight.profile(one, input_ids=mine, labels=mine).activation_bytes
    packlight.convert(one, accelerator.packlight.methods)
    loss_of(one, ids).backward()
    expected, state = grads(one), make().state_dict()

    ways = [{}, {"activation_checkpointing": True}, {"cpu_ram_efficient_loading": True}]
    for plugged, options in [(False, {}), *((True, way) for way in ways)]:
        if plugged:
            # accelerate shards nothing on CPUs of its own accord.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options
            )
        accelerator.packlight.kept_bytes = None
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        assert isinstance(model, FSDPModule) == plugged
        loss = loss_of(model, mine)
        accelerator.backward(loss)
        assert 0 < accelerator.packlight.kept_bytes < 0.5 * plain_bytes
        mean = accelerator.reduce(loss.detach(), "mean")
        torch.testing.assert_close(mean, loss_of(one, ids).detach(), rtol=1e-5, atol=1e-6)
        found = grads(accelerator.unwrap_model(model))
        assert found.keys() == expected.keys()
        for name, truth in expected.items():
            error = (found[name] - truth).norm() / truth.norm()
            assert error < 1e-3, (options, name, error)
        back = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            names = {name.replace("_checkpoint_wrapped_module.", "") for name in back}
            assert names == set(state), names ^ set(state)
            assert all(torch.equal(back[name], state[name]) for name in back if name in state)
        optimizer.step()
        accelerator.free_memory()
    accelerator.print("same gradients")
    sys.stdout.flush()
    accelerator.wait_for_everyone()
    os._exit(0)
