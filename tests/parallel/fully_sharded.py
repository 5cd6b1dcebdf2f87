"""FSDP2 as engines use it: gradients of a converted Llama on ranks beside those of one process."""

import copy
import itertools

import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import packlight
from packlight import Checkpoint, GroupQuant, Offload
from tests.parallel.ranks import join, leave

NEAREST = GroupQuant(8, group_size=32, rounding="nearest")
METHODS = {
    "packs": NEAREST,
    "checkpoint": (Checkpoint(NEAREST), NEAREST),
    "offload": (Offload(NEAREST), NEAREST),
}


def make():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).train()


def shard(model, mesh, finely=False, **options):
    for layer in model.model.layers:
        if finely:  # norms and the Linears that read them lie in different shards
            for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
                fully_shard(part, mesh=mesh, **options)
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def grads(model):
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        name = name.replace("_checkpoint_wrapped_module.", "")
        # Shards that are offloaded are gathered on the device of their mesh.
        grad = grad.to(grad.device_mesh.device_type) if hasattr(grad, "device_mesh") else grad
        found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def near(found, expected, rtol, what):
    for name, truth in expected.items():
        error = (found[name].float() - truth.float()).norm() / truth.float().norm()
        assert error < rtol, (what, name, error.item())


if __name__ == "__main__":
    rank, count, kind = join()
    # Four ranks are two copies of two shards.
    names = ("replicate", "shard")[-1 if count == 2 else -2 :]
    mesh = init_device_mesh(kind, (2,) * len(names), mesh_dim_names=names)
    ids = torch.randint(0, 64, (2 * count, 32), generator=torch.Generator().manual_seed(1)).to(kind)
    half = ids[2 * rank : 2 * rank + 2]

    def step(model, batch, count=1):
        for part in batch.chunk(count):
            (model(input_ids=part, labels=part).loss / count).backward()

    for name, methods in METHODS.items():

        def converted(methods=methods):
            model = make().to(kind)
            packlight.convert(model, methods, head=True)
            return model

        one = converted()
        step(one, ids)
        expected = grads(one)

        ways = itertools.product((False, True), (False, True))
        for finely, reshard in ways if name == "packs" else [(False, True)]:
            model = shard(converted(), mesh, finely, reshard_after_forward=reshard)
            step(model, half)
            near(grads(model), expected, 1e-3, ("sharded", name, finely, reshard))

        model = shard(converted(), mesh)  # two backward passes, of which the last sends gradients
        for i, part in enumerate(half.chunk(2)):
            model.set_requires_gradient_sync(i == 1)
            (model(input_ids=part, labels=part).loss / 2).backward()
        near(grads(model), expected, 1e-3, ("accumulated", name))

        model = converted()  # the checkpoints of an engine, around packs
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = checkpoint_wrapper(layer)
        shard(model, mesh)
        step(model, half)
        near(grads(model), expected, 1e-3, ("checkpoints", name))

        policy = CPUOffloadPolicy(pin_memory=kind == "cuda")
        model = shard(converted(), mesh, offload_policy=policy)
        assert all(p.device.type == "cpu" for p in model.parameters())
        step(model, half)
        near(grads(model), expected, 1e-3, ("offloaded", name))

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = shard(converted(), mesh, mp_policy=policy)
        step(model, half)
        near(grads(model), expected, 0.1, ("mixed precision", name))

    # ---- weights, there and back -----------------------------------------------------------------
    whole = StateDictOptions(full_state_dict=True)
    plain, state = make(), make().state_dict()
    for first in ("convert", "shard"):  # made without memory
        with torch.device("meta"):
            model = make()
        if first == "convert":
            packlight.convert(model, NEAREST, head=True)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if first == "shard":  # what is a shard of its own has a class of FSDP's, and stays
            packlight.convert(model, NEAREST, head=True)
        model.to_empty(device=kind)
        rotary = make().model.rotary_emb
        model.model.rotary_emb.inv_freq = rotary.inv_freq.to(kind)
        model.model.rotary_emb.original_inv_freq = rotary.original_inv_freq.to(kind)
        set_model_state_dict(model, dict(state), options=whole)
        step(model, half)
        one = copy.deepcopy(plain).to(kind)
        packlight.convert(one, NEAREST, head=True)
        step(one, ids)
        near(grads(model), grads(one), 1e-3, ("from meta",))
        found = get_model_state_dict(model, options=whole)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key].cpu(), state[key]) for key in state)
    leave("same gradients")
