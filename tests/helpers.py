"""What tests of several folders need: samples, gradients, what is kept, distances."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, is_tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import packlight
from packlight.groupquant.grouping import MINMAX, Grouping

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# Rounding of one operation, and twice that: the interpreter truncates fp32 to bf16.
EPSILON = {
    torch.float64: 1e-12,
    torch.float32: 4e-7,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
SPECIAL = [0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 0.375, -0.375, 1e-6, -1e-6, 30.0, -30.0]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
every_kernel_dtype = pytest.mark.parametrize("dtype", INTEGERS, ids=dtype_name)


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values with sigma 3, the special points first."""
    x = torch.randn(shape) * 3
    flat = x.view(-1)
    count = min(len(SPECIAL), flat.numel())
    flat[:count] = torch.tensor(SPECIAL[:count])
    return x.to(dtype)


SHAPES = {
    "scalar": lambda: sample(),
    "empty": lambda: sample(0, 5),
    "one": lambda: sample(1),
    "sliced": lambda: sample(6, 10)[:, ::3],
    "transposed": lambda: sample(5, 7).t(),
    "expanded": lambda: sample(1, 9).expand(4, 9),
    "channels-last": lambda: sample(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "six dimensions": lambda: sample(2, 1, 3, 1, 2, 2),
    "tail": lambda: sample(513),
}


def gradient(
    function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and input gradient."""
    x = x.detach().requires_grad_()
    y = function(x)
    dy = torch.ones_like(y) if dy is None else dy
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of a weighted sum of the output; the same weights and roundings every time."""
    model.zero_grad()
    packlight.manual_seed(1)
    y = model(x)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def pack_bytes(count: int, bits: int = 4, group_size: int = 128, code: int = MINMAX) -> int:
    """What a pack of `GroupQuant` takes of so many elements."""
    grouping = Grouping(1, count, bits, group_size, code)
    return grouping.code_bytes + 4 * grouping.words


def kept_bytes(function: Callable[[], object]) -> int:
    """Bytes of the unique storages that autograd keeps while `function` runs."""
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storages.values())


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.sizes and key not in given:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, key)
        self.peak = max(self.peak, self.now)
        return result

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes of tensors made by `function` that are alive at once, backward included."""
    with _Alive() as alive, torch.autograd.set_multithreading_enabled(False):
        function()
    return alive.peak


def crossing(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Fakes of what the compiled forward hands out: its outputs, then what its backward reads."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def forward(graph, example_inputs):
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        seen.extend(node.meta["val"] for node in outputs if hasattr(node, "meta"))
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph),
        partition_fn=torch._functorch.partitioners.min_cut_rematerialization_partition,
    )
    result = torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    result.sum().backward()
    torch._dynamo.reset()
    return seen


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| relative to |exact|, over the whole tensor; 0 where both are 0."""
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Distance in units in the last place: how many floats lie between."""
    kind = INTEGERS[a.dtype]

    def ordered(x: Tensor) -> Tensor:
        bits = x.view(kind).long()
        return torch.where(bits < 0, torch.iinfo(kind).min - bits, bits)

    return (ordered(a) - ordered(b)).abs()


def all_values(dtype: torch.dtype) -> Tensor:
    """Every finite value of a 16-bit dtype."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.isfinite()]


def many_values(dtype: torch.dtype, device: str) -> Tensor:
    """Finite values of a dtype, as many as a test can take: in 16 bits all of them on a device."""
    if dtype == torch.float32:
        count = 2**22 if device == "cuda" else 2**12
        return torch.cat([torch.randn(count) * s for s in (1e-3, 1.0, 4.0, 30.0)]).to(device)
    x = all_values(dtype)
    if device == "cpu":
        x = x[torch.randperm(x.numel())[: 2**13]]
    return x.to(device)


def assert_as_near_as_torch(y: Tensor, plain: Tensor, truth: Tensor) -> None:
    """A kernel's output is within 1 ulp of torch's own, or as near the truth in float64."""
    dtype = y.dtype
    # The interpreter truncates fp32 to bf16, which is worth one more.
    allowed = 2 if y.device.type == "cpu" and dtype == torch.bfloat16 else 1
    close = ulps(y, plain) <= allowed
    near = (y.double() - truth).abs() <= (plain.double() - truth).abs() * (1 + 1e-6)
    near |= ulps(y, truth.to(dtype)) <= allowed
    bad = ~(close | near)
    # Below, kernels flush to zero what torch may return; the interpreter gets such bf16 wrong.
    bad &= truth.abs() > 1e-35
    if dtype == torch.float32:
        # Values of a few roundings each: no further from the truth than torch's worst, or 3 ulps.
        bad &= ulps(y, truth.to(dtype)) > max(3, ulps(plain, truth.to(dtype)).max().item())
    assert not bad.any(), (y[bad][:5], plain[bad][:5], truth[bad][:5])


def node_name(y):
    """The name of the node that made `y`. torch 2.11 names no node whose tensor is gone."""
    return y.grad_fn.name()


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def nodes_outlive_results() -> bool:
    """Whether a backward pass may start at the node of a Function whose result is gone.

    As that of the weights does in a zero-bubble pipeline. torch 2.11 raises.
    """
    node = _Same.apply(torch.ones(1, requires_grad=True)).grad_fn
    try:
        return bool(node._input_metadata)
    except RuntimeError:
        return False
