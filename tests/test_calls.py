"""`convert(..., functional=True)`: calls of torch functions in a model's own code."""

import contextlib
import copy
import dataclasses
import inspect
import io
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import (
    FewBit,
    FixedPoint,
    GroupQuant,
    Inverted,
    _torch,
    calls,
    convert,
    groupquant,
    profile,
    revert,
)
from packlight import method as rules
from packlight._classes import joined
from packlight.errors import CannotConvertError, InputError, NothingMatchedError
from packlight.layers import product
from packlight.layers.arithmetic import ARITHMETIC
from packlight.layers.casts import CASTS
from packlight.layers.matmul import matmul
from packlight.method import Method, _call_rules
from packlight.quantiser import Quantiser
from packlight.sketch import Sketch
from tests.helpers import gradients, node_name

NEAREST = GroupQuant(bits=8, group_size=32, rounding="nearest")
FINE = (NEAREST, FewBit(bits=8))


class Gated(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Net(nn.Module):
    def __init__(self, width=64, reentrant=None):
        super().__init__()
        self.gated = nn.ModuleList([Gated(width), Gated(width)])
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.reentrant = reentrant

    def forward(self, x, *, scale=1.0):
        for module in self.gated:
            if self.reentrant is None:
                x = x + module(x)
            else:
                x = x + checkpoint(module, x, use_reentrant=self.reentrant)
        q, k, v = (part.unflatten(-1, (4, -1)).mT for part in self.qkv(self.norm(x)).chunk(3, -1))
        q, k, v = (part.permute(0, 3, 1, 2) for part in (q, k, v))
        return F.relu(F.scaled_dot_product_attention(q, k, v)) * scale


def operations(model, x):
    return set(profile(model, x).by_operation())


def test_calls_keep_less_and_give_the_same_results():
    packlight.manual_seed(0)
    plain, x = Net(), torch.randn(2, 32, 64)
    model = copy.deepcopy(plain)
    conversion = convert(model, FINE, functional=True)
    assert conversion.functional == ("", "gated.0", "gated.1")
    assert "calls of torch functions are covered in 3 modules" in str(conversion)
    assert torch.equal(model(x), plain(x))
    for ours, theirs in zip(gradients(model, x), gradients(plain, x), strict=True):
        assert (ours - theirs).norm() < 0.06 * theirs.norm()
    kept = profile(model, x)
    assert not {"SiluBackward0", "ReluBackward0"} & kept.by_operation().keys()
    assert {"_MultiplicationBackward", "_RecomputedAttentionBackward"} <= kept.by_operation().keys()
    change = conversion.bytes(x)
    assert change.after.activation_bytes == kept.activation_bytes
    assert change.before.activation_bytes == profile(plain, x).activation_bytes
    assert change.before.activation_bytes > 3 * kept.activation_bytes


def test_a_product_of_an_activation_keeps_nothing_for_it():
    model, x = Gated(), torch.randn(128, 64)
    convert(model, GroupQuant(bits=4, code="minmax"), functional=True)
    # Packs of the input, of gate and of up: the activation and the product are rebuilt.
    assert profile(model, x).activation_bytes == 3 * x.numel() * 17 // 32


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("activation_first", [True, False])
def test_a_product_of_an_activation_is_a_gated_unit(activation_first, compiled, fresh_compiler):
    """Its packs are read by the operators of gated units, in either order of the factors."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(256, 16)

        def forward(self, gate, up):
            y = F.silu(gate * 1.0)
            return self.down(y * up if activation_first else up * y)

    model = Product()
    convert(model, NEAREST, functional=True)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    inputs = [torch.randn(8, 256, requires_grad=True) for _ in range(2)]
    inputs.append(model.down.weight)
    unit = groupquant.swiglu(*inputs[:2], **dataclasses.asdict(NEAREST))
    expected = torch.autograd.grad(model.down(unit).square().sum(), inputs)
    actual = torch.autograd.grad(run(*inputs[:2]).square().sum(), inputs)
    torch.testing.assert_close(actual, expected)

    called = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            called.add(operator.__name__.partition(".")[0])
            return operator(*args, **(kwargs or {}))

    with Watch():
        model(*inputs[:2]).sum().backward()
    assert {"group_quant_gated_backward", "group_quant_gated_product"} <= called
    assert "group_dequantize" not in called


def test_which_products_are_torch_s():
    """Those of numbers, of no gradient, and of less than a group."""

    def name(*factors, group_size=128):
        y = product.mul(*factors, method=GroupQuant(8, group_size, "nearest"))
        torch.testing.assert_close(y, torch.mul(*factors))
        return y.grad_fn.name()

    def plain(*shape, **options):
        return torch.randn(shape, requires_grad=True, **options) * 1

    packed = groupquant.silu(plain(8, 64), bits=8, rounding="nearest")
    ours = "_MultiplicationBackward"
    assert name(packed, plain(8, 64)) == name(plain(8, 64), packed) == name(packed, packed) == ours
    for other in (plain(8, 1), plain(8, 64, dtype=torch.bfloat16), plain(8, 64)):
        assert name(packed, other) == name(other, packed) == ours
    for other in (2.0, torch.randn(8, 64), torch.randn(64)):
        assert name(packed, other) == "MulBackward0"
    for vector in (plain(64), plain(1, 64)):  # tests/test_scales.py
        assert name(packed, vector) == "_ScalingBackward"
    assert name(packed, plain(8, 64), group_size=1024) == "MulBackward0"
    assert name(packed, plain(8, 64), group_size=512) == ours
    assert name(plain(8, 64), plain(8, 64)) == ours
    assert name(torch.randn(8, 64), packed) == "MulBackward0"


# What is done to gate, the activation's result and up before they are multiplied, and after.
USES = {
    "product alone": lambda gate, y, up: y * up,
    "another reader": lambda gate, y, up: y * up + y.sin(),
    "a reader before": lambda gate, y, up: y.sin() + y * up,
    "gate read": lambda gate, y, up: gate.sin() + y * up,
    "gate itself": lambda gate, y, up: (y * gate) * (up + 1.0),
    "its square": lambda gate, y, up: (y * y) * (up + 1.0),
    "data modified": lambda gate, y, up: (y.data.mul_(2.0), y * up)[1],
    "gate's data modified": lambda gate, y, up: (gate.data.mul_(2.0), y * up)[1],
    "detached": lambda gate, y, up: y.detach() * up + gate.sin(),
    "a view": lambda gate, y, up: y.flatten() * up.flatten(),
    "gate modified": lambda gate, y, up: (gate.mul_(2.0), y * up)[1],
    "activation modified": lambda gate, y, up: y.mul_(2.0) * up,
    "in a checkpoint": lambda gate, y, up: checkpoint(torch.mul, y, up, use_reentrant=False),
}


@pytest.mark.parametrize("use", USES)
def test_a_compiled_product_of_an_activation_is_one_operator_each_way(use, fresh_compiler):
    class Product(nn.Module):
        def forward(self, gate, up):
            gate = gate * 1.0
            return USES[use](gate, F.silu(gate), up)

    model = Product()
    convert(model, NEAREST, functional=True)
    inputs = [torch.randn(8, 256, requires_grad=True) for _ in range(2)]
    dy = torch.randn(8, 256)
    expected = torch.autograd.grad(model(*inputs).reshape(8, 256), inputs, dy)
    called = set()

    def collect(graph, example_inputs):
        called.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=collect, bw_compiler=collect)
    run = torch.compile(model, fullgraph=True, backend=backend)
    actual = torch.autograd.grad(run(*inputs).reshape(8, 256), inputs, dy)
    torch.testing.assert_close(run(*inputs), model(*inputs))
    torch.testing.assert_close(actual, expected)
    operators = {name.split(".")[1] for name in called if name.startswith("packlight.")}
    one_each_way = {"group_quant_gated", "group_quant_gated_backward"}
    assert (operators == one_each_way) == (use == "product alone"), operators


@pytest.mark.parametrize("bits", [2, 8])
def test_a_compiled_product_of_an_activation_of_another_method_is_a_product(bits, fresh_compiler):
    class Activation(nn.Module):
        def forward(self, x):
            return F.silu(x)

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = Activation()

        def forward(self, gate, up):
            return self.act(gate * 1.0) * up

    model = Product()
    convert(model, {"act": dataclasses.replace(NEAREST, bits=bits), "*": NEAREST}, functional=True)
    inputs = [torch.randn(8, 256, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, found = (
        torch.autograd.grad(run(*inputs), inputs, torch.ones(8, 256)) for run in (model, compiled)
    )
    torch.testing.assert_close(found, expected)


OPTIONS = dataclasses.asdict(NEAREST)
TWICE = {
    "key and value": lambda x: F.scaled_dot_product_attention(x * 1.0, y := x * 2.0, y),
    "all of attention": lambda x: F.scaled_dot_product_attention(y := x * 2.0, y, y),
    "square": lambda x: (y := F.silu(x * 1.0)) * y,
    "gated unit": lambda x: groupquant.swiglu(y := x * 1.0, y, **OPTIONS),
}


@pytest.mark.parametrize("function", TWICE)
def test_a_tensor_given_twice_gets_both_gradients_compiled(function, fresh_compiler):
    class Net(nn.Module):
        def forward(self, x):
            return TWICE[function](x)

    model, x = Net(), torch.randn(2, 4, 16, 32, requires_grad=True)
    convert(model, NEAREST, functional=True)
    (expected,) = torch.autograd.grad(model(x).sin().sum(), x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(x).sin().sum(), x)
    torch.testing.assert_close(actual, expected)


# Of linear layers a, b, c, d, and an input: what is packed once must be packed once compiled.
READERS = {
    "gated": lambda a, b, c, d, x: c(F.silu(a(x)) * b(x)),
    "gate read before": lambda a, b, c, d, x: d(g := a(x)) + c(F.silu(g) * b(x)),
    "gate read after": lambda a, b, c, d, x: c(F.silu(g := a(x)) * b(x)) + d(g),
    "up read before": lambda a, b, c, d, x: d(u := b(x)) + c(F.silu(a(x)) * u),
    "up read after": lambda a, b, c, d, x: c(F.silu(a(x)) * (u := b(x))) + d(u),
    "input gated": lambda a, b, c, d, x: c(x * torch.sigmoid(a(x))),
    "swish": lambda a, b, c, d, x: c((h := a(x)) * torch.sigmoid(h)),
    "two activations": lambda a, b, c, d, x: c(torch.tanh(a(x)) * torch.sigmoid(b(x))),
    "GRU": lambda a, b, c, d, x: c((1 - (z := torch.sigmoid(a(x)))) * torch.tanh(b(x)) + z * x),
    "highway": lambda a, b, c, d, x: c((z := torch.sigmoid(a(x))) * F.relu(b(x)) + (1 - z) * x),
}


@pytest.mark.parametrize("readers", READERS)
def test_compiled_products_keep_no_more_than_uncompiled_ones(readers, fresh_compiler):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(256, 256, bias=False) for _ in range(4)])

        def forward(self, x):
            return READERS[readers](*self.layers, x * 1.0)

    model, x = Net(), torch.randn(64, 256)
    convert(model, {"layers.1": GroupQuant(2), "*": GroupQuant(4)}, functional=True)
    expected = profile(model, x).activation_bytes
    found = profile(torch.compile(model, fullgraph=True, backend="aot_eager"), x).activation_bytes
    assert found <= expected + 64


def test_eval_and_no_grad_run_the_plain_functions():
    model, x = Net(), torch.randn(2, 32, 64)
    plain = copy.deepcopy(model)
    convert(model, [GroupQuant()], functional=True)
    seen = []
    model.norm.register_forward_hook(lambda *_: seen.append(_get_current_function_mode_stack()))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert len(seen[-1]) == 1  # a pass without gradients runs what the one with them does
    model.eval(), plain.eval()
    assert all(map(torch.equal, gradients(model, x), gradients(plain, x)))
    assert seen[-1] == []
    model.train()
    model(x)
    assert len(seen[-1]) == 1  # once, also within the modules of the model


def test_layers_of_torch_are_left_to_the_rules_for_layers():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.fc = nn.GELU(), nn.Linear(32, 32)

        def forward(self, x):
            return F.gelu(self.act(self.fc(x)))

    model, x = Mixed(), torch.randn(64, 32)
    conversion = convert(model, {"act": None, nn.Linear: GroupQuant()}, functional=True)
    assert conversion.functional == ("",)
    operations = profile(model, x).by_operation()
    assert "GeluBackward0" in operations  # of the layer
    assert "_ActivationBackward" in operations  # of the call


def test_calls_alone_are_a_conversion():
    class Calls(nn.Module):
        def forward(self, x):
            return F.gelu(x)

    model, x = Calls(), torch.randn(64, 32, requires_grad=True)
    with pytest.raises(NothingMatchedError):
        convert(model, FewBit(), functional=False)
    assert convert(model, FewBit(bits=2)).replaced == ()
    assert profile(model, x).activation_bytes == 64 * 32 * 2 / 8 + 1
    with pytest.raises(NothingMatchedError):
        convert(nn.Flatten(), FewBit(), functional=True)
    assert revert(model) == 1
    assert type(model) is Calls


def test_the_first_method_with_a_rule_for_the_function_counts():
    class Calls(nn.Module):
        def forward(self, x):
            return F.dropout(F.gelu(x), 0.5)

    x = torch.randn(64, 32, requires_grad=True)
    for methods, kept in (
        ([FewBit(bits=2), GroupQuant()], 2 + 1 + 8 / 2048),  # and a flag of one byte
        ([GroupQuant(bits=8), FewBit(bits=2)], 8.25 + 1),
        ({nn.Linear: GroupQuant(bits=8), nn.GELU: FewBit()}, 8.25 + 1),
    ):
        model = Calls()
        convert(model, methods, functional=True)
        assert profile(model, x).activation_bytes == x.numel() * kept / 8


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_recomputes_with_the_calls_covered(reentrant):
    model, x = Net(), torch.randn(2, 32, 64, requires_grad=True)
    convert(model, FINE, functional=True)
    expected = gradients(model, x)
    model.reentrant = reentrant
    for ours, theirs in zip(gradients(model, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)  # sums in another order


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_of_a_function_or_a_method_is_plain(reentrant):
    """It runs again outside of the module's forward."""

    class Inline(nn.Module):
        def __init__(self):
            super().__init__()
            self.gated = Gated()

        def method(self, x):
            return F.dropout(self.gated(F.gelu(x)), 0.5)

        def forward(self, x):
            y = checkpoint(lambda x: F.gelu(x) * 2, F.silu(x), use_reentrant=reentrant)
            return checkpoint(self.method, y, use_reentrant=reentrant)

    plain, x = Inline(), torch.randn(64, 64, requires_grad=True)
    model = copy.deepcopy(plain)
    convert(model, {"gated*": NEAREST, "*": FewBit(bits=8)}, functional=True)
    results = []
    for module in (plain, model):
        torch.manual_seed(1)
        y = module(x)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), x.grad, module.gated.down.weight.grad))
        x.grad = None
    (y, *grads), (ours, *our_grads) = results
    assert torch.equal(ours, y)
    for our_grad, grad in zip(our_grads, grads, strict=True):
        assert 0 < (our_grad - grad).norm() < 0.02 * grad.norm()


