"""Self-attention and blocks of transformers and timm as one function, beside their parts."""

import copy
import functools

import peft
import pytest
import torch
import transformers
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.roberta.modeling_roberta import RobertaLayer, RobertaSelfAttention

import packlight
from packlight import DoubleBackwardError, FewBit, GroupQuant, ModifiedWeightError
from packlight.integrations.transformers import blocks, rotary
from packlight.integrations.transformers.attention import GroupQuantSplitAttention
from packlight.layers import attention as sdpa
from tests.helpers import relative_error

NEAREST = GroupQuant(bits=8, group_size=32, rounding="nearest")
WIDTH = 64


def bert(kind=RobertaSelfAttention):
    config = transformers.RobertaConfig(
        hidden_size=WIDTH, num_attention_heads=2, attention_probs_dropout_prob=0.0
    )
    config._attn_implementation = "sdpa"
    return kind(config)


def bert_layer(p=0.0):
    config = transformers.RobertaConfig(
        hidden_size=WIDTH,
        intermediate_size=96,
        num_attention_heads=2,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=p,
    )
    config._attn_implementation = "sdpa"
    return RobertaLayer(config)


def attention(bias=True):
    return Attention(WIDTH, num_heads=2, qkv_bias=bias)


def block(bias=True):
    return Block(WIDTH, 2, qkv_bias=bias)


class Rotated(nn.Module):
    """Attention of a model with rotary embedding, or a block, by itself."""

    def __init__(self, kind, config):
        super().__init__()
        shape = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = config(**shape, head_dim=16, intermediate_size=96)
        config._attn_implementation = "sdpa"
        self.attention = kind(config, 0)

    def forward(self, x, attn_mask=None, past_key_values=False):
        angles = torch.arange(x.shape[1])[:, None] / torch.arange(1, 9)
        angles = torch.cat((angles, angles), -1)[None].to(x.dtype)
        places = (angles.cos(), angles.sin())
        given = {"position_embeddings": places, "attention_mask": attn_mask}
        if past_key_values:
            given["past_key_values"] = transformers.DynamicCache()
        return self.attention(x, **given)


def llama():
    return Rotated(LlamaAttention, transformers.LlamaConfig)


def llama_block():
    return Rotated(LlamaDecoderLayer, transformers.LlamaConfig)


def qwen2():
    return Rotated(Qwen2Attention, transformers.Qwen2Config)


def qwen3():
    return Rotated(Qwen3Attention, transformers.Qwen3Config)


KINDS = {
    "llama": (llama, {"_LinearsBackward"}),
    "llama's block": (llama_block, {"_LinearsBackward", "_GatedMLPBackward"}),
    "qwen2": (qwen2, {"_LinearsBackward"}),
    "qwen3": (qwen3, {"_LinearsBackward"}),
    "roberta": (bert, {"_WholeAttentionBackward", "_ProjectionsBackward"}),
    "bert": (lambda: bert(BertSelfAttention), {"_WholeAttentionBackward", "_ProjectionsBackward"}),
    "bert's layer": (
        bert_layer,
        {"_AttentionBackward", "_MLPBackward"},
    ),
    "attention": (attention, {"_WholeAttentionBackward"}),
    "attention without bias": (lambda: attention(False), {"_WholeAttentionBackward"}),
    "block": (block, {"_AttentionBackward", "_MLPBackward"}),
    "block without bias": (lambda: block(False), {"_AttentionBackward", "_MLPBackward"}),
}
every_kind = pytest.mark.parametrize("name", KINDS)


def converted(make):
    torch.manual_seed(0)
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    plain = copy.deepcopy(module)
    packlight.convert(module, (NEAREST, FewBit(bits=8)), functional=True)
    return module, plain


def one_by_one(module):
    """Hooks on all parts have them run by themselves."""
    for part in module.modules():
        if part is not module:
            part.register_forward_hook(lambda *_: None)
    return module


