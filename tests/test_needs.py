"""What torch keeps for a gradient, what the gradient needs, and what a converted model keeps.

Tables of all modules of torch.nn, of all functions of torch.nn.functional, and of functions and
methods of tensors that models use. Bytes are those that `packlight.profile` counts, parameters
apart. A module that a new torch brings has no row yet, and fails.
"""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from tests.torch_modules import CASES, Started, made

# What a gradient needs, in bytes, by the bytes of the floating inputs and outputs and of whole
# numbers that are given.
NEEDS = {
    # Torch keeps nothing either.
    "nothing": lambda x, y, i: 0,
    # Torch keeps the input to read its shape.
    "shape": lambda x, y, i: 0,
    "bit": lambda x, y, i: x / 32,
    "two bits": lambda x, y, i: x / 16,
    # One byte an output: the place of a maximum in its window, or which of some outputs it is.
    "place": lambda x, y, i: y / 4,
    "index": lambda x, y, i: 2 * y,
    "indices": lambda x, y, i: i,
    "bits and indices": lambda x, y, i: x / 32 + i,
    "mask": lambda x, y, i: x / 4,
    "slopes": lambda x, y, i: x,
    "input": lambda x, y, i: x + i,
    # And the target of a loss, in a table where x is one of them.
    "two inputs": lambda x, y, i: 2 * x,
    "output": lambda x, y, i: y,
}
# What a need does not count: statistics, to a quarter of it, and a few numbers or padding of bits.
STATISTICS = 1.25
FEW = 128

# ---- modules -------------------------------------------------------------------------------------

MODULES = {
    "nothing": (
        "ChannelShuffle CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d "
        "ConstantPad3d Dropout1d Dropout2d Dropout3d FeatureAlphaDropout Flatten Fold Identity "
        "PixelShuffle PixelUnshuffle Unflatten Unfold Upsample UpsamplingBilinear2d "
        "UpsamplingNearest2d ZeroPad1d ZeroPad2d ZeroPad3d"
    ),
    "shape": (
        "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AvgPool1d AvgPool2d AvgPool3d "
        "ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d "
        "ReplicationPad3d"
    ),
    "bit": (
        "Dropout Hardshrink Hardsigmoid Hardtanh LeakyReLU ReLU ReLU6 Softshrink Threshold "
        "AlphaDropout"
    ),
    "two bits": "L1Loss",
    "place": "MaxPool1d MaxPool2d MaxPool3d",
    "index": (
        "AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d FractionalMaxPool2d "
        "FractionalMaxPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d"
    ),
    "indices": "Embedding EmbeddingBag NLLLoss NLLLoss2d",
    "bits and indices": "MultiLabelMarginLoss",
    "slopes": "RReLU",
    "input": (
        "BCELoss BCEWithLogitsLoss BatchNorm1d BatchNorm2d BatchNorm3d Bilinear CELU Conv1d Conv2d "
        "Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d CosineEmbeddingLoss "
        "CosineSimilarity CrossEntropyLoss CrossMapLRN2d ELU GELU GLU GaussianNLLLoss GroupNorm "
        "Hardswish HingeEmbeddingLoss HuberLoss InstanceNorm1d InstanceNorm2d InstanceNorm3d "
        "KLDivLoss LPPool1d LPPool2d LPPool3d LayerNorm LazyBatchNorm1d LazyBatchNorm2d "
        "LazyBatchNorm3d LazyConv1d LazyConv2d LazyConv3d LazyConvTranspose1d LazyConvTranspose2d "
        "LazyConvTranspose3d LazyInstanceNorm1d LazyInstanceNorm2d LazyInstanceNorm3d LazyLinear "
        "Linear LocalResponseNorm LogSigmoid MSELoss MarginRankingLoss Mish "
        "MultiLabelSoftMarginLoss MultiMarginLoss PReLU PairwiseDistance PoissonNLLLoss RMSNorm "
        "SELU SiLU Sigmoid SmoothL1Loss SoftMarginLoss Softplus Softsign SyncBatchNorm Tanh "
        "Tanhshrink TripletMarginLoss TripletMarginWithDistanceLoss"
    ),
    "output": "LogSoftmax Softmax Softmax2d Softmin",
}
# Made of several layers, or of many steps, each with needs of its own.
COMPOSED = (
    "AdaptiveLogSoftmaxWithLoss CTCLoss GRU GRUCell LSTM LSTMCell LinearCrossEntropyLoss "
    "MultiheadAttention RNN RNNCell Transformer TransformerDecoder TransformerDecoderLayer "
    "TransformerEncoder TransformerEncoderLayer"
)
# What keeps more than its gradient needs, in a converted model as in torch.
ABOVE = {
    "AlphaDropout": "its noise, of the input's dtype",
    "CrossMapLRN2d": "scale and result beside the input",
    "L1Loss": "the difference, a loss",
    "LocalResponseNorm": "squares, a padded copy and powers of them",
    "MultiLabelMarginLoss": "a loss",
    "MultiLabelSoftMarginLoss": "terms of a loss",
    "NLLLoss": "the input, which a log-softmax before it keeps anyway",
    "NLLLoss2d": "the input, which a log-softmax before it keeps anyway",
}