def test_an_exception_leaves_nothing_behind():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    model = Fails()
    convert(model, FewBit(), functional=True)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(2, requires_grad=True))
    assert _get_current_function_mode_stack() == []


# --- Layers of ours run with the mode off.


class Layers(nn.Module):
    """What is on, seen from within a layer that a conversion makes."""

    def __init__(self, act=None):
        super().__init__()
        self.fc, self.norm, self.act = nn.Linear(64, 64), nn.LayerNorm(64), act or nn.GELU()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return F.silu(self.drop(self.act(self.norm(self.fc(x)))))


def count_calls(monkeypatch):
    seen = []
    covering = calls._Covering.__torch_function__

    def counted(self, func, *rest):
        seen.append(func)
        return covering(self, func, *rest)

    monkeypatch.setattr(calls._Covering, "__torch_function__", counted)
    return seen


@pytest.mark.parametrize("again", [lambda model: model, lambda m: pickle.loads(pickle.dumps(m))])
def test_nothing_that_our_layers_call_goes_through_the_mode(again, monkeypatch):
    model, x = Layers(), torch.randn(2, 64)
    convert(model, FINE, functional=True)
    model = again(model)
    seen = count_calls(monkeypatch)
    model(x).sum().backward()
    assert seen == [F.silu]


@pytest.mark.parametrize("around", [True, False])
def test_a_mode_of_the_user_sees_what_our_layers_call(around):
    class Names(TorchFunctionMode):
        def __torch_function__(self, func, kinds, args=(), kwargs=None):
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    class Within(Layers):
        def forward(self, x):
            with contextlib.nullcontext() if around else Names():
                return super().forward(x)

    names = []
    model, x = Within(), torch.randn(2, 64)
    convert(model, [GroupQuant(), FewBit()], functional=True)
    with Names() if around else contextlib.nullcontext():
        model(x)
    assert names.count("randint") == 1  # of the dropout layer


