"""A GPT of Megatron-Core whose layer specification converts, on one rank and on two.

Beside the plain model and one that `packlight.convert` converted: losses, gradients, bytes and
state dicts; tensor parallel, and recomputation of whole layers. Megatron-Core asks CUDA for a
device and for random states, for which there are stand-ins here. Run as RANK of WORLD_SIZE.
"""

import contextlib
import functools

import torch

from tests.parallel.ranks import join, leave


class Tracker:
    """Of random states; nothing here draws."""

    def fork(self, name=None):
        return contextlib.nullcontext()

    def get_states(self):
        return {}

    def set_states(self, states):
        pass


torch.cuda.current_device = lambda: torch.device("cpu")
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.tensor_parallel import random  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

import packlight  # noqa: E402
from packlight.integrations.megatron import converted  # noqa: E402
from packlight.method_files import parse_methods  # noqa: E402

for place in (tensor_parallel, random, tensor_parallel.layers):
    place.get_cuda_rng_tracker = Tracker
random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
random._set_cuda_rng_state = lambda *args, **kwargs: None

OPTIONS = {"methods": "GroupQuant(8, group_size=32, rounding='nearest'), FewBit(8)"}
OPTIONS["rest"] = "GroupQuant(8, group_size=32, rounding='nearest')"
VOCABULARY, LENGTH = 64, 32


def make(spec, **changes):
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128}
    kinds = {"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False}
    fusions = ("masked_softmax_fusion", "bias_dropout_fusion", "bias_activation_fusion")
    config = TransformerConfig(
        **sizes,
        **kinds,
        **dict.fromkeys((*fusions, "persist_layer_norm", "gradient_accumulation_fusion"), False),
        **dict.fromkeys(("hidden_dropout", "attention_dropout"), 0.0),
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        **changes,
    )
    return GPTModel(
        config, spec, VOCABULARY, LENGTH, position_embedding_type="learned_absolute"
    ).train()


def step(model, ids):
    places = torch.arange(LENGTH).expand_as(ids)
    future = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    run = functools.partial(model, ids, places, future, labels=ids)
    kept = packlight.profile(run).activation_bytes
    loss = run().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, kept


if __name__ == "__main__":
    rank, count, kind = join()
    parallel_state.initialize_model_parallel(count)
    plain_spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec = converted(plain_spec, **OPTIONS)
    ids = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    parallel = {"tensor_model_parallel_size": count}
    again = {"recompute_granularity": "full", "recompute_method": "uniform"}
    for changes in ({}, {**again, "recompute_num_layers": 1}):
        plain, ours, direct = (
            make(s, **parallel, **changes) for s in (plain_spec, spec, plain_spec)
        )
        for layer in direct.decoder.layers:
            packlight.convert(
                layer,
                parse_methods(OPTIONS["methods"]),
                rest=parse_methods(OPTIONS["rest"]),
            )
        exact, found, same = step(plain, ids), step(ours, ids), step(direct, ids)
        assert torch.equal(found[0], same[0])
        torch.testing.assert_close(found[0], exact[0], rtol=1e-5, atol=1e-6)
        for name, truth in exact[1].items():
            assert torch.equal(found[1][name], same[1][name]), name
            error = (found[1][name] - truth).norm() / truth.norm()
            assert error < 0.03, (changes, name, error)
        assert found[2] < (0.5 if not changes else 1.01) * exact[2], (found[2], exact[2])
        assert found[2] == same[2]
        state, before = ours.state_dict(), make(plain_spec, **parallel, **changes).state_dict()
        assert state.keys() == before.keys()
    leave("same gradients")
