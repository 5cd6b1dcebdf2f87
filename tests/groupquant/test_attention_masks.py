"""Attention with a mask, and with grouped heads, in both forms: the forward is torch's."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import packlight
from packlight import _torch, groupquant, profile
from packlight.groupquant import scaled_dot_product_attention
from packlight.layers import attention, attention_backends
from tests.helpers import every_device, relative_error

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 4, 40, 37, 32  # 37: rows of a bias that are not aligned
OPTIONS = {"bits": 8, "group_size": 32, "rounding": "nearest"}


def _padding(device):
    lengths = torch.tensor([KEYS, 20], device=device)
    allowed = torch.arange(KEYS, device=device) < lengths[:, None]
    return allowed[:, None, None].expand(BATCH, 1, QUERIES, KEYS)


def _window(device):
    i, j = torch.arange(QUERIES, device=device)[:, None], torch.arange(KEYS, device=device)
    return ((i - j).abs() < 9)[None, None].expand(BATCH, 1, -1, -1).contiguous()


MASKS = {
    "none": lambda device, dtype: None,
    "padding": lambda device, dtype: _padding(device),
    "window": lambda device, dtype: _window(device),
    "bias": lambda device, dtype: torch.randn(1, HEADS, QUERIES, KEYS, device=device, dtype=dtype),
    "matrix": lambda device, dtype: torch.randn(QUERIES, KEYS, device=device, dtype=dtype),
}

both_forms = pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])


def qkv(device, groups=1):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    heads = HEADS // groups
    shapes = [(HEADS, QUERIES), (heads, KEYS), (heads, KEYS)]
    return [
        torch.randn(BATCH, *shape, WIDTH, device=device, dtype=dtype).requires_grad_()
        for shape in shapes
    ]


def gradients(function, tensors, mask, **options):
    y = function(*tensors, mask, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return y.detach(), torch.autograd.grad(y, tensors, dy)


def torch_s(tensors, mask):
    """torch's own output; of repeated heads where it has fused kernels for none but those."""
    q, k, v = tensors
    repeats = q.shape[1] // k.shape[1]
    if attention_backends.choose((q, k, v, mask), 0.0, False)[1] == 1:
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=repeats > 1)
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask)


@every_device
@pytest.mark.parametrize("groups", [1, 2], ids=["", "grouped"])
@pytest.mark.parametrize("mask", MASKS)
@both_forms
def test_forward_is_torch_s_and_gradients_are_near(recompute, mask, groups, device):
    tensors = qkv(device, groups)
    mask = MASKS[mask](device, tensors[0].dtype)
    y = torch_s(tensors, mask)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    expected = torch.autograd.grad(y, tensors, dy)
    options = {"enable_gqa": groups > 1, "recompute": recompute, **OPTIONS}
    ours, actual = gradients(groupquant.scaled_dot_product_attention, tensors, mask, **options)
    assert ours.grad_fn is None
    torch.testing.assert_close(ours, y.detach(), rtol=0, atol=0)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) < (0.015 if recompute else 0.03)


@every_device
@pytest.mark.parametrize("groups", [1, 2], ids=["", "grouped"])
@pytest.mark.parametrize("mask", ["padding", "window"])
@both_forms
def test_packs_and_the_mask_are_kept(recompute, mask, groups, device):
    """Of query, key and value; in the kept form of the output too, and the statistic."""
    tensors = qkv(device, groups)
    mask = MASKS[mask](device, None)

    def run(*tensors):
        qkv = [x * 1 for x in tensors]
        options = {"enable_gqa": groups > 1, "recompute": recompute, **OPTIONS}
        return groupquant.scaled_dot_product_attention(*qkv, mask, **options)

    report = profile(run, *tensors)
    elements = sum(x.numel() for x in tensors) + (0 if recompute else tensors[0].numel())
    assert sum(row.bytes for row in report.rows if row.dtype == "uint8") == elements
    assert sum(row.bytes for row in report.rows if row.dtype == "int32") == elements // 8
    others = [row.bytes for row in report.rows if row.dtype not in ("uint8", "int32", "bool")]
    if recompute:
        assert sum(others) <= 3 * 8  # the factors 1
        return
    # The statistic of each row, in float32, and what the kernel's random numbers need.
    assert sum(others) <= 4 * BATCH * HEADS * 64 + 64
    assert not any(
        row.dtype == "float32" and row.bytes > 4 * BATCH * HEADS * 64 for row in report.rows
    )


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2], ids=["", "grouped"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION])
@both_forms
def test_every_kernel_that_takes_masks(recompute, backend, mask, groups):
    tensors = qkv("cuda", groups)
    mask = MASKS[mask]("cuda", tensors[0].dtype)
    with sdpa_kernel(backend):
        try:
            y = torch_s(tensors, mask)
            # Where this is the only kernel, torch refuses grouped heads that it does not take.
            F.scaled_dot_product_attention(*tensors, mask, enable_gqa=groups > 1)
        except RuntimeError:
            pytest.skip(f"torch has no {backend} for this mask and these heads here")
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        expected = torch.autograd.grad(y, tensors, dy)
        chosen = attention_backends.choose((*tensors, mask), 0.0, False)
        assert chosen == (backend.value, 1)
        options = {"enable_gqa": groups > 1, "recompute": recompute, **OPTIONS}
        ours, actual = gradients(groupquant.scaled_dot_product_attention, tensors, mask, **options)
    torch.testing.assert_close(ours, y.detach(), rtol=0, atol=0)
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < 0.03