def test_a_hook_of_a_layer_is_covered_as_the_model_s_code_is():
    model, x = Layers(), torch.randn(2, 64)
    convert(model, FINE, functional=True)
    model.fc.register_forward_hook(lambda module, given, y: F.softsign(y))
    assert "SoftsignBackward0" not in operations(model, x)


def test_what_is_inside_a_layer_of_ours_is_covered(monkeypatch):
    model, x = Layers(), torch.randn(2, 64)
    convert(model, FINE, functional=True)
    model.norm.inside = nn.Identity()  # added later, so it has no cover of its own
    seen = count_calls(monkeypatch)
    model(x)
    assert len(seen) > 1


def test_an_exception_in_a_layer_leaves_the_mode_as_it_was():
    stacks = []

    class Catches(Layers):
        def forward(self, x):
            with pytest.raises(InputError):
                self.fc(None)
            stacks.append(_get_current_function_mode_stack())
            return super().forward(x)

    model = Catches()
    convert(model, FINE, functional=True)
    model(torch.randn(2, 64))
    assert [len(stack) for stack in stacks] == [1]
    assert _get_current_function_mode_stack() == []


def test_it_compiles_without_a_break_to_the_same_gradients(fresh_compiler):
    model, x = Net(), torch.randn(2, 32, 64)
    convert(model, FINE, functional=True)
    expected = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    plain = copy.deepcopy(model)
    revert(plain)
    assert not torch.equal(gradients(plain, x)[0], expected[0])  # there is a difference to see