def words(table):
    return [name for names in table.values() for name in names.split()]


def nbytes(values, floating=True):
    found = 0
    for value in values if isinstance(values, (tuple, list)) else [values]:
        if isinstance(value, (tuple, list)):
            found += nbytes(value, floating)
        elif isinstance(value, torch.Tensor) and value.is_floating_point() is floating:
            found += value.nbytes
    return found


def kept(model, *x):
    """Bytes kept of activations and inputs, but for those of starting the inputs' history."""
    packlight.manual_seed(0)
    report = packlight.profile(model, *x)
    nothing = packlight.profile(Started(nn.Identity()), *x[:1])
    return report.activation_bytes + report.input_bytes - nothing.activation_bytes


def convert(model, **options):
    """Converts what can be; a model of which nothing can be stays as it is."""
    with contextlib.suppress(packlight.NothingMatchedError):
        packlight.convert(model, strict=False, **options)


def test_every_module_has_one_row():
    rows = [*words(MODULES), *COMPOSED.split()]
    assert len(rows) == len(set(rows))
    assert set(rows) == CASES.keys() | {name for name in rows if not hasattr(nn, name)}
    assert set(ABOVE) <= set(rows)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("need", "name"), [(need, name) for need in MODULES for name in MODULES[need].split()]
)
def test_a_converted_module_keeps_what_its_gradient_needs(need, name):
    model, x = made(name, CASES[name][0])
    sizes = nbytes(x), nbytes(model(*x)), nbytes(x, floating=False)
    needed = NEEDS[need](*sizes)
    plain = kept(model, *x)
    convert(model)
    ours = kept(model, *x)
    if need == "shape":
        assert plain >= sizes[0]
        assert ours == 0
    assert (ours > STATISTICS * needed + FEW) == (name in ABOVE)


# ---- functions -----------------------------------------------------------------------------------


def signal(x):
    return x.flatten(2)


def volume(x):
    return x.unflatten(1, (2, 4))


def weight(*shape):
    return nn.Parameter(torch.ones(shape))


def labels(x):
    return torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.long)


def places(x, dim=1):
    return torch.zeros_like(x.narrow(dim, 0, 2), dtype=torch.long)


def unpooled(x, axes):
    index = torch.arange(math.prod(x.shape[2:])).view(x.shape[2:]).expand(x.shape)
    return getattr(F, f"max_unpool{axes}d")(x, index, 2)


def target(x):
    return torch.full_like(x.detach(), 0.5)