def nodes(y):
    found, pending = set(), [y.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None:
            found.add(node.name())
            pending += [following for following, _ in node.next_functions]
    return found


def sample(dtype=torch.float32, length=6):
    torch.manual_seed(1)
    return torch.randn(3, length, WIDTH).to(dtype).requires_grad_()


def run(module, x, autocast=False, **options):
    packlight.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x, **options)
    y = y[0] if isinstance(y, tuple) else y
    torch.manual_seed(3)
    y.backward(torch.randn_like(y))
    gradients = [x.grad] + [p.grad for p in module.parameters()]
    x.grad = None
    return y, gradients


def assert_alike(module, gradients, others, near):
    """Gradients of the input and of all parameters."""
    names = ["x"] + [name for name, _ in module.named_parameters()]
    for name, a, b in zip(names, gradients, others, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        # Of a whole sub-layer it is of the output that comes again, not of a pack.
        again = (Block, "attn.proj.weight"), (RobertaLayer, "attention.output.dense.weight")
        loose = any(isinstance(module, kind) and name == own for kind, own in again)
        assert relative_error(a, b) <= (max(near, 0.02) if loose else near)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_the_same_as_part_by_part(name, dtype, autocast):
    make, expected_nodes = KINDS[name]
    module, _ = converted(lambda: make().to(dtype))
    x = sample(dtype)
    y, gradients = run(module, x, autocast)
    assert expected_nodes <= nodes(y)
    parts = one_by_one(copy.deepcopy(module))
    expected, others = run(parts, x, autocast)
    assert not expected_nodes & nodes(expected)
    near = 1e-5 if dtype == torch.float32 and not autocast else 3e-2
    assert y.dtype == expected.dtype
    assert relative_error(y, expected) <= near / 3
    assert_alike(module, gradients, others, near)


def _other_rotary(_):
    modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin: (q, k)


def _plain_projection(module):
    packlight.revert(module.attention.o_proj)


def _adapters(module):
    packlight.revert(module)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, module)
    packlight.convert(module, NEAREST, functional=True)


def _cache(module):
    module.forward = functools.partial(module.forward, past_key_values=True)


CHANGES = {
    "as it is": lambda _: None,
    "projection reverted": _plain_projection,
    "another rotation": _other_rotary,
    "adapters": _adapters,
    "cache": _cache,
}


