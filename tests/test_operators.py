"""The fake of every operator against the operator, in passes that together reach all of them."""

import functools
import itertools

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from packlight import _seeds, fewbit, groupquant, head, sketch
from packlight._library import _LIBRARY
from packlight.fewbit import ops as few_bit_ops
from packlight.groupquant import ops as group_ops
from packlight.low_rank import ops as low_rank
from packlight.packing.ops import pack_mask, unpack_mask
from packlight.rotary import rotate
from packlight.sketch.method import KINDS
from tests.groupquant import test_conv_norm
from tests.groupquant.test_residual import basic, converted, images
from tests.inverted.norm_layers import LAYERS as NORMS
from tests.test_contract import LAYERS

DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Compared(TorchDispatchMode):
    """Runs the fake of each of packlight's operators before it."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace != "packlight":
            return operator(*args, **(kwargs or {}))
        with FakeTensorMode():
            fake = operator(*tree_map_only(torch.Tensor, without_values, args))
        results = operator(*args)
        assert described(fake) == described(results), (operator, args)
        self.seen.add(operator.name())
        return results


def without_values(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def described(results):
    """All that code which sees no values can read of them."""
    return [
        (t.shape, t.dtype, t.device, t.stride(), t.storage_offset())
        for t in tree_leaves(results)
        if t is not None  # what an operator returns that only writes
    ]


def both_ways(function, x):
    """A forward and a backward pass, with a gradient of other strides than the output's."""
    (y, *_) = tree_leaves(function(x.detach().requires_grad_()))
    y.backward(torch.ones((), dtype=y.dtype).expand(y.shape))


def activations():
    for layer in LAYERS:
        for inplace in {False, layer.inplace}:
            options = {"inplace": True} if inplace else {}
            for dtype in DTYPES:
                x = torch.randn(5, 33, dtype=dtype)
                both_ways(lambda x, layer=layer, kw=options: layer.apply(x * 1, **kw), x)
                both_ways(lambda x, layer=layer, kw=options: layer.apply((x * 1).t(), **kw), x)
    book = fewbit.fit_codebook(torch.sin, 2, domain=(-3, 3))
    both_ways(fewbit.activation(torch.sin, book), torch.randn(5, 33))


def dropouts():
    seed = torch.tensor([7])
    for keep in (True, False):
        for x in (torch.ones(5, 33), torch.ones(33, 5, dtype=torch.bfloat16).t()):
            for drop in (few_bit_ops.dropout, few_bit_ops.dropout_):
                drop(x.clone(), seed, 0, 0.5, keep)
                drop(x.clone(), None, 7, 0.5, keep)
    few_bit_ops.dropout_mask(seed, 165, 0.5)


def pools():
    for layout in LAYOUTS:
        x = torch.randn(2, 3, 9, 8).to(memory_format=layout)
        for options in ({}, {"return_indices": True}, {"ceil_mode": True, "padding": 1}):
            both_ways(lambda x, kw=options: fewbit.max_pool2d(x, 3, **kw), x)


def inverted_norms():
    for layer in NORMS:
        for dtype in DTYPES:
            both_ways(layer.pair(dtype)[0], layer.sample(dtype))


CODES = [("stochastic", "minmax"), ("nearest", "minmax"), ("offset", "minmax")]
CODES += [("stochastic", "rotated")]


def group_quantised_norms():
    for kind, arguments, shape in (
        ("LayerNorm", (33,), (5, 33)),
        ("RMSNorm", (33,), (5, 33)),
        ("BatchNorm2d", (6,), (3, 6, 4, 5)),
        ("GroupNorm", (3, 6), (3, 6, 4, 5)),
    ):
        for dtype in DTYPES:
            for rounding, code in CODES:
                options = {"rounding": rounding, "code": code}
                layer = getattr(groupquant, kind)(*arguments, **options).to(dtype)
                both_ways(layer, torch.randn(shape).to(dtype))


def norms_behind_sums():
    for dtype in DTYPES:
        for p, residual_dtype in ((0.0, dtype), (0.3, dtype), (0.0, torch.float32)):
            x = torch.randn(8, 64, dtype=dtype)
            residual, parameter = torch.randn(8, 64, dtype=residual_dtype), torch.randn(64)
            settings = (parameter, None, p, 1e-5, torch.float32, (4, 64, 0))
            seeds = (None, 3, torch.tensor([7]), 0)
            y, *kept, _, _, mask = group_ops.post_norm(x, residual, *settings, *seeds)
            for needs in ((True, True), (True, False), (False, False)):
                given = (parameter, mask, p, dtype, residual_dtype, *needs, (4, 64, 0))
                group_ops.post_norm_backward(y, *kept, *given)


