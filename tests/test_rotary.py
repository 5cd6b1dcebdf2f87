"""Rotary position embedding: the kernel against the reference, and both against transformers."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama import modeling_llama

import packlight
from packlight.errors import DoubleBackwardError, InputError
from packlight.integrations.transformers import rotary as integration
from packlight.rotary import kernels, ops, rotate
from tests.helpers import DEVICES

# The plain function, whatever a conversion has put in its place since.
plain = getattr(modeling_llama.apply_rotary_pos_emb, "__wrapped__", None)
plain = plain or modeling_llama.apply_rotary_pos_emb

SHAPES = [(2, 4, 2, 16, 64), (1, 3, 1, 5, 96), (2, 32, 8, 3, 128), (1, 1, 1, 1, 2), (1, 2, 2, 0, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def inputs(shape, dtype, device, batch=1, transposed=True):
    size_of_batch, heads, groups, length, size = shape
    found = []
    for count in (heads, groups):
        x = torch.randn(size_of_batch, length, count, size, device=device, dtype=dtype)
        found.append(x.transpose(1, 2) if transposed else x.transpose(1, 2).contiguous())
    angles = torch.randn(batch, length, size, device=device)
    return *found, angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_it_is_what_transformers_computes(device, dtype, shape, transposed):
    for batch in {1, shape[0]}:
        q, k, cos, sin = inputs(shape, dtype, device, batch, transposed)
        ours = [x.clone().requires_grad_() for x in (q, k)]
        theirs = [x.clone().requires_grad_() for x in (q, k)]
        found, expected = rotate(*ours, cos, sin), plain(*theirs, cos, sin)
        grads = [torch.randn_like(x) for x in found]
        torch.autograd.backward(found, grads)
        torch.autograd.backward(expected, grads)
        exact = dtype != torch.float32 or device == "cpu"  # float32 products are fused on a device
        options = {"rtol": 0, "atol": 0} if exact else {}
        torch.testing.assert_close(found, expected, **options)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, **options)
        assert [x.stride() for x in found] == [torch.empty_like(x).stride() for x in (q, k)]


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("back", [False, True])
def test_the_kernel_is_the_reference(dtype, shape, transposed, back, poison):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for batch in {1, shape[0]}:
        given = inputs(shape, dtype, device, batch, transposed)
        found = kernels.rotary(*given, back)
        expected = ops._reference(*given, back)
        # The interpreter truncates to bfloat16, and a device fuses float32 products.
        options = {"rtol": 0, "atol": 0}
        if dtype == torch.bfloat16 and device == "cpu":
            options = {"rtol": 0.02, "atol": 0.04}
        torch.testing.assert_close(found, expected, **(options if dtype.itemsize == 2 else {}))


def test_columns_that_do_not_lie_side_by_side():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, cos, sin = inputs((2, 4, 2, 6, 16), torch.float32, device)
    q = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    found = kernels.rotary(q, k, cos, sin.transpose(-1, -2).contiguous().transpose(-1, -2), False)
    torch.testing.assert_close(found, ops._reference(q, k, cos, sin, False))


def test_gradients_are_those_of_numbers():
    q, k, cos, sin = inputs((1, 2, 1, 3, 4), torch.float64, "cpu")
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rotate(q, k, cos, sin), (q, k))
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(rotate(q, k, cos, sin)[0].sum(), q, create_graph=True)


def test_nothing_is_kept_of_queries_and_keys():
    q, k, cos, sin = inputs((2, 4, 2, 16, 64), torch.float32, "cpu")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rotate(q.requires_grad_(), k.requires_grad_(), cos, sin)
    assert {id(x) for x in kept} == {id(cos), id(sin)}


def test_wrong_arguments():
    q, k, cos, sin = inputs((2, 4, 2, 16, 64), torch.float32, "cpu")
    for wrong in (
        (q[0], k, cos, sin), (q, k[:, :, :8], cos, sin), (q, k, cos[:, :8], sin[:, :8]),
        (q, k, cos.double(), sin), (q, k, cos, sin[..., :32]), (q[..., :63], k, cos, sin),
    ):  # fmt: skip
        with pytest.raises(InputError, match="rotate takes queries"):
            rotate(*wrong)


# ---- in models of transformers -------------------------------------------------------------------


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(integration, "_DEVICES", ("cpu", "cuda"))
    calls = []
    monkeypatch.setattr(integration, "rotate", lambda *given: calls.append(1) or rotate(*given))
    return calls


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3"])
def test_converted_models_rotate_by_one_kernel(family, on_the_cpu):
    config = getattr(transformers, f"{family}Config")(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=64,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).train()
    ids = torch.randint(3, 60, (2, 8))
    steps = []
    for kind in (None, "launched", "again"):
        model.zero_grad()
        if kind == "launched":
            packlight.convert(
                model, {nn.Linear: None, "*": packlight.GroupQuant(8)}, functional=True
            )
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        steps.append((loss.detach(), model.lm_head.weight.grad.clone()))
    assert len(on_the_cpu) == 4  # two layers, two passes
    torch.testing.assert_close(steps[1][0], steps[0][0])
    torch.testing.assert_close(steps[2][1], steps[0][1], rtol=0.05, atol=1e-3)
    model.eval()
    model(input_ids=ids)
    packlight.revert(model)
    model.train()
    model(input_ids=ids)
    assert len(on_the_cpu) == 4


def test_a_function_of_other_code_stays(on_the_cpu, monkeypatch):
    def twice(q, k, cos, sin, unsqueeze_dim=1):
        return 2 * q, 2 * k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", twice)
    integration.use_one_kernel(modeling_llama.LlamaAttention)
    assert modeling_llama.apply_rotary_pos_emb is twice