@pytest.mark.parametrize("device", ["cuda", "cpu"])  # where there is a kernel of the rotation
@pytest.mark.parametrize("change", CHANGES)
def test_llamas_code_behind_its_projections_is_known(change, device, monkeypatch):
    rotates = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotates)
    monkeypatch.setattr(rotary, "_DEVICES", (device,))
    module, _ = converted(llama)
    CHANGES[change](module)
    ran, behind = [], GroupQuantSplitAttention._behind
    monkeypatch.setattr(
        GroupQuantSplitAttention, "_behind", lambda *given: ran.append(1) or behind(*given)
    )
    y, gradients = run(module, sample())
    assert ran == [1]
    module.zero_grad()
    monkeypatch.setattr(GroupQuantSplitAttention, "_runs_known_code", lambda *_: False)
    again, others = run(module, sample())
    assert ran == [1]
    assert torch.equal(again, y)
    pairs = zip(gradients, others, strict=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_code_that_is_not_llamas_runs_itself(monkeypatch):
    monkeypatch.setattr(GroupQuantSplitAttention, "_behind", None)
    module, _ = converted(qwen2)
    assert "_LinearsBackward" in nodes(run(module, sample())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_goes_on_beside_a_norm_comes_back_with_its_gradient(dtype, monkeypatch):
    module, _ = converted(llama_block)
    module.to(dtype)
    with Sums() as sums:
        y, gradients = run(module, sample(dtype))
    module.zero_grad()
    monkeypatch.setattr(blocks, "_beside", lambda *_: None)
    with Sums() as more:
        again, others = run(module, sample(dtype))
    assert (sums.beside, more.beside, more.count - sums.count) == (2, 0, 2)
    assert torch.equal(again, y)
    assert_alike(module, gradients, others, 1e-6 if dtype == torch.float32 else 1e-2)


class Sums(TorchDispatchMode):
    """Counts additions of a backward pass, and gradients of norms that something is added to."""

    count = beside = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.packlight.group_quant_norm_backward.default:
            self.beside += args[-1] is not None
        adds = func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
        self.count += adds and torch._C._current_graph_task_id() >= 0
        return func(*args, **(kwargs or {}))


def test_arguments_by_position_reach_the_modules_own_code():
    module, _ = converted(llama)
    angles = torch.randn(1, 6, 16)
    given = ((angles.cos(), angles.sin()), torch.rand(3, 1, 6, 6) > -1)
    packlight.manual_seed(2)
    y, _ = module.attention(sample(), *given)
    packlight.manual_seed(2)
    names = ("position_embeddings", "attention_mask")
    expected, _ = module.attention(sample(), **dict(zip(names, given, strict=True)))
    assert torch.equal(y, expected)


def test_a_projection_whose_result_nobody_reads_has_no_gradient():
    module, _ = converted(llama)
    attention = module.attention
    x = sample()
    query, _, value = attention._projected(x)
    (query.sum() + value.sum()).backward()
    assert attention.k_proj.weight.grad is None
    expected = sum(each.weight.sum(0) for each in (attention.q_proj, attention.v_proj))
    torch.testing.assert_close(x.grad, expected.expand_as(x))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@every_kind
def test_a_mask_is_taken(name, kind):
    make, expected_nodes = KINDS[name]
    module, _ = converted(make)
    allowed = torch.rand(3, 1, 6, 6) > 0.3
    allowed |= torch.eye(6, dtype=torch.bool)
    mask = allowed if kind == torch.bool else torch.where(allowed, 0.0, -torch.inf)
    options = {"attention_mask" if "bert" in name else "attn_mask": mask}
    y, gradients = run(module, sample(), **options)
    assert expected_nodes <= nodes(y)
    expected, others = run(one_by_one(copy.deepcopy(module)), sample(), **options)
    assert relative_error(y, expected) <= 1e-5
    assert_alike(module, gradients, others, 1e-5)


@every_kind
def test_gradients_are_those_of_the_plain_layer_but_for_the_packs(name):
    module, plain = converted(KINDS[name][0])
    y, gradients = run(module, sample())
    expected, truth = run(plain, sample())
    torch.testing.assert_close(y, expected)
    for a, b in zip(gradients, truth, strict=True):
        # The gradient of a key's bias is nothing but rounding: a softmax does not see it.
        assert relative_error(a, b) < 0.05 or b.norm() < 1e-3 * truth[0].norm()


def test_dropouts_of_a_layer_draw_as_by_themselves():
    module, _ = converted(lambda: bert_layer(0.3))
    y, gradients = run(module, sample())
    assert {"_AttentionBackward", "_MLPBackward"} <= nodes(y)
    expected, others = run(one_by_one(copy.deepcopy(module)), sample())
    assert relative_error(y, expected) <= 1e-5
    assert_alike(module, gradients, others, 1e-5)
    x = sample()
    with torch.no_grad():  # the pass of a checkpoint without gradients
        packlight.manual_seed(2)
        assert relative_error(module(x), y) <= 1e-5


def test_the_gradient_of_a_blocks_projection_is_nearer_the_truth_than_by_a_pack_of_4_bits():
    torch.manual_seed(0)
    plain = Block(128, 2, qkv_bias=True)
    module, parts = copy.deepcopy(plain), copy.deepcopy(plain)
    for each in (module, parts):
        packlight.convert(each, functional=True)
    x = torch.randn(3, 64, 128)
    for each in (plain, module, one_by_one(parts)):
        each(x.clone().requires_grad_()).square().sum().backward()
    truth, ours, by_pack = (each.attn.proj.weight.grad for each in (plain, module, parts))
    assert relative_error(ours, truth) < relative_error(by_pack, truth) / 4


@every_kind
def test_it_keeps_no_more(name):
    module, _ = converted(KINDS[name][0])
    x = sample(length=64)
    kept = packlight.profile(module, x).activation_bytes
    assert kept <= packlight.profile(one_by_one(module), x).activation_bytes


def test_what_the_projection_of_a_whole_sub_layer_reads_is_not_kept():
    module, _ = converted(bert_layer)
    x = torch.randn(4, 16, WIDTH, requires_grad=True)
    kept = packlight.profile(module, x).activation_bytes
    parts = packlight.profile(one_by_one(copy.deepcopy(module)), x).activation_bytes
    groups = x.numel() // NEAREST.group_size
    assert parts - kept == x.numel() + 4 * groups  # a byte an element and a word a group


@pytest.mark.parametrize("reentrant", [False, True])
@every_kind
def test_within_a_checkpoint(name, reentrant):
    """The second pass runs outside of the model's forward, and saves what the first did."""
    module, _ = converted(KINDS[name][0])
    y, gradients = run(module, sample())
    module.zero_grad()

    def checkpointed(x):
        return checkpoint(module, x, use_reentrant=reentrant)

    checkpointed.parameters = module.parameters
    again, others = run(checkpointed, sample())
    assert torch.equal(again, y)
    for a, b in zip(gradients, others, strict=True):
        assert relative_error(a, b) <= 1e-5


def _frozen(module):
    next(module.parameters()).requires_grad_(False)


def _first_linear(module):
    return next(part for part in module.modules() if isinstance(part, nn.Linear))


def _part_in_eval(module):
    _first_linear(module).eval()


def _plain_part(module):
    packlight.revert(_first_linear(module))


@pytest.mark.parametrize("change", [_frozen, _part_in_eval, one_by_one, _plain_part])
@every_kind
def test_elsewhere_the_parts_run(name, change):
    make, expected_nodes = KINDS[name]
    module, _ = converted(make)
    change(module)
    y, _ = run(module, sample())
    missing = expected_nodes - nodes(y)
    assert missing or (change is _frozen and "block" in name)  # whose norm may be frozen


@every_kind
def test_in_eval_it_is_the_plain_layer(name):
    module, plain = converted(KINDS[name][0])
    x = sample()
    y, expected = module.eval()(x), plain.eval()(x)
    y, expected = (each[0] if isinstance(each, tuple) else each for each in (y, expected))
    assert torch.equal(y, expected)
    assert nodes(y) == nodes(expected)


@every_kind
def test_what_layers_refuse_is_refused(name):
    module, _ = converted(KINDS[name][0])
    x = sample()

    def forward():
        y = module(x)
        return y[0] if isinstance(y, tuple) else y

    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(forward().sum(), x, create_graph=True)
    y = forward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    with pytest.raises(ModifiedWeightError):
        y.sum().backward()
    y = forward()
    y.add_(1.0)  # it may be written to
    y.sum().backward()


@every_kind
def test_where_attention_keeps_its_statistic_its_own_function_runs(name, monkeypatch):
    module, _ = converted(KINDS[name][0])
    monkeypatch.setattr(sdpa, "STATISTIC_KEYS", 4)
    y, gradients = run(module, sample())
    found = nodes(y)
    assert "_KeptAttentionBackward" in found
    assert not found & {"_WholeAttentionBackward", "_AttentionBackward"}
    expected, others = run(one_by_one(copy.deepcopy(module)), sample())
    assert relative_error(y, expected) <= 1e-5
    for a, b in zip(gradients, others, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_without_covered_calls_attention_of_timm_keeps_what_torch_keeps():
    torch.manual_seed(0)
    module = block()
    packlight.convert(module, NEAREST, functional=False)
    y = module(sample())
    assert not {"_AttentionBackward", "_WholeAttentionBackward"} & nodes(y)
    assert any("ScaledDotProduct" in node for node in nodes(y))


def test_settings_that_the_functions_do_not_know_run_part_by_part():
    for options in (
        {"qk_norm": True},
        {"init_values": 0.1},
        {"drop_path": 0.2},
        {"proj_drop": 0.1},
    ):
        torch.manual_seed(0)
        module = Block(WIDTH, 2, qkv_bias=True, **options)
        packlight.convert(module, (NEAREST, FewBit(bits=8)), functional=True)
        assert "_AttentionBackward" not in nodes(module(sample()))