@every_device
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
def test_gradients_of_grouped_heads_come_in_parts_of_the_batch(backend, device, monkeypatch):
    """What torch's kernel takes beside them is of a part, then."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (
        torch.randn(3, heads, QUERIES, 64, device=device, dtype=dtype, requires_grad=True)
        for heads in (HEADS, 2, 2)
    )
    options = {"is_causal": True, "enable_gqa": True, "recompute": True, **OPTIONS}
    calls, in_parts = [], attention_backends._in_parts

    def counted(backward, common):
        return in_parts(lambda *part: calls.append(len(part[0])) or backward(*part), common)

    monkeypatch.setattr(attention_backends, "_in_parts", counted)
    with sdpa_kernel(backend if device == "cuda" else SDPBackend.FLASH_ATTENTION):
        _, whole = gradients(scaled_dot_product_attention, (q, k, v), None, **options)
        monkeypatch.setattr(attention_backends, "PART", 2 * HEADS * QUERIES)
        _, parts = gradients(scaled_dot_product_attention, (q, k, v), None, **options)
    assert calls == [3, 2, 1]
    for one, other in zip(parts, whole, strict=True):
        assert relative_error(one, other) < (1e-6 if device == "cpu" else 1e-2)


@pytest.mark.parametrize(
    ("heads", "batch"),
    [((8, 2, 4), (2, 2)), ((8, 4, 2), (2, 2)), ((8, 2, 2), (2, 1)), ((4, 4, 4), (2, 1))],
)
def test_other_groupings_are_left_to_torch(heads, batch):
    """Its fused kernels do not check them."""
    sizes = zip(heads, (batch[0], batch[1], batch[1]), strict=True)
    q, k, v = (torch.randn(b, h, 16, 32, requires_grad=True) for h, b in sizes)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    actual = groupquant.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("heads", [(2, 4), (8, 3)])
def test_heads_that_torch_refuses_are_refused(heads):
    q, k = (torch.randn(2, h, 16, 32, requires_grad=True) for h in heads)
    with pytest.raises(RuntimeError, match="must divide"):
        groupquant.scaled_dot_product_attention(q, k, k, enable_gqa=True)


@pytest.mark.parametrize("kind", ["gradient", "dtype"])
def test_of_a_mask_that_our_kernels_do_not_take_torch_runs_once_more(kind):
    q, k, v = qkv("cpu")
    mask = torch.randn(QUERIES, KEYS)
    if kind == "gradient":
        mask.requires_grad_()
    else:
        q, k, v = (x.detach().bfloat16().requires_grad_() for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    actual = groupquant.scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(actual, expected)
    assert actual.grad_fn.name() == "_ReplayedBackward"
    dy = torch.randn_like(expected)
    wanted = [x for x in (q, k, v, mask) if x.requires_grad]
    found, true = (torch.autograd.grad(y, wanted, dy) for y in (actual, expected))
    assert all(relative_error(a, b) < 0.03 for a, b in zip(found, true, strict=True))


def test_a_float_mask_under_autocast_is_cast_as_torch_casts_it():
    tensors, mask = qkv("cpu"), torch.randn(QUERIES, KEYS)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = gradients(F.scaled_dot_product_attention, tensors, mask)
        ours, actual = gradients(groupquant.scaled_dot_product_attention, tensors, mask, **OPTIONS)
    assert torch.equal(ours, y)
    assert all(relative_error(a, b) < 0.05 for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("mask", MASKS)
@both_forms
def test_it_compiles_without_a_break(recompute, mask, fresh_compiler):
    tensors, mask = qkv("cpu"), MASKS[mask]("cpu", torch.float32)

    def run(q, k, v, mask):
        options = {"recompute": recompute, **OPTIONS}
        return groupquant.scaled_dot_product_attention(q * 1, k * 1, v * 1, mask, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y, expected = gradients(run, tensors, mask)
    ours, actual = gradients(compiled, tensors, mask)
    torch.testing.assert_close(ours, y)
    torch.testing.assert_close(actual, expected)


def test_a_bias_is_laid_out_as_the_memory_efficient_kernel_reads_it():
    """Rows begin at multiples of 8 elements. On meta the query asks for no device."""
    query, key = torch.empty(2, 3, 5, 8, device="meta"), torch.empty(2, 3, 13, 8, device="meta")
    efficient, flash = SDPBackend.EFFICIENT_ATTENTION.value, SDPBackend.FLASH_ATTENTION.value
    laid_out = torch.randn(2, 3, 5, 16)[..., :13], torch.randn(13), torch.randn(5, 16)[:, :13]
    others = (
        torch.randn(5, 13), torch.randn(2, 1, 13, 5).mT, torch.randn(2, 3, 5, 13),
        torch.randn(5, 2, 3, 13).permute(1, 2, 0, 3), torch.randn(2, 3, 5, 12)[..., :1],
        torch.randn(2, 3, 65)[..., :15].view(2, 3, 5, 3)[..., :1], torch.randn(26)[::2],
    )  # fmt: skip
    for mask in (*laid_out, *others):
        bias = attention_backends.bias_of(mask, query, key, efficient)
        assert torch.equal(bias, mask.expand(2, 3, 5, 13))
        assert bias.shape == (2, 3, 5, 13)
        assert bias.stride(-1) == min(1, mask.shape[-1] - 1)
        assert not any(stride % 8 for stride in bias.stride()[:-1])
        assert (bias.data_ptr() == mask.data_ptr()) == any(mask is x for x in laid_out)
        assert attention_backends.bias_of(mask, query, key, flash) is mask
        assert attention_backends.bias_of(mask, torch.empty(2, 3, 5, 8), key, efficient) is mask


def test_gradients_of_repeated_heads_are_summed():
    x, dy = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 12, 5, 8)
    repeated = attention_backends.repeated(x, 4)
    assert torch.equal(repeated, x.repeat_interleave(4, dim=1))
    (expected,) = torch.autograd.grad(repeated, x, dy)
    torch.testing.assert_close(attention_backends.summed(dy, 4), expected)
    assert attention_backends.repeated(x, 1) is x
    assert attention_backends.summed(dy, 1) is dy


def test_causal_attention_with_dropout_compiles(fresh_compiler):
    """torch's plain attention makes its triangle itself, while the kernel is asked for."""
    x = torch.randn(2, 4, 64, 32, requires_grad=True)

    def attend(x):
        q, k, v = x * 1.0, x * 2.0, x * 3.0
        return groupquant.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)

    y = torch.compile(attend, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.any()


@both_forms
def test_what_is_packed_is_rounded_each_in_its_own_way(recompute, monkeypatch):
    draws, kept = [], []
    randint = torch.randint

    def watched(*args, **kwargs):
        draws.append(args)
        return randint(*args, **kwargs)

    def keep(tensor):
        kept.append(tensor)
        return tensor

    monkeypatch.setattr(torch, "randint", watched)
    x = torch.randn(BATCH, HEADS, KEYS, WIDTH, requires_grad=True)
    for _ in range(2):
        packlight.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            options = {"bits": 8, "group_size": 32, "recompute": recompute}
            groupquant.scaled_dot_product_attention(x, x, x, **options)
    assert not draws  # rounding has a stream of its own
    codes = [tensor for tensor in kept if tensor.dtype == torch.uint8]
    count = 3 if recompute else 4
    assert len(codes) == 2 * count
    first, again = codes[:count], codes[count:]
    assert all(map(torch.equal, first, again))
    for one, other in itertools.combinations(first[:3], 2):  # of one tensor: codes differ by 1
        difference = (one.int() - other.int()).abs()
        assert difference.max() == 1
        # Independent roundings of a value a share p of the way to the next differ in 2 p (1 - p).
        assert 0.30 < difference.float().mean() < 0.36


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_dropout_takes_one_kernel_with_and_without_gradients(without, monkeypatch):
    asked = []

    def backend(query, *_, **__):
        asked.append(torch.is_grad_enabled() and query.requires_grad)
        return SDPBackend.MATH.value

    monkeypatch.setattr(_torch, "attention_backend", backend)
    q = torch.randn(2, 4, 16, 32)
    results = []
    for context, wanted in ((without, False), (contextlib.nullcontext, True)):
        torch.manual_seed(1)
        with context():
            given = q.clone().requires_grad_() if wanted else q
            results.append(scaled_dot_product_attention(given, q, q, dropout_p=0.3))
    assert asked == [True, True]
    assert torch.equal(results[0], results[1])


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_of_attention_draws_alike_with_and_without_gradients(dtype, masked):
    q = torch.randn(2, 4, 64, 32, device="cuda", dtype=dtype)
    mask = torch.ones(64, 64, dtype=torch.bool, device="cuda").tril() if masked else None
    results = []
    for context in (torch.no_grad(), contextlib.nullcontext()):
        torch.manual_seed(1)
        with context:
            y = scaled_dot_product_attention(q.clone().requires_grad_(), q, q, mask, 0.3)
        results.append((y.detach(), torch.cuda.get_rng_state()))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# ---- query, key and value as parts of one tensor -------------------------------------------------


def _timm(made):
    """As timm and GPT-2 cut the output of one projection: heads side by side."""
    parts = made.view(BATCH, QUERIES, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    return parts.unbind(0)


def _split(made):
    parts = made.split(HEADS * WIDTH, dim=-1)
    return [part.view(BATCH, QUERIES, HEADS, WIDTH).transpose(1, 2) for part in parts]


def _by_head(made):
    """As GPT-NeoX cuts it: each head has its query, key and value side by side."""
    parts = made.view(BATCH, QUERIES, HEADS, 3 * WIDTH).transpose(1, 2)
    return parts.chunk(3, dim=-1)


def _two_of_three(made):
    query, key, _ = _timm(made)
    return query, key, key * 1.0


@pytest.mark.parametrize(
    ("cut", "packs"), [(_timm, 1), (_split, 1), (_by_head, 3), (_two_of_three, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_forms
def test_what_one_projection_makes_has_one_pack(cut, packs, dtype, recompute, monkeypatch):
    packed = []
    plain = packlight.GroupQuant.pack

    def pack(self, x, seed, *shift):
        packed.append(tuple(x.shape))
        return plain(self, x, seed, *shift)

    monkeypatch.setattr(packlight.GroupQuant, "pack", pack)
    made = torch.randn(BATCH, QUERIES, 3 * HEADS * WIDTH, dtype=dtype, requires_grad=True)
    dy = torch.randn(BATCH, HEADS, QUERIES, WIDTH, dtype=dtype)

    def gradient(function, **options):
        out = function(*cut(made * 1.0), **options)
        return out, *torch.autograd.grad(out, made, dy)

    y, dmade = gradient(scaled_dot_product_attention, **OPTIONS, recompute=recompute)
    assert len(packed) == packs + (not recompute)  # and the output's
    expected, truth = gradient(F.scaled_dot_product_attention)
    assert torch.equal(y, expected)
    assert relative_error(dmade, truth) < 0.02


def test_a_part_that_was_given_other_memory_is_packed_by_itself():
    made = torch.randn(BATCH, QUERIES, 3 * HEADS * WIDTH)
    query, key, value = _timm(made * 1.0)
    method = packlight.GroupQuant(**OPTIONS)
    assert attention._whole(query, key, value, method) is not None
    key.data = key.detach().clone()
    assert attention._whole(query, key, value, method) is None


def test_groups_do_not_lie_across_two_of_them():
    made = torch.randn(BATCH, QUERIES, 3 * HEADS * 8) * 1.0
    parts = made.view(BATCH, QUERIES, 3, HEADS, 8).permute(2, 0, 3, 1, 4).unbind(0)
    assert attention._whole(*parts, packlight.GroupQuant(group_size=32)) is not None
    assert attention._whole(*parts, packlight.GroupQuant(group_size=64)) is None