# Of x [2, 8, 12, 12], a result of an operation in the model's own code.
FUNCTIONS = {
    "nothing": {
        "affine_grid": lambda x: F.affine_grid(x[:, 0, :2, :3], [2, 1, 4, 4], False),
        "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
        "dropout1d": lambda x: F.dropout1d(signal(x)),
        "dropout2d": F.dropout2d,
        "dropout3d": lambda x: F.dropout3d(volume(x)),
        "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, training=True),
        "fold": lambda x: F.fold(x.reshape(2, 32, 36), (12, 12), 2, stride=2),
        "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
        "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
        "unfold": lambda x: F.unfold(x, 3),
        "upsample": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
        "upsample_bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        "upsample_nearest": lambda x: F.interpolate(x, scale_factor=2),
    },
    "shape": {
        "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(signal(x), 5),
        "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 5),
        "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(volume(x), 2),
        "avg_pool1d": lambda x: F.avg_pool1d(signal(x), 2),
        "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
        "avg_pool3d": lambda x: F.avg_pool3d(volume(x), 2),
        "interpolate": lambda x: F.interpolate(x, scale_factor=0.5, mode="area"),
        "pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    },
    "bit": {
        "alpha_dropout": lambda x: F.alpha_dropout(x, training=True),
        "dropout": F.dropout,
        "hardshrink": F.hardshrink,
        "hardsigmoid": F.hardsigmoid,
        "hardtanh": F.hardtanh,
        "leaky_relu": F.leaky_relu,
        "relu": F.relu,
        "relu6": F.relu6,
        "softshrink": F.softshrink,
        "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    },
    "two bits": {"l1_loss": lambda x: F.l1_loss(x, target(x))},
    "place": {
        "max_pool1d": lambda x: F.max_pool1d(signal(x), 2),
        "max_pool2d": lambda x: F.max_pool2d(x, 2),
        "max_pool3d": lambda x: F.max_pool3d(volume(x), 2),
    },
    "index": {
        "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(signal(x), 5),
        "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 5),
        "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(volume(x), 2),
        "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(x, 2, 5),
        "fractional_max_pool3d": lambda x: F.fractional_max_pool3d(volume(x), 2, 2),
        "max_unpool1d": lambda x: unpooled(signal(x), 1),
        "max_unpool2d": lambda x: unpooled(x, 2),
        "max_unpool3d": lambda x: unpooled(volume(x), 3),
    },
    "indices": {
        "embedding": lambda x: F.embedding(torch.zeros(3, dtype=torch.long), x.flatten(1)),
        "nll_loss": lambda x: F.nll_loss(x, labels(x)),
    },
    "bits and indices": {
        "multilabel_margin_loss": lambda x: F.multilabel_margin_loss(
            x.flatten(1), torch.zeros_like(x.flatten(1), dtype=torch.long)
        ),
    },
    "slopes": {"rrelu": lambda x: F.rrelu(x, training=True)},
    "input": {
        "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
        "celu": F.celu,
        "conv1d": lambda x: F.conv1d(signal(x), weight(4, 8, 3)),
        "conv2d": lambda x: F.conv2d(x, weight(4, 8, 3, 3)),
        "conv3d": lambda x: F.conv3d(volume(x), weight(4, 2, 2, 3, 3)),
        "conv_tbc": lambda x: F.conv_tbc(signal(x), weight(3, 144, 4), torch.zeros(4)),
        "conv_transpose1d": lambda x: F.conv_transpose1d(signal(x), weight(8, 4, 3)),
        "conv_transpose2d": lambda x: F.conv_transpose2d(x, weight(8, 4, 3, 3)),
        "conv_transpose3d": lambda x: F.conv_transpose3d(volume(x), weight(2, 4, 2, 3, 3)),
        "cross_entropy": lambda x: F.cross_entropy(x, labels(x)),
        "elu": F.elu,
        "gelu": F.gelu,
        "glu": lambda x: F.glu(x.flatten(1)),
        "grid_sample": lambda x: F.grid_sample(x, torch.zeros(2, 4, 4, 2), align_corners=False),
        "group_norm": lambda x: F.group_norm(x, 4),
        "hardswish": F.hardswish,
        "instance_norm": F.instance_norm,
        "kl_div": lambda x: F.kl_div(x, target(x), reduction="batchmean"),
        "layer_norm": lambda x: F.layer_norm(x.flatten(2), (144,)),
        "linear": lambda x: F.linear(x, weight(16, 12)),
        "local_response_norm": lambda x: F.local_response_norm(x, 3),
        "logsigmoid": F.logsigmoid,
        "lp_pool1d": lambda x: F.lp_pool1d(signal(x), 2, 2),
        "lp_pool2d": lambda x: F.lp_pool2d(x, 2, 2),
        "lp_pool3d": lambda x: F.lp_pool3d(volume(x), 2, 2),
        "mish": F.mish,
        "multi_margin_loss": lambda x: F.multi_margin_loss(x.flatten(1), torch.tensor([0, 1])),
        "normalize": F.normalize,
        "pairwise_distance": lambda x: F.pairwise_distance(x, target(x)),
        "pdist": lambda x: F.pdist(x.flatten(0, 1).flatten(1)),
        "prelu": lambda x: F.prelu(x, weight(1)),
        "rms_norm": lambda x: F.rms_norm(x.flatten(2), (144,)),
        "selu": F.selu,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "softplus": F.softplus,
        "softsign": F.softsign,
        "tanh": torch.tanh,
        "tanhshrink": F.tanhshrink,
    },
    "two inputs": {
        "bilinear": lambda x: F.bilinear(x, target(x), weight(3, 12, 12)),
        "binary_cross_entropy": lambda x: F.binary_cross_entropy(x * 0 + 0.5, target(x)),
        "binary_cross_entropy_with_logits": lambda x: F.binary_cross_entropy_with_logits(
            x, target(x)
        ),
        "cosine_embedding_loss": lambda x: F.cosine_embedding_loss(
            x.flatten(1), target(x).flatten(1), torch.ones(2)
        ),
        "cosine_similarity": lambda x: F.cosine_similarity(x, target(x)),
        "gaussian_nll_loss": lambda x: F.gaussian_nll_loss(x, target(x), target(x)),
        "hinge_embedding_loss": lambda x: F.hinge_embedding_loss(x, torch.ones_like(x)),
        "huber_loss": lambda x: F.huber_loss(x, target(x)),
        "margin_ranking_loss": lambda x: F.margin_ranking_loss(x, target(x), torch.ones_like(x)),
        "mse_loss": lambda x: F.mse_loss(x, target(x)),
        "multilabel_soft_margin_loss": lambda x: F.multilabel_soft_margin_loss(x, target(x)),
        "poisson_nll_loss": lambda x: F.poisson_nll_loss(x, target(x)),
        "smooth_l1_loss": lambda x: F.smooth_l1_loss(x, target(x)),
        "soft_margin_loss": lambda x: F.soft_margin_loss(x, torch.ones_like(x)),
        "triplet_margin_loss": lambda x: F.triplet_margin_loss(x, target(x), target(x)),
        "triplet_margin_with_distance_loss": lambda x: F.triplet_margin_with_distance_loss(
            x, target(x), target(x)
        ),
    },
    "output": {
        "gumbel_softmax": F.gumbel_softmax,
        "log_softmax": lambda x: F.log_softmax(x, 1),
        "softmax": lambda x: F.softmax(x, 1),
        "softmin": lambda x: F.softmin(x, 1),
    },
}
# Functions with no need of their own: of several layers or many steps, without a gradient, of
# formats of 8 bits, in place, or with indices beside a result that is in the table.
OTHERS = (
    "ctc_loss embedding_bag linear_cross_entropy multi_head_attention_forward "
    "scaled_dot_product_attention native_channel_shuffle one_hot grouped_mm scaled_grouped_mm "
    "scaled_mm"
)

# Functions and methods of tensors. What keeps a tensor of the same size is not here.
OPERATIONS = {
    "nothing": {
        "cat": lambda x: torch.cat([x, x]),
        "chunk": lambda x: x.chunk(2, 1)[0],
        "cumsum": lambda x: x.cumsum(1),
        "diff": lambda x: x.diff(dim=1),
        "einsum of one": lambda x: torch.einsum("nchw->nc", x),
        "expand": lambda x: x[None].expand(3, *x.shape),
        "flatten": lambda x: x.flatten(1),
        "flip": lambda x: x.flip(2),
        "index": lambda x: x[:, 1:, ::2],
        "index_select": lambda x: x.index_select(1, torch.tensor([0, 1])),
        "mean": lambda x: x.mean((2, 3)),
        "neg": lambda x: -x,
        "permute": lambda x: x.permute(1, 0, 2, 3).contiguous(),
        "repeat": lambda x: x.repeat(2, 1, 1, 1),
        "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
        "roll": lambda x: x.roll(1, 2),
        "round": torch.round,
        "split": lambda x: x.split(4, 1)[0],
        "stack": lambda x: torch.stack([x, x]),
        "sum": lambda x: x.sum(1),
        "times a number": lambda x: x * 2,
        "tril": torch.tril,
        "unfold": lambda x: x.unfold(2, 3, 1),
        "view": lambda x: x.view(2, -1),
    },
    "bit": {
        "clamp": lambda x: x.clamp(0, 1),
        "masked_fill": lambda x: x.masked_fill(x > 1, 0.0),
        "maximum": lambda x: torch.maximum(x, target(x)),
        "nansum": lambda x: x.nansum(1),
        "relu": torch.relu,
        "where": lambda x: torch.where(x > 0, x, 0.0),
    },
    "two bits": {"abs": torch.abs},
    "index": {
        "cummax": lambda x: x.cummax(1)[0],
        "gather": lambda x: x.gather(1, places(x)),
        "max of a dimension": lambda x: x.max(1)[0],
        "median of a dimension": lambda x: x.median(1)[0],
        "sort": lambda x: x.sort(1)[0],
        "topk": lambda x: x.topk(2, 1)[0],
    },
    "mask": {"masked_select": lambda x: x.masked_select(x > 0)},
}

FUNCTIONS_ABOVE = {
    "alpha_dropout": "its noise, of the input's dtype",
    "local_response_norm": "squares, a padded copy and powers of them",
    "l1_loss": "the difference, a loss",
    "multilabel_margin_loss": "a loss",
    "multilabel_soft_margin_loss": "terms of a loss",
    "nll_loss": "the input, which a log-softmax before it keeps anyway",
}
OPERATIONS_ABOVE = {
    "maximum": "three bits an element, by which ties are told",
    "nansum": "the input",
}


class Call(nn.Module):
    """A module whose own code makes the call."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def rows(table):
    return [(need, name) for need, functions in table.items() for name in functions]


def check_call(need, function, is_above):
    x = torch.randn(2, 8, 12, 12, requires_grad=True)
    model = Started(Call(function))
    needed = NEEDS[need](x.nbytes, nbytes(model(x)), 0)
    plain = kept(model, x)
    convert(model, functional=True)
    ours = kept(model, x)
    if need == "shape":
        assert plain >= x.nbytes
        assert ours == 0
    assert (ours > STATISTICS * needed + FEW) == is_above


def test_every_function_has_one_row():
    mine = [name for _, name in rows(FUNCTIONS)] + OTHERS.split()
    assert len(mine) == len(set(mine))
    named = {
        name
        for name, value in vars(F).items()
        if name[0] not in "_"
        and callable(value)
        and not isinstance(value, type)
        and getattr(value, "__module__", None) not in ("typing", "torch.overrides")
    } - {"assert_int_or_pair", "boolean_dispatch", "has_torch_function"}
    named -= {"has_torch_function_unary", "has_torch_function_variadic"}
    variants = {name for name in named if name.rstrip("_") in mine or "_with_indices" in name}
    assert named - variants <= set(mine)
    assert set(mine) <= named | {name for name in mine if not hasattr(F, name)}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("need", "name"), rows(FUNCTIONS))
def test_a_covered_call_keeps_what_its_gradient_needs(need, name):
    check_call(need, FUNCTIONS[need][name], name in FUNCTIONS_ABOVE)


@pytest.mark.parametrize(("need", "name"), rows(OPERATIONS))
def test_a_covered_operation_keeps_what_its_gradient_needs(need, name):
    check_call(need, OPERATIONS[need][name], name in OPERATIONS_ABOVE)
