"""`apply_of`: `torch.autograd.Function.apply` at less cost."""

import pytest
import torch

from packlight._library import apply_of


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


doubled = apply_of(Doubled)


def test_it_is_the_function():
    x = torch.randn(3, requires_grad=True)
    y = doubled(x, 2.0)
    assert y.grad_fn.name() == "DoubledBackward"
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 2.0))


def test_transforms_are_refused_as_torch_refuses_them():
    for apply in (Doubled.apply, doubled):
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.grad(lambda x, apply=apply: apply(x, 2.0).sum())(torch.randn(3))


def test_what_a_transform_left_behind_is_a_tensor_again():
    left = []
    torch.func.grad(lambda x: (left.append(x * 1), x.sum())[1])(torch.ones(3))
    assert torch.equal(doubled(left[0], 2.0), Doubled.apply(left[0], 2.0))


def test_it_is_traced_without_a_break(fresh_compiler):
    compiled = torch.compile(lambda x: doubled(x, 2.0), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, requires_grad=True)
    compiled(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
