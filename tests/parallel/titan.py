"""torchtitan's way to a model, with packlight by a line of its options, against one process.

What its `Trainer` does up to the first step, in its order and by its functions; its `Trainer` asks
for a GPU. Run as RANK of WORLD_SIZE.
"""

import logging

import torch
import torchtitan.distributed.parallel_dims
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.config.override import OverrideConfig, apply_overrides, parse_cli_imports
from torchtitan.distributed import ParallelDims, utils
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.common import ComplexRoPE
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import Llama3Model, _build_llama3_layers, model_registry
from torchtitan.trainer import Trainer

import packlight
from tests.parallel.ranks import join, leave

LINE = """packlight.integrations.torchtitan.convert={"methods":
"GroupQuant(8, group_size=32, rounding='nearest'), FewBit(8)"}"""
METHODS = (packlight.GroupQuant(8, group_size=32, rounding="nearest"), packlight.FewBit(8))
WHOLE = StateDictOptions(full_state_dict=True)
VOCABULARY, LENGTH = 64, 32


def spec():
    """Llama of torchtitan, tiny, with the attention that it has for the CPU."""
    found = model_registry("debugmodel")
    known = found.model
    rope = ComplexRoPE.Config(dim=16, max_seq_len=LENGTH, theta=10000, scaling="none")
    layers = _build_llama3_layers(
        n_layers=2,
        dim=64,
        n_heads=4,
        hidden_dim=128,
        rope=rope,
        attn_backend="flex",
        fuse_qkv=False,
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    found.model = Llama3Model.Config(
        dim=64,
        vocab_size=VOCABULARY,
        tok_embeddings=replaced(known.tok_embeddings, num_embeddings=VOCABULARY, embedding_dim=64),
        norm=replaced(known.norm, normalized_shape=64),
        lm_head=replaced(known.lm_head, in_features=64, out_features=VOCABULARY),
        layers=layers,
    )
    return found


def replaced(config, **changes):
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def made(policy, overrides, **degrees):
    """The model as the `Trainer` makes it, its loss, and the context of its steps."""
    config = Trainer.Config(
        model_spec=spec(),
        training=TrainingConfig(
            seq_len=LENGTH, mixed_precision_param="float32", disable_cuda_graphs=True
        ),
        # The default, "spmd_types", asks for a newer torch than 2.13.
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor", **degrees),
        loss=CrossEntropyLoss.Config(global_vocab_size=VOCABULARY),
        activation_checkpoint=policy,
        override=OverrideConfig(imports=parse_cli_imports(overrides)),
    )
    dims = ParallelDims.from_config(config.parallelism, torch.distributed.get_world_size())
    utils.set_spmd_backend(config.parallelism.spmd_backend)
    model_config = config.model_spec.model
    model_config.update_from_config(config=config)
    if config.override.imports:
        apply_overrides(config.override, config)
    with torch.device("meta"):
        model = model_config.build()
    model.verify_module_protocol()
    model = config.model_spec.parallelize_fn(
        model,
        parallel_dims=dims,
        training=config.training,
        parallelism=config.parallelism,
        compile_config=CompileConfig(),
        ac_config=policy,
        dump_folder="",
    )
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    model.train()
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gloo cannot multiply while it sums
            module.set_force_sum_reduction_for_comms(True)
    loss = config.loss.build(compile_config=config.compile)
    return model, loss, utils.get_spmd_context(parallel_dims=dims)


def grads(model):
    named = dict(model.named_parameters())
    return {
        name.replace("_checkpoint_wrapped_module.", ""): p.grad.full_tensor()
        if hasattr(p.grad, "full_tensor")
        else p.grad
        for name, p in named.items()
    }


if __name__ == "__main__":
    logging.disable(logging.INFO)
    rank, count, kind = join()
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does
    torchtitan.distributed.parallel_dims.device_type = kind
    ids = torch.randint(
        0, VOCABULARY, (2 * count, LENGTH + 1), generator=torch.Generator().manual_seed(1)
    )

    def step(model, loss, batch):
        out = loss(model(batch[:, :-1]), batch[:, 1:])[0] / ids[:, 1:].numel()
        out.backward()
        return out.detach()

    torch.manual_seed(0)
    plain = spec().model.build()
    plain.init_weights(buffer_device=None)
    plain.train()
    state = plain.state_dict()
    criterion = CrossEntropyLoss.Config(global_vocab_size=VOCABULARY).build()
    before = packlight.profile(plain, ids[:, :-1]).activation_bytes
    packlight.convert(plain, METHODS)
    assert packlight.profile(plain, ids[:, :-1]).activation_bytes < 0.4 * before
    expected_loss = step(plain, criterion, ids)
    expected = grads(plain)

    ways = {
        "sharded": (None, {}),
        "full checkpoints": (FullAC.Config(), {}),
        "selective checkpoints": (SelectiveAC.Config(), {}),
        "tensor parallel": (None, {"tensor_parallel_degree": count}),
    }
    for name, (policy, degrees) in ways.items():
        model, loss, context = made(policy, [LINE.replace("\n", " ")], **degrees)
        set_model_state_dict(model, dict(state), options=WHOLE)
        with context():
            if name == "sharded":
                exact = made(policy, [], **degrees)[0]
                kept = [packlight.profile(m, ids[:2, :-1]).activation_bytes for m in (model, exact)]
                assert kept[0] < 0.4 * kept[1]
            found = step(model, loss, ids if degrees else ids[2 * rank : 2 * rank + 2])
        if not degrees:
            torch.distributed.all_reduce(found)
        torch.testing.assert_close(found, expected_loss, rtol=1e-5, atol=1e-6)
        got = grads(model)
        for key, truth in expected.items():
            error = (got[key] - truth).norm() / truth.norm()
            # Groups of a tensor's shards are of other elements than those of the tensor.
            assert error < (0.02 if "tensor" in name else 1e-3), (name, key, error)
        back = get_model_state_dict(model, options=WHOLE)
        if rank == 0:
            assert back.keys() == state.keys()
            assert all(torch.equal(back[key], state[key]) for key in state)
    leave("same gradients")
