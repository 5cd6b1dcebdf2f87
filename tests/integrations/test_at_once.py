"""Known layers of transformers and timm that run as one function, beside their parts."""

import copy

import pytest
import torch
import transformers
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.overrides import _get_current_function_mode_stack
from transformers.models.bert.modeling_bert import BertLayer, BertOutput
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.roberta.modeling_roberta import RobertaIntermediate, RobertaSelfOutput
from transformers.pytorch_utils import Conv1D

import packlight
from packlight import DoubleBackwardError, FewBit, GroupQuant, ModifiedWeightError
from packlight.planner.devices import device_of
from packlight.planner.menu import PACKED_4
from packlight.planner.study import Study
from packlight.planner.timeline import BACKWARD
from tests.helpers import relative_error

NEAREST = GroupQuant(bits=8, group_size=32, rounding="nearest")
WIDTH, MIDDLE = 64, 96


def output(kind=RobertaSelfOutput, p=0.0):
    config = transformers.RobertaConfig(
        hidden_size=WIDTH, intermediate_size=MIDDLE, hidden_dropout_prob=p
    )
    return kind(config)


def mlp():
    sizes = {"hidden_size": WIDTH, "intermediate_size": MIDDLE}
    return LlamaMLP(transformers.LlamaConfig(**sizes))


def half():
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH}
    return RobertaIntermediate(transformers.RobertaConfig(**sizes))


def plain_mlp():
    return Mlp(WIDTH, MIDDLE)


def transposed_mlp():
    return GPT2MLP(MIDDLE, transformers.GPT2Config(n_embd=WIDTH, resid_pdrop=0.0))


def other_mlp():
    sizes = {"hidden_size": WIDTH, "intermediate_size": MIDDLE}
    return CLIPMLP(transformers.CLIPVisionConfig(**sizes, num_attention_heads=2, hidden_act="gelu"))


KINDS = {
    "transposed mlp": (transposed_mlp, (WIDTH,), "_MLPBackward"),
    "other mlp": (other_mlp, (WIDTH,), "_MLPBackward"),
    "half": (half, (WIDTH,), "_ActivatedBackward"),
    "plain mlp": (plain_mlp, (WIDTH,), "_MLPBackward"),
    "output": (output, (WIDTH, WIDTH), "_PostNormBackward"),
    "mlp": (mlp, (WIDTH,), "_GatedMLPBackward"),
}


def inputs(widths, shape=(3, 7), dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.randn(*shape, width).to(dtype).requires_grad_() for width in widths]


def converted(make):
    torch.manual_seed(0)
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    plain = copy.deepcopy(module)
    packlight.convert(module, (NEAREST, FewBit(bits=8)))
    return module, plain


def one_by_one(module):
    """A hook on a part has the parts run by themselves."""
    part = next(iter(module.children()))
    part.register_forward_hook(lambda *_: None)
    return module


def run(module, given, dy, autocast):
    packlight.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(*given)
    y.backward(dy.to(y.dtype))
    gradients = [x.grad for x in given] + [p.grad for p in module.parameters()]
    for x in given:
        x.grad = None
    return y, gradients


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7), (5,), (2, 0)])
@pytest.mark.parametrize("name", KINDS)
def test_the_same_as_part_by_part(name, shape, dtype, autocast):
    make, widths, node = KINDS[name]
    module, _ = converted(lambda: make().to(dtype))
    given, dy = inputs(widths, shape, dtype), torch.randn(*shape, WIDTH)
    y, gradients = run(module, given, dy, autocast)
    if 0 not in shape:
        assert y.grad_fn.name() == node
    parts = one_by_one(copy.deepcopy(module))
    expected, others = run(parts, given, dy, autocast)
    assert expected.grad_fn.name() != node
    assert torch.equal(y, expected)
    near = 1e-5 if dtype == torch.float32 and not autocast else 2e-2
    for a, b in zip(gradients, others, strict=True):
        assert a.dtype == b.dtype
        assert not b.numel() or relative_error(a, b) <= near


class Compiler:
    """A backend of torch.compile that notes our nodes of its graphs, and the modes they run in."""

    def __init__(self):
        self.nodes, self.modes = [], []

    def __call__(self, graph, inputs):
        names = [getattr(node.target, "__name__", "") for node in graph.graph.nodes]
        self.nodes += [name for name in names if name.startswith("apply_")]
        compiled = aot_eager(graph, inputs)

        def run(*args):
            self.modes.append(_get_current_function_mode_stack())
            return compiled(*args)

        return run