def overwritten():
    for dtype in DTYPES:
        for x in (torch.randn(5, 64, dtype=dtype), torch.randn(64, 5, dtype=dtype).t()):
            f = ("gelu", (), (4, 64, 0))
            pack = group_ops.activation_(x, *f, None, 7)
            group_ops.activation_backward_(x, *pack, *f)
            f = ("silu", (4, 64, 0))
            _, *packs = group_ops.gated(x, x, *f, None, 7)
            group_ops.gated_backward_(x, *packs, *f)


def less_a_shift():
    for dtype, groups in itertools.product(DTYPES, ((4, 64, 0), (2, 64, 2))):
        for x in (torch.randn(5, 64, dtype=dtype), torch.randn(64, 5, dtype=dtype).t()):
            shift = torch.randn(64, dtype=dtype)
            group_ops.quantize_less(x, x.stride(), shift, 64, groups, None, 7)


def group_quantised_products():
    for dtype in DTYPES:
        x, linear = torch.randn(9, 132, dtype=dtype), groupquant.Linear(66, 4).to(dtype)
        for rounding, code in CODES:
            swiglu = functools.partial(groupquant.swiglu, rounding=rounding, code=code)
            both_ways(lambda x, f=linear, g=swiglu: f(g(*x.chunk(2, -1))), x)
        a, b = torch.randn(5, 64, dtype=dtype), torch.randn(64, 3, dtype=dtype)
        torch.ops.packlight.wide_mm(a, b)
        torch.ops.packlight.recast(a.t(), b.double())
        torch.ops.packlight.recast_parts([a.t(), a.t()], b.double())


def residual_blocks():
    for layout in LAYOUTS:
        both_ways(converted(basic(2)), images().to(memory_format=layout))


def convolutions_with_norms():
    for dtype in DTYPES:
        for act, summed in test_conv_norm.FORMS.values():
            given = test_conv_norm.tensors(dtype)
            test_conv_norm.at_once(given, act, summed=summed).sum().backward()


def sketches():
    for kind in KINDS:
        for dtype in DTYPES:
            layer = sketch.Linear(33, 4, kind=kind).to(dtype)
            both_ways(layer, torch.randn(64, 33, dtype=dtype))


def masks():
    mask = torch.rand(50, 3).t() > 0.5
    packed = pack_mask(mask.view(torch.uint8), mask.stride())
    unpack_mask(packed, mask.shape, mask.stride())


def heads():
    target = torch.arange(5)
    for dtype in DTYPES:
        w = torch.randn(40, 8, dtype=dtype, requires_grad=True)
        both_ways(
            lambda x, w=w: head.linear_cross_entropy(x, w, target), torch.randn(5, 8).to(dtype)
        )


def rotations():
    for dtype in DTYPES:
        q, k = (torch.randn(2, 5, n, 8, dtype=dtype).transpose(1, 2) for n in (4, 2))
        angles = torch.randn(1, 5, 8, dtype=dtype)
        for x in (q, q.contiguous()):
            both_ways(lambda x, k=k, angles=angles: rotate(x, k, angles, angles)[0], x)


def products_of_low_rank():
    for dtype in DTYPES:
        factor, low = torch.randn(4, 16, dtype=dtype), torch.randn(6, 4, dtype=dtype)
        for x in (torch.randn(6, 16, dtype=dtype), torch.randn(6, 16).bfloat16()):
            low_rank.narrowed(x, factor.t())
            low_rank.outer(x, low)
            low_rank.add_widened_(x, low, factor, 0.5, True)


PASSES = (
    activations, dropouts, pools, inverted_norms, group_quantised_norms, group_quantised_products,
    norms_behind_sums, overwritten, residual_blocks, convolutions_with_norms, sketches, masks,
    heads, rotations, less_a_shift, products_of_low_rank,
)  # fmt: skip


def test_every_fake_is_like_what_its_operator_returns():
    with Compared() as compared:
        for run in PASSES:
            run()
        _seeds.rounding_tensor(torch.ones(1))
        torch.ops.packlight.rounding_seeds(torch.device("cpu"), 3)
    assert compared.seen == _LIBRARY._op_defs
