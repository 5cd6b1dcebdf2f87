"""Known code of transformers, where a model's user has changed what it does, before or after."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers.models.llama import modeling_llama

import packlight
from packlight import FewBit, GroupQuant
from packlight.integrations.transformers import rotary
from tests.integrations.models import batch, make, step, worst_error

EIGHT = GroupQuant(8, group_size=32, rounding="nearest")


def pair(**options):
    plain = make("llama")
    model = copy.deepcopy(plain)
    packlight.convert(model, EIGHT, **options)
    return plain, model


def agree(model, plain, inputs=None):
    inputs = batch("llama") if inputs is None else inputs
    expected, true = step(plain, inputs)
    output, found = step(model, inputs)
    torch.testing.assert_close(output.loss, expected.loss)
    assert worst_error(found, true) < 0.05


def doubled(own):
    def forward(self, hidden_states, *args, **kwargs):
        return own(self, hidden_states * 2, *args, **kwargs)

    return forward


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["LlamaDecoderLayer", "LlamaAttention", "LlamaMLP"])
def test_a_class_is_given_another_forward(kind, when, monkeypatch):
    """The class has been met before, so what is known of it must not be what was."""
    # Attention behind its projections runs as one function where the rotary kernel is.
    monkeypatch.setattr(rotary, "_DEVICES", ("cuda", "cpu"))
    own = getattr(modeling_llama, kind)
    agree(*reversed(pair(functional=True)))
    if when == "before" or kind == "LlamaMLP":  # which has our forward once it is converted
        monkeypatch.setattr(own, "forward", doubled(own.forward))
        agree(*reversed(pair(functional=True)))
    else:
        plain, model = pair(functional=True)
        monkeypatch.setattr(own, "forward", doubled(own.forward))
        agree(model, plain)


@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
def test_a_projection_is_parametrized_after_the_conversion(name):
    """A weight that is made anew each time it is read, by a power iteration."""
    plain, model = pair()
    for each in (plain, model):
        for layer in each.model.layers:
            torch.manual_seed(1)
            spectral_norm(getattr(layer.self_attn, name))
    for _ in range(2):
        agree(model, plain)


@pytest.mark.parametrize("part", ["attention.output.dense", "output.dense"])
def test_a_layer_behind_is_parametrized_where_the_one_before_is_left_alone(part):
    """What looks at both and takes neither reads no weight: each reading goes an iteration on."""
    plain = make("bert")
    model = copy.deepcopy(plain)
    packlight.convert(model, (EIGHT, FewBit(bits=8)))
    vectors = []
    for each in (plain, model):
        for layer in each.bert.encoder.layer:
            layer.attention.self.query.weight.requires_grad_(False)
            layer.intermediate.dense.weight.requires_grad_(False)
            torch.manual_seed(1)
            spectral_norm(layer.get_submodule(part))
        each(**batch("bert"))
        vectors.append([b for name, b in each.named_buffers() if name.endswith("_u")])
    torch.testing.assert_close(*vectors)


class WritesItsInput(modeling_llama.LlamaAttention):
    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        hidden_states.mul_(2.0)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        attend = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        out, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0
        )
        return self.o_proj(out.reshape(*shape[:-2], -1)), weights


def test_code_that_writes_into_what_it_projects():
    plain = make("llama")
    for layer in plain.model.layers:
        layer.self_attn.__class__ = WritesItsInput
    model = copy.deepcopy(plain)
    packlight.convert(model, EIGHT)
    expected, output = (each(**batch("llama")) for each in (plain, model))
    torch.testing.assert_close(output.loss, expected.loss)


def test_one_projection_in_two_places():
    plain = make("llama", num_key_value_heads=4)
    for layer in plain.model.layers:
        layer.self_attn.k_proj = layer.self_attn.q_proj
    model = copy.deepcopy(plain)
    packlight.convert(model, EIGHT)
    agree(model, plain)


@pytest.mark.parametrize("name", ["llama", "phi3", "t5"])
@pytest.mark.parametrize("change", ["a hook", "a backward hook", "another activation"])
def test_the_activation_of_a_gated_layer(name, change):
    """It is not called while gate and up are packed together, so then it must be."""
    plain = make(name)
    model = copy.deepcopy(plain)
    packlight.convert(model, EIGHT)
    seen = []
    for each in (plain, model):
        for module in each.modules():
            for place in ("act_fn", "activation_fn", "act"):
                if place not in module._modules:
                    continue
                if change == "another activation":
                    setattr(module, place, nn.Tanh())
                elif change == "a hook":
                    module._modules[place].register_forward_hook(lambda m, args, y: y * 2)
                else:
                    module._modules[place].register_full_backward_hook(
                        lambda m, given, got, each=each: seen.append(each is model)
                    )
    agree(model, plain, batch(name))
    if change == "a backward hook":
        assert seen.count(True) == seen.count(False) > 0


def test_transforms_of_functions_run_the_plain_code():
    plain, model = pair()
    inputs = batch("llama")

    def gradient(each):
        parameters = {name: p.detach() for name, p in each.named_parameters()}
        return torch.func.grad(
            lambda given: torch.func.functional_call(each, given, (), inputs).loss
        )(parameters)

    expected, found = gradient(plain), gradient(model)
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Halves(packlight.Quantiser):
    """bfloat16 numbers, by a `pack` of its own."""

    @property
    def grade(self):
        return packlight.Grade(7, 64, False)

    def keep(self, flat, seed):
        return (flat.bfloat16(),)

    def restore(self, dtype, count, *kept):
        return kept[0].to(dtype)

    def pack(self, x, seed):
        return super().pack(x, seed)

    def unpack(self, dtype, shape, stride, *kept):
        return super().unpack(dtype, shape, stride, *kept)


def test_a_quantiser_with_a_pack_of_its_own():
    plain = make("llama")
    model = copy.deepcopy(plain)
    packlight.convert(model, Halves())
    agree(model, plain)


def test_weights_that_change_where_no_gradient_of_the_input_is_asked():
    _, model = pair()
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 8, 64)
    places = model.model.rotary_emb(x, torch.arange(8)[None])
    out, _ = attention(x, position_embeddings=places, attention_mask=None)
    with torch.no_grad():
        attention.q_proj.weight.mul_(2)
    out.sum().backward()
    assert attention.q_proj.weight.grad is not None


class Gated(nn.Module):
    """Of no known code: the product of gate and up is a call that is covered."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("way", ["a hook that comes later", "retain_grad", "asked for"])
def test_who_looks_at_an_activation_after_its_product(way):
    torch.manual_seed(0)
    plain = Gated()
    model = copy.deepcopy(plain)
    packlight.convert(model, EIGHT, functional=True)
    x = torch.randn(16, 64)
    gradients = []
    for each in (plain, model):
        met = []
        each.act.register_forward_hook(lambda module, args, y, met=met: met.append(y))
        loss = each(x).square().sum()
        y, found = met[0], []
        if way == "asked for":
            found = torch.autograd.grad(loss, y)
        elif way == "retain_grad":
            y.retain_grad()
            loss.backward()
            found = [y.grad]
        else:
            y.register_hook(found.append)
            loss.backward()
        gradients.append(found[0])
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()