# The tracer looks at the gradients of a block's input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_run_with_the_mode_off(fresh_compiler):
    modes = []

    def compiler(graph, inputs):
        def run(*args):
            modes.append(_get_current_function_mode_stack())
            return graph(*args)

        return run

    packlight.manual_seed(0)
    model, x = Net(), torch.randn(4, 16, 64)
    convert(model, FINE, functional=True)
    expected = profile(model, x).activation_bytes
    for module in model.gated:
        module.compile(backend=compiler, fullgraph=True)
    found = profile(model, x).activation_bytes
    assert modes == [[]] * len(modes)
    assert len(modes) >= 2
    assert found <= expected
    assert pickle.loads(pickle.dumps(model))(x).shape == model(x).shape


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("block", ["in eval", "with a hook", "of another method"])
def test_a_compiled_block_covers_no_less_than_the_mode_around_it(block, fresh_compiler):
    model, x = Net(), torch.randn(4, 16, 64)
    other = GroupQuant(bits=2, group_size=32, rounding="nearest")
    methods = {"gated.1.*": other, "*": NEAREST} if block == "of another method" else NEAREST
    convert(model, methods, functional=True)
    if block == "in eval":
        model.gated[1].eval()
    if block == "with a hook":
        model.gated[1].register_forward_hook(lambda module, args, y: F.gelu(y) * F.silu(y))
    expected, kept = gradients(model, x), profile(model, x).activation_bytes
    for module in model.gated:
        module.compile(backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(model, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert profile(model, x).activation_bytes <= kept


def test_a_class_with_a_compile_of_its_own_keeps_it():
    class Keras(Gated):
        def compile(self, optimizer):
            return optimizer

    class Flagged(Gated):
        compile = False

    for kind, value in ((Keras, "adam"), (Flagged, False)):
        model, x = kind(), torch.randn(2, 64)
        convert(model, FINE, functional=True)
        assert (model.compile and model.compile("adam")) == value
        assert model(x).shape == x.shape


def test_as_many_classes_compile_as_there_are(fresh_compiler):
    """The compiler counts recompilations by code object, and by its name the sizes that vary."""
    inputs = []

    def backend(graph, example_inputs):
        inputs.extend(example_inputs)
        return graph.forward

    for i in range(torch._dynamo.config.recompile_limit + 2):
        own = types.FunctionType(Gated.forward.__code__.replace(co_name=f"forward_{i}"), globals())
        kind = type(f"Gated{i}", (Gated,), {"forward": own})
        model, x = kind(32 + i), torch.randn(4, 32 + i)
        convert(model, FINE, functional=True)
        expected = gradients(model, x)
        model.compile(fullgraph=True, backend=backend)
        assert all(map(torch.equal, gradients(model, x), expected))
    assert all(isinstance(given, Tensor) for given in inputs)  # no size became a variable


def test_it_copies_pickles_reverts_and_keeps_its_name_and_signature():
    model, x = Net(), torch.randn(2, 32, 64)
    signature, keys = inspect.signature(model.forward), vars(model).keys() | set()
    convert(model, FINE, functional=True)
    assert isinstance(model, Net)
    assert type(model).__name__ == "Net"
    assert inspect.signature(model.forward) == signature
    expected = gradients(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for clone in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert type(clone) is type(model)
        assert all(map(torch.equal, gradients(clone, x), expected))
        assert revert(clone) == 11
        assert (type(clone), type(clone.gated[0])) == (Net, Gated)
    once = type(model)
    convert(model, FINE, functional=True)
    assert type(model) is once
    assert revert(model) == 11
    assert vars(model).keys() == keys


def test_what_our_functions_do_not_take_is_left_to_torch():
    class Calls(nn.Module):
        def forward(self, x):
            out = torch.empty(4)
            torch.tanh(torch.ones(4), out=out)
            assert torch.relu(torch.arange(-2, 2)).tolist() == [0, 0, 0, 1]
            assert torch.tanh(torch.ones(2, dtype=torch.complex64)).is_complex()
            return x * out * 2.0 + torch.mul(x, x)

    model, x = Calls(), torch.randn(4, requires_grad=True)
    plain = Calls()(x)
    convert(model, [GroupQuant(), FewBit()], functional=True)
    assert torch.equal(model(x), plain)


def test_a_class_changed_since_is_refused():
    from torch.nn.utils import parametrize

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return F.gelu(x @ self.weight)

    model = Own()
    convert(model, FewBit(), functional=True)
    parametrize.register_parametrization(model, "weight", nn.Identity())
    with pytest.raises(CannotConvertError, match="its class has become"):
        convert(model, FewBit(), functional=True)


# --- Every rule for a function.

X = torch.randn(4, 16, 8, 8)


def _weight(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), requires_grad=True)


def _scores(x):
    """What is noted to be computed from packs."""
    return matmul(x, x * 2, method=NEAREST)


ARGUMENTS = {
    F.adaptive_avg_pool1d: lambda x: (x.flatten(2), 3),
    F.adaptive_avg_pool2d: lambda x: (x, (3, None)),
    F.adaptive_avg_pool3d: lambda x: (x.unsqueeze(2), (1, 3, 3)),
    F.adaptive_max_pool1d: lambda x: (x.flatten(2), 3),
    F.adaptive_max_pool2d: lambda x: (x, (3, None)),
    F.adaptive_max_pool3d: lambda x: (x.unsqueeze(2), (1, 3, 3)),
    F.avg_pool1d: lambda x: (x.flatten(2), 2),
    F.avg_pool2d: lambda x: (x, 3, 2, 1, True, False),
    F.avg_pool3d: lambda x: (x.unsqueeze(2), (1, 2, 2)),
    F.batch_norm: lambda x: (x, None, None, None, None, True),
    F.conv1d: lambda x: (x.flatten(2), torch.ones(4, 16, 3, requires_grad=True)),
    F.conv2d: lambda x: (x, torch.ones(4, 16, 3, 3, requires_grad=True)),
    F.conv3d: lambda x: (x.unsqueeze(2), torch.ones(4, 16, 1, 3, 3, requires_grad=True)),
    F.conv_transpose1d: lambda x: (x.flatten(2), torch.ones(16, 4, 3, requires_grad=True)),
    F.conv_transpose2d: lambda x: (x, torch.ones(16, 4, 3, 3, requires_grad=True)),
    F.conv_transpose3d: lambda x: (x.unsqueeze(2), torch.ones(16, 4, 1, 3, 3, requires_grad=True)),
    F.dropout: lambda x: (x, 0.0),
    F.elu: lambda x: (x, 0.5),
    F.fractional_max_pool2d: lambda x: (x, 2, 3),
    F.fractional_max_pool3d: lambda x: (x.unflatten(1, (8, 2)), (1, 2, 2), (1, 3, 3)),
    F.gelu: lambda x: (x,),
    F.glu: lambda x: (x.flatten(1),),
    F.group_norm: lambda x: (x, 4),
    F.hardtanh: lambda x: (x, -0.5, 0.75),
    F.interpolate: lambda x: (x, None, 0.4, "area"),
    F.layer_norm: lambda x: (x.flatten(2), (64,)),
    F.leaky_relu: lambda x: (x, 0.2),
    F.linear: lambda x: (x, torch.ones(3, 8, requires_grad=True)),
    F.lp_pool1d: lambda x: (x.flatten(2), 2, 2),
    F.lp_pool2d: lambda x: (x, 2, (2, 3)),
    F.lp_pool3d: lambda x: (x.unsqueeze(2), 2, (1, 2, 2)),
    F.max_pool1d: lambda x: (x.flatten(2), 2),
    F.max_pool2d: lambda x: (x, 2),
    F.max_pool3d: lambda x: (x, (1, 2, 2)),
    F.pad: lambda x: (x, (1, 2, 0, 1), "reflect"),
    F.rms_norm: lambda x: (x.flatten(2), (64,)),
    F.rrelu: lambda x: (x, 0.1, 0.3, True),
    Tensor.prelu: lambda x: (x, torch.full((1,), 0.3, requires_grad=True)),
    torch.prelu: lambda x: (x, torch.full((1,), 0.3, requires_grad=True)),
    F.scaled_dot_product_attention: lambda x: (x, x * 0.5, x * 2),
    F.softplus: lambda x: (x, 1.5, 10.0),
    F.threshold: lambda x: (x, 0.1, -1.0),
    Tensor.add: lambda x: (x, x * 2),
    Tensor.add_: lambda x: (x, x * 2),
    Tensor.addmm: lambda x: (x.flatten(1)[0, :16], x.flatten(1), _weight(1024, 16)),
    Tensor.baddbmm: lambda x: (x[0], x[0], x[0] * 2),
    Tensor.bmm: lambda x: (x[0], x[0] * 2),
    Tensor.clamp: lambda x: (x, -0.5, 0.75),
    Tensor.clamp_max: lambda x: (x, 0.75),
    Tensor.clamp_min: lambda x: (x, -0.5),
    Tensor.clip: lambda x: (x, None, 0.75),
    Tensor.gather: lambda x: (x, 1, torch.tensor([[[[3, 0]]]])),
    Tensor.masked_select: lambda x: (x, x.detach() > 0),
    Tensor.div: lambda x: (x, x * x + 1),
    Tensor.div_: lambda x: (_scores(x), 2.0),
    Tensor.masked_fill: lambda x: (_scores(x), x.detach()[:1] > 0, 0.5),
    Tensor.masked_fill_: lambda x: (_scores(x), x.detach()[:1] > 0, 0.5),
    Tensor.matmul: lambda x: (x, x * 2),
    Tensor.mm: lambda x: (x[0, 0], _weight(8, 64)),
    Tensor.mul_: lambda x: (_scores(x), 2.0),
    Tensor.__pow__: lambda x: (x, 2),
    Tensor.pow: lambda x: (x, 2),
    Tensor.softmax: lambda x: (x, -1),
    Tensor.sub: lambda x: (_scores(x), 2.0),
    Tensor.mul: lambda x: (torch.sigmoid(x), x),
    Tensor.to: lambda x: (x, torch.bfloat16),
    Tensor.type: lambda x: (x, torch.bfloat16),
    Tensor.type_as: lambda x: (x, torch.ones(1, dtype=torch.bfloat16)),
    torch.add: lambda x: (x, x * 2),
    torch.addmm: lambda x: (x.flatten(1)[0, :16], x.flatten(1), _weight(1024, 16)),
    torch.baddbmm: lambda x: (x[0], x[0], x[0] * 2),
    torch.bmm: lambda x: (x[0], x[0] * 2),
    torch.cat: lambda x: ([_scores(x), torch.ones(4, 16, 8, 1)], -1),
    torch.clamp: lambda x: (x, -0.5),
    torch.clamp_max: lambda x: (x, 0.75),
    torch.clamp_min: lambda x: (x, -0.5),
    torch.clip: lambda x: (x, -0.5, 0.75),
    torch.div: lambda x: (x, x * x + 1),
    torch.einsum: lambda x: ("abcd,abed->abce", x, x * 2),
    torch.gather: lambda x: (x, 1, torch.tensor([[[[3, 0]]]])),
    torch.masked_select: lambda x: (x, x.detach()[:1] > 0),
    torch.masked_fill: lambda x: (_scores(x), x.detach()[:1] > 0, 0.5),
    torch.matmul: lambda x: (x, x * 2),
    torch.mm: lambda x: (x[0, 0], _weight(8, 64)),
    torch.divide: lambda x: (x, x * x + 1),
    torch.true_divide: lambda x: (x, x * x + 1),
    Tensor.true_divide: lambda x: (x, x * x + 1),
    torch.subtract: lambda x: (_scores(x), 2.0),
    **dict.fromkeys(
        (torch.maximum, torch.minimum, Tensor.maximum, Tensor.minimum), lambda x: (x, 0.5 * x * x)
    ),
    torch.mul: lambda x: (torch.tanh(x), x),
    torch.multiply: lambda x: (torch.tanh(x), x),
    Tensor.multiply: lambda x: (torch.tanh(x), x),
    torch.pow: lambda x: (x, 2),
    torch.softmax: lambda x: (x, -1),
    F.softmax: lambda x: (x, -1),
    torch.sub: lambda x: (_scores(x), 2.0),
    torch.where: lambda x: (x.detach()[:1] > 0, _scores(x), 0.5),
    **{
        function: lambda x: (
            x.flatten(2).flatten(0, 1),
            _weight(4, 64, 8),
            torch.tensor([9, 20, 40, 64]).int(),
        )
        for function in _torch.grouped_mm()
    },
}
METHODS = {
    FewBit: FewBit(bits=8), FixedPoint: FixedPoint(bits=8), Quantiser: NEAREST,
    Inverted: Inverted(), Sketch: Sketch(rows=8, min_rows=1), Method: Inverted(),
}  # fmt: skip
INPLACE = (F.relu, F.silu, F.elu, F.hardswish, F.leaky_relu, F.mish, F.selu, F.celu, F.hardtanh)


class Function(nn.Module):
    """A call, with the arguments behind so many places by these names."""

    def __init__(self, function, places=None, names=(), **keywords):
        super().__init__()
        self.function, self.places, self.names = function, places, names
        self.keywords = keywords

    def forward(self, x):
        arguments = ARGUMENTS.get(self.function, lambda x: (x,))(x * 1.0)
        parts = [x for value in arguments for x in (value if type(value) is list else [value])]
        subject = next(x for x in parts if isinstance(x, Tensor) and x.is_floating_point())
        subject.requires_grad_()
        by_place, rest = arguments[: self.places], arguments[len(arguments[: self.places]) :]
        named = dict(zip(self.names[len(by_place) :], rest, strict=False))
        return self.function(*by_place, **named, **self.keywords)


# Functions of several results are tested in tests/test_packed_calls.py.
CALLS = [rule for rule in _call_rules if rule[1] is not F.multi_head_attention_forward]
every_function = pytest.mark.parametrize(
    ("method", "function"),
    CALLS,
    ids=[
        f"{method.__name__}-{function.__name__}-{i}" for i, (method, function) in enumerate(CALLS)
    ],
)


@every_function
def test_every_function_gives_torch_s_results(method, function):
    for keywords in ({}, {"inplace": True}) if function in INPLACE else ({},):
        plain = Function(function, **keywords)
        model = copy.deepcopy(plain)
        convert(model, METHODS[method], functional=True)
        results = []
        for module in (plain, model):
            x = X.clone().requires_grad_()
            torch.manual_seed(1)
            y = module(x)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
            y.backward(dy.to(y.dtype))
            results.append((y.detach(), x.grad))
        (y, grad), (ours, our_grad) = results
        assert ours.dtype == y.dtype
        assert torch.equal(ours, y)
        assert (our_grad - grad).norm() <= 0.08 * grad.norm()  # elu and selu jump at 0
        name = getattr(function, "__name__", "")
        # Sums, scales, masks and casts keep what torch keeps either way.
        same = name in ("linear", "dropout") or function in (*ARITHMETIC, *CASTS)
        x = X.clone().requires_grad_()
        assert same or operations(model, x) != operations(plain, x)


def test_attention_is_packed_at_8_bits_whatever_the_method():
    model = Function(F.scaled_dot_product_attention)
    convert(model, GroupQuant(bits=2, code="minmax"), functional=True)
    kept = profile(model, X.clone().requires_grad_())
    packed = sum(row.bytes for row in kept.rows if row.dtype == "uint8")
    assert packed == 3 * X.numel()


@every_function
def test_a_call_by_keyword_is_the_call_by_place(method, function):
    call = calls.Calls.of((METHODS[method],)).table[function]
    is_method = function in vars(Tensor).values() or function in vars(torch._C.TensorBase).values()
    results = []
    if function is torch.einsum:  # which has no names for its arguments
        return
    for places in (None, 1, *(() if is_method else (0,))):
        model = Function(function, places, call.names)
        convert(model, METHODS[method], functional=True)
        x = X.clone().requires_grad_()
        torch.manual_seed(1)
        y = model(x)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        kept = profile(model, X.clone().requires_grad_())
        results.append((y.detach(), grad, kept.activation_bytes, kept.by_operation()))
    for y, grad, *kept in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad, results[0][1])
        assert kept == list(results[0][2:])


def test_a_call_that_only_torch_takes_is_torch_s():
    class Calls(nn.Module):
        def forward(self, x):
            nothing, out = F.gelu(x, out=None), torch.empty(3)
            assert torch.mul(torch.ones(3), 2.0, out=out) is out
            return nothing + torch.mul(x1=x, x2=F.gelu(x))  # the names that NumPy has

    model, x = Calls(), X.clone().requires_grad_()
    plain = Calls()(x)
    convert(model, GroupQuant(), functional=True)
    assert torch.equal(model(x), plain)
    assert "GeluBackward0" not in operations(model, x)


# --- Each module decides for its own code.


class Block(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.fc, self.inner, self.node = nn.Linear(64, 64), inner, None

    def forward(self, x):
        y = F.gelu(self.fc(x))
        if not torch.compiler.is_compiling():
            self.node = y.grad_fn.name()
        return y if self.inner is None else self.inner(y) + F.silu(y)


OURS, THEIRS, OTHERS = "_ActivationBackward", "GeluBackward0", "_InvertedActivationBackward"

# What is done to three blocks within each other, the methods, and the node of each one's GELU.
PARTS = {
    "all": (NEAREST, lambda one, two, three: None, [OURS, OURS, OURS]),
    "inner in eval": (NEAREST, lambda one, two, three: three.eval(), [OURS, OURS, THEIRS]),
    "middle in eval": (
        NEAREST,
        lambda one, two, three: (two.eval(), three.train()),
        [OURS, THEIRS, OURS],
    ),
    "outer in eval": (
        NEAREST,
        lambda one, two, three: (one.eval(), two.train()),
        [THEIRS, OURS, OURS],
    ),
    "inner excluded": ({"inner.inner": None, "*": NEAREST}, None, [OURS, OURS, THEIRS]),
    "middle excluded": ({"inner": None, "*": NEAREST}, None, [OURS, THEIRS, OURS]),
    "outer excluded": ({"": None, "*": NEAREST}, None, [THEIRS, OURS, OURS]),
    "all but the outer": ({"inner*": None, "*": NEAREST}, None, [OURS, THEIRS, THEIRS]),
    "of another method": ({"inner": Inverted(), "*": NEAREST}, None, [OURS, OTHERS, OURS]),
    "a predicate": (
        {lambda name, module: name == "inner": None, "*": NEAREST},
        None,
        [OURS, THEIRS, OURS],
    ),
    "no selector": ({"*.fc": NEAREST}, None, [OURS, OURS, OURS]),
}


@pytest.mark.parametrize("part", PARTS)
def test_each_module_decides_for_its_own_code(part, fresh_compiler):
    methods, change, nodes = PARTS[part]
    model, x = Block(Block(Block())), torch.randn(64, 64)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    conversion = convert(model, methods, functional=True)
    if change is not None:
        change(*blocks)
    model(x)
    assert [block.node for block in blocks] == nodes
    if change is None:
        names = zip(("", "inner", "inner.inner"), nodes, strict=True)
        assert conversion.functional == tuple(name for name, node in names if node != THEIRS)

    expected, kept = gradients(model, x), profile(model, x).activation_bytes
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert profile(compiled, x).activation_bytes <= kept + 64
    revert(model)
    assert type(model) is Block


def test_what_covers_nothing_is_no_conversion():
    with pytest.raises(NothingMatchedError):
        convert(Block(), {"*": None}, functional=True)
    model = Block()
    conversion = convert(model, {"": None, "fc": NEAREST}, functional=True)
    assert conversion.functional == ()
    assert type(model) is Block  # nothing around it covers its code


def test_a_selector_of_a_module_s_own_code_alone_is_no_mistake():
    model = Block()
    assert convert(model, {Block: FewBit()}, functional=True).functional == ("",)
    with pytest.raises(CannotConvertError, match="picks nothing"):
        convert(Block(), {Block: FewBit(), "fc": NEAREST}, functional=False)


# --- Passes without gradients.


class Holder(nn.Module):
    """Checkpoints of a module, a method and a function, one within the other."""

    def __init__(self, depth=0):
        super().__init__()
        self.fc, self.inner = nn.Linear(64, 64), Holder(depth - 1) if depth else None

    def body(self, x):
        return F.dropout(F.gelu(self.fc(x)), 0.5, self.training)

    def forward(self, x):
        x = checkpoint(self.body, x, use_reentrant=True)
        x = checkpoint(lambda x: F.dropout(x * 1.0, 0.3, inplace=True), x, use_reentrant=True)
        if self.inner is not None:
            x = checkpoint(self.inner, x, use_reentrant=True)
        return x


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("methods", [FewBit(bits=8), FINE, NEAREST], ids=["FewBit", "both", "none"])
def test_reentrant_checkpoints_of_whatever_draw_alike_in_both_passes(methods):
    """The second pass of a method or a function runs outside of the module's forward."""
    plain, x = Holder(depth=2), torch.randn(32, 64, requires_grad=True)
    model = copy.deepcopy(plain)
    convert(model, methods, functional=True)
    packlight.manual_seed(1)
    expected = plain(x)
    packlight.manual_seed(1)
    actual = model(x)
    assert torch.equal(actual, expected)  # torch's own masks
    dy = torch.randn_like(x)
    expected_dx, actual_dx = (_input_gradient(y, x, dy) for y in (expected, actual))
    assert (actual_dx - expected_dx).norm() < 0.05 * expected_dx.norm()


def _input_gradient(y, x, dy):
    x.grad = None
    y.backward(dy)
    return x.grad


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("methods", [FewBit(bits=8), FINE], ids=["FewBit", "both"])
def test_a_pass_without_gradients_draws_what_the_one_with_them_draws(methods, without):
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.drop = nn.Linear(64, 64), nn.Dropout(0.3)

        def forward(self, x):
            q = self.drop(F.gelu(self.fc(x))).unflatten(-1, (4, 16)).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, q, q, dropout_p=0.2)
            return F.dropout(y * torch.sigmoid(y), 0.5)

    model, x = Calls(), torch.randn(2, 32, 64)
    convert(model, methods, functional=True)
    results = []
    for context in (without, contextlib.nullcontext):
        packlight.manual_seed(3)
        with context():
            results.append(model(x).clone())
        results.append(torch.get_rng_state())
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


class _Mixin(nn.Module):
    """What a rule of ours adds to a class whose forward stays its own."""


class _Meta(type):
    """A metaclass of the user's."""


class _Own(nn.Module, metaclass=_Meta):
    """A module with a rule, whose own code calls a function of torch too."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x):
        return F.silu(self.inner(x))


def test_a_module_with_a_rule_has_its_calls_covered_and_its_children_converted(monkeypatch):
    """One class of three: the module's, what the rule joins to it, and what covers its calls."""
    quant = packlight.GroupQuant(4, 64)

    def rule(method, module):
        return rules.Swap(joined(_Mixin, type(module)), {"told": method})

    monkeypatch.setitem(rules._rules, (packlight.GroupQuant, _Own), rule)
    plain = nn.Sequential(_Own())
    model = copy.deepcopy(plain)
    packlight.convert(model, quant, functional=True)
    x = torch.randn(4, 64, requires_grad=True)
    for module in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        own = module[0]
        assert isinstance(own, _Own)
        assert isinstance(own, _Mixin)
        assert own.told == quant
        assert type(own).__name__ == "_Own"
        assert isinstance(own.inner, packlight.groupquant.Linear)
        assert node_name(module(x)) == "_ActivationBackward"
        own.eval()  # alone: the model around it trains
        assert node_name(module(x)) == "SiluBackward0"
        own.train()
    packlight.convert(model, quant, functional=False)  # anew, without its calls
    assert node_name(model(x)) == "SiluBackward0"
    assert isinstance(model[0], _Mixin)
    packlight.revert(model)
    assert type(model[0]) is _Own
    assert "told" not in vars(model[0])


def test_a_rule_s_part_of_a_class_stays_without_its_calls(monkeypatch):
    def rule(method, module):
        return rules.Swap(joined(_Mixin, type(module)), {"told": method})

    monkeypatch.setitem(rules._rules, (GroupQuant, _Own), rule)
    quant = GroupQuant(4, 64)
    model, x = nn.Sequential(_Own(), nn.GELU()), torch.randn(4, 64, requires_grad=True)
    convert(model, quant, functional=True)
    for functional, node in ((False, "SiluBackward0"), (True, "_ActivationBackward")):
        convert(model, {nn.GELU: FewBit(bits=2)}, functional=functional)
        assert isinstance(model[0], _Mixin)
        assert model[0].told == quant
        assert node_name(model[0](x)) == node
    convert(model, {"0": None, "1": FewBit()})
    assert type(model[0]) is _Own
    assert "told" not in vars(model[0])
    assert revert(model) == 2  # and the Linear inside
    assert type(model[0].inner) is nn.Linear


# ---- where tracing gives up ----------------------------------------------------------------------

SQUARES = {
    "views": lambda h: h.view(8, 64) * h.view(8, 64),
    "a view": lambda h: h * h.view_as(h),
    "casts": lambda h: h.double().float() * h.float(),
    "rms": lambda h: h * (h.float() * h.float()).mean(-1, keepdim=True).rsqrt(),
}


class Sums(nn.Module):
    """A sum behind a product of two aliases of one tensor."""

    def __init__(self, square):
        super().__init__()
        self.layer, self.square = nn.Linear(64, 64), square

    def forward(self, x):
        u = self.layer(x)
        p = self.square(x)
        return u + p


@pytest.mark.parametrize("square", SQUARES)
def test_a_compiled_product_of_two_aliases(square, fresh_compiler):
    model = Sums(SQUARES[square])
    convert(model, GroupQuant(8, rounding="nearest"), functional=True)
    x, dy = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        y = run(x)
        results.append((y.detach(), *torch.autograd.grad(y, (x, model.layer.weight), dy)))
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor:UserWarning")  # torch's own
def test_where_tracing_gives_up_each_function_is_itself(fresh_compiler):
    """The compiler made one frame of the mode's handler, and `u + p` was computed as `u * p`."""

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            u = self.layer(x)
            p = x.view(32, 64) * x.view(32, 64)
            torch._dynamo.graph_break()
            return u + p

    model = Written()
    convert(model, GroupQuant(8), functional=True)
    x = torch.randn(32, 64, requires_grad=True)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


class Breaks(nn.Module):
    """Its code breaks the graph of torch.compile."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        x = F.gelu(self.linear(x))
        torch._dynamo.graph_break()
        return F.gelu(x)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Breaks()

    def forward(self, x):
        return F.silu(self.inner(F.silu(x)))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the tracer looks at it
def test_no_frame_around_a_break_is_traced_beside_those_of_the_plain_model(fresh_compiler):
    """The compiler begins anew in each frame around a break, also in those of inner modules."""
    x, breaks = torch.randn(32, 64), []
    for is_converted in (False, True):
        torch.manual_seed(0)
        model = Around()
        if is_converted:
            packlight.convert(model, GroupQuant(bits=8))
        torch._dynamo.reset()
        counters.clear()
        torch.compile(model, backend="eager")(x).square().mean().backward()
        breaks.append(sum(counters["graph_break"].values()))
        assert model.inner.linear.weight.grad is not None
    assert breaks == [2, 2]


class OwnLinear(nn.Linear):
    def forward(self, input):
        return super().forward(input)


class OwnGELU(nn.GELU):
    pass


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(OwnLinear(64, 64), OwnGELU(), OwnLinear(64, 64)),
        nn.TransformerEncoderLayer(64, 4, 64, 0.0, activation="gelu", batch_first=True),
    ],
    ids=["subclasses", "TransformerEncoderLayer"],
)
def test_code_of_torchs_layers_that_counts_as_a_models_is_covered_in_traced_code(
    fresh_compiler, model
):
    """Compiled, such layers kept what torch keeps, while an uncompiled run packed it."""
    torch.manual_seed(0)
    x = torch.randn(4, 64, 64, requires_grad=True)
    kept, gradients = {}, {}
    for name in ("plain", "converted", "compiled"):
        own = copy.deepcopy(model)
        if name != "plain":
            convert(own, (GroupQuant(8), FewBit(8)), strict=False)
        run = torch.compile(own, backend="aot_eager") if name == "compiled" else own
        kept[name] = profile(run, x).activation_bytes
        gradients[name] = torch.cat([g.flatten() for g in torch.autograd.grad(
            run(x).square().mean(), [x, *own.parameters()]
        )])  # fmt: skip
    assert kept["compiled"] < 0.62 * kept["plain"]
    if isinstance(model, nn.Sequential):
        assert kept["compiled"] == pytest.approx(kept["converted"], rel=0.05)
    for name in ("converted", "compiled"):
        error = (gradients[name] - gradients["plain"]).norm() / gradients["plain"].norm()
        assert 0 < error < 0.01


def test_what_stands_in_for_attention_calls_torchs_also_in_traced_code(fresh_compiler, monkeypatch):
    """After a call that was covered, further ones are handled elsewhere."""

    class Attends(nn.Module):
        def forward(self, x):
            x = F.gelu(F.silu(x))
            return F.scaled_dot_product_attention(x, x, x)

    made, make_node = [], calls._torch.make_node

    def noting(tracer, function, *args):
        made.append(function.__name__)
        return make_node(tracer, function, *args)

    monkeypatch.setattr(calls._torch, "make_node", noting)
    torchs = F.scaled_dot_product_attention
    x = torch.randn(2, 4, 32, 16, requires_grad=True)
    for expected in (["gelu", "scaled_dot_product_attention"], ["gelu"]):
        torch._dynamo.reset()
        made.clear()
        model = Attends()
        convert(model, GroupQuant(8), functional=True)
        torch.compile(model, backend="eager")(x)
        assert made == expected
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torchs(q, k, v))


class Loop(nn.Module):
    """Its code breaks the graph within a loop, so that its frame runs as it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x):
        for _ in range(2):
            torch._dynamo.graph_break()
            x = self.linear(self.norm(x))
        return x


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the tracer looks at it
def test_a_layer_between_graphs_is_none_and_one_that_is_compiled_is(fresh_compiler):
    counter, model = CompileCounter(), Loop()
    packlight.convert(model, NEAREST)
    x = torch.randn(32, 64, requires_grad=True)
    results = []
    for run in (model, torch.compile(model, backend=counter)):
        torch.manual_seed(0)
        y = run(x)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), (x, *model.parameters()))))
    torch.testing.assert_close(*results)
    assert counter.frame_count == 0
    for part in (model.norm, model.linear.forward):
        torch.compile(part, backend=counter, fullgraph=True)(x)
    assert counter.frame_count == 2