@pytest.mark.parametrize("name", KINDS)
def test_compiled_they_are_one_node_with_the_same_gradients(name, fresh_compiler):
    make, widths, _ = KINDS[name]
    module, _ = converted(make)
    given, dy = inputs(widths), torch.randn(3, 7, WIDTH)
    y, expected = run(module, given, dy, False)
    module.zero_grad()
    compiler = Compiler()
    z, gradients = run(torch.compile(module, backend=compiler, fullgraph=True), given, dy, False)
    assert len(compiler.nodes) == 1 + (name == "transposed mlp")  # with its dropout
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("change", [lambda m: _frozen(m), lambda m: _part_in_eval(m)])
@pytest.mark.parametrize("name", ["plain mlp", "output"])
def test_compiled_code_is_made_anew_where_the_parts_are_to_run(name, change, fresh_compiler):
    """torch 2.11 does not make it anew for a frozen weight, whose gradient it leaves out."""
    make, widths, _ = KINDS[name]
    module, _ = converted(make)
    given, dy = inputs(widths), torch.randn(3, 7, WIDTH)
    compiler = Compiler()
    compiled = torch.compile(module, backend=compiler)
    run(compiled, given, dy, False)
    change(module)
    module.zero_grad()
    y, expected = run(module, given, dy, False)
    expected = copy.deepcopy(expected)
    module.zero_grad()
    compiler.nodes.clear()
    z, gradients = run(compiled, given, dy, False)
    assert len(compiler.nodes) != 1
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("part", ["dense", "dropout"])
def test_compiled_code_is_made_anew_for_a_forward_of_a_part_s_own(part, fresh_compiler):
    make, widths, _ = KINDS["output"]
    module, _ = converted(make)
    given, dy = inputs(widths), torch.randn(3, 7, WIDTH)
    compiled = torch.compile(module, backend="aot_eager")
    run(compiled, given, dy, False)
    inner = getattr(module, part)
    forward = inner.forward
    inner.forward = lambda x: 2 * forward(x)
    results = []
    for each in (module, compiled):
        module.zero_grad()
        results.append(copy.deepcopy(run(each, given, dy, False)[1]))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_layers_compile_with_any_length_and_dropout(fresh_compiler):
    """Causal layers one by one, whose lengths become symbols, and probabilities that do."""
    config = transformers.BertConfig(
        is_decoder=True, vocab_size=64, hidden_size=WIDTH, intermediate_size=MIDDLE,
        num_hidden_layers=2, num_attention_heads=2, attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertLMHeadModel(config).train()
    packlight.convert(model, NEAREST)
    blocks = model.bert.encoder.layer
    lengths = (7, 9, 5, 1)
    words = [torch.randint(0, 64, (3, length)) for length in lengths]

    def gradients(ids):
        model.zero_grad()
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
        return [p.grad for p in model.parameters()]

    expected = [gradients(ids) for ids in words]
    for block in blocks:
        block.compile(backend="aot_eager")
    torch.testing.assert_close([gradients(ids) for ids in words], expected, rtol=1e-3, atol=1e-3)
    for p in (0.1, 0.2, 0.0):
        for block in blocks:
            block.attention.self.dropout.p = p
        gradients(words[0])


def test_whole_attention_compiles_with_dynamic_shapes(fresh_compiler):
    torch.manual_seed(0)
    module = Block(WIDTH, 2)
    packlight.convert(module, NEAREST)
    compiled = torch.compile(module, backend="aot_eager", dynamic=True)
    for length in (7, 9):
        x = torch.randn(3, length, WIDTH)
        torch.testing.assert_close(compiled(x), module(x))
        compiled(x).sum().backward()


def bert_block():
    config = transformers.BertConfig(
        hidden_size=WIDTH, intermediate_size=MIDDLE, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return BertLayer(config)


def timm_block():
    return Block(WIDTH, 2, mlp_ratio=1.5, qkv_bias=True)


@pytest.mark.parametrize("make", [bert_block, timm_block])
def test_a_compiled_block_is_two_nodes_with_the_mode_off(make, fresh_compiler):
    class Model(nn.Module):  # whose code is covered around the block's
        def __init__(self):
            super().__init__()
            self.block = make()

        def forward(self, x):
            y = self.block(x)
            return y[0] if isinstance(y, tuple) else y

    module, _ = converted(Model)
    [x], dy = inputs([WIDTH]), torch.randn(3, 7, WIDTH)
    y, expected = run(module, [x], dy, False)
    module.zero_grad()
    compiler = Compiler()
    module.block.compile(backend=compiler, fullgraph=True)
    z, gradients = run(module, [x], dy, False)
    assert compiler.nodes == ["apply_attention", "apply_mlp"]
    assert compiler.modes == [[]]
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", KINDS)
def test_compiled_autograd_gives_the_gradients(name, fresh_compiler):
    make, widths, _ = KINDS[name]
    module, _ = converted(make)
    given, dy = inputs(widths), torch.randn(3, 7, WIDTH)
    _, expected = run(module, given, dy, False)
    module.zero_grad()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        _, gradients = run(module, given, dy, False)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_lie_as_their_parameters(name):
    """A fused optimizer goes through both as they lie in memory."""
    make, widths, _ = KINDS[name]
    module, _ = converted(make)
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(module(*inputs(widths)).sum(), parameters)
    assert [g.stride() for g in gradients] == [p.stride() for p in parameters]


@pytest.mark.parametrize("reads_data", [True, False])
def test_the_gradient_of_a_transposed_weight_lies_as_the_weight(reads_data):
    layer, plain = converted(lambda: Conv1D(MIDDLE, WIDTH))
    [x] = inputs([WIDTH])
    x.requires_grad_(not reads_data)
    [gradient] = torch.autograd.grad(layer(x).sum(), [layer.weight])
    [expected] = torch.autograd.grad(plain(x).sum(), [plain.weight])
    assert gradient.stride() == expected.stride()
    assert relative_error(gradient, expected) < 0.02


@pytest.mark.parametrize("kind", [RobertaSelfOutput, BertOutput])
def test_a_dropout_draws_as_its_layer_does(kind):
    widths = (MIDDLE if kind is BertOutput else WIDTH, WIDTH)
    module, plain = converted(lambda: output(kind, 0.3))
    given, dy = inputs(widths), torch.randn(3, 7, WIDTH)
    y, gradients = run(module, given, dy, False)
    assert y.grad_fn.name() == "_PostNormBackward"
    expected, others = run(one_by_one(copy.deepcopy(module)), given, dy, False)
    assert torch.equal(y, expected)
    for a, b in zip(gradients, others, strict=True):
        assert relative_error(a, b) < 1e-5
    with torch.no_grad():  # the pass of a checkpoint without gradients
        packlight.manual_seed(2)
        assert torch.equal(module(*given), y)
    module.eval()
    assert torch.equal(module(*given), plain.eval()(*given))


@pytest.mark.parametrize("name", KINDS)
def test_it_keeps_no_more_and_its_readers_share(name):
    make, widths, _ = KINDS[name]
    module, _ = converted(make)
    tail = nn.Linear(WIDTH, WIDTH)
    packlight.convert(tail, NEAREST)

    class Both(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.first, self.tail = first, tail

        def forward(self, *given):
            return self.tail(self.first(*given))

    given = inputs(widths, (16, 8))
    kept = packlight.profile(Both(module), *given).activation_bytes
    parts = packlight.profile(Both(one_by_one(module)), *given).activation_bytes
    assert kept <= parts


def _frozen(module):
    next(module.parameters()).requires_grad_(False)


def _part_in_eval(module):
    next(iter(module.children())).eval()


def _plain_part(module):
    packlight.revert(next(iter(module.children())))


@pytest.mark.parametrize("change", [_frozen, _part_in_eval, one_by_one, _plain_part])
@pytest.mark.parametrize("name", KINDS)
def test_elsewhere_the_parts_run(name, change):
    make, widths, node = KINDS[name]
    module, _ = converted(make)
    assert module(*inputs(widths)).grad_fn.name() == node
    change(module)
    assert module(*inputs(widths)).grad_fn.name() != node


@pytest.mark.parametrize("name", KINDS)
def test_what_layers_refuse_is_refused(name):
    make, widths, _ = KINDS[name]
    module, _ = converted(make)
    given = inputs(widths)
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(module(*given).sum(), given, create_graph=True)
    y = module(*given)
    with torch.no_grad():
        next(module.parameters()).mul_(2)
    with pytest.raises(ModifiedWeightError):
        y.sum().backward()
    y = module(*given)
    y.add_(1.0)  # it may be written to
    y.sum().backward()


def test_the_backward_pass_of_a_gated_mlp_has_two_products_at_once():
    """The gradients of gate and up, a tensor like x, and gradients of three weights; no packs."""
    rows, width, inner = 512, 64, 256
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=128, use_cache=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ids = torch.randint(0, 128, (1, rows))
    study = Study(model.train(), (), {"input_ids": ids, "labels": ids}, device_of("H200"))
    timeline = study.walked(PACKED_4, PACKED_4).timeline
    [part] = [
        segment
        for segment in timeline.segments
        if segment.phase == BACKWARD and segment.place.endswith("mlp")
    ]
    product, x, weight = (2 * n for n in (rows * inner, rows * width, width * inner))
    packs = 2 * rows * inner * 9 // 16  # of gate and up, 4 bits and a half
    working = part.peak - part.before
    assert 2 * product < working <= 2 * product + x + 3 * weight - packs // 2 + 4096
