"""Every module of torch.nn that trains: what makes it, and what makes its inputs."""

import itertools

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import packlight

# Classes that run nothing of their own.
BASES = {"Container", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList",
         "RNNBase", "RNNCellBase", "Sequential", "LinearCrossEntropyOptions"}  # fmt: skip


def f(*shape):
    """A floating input with a history, so that it counts as an activation where it is kept."""
    return torch.randn(shape, requires_grad=True)


def positive(*shape):
    return torch.rand(shape, requires_grad=True)


def ids(limit, *shape):
    return torch.randint(limit, shape)


def signs(*shape):
    return torch.randint(2, shape) * 2.0 - 1


# Name: a list of (what makes the module, what makes its inputs). Sizes are odd, so that a byte an
# element is no multiple of another count.
CASES = {}


def case(names, module, *inputs):
    """Entries for several names, `{}` in `module`, of arguments that are evaluated each time."""
    for name in names.split():
        if not hasattr(nn, name):  # of a later torch
            continue
        CASES.setdefault(name, []).append((module.replace("{}", name), inputs))


V1, V2, V3 = "f(4, 6, 33)", "f(4, 6, 17, 19)", "f(3, 4, 9, 11, 10)"
for d, v in enumerate((V1, V2, V3), start=1):
    for rule in ("AdaptiveAvgPool", "AdaptiveMaxPool"):
        case(f"{rule}{d}d", "nn.{}(4)", v)
    for rule in ("AvgPool", "MaxPool", "CircularPad", "ConstantPad", "ReflectionPad", "ZeroPad",
                 "ReplicationPad"):  # fmt: skip
        case(f"{rule}{d}d", "nn.{}(2, 1)" if rule == "ConstantPad" else "nn.{}(2)", v)
    case(f"MaxPool{d}d", "nn.{}(3, 2, padding=1, return_indices=True)", v)
    case(f"MaxPool{d}d", "nn.{}(3, 2, padding=1, ceil_mode=True, dilation=2)", v)
    case(f"AdaptiveMaxPool{d}d", "nn.{}(4, return_indices=True)", v)
    case(f"MaxUnpool{d}d", f"Unpools({d})", v)
    case(f"LPPool{d}d", "nn.{}(2, 3)", v.replace("f", "positive"))
    for rule in ("BatchNorm", "InstanceNorm", "LazyBatchNorm", "LazyInstanceNorm"):
        size = "" if "Lazy" in rule else "4, " if d == 3 else "6, "
        case(f"{rule}{d}d", f"nn.{{}}({size})", v)
        case(f"{rule}{d}d", f"nn.{{}}({size}affine=True, momentum=None)", v)
        case(f"{rule}{d}d", f"nn.{{}}({size}track_running_stats=False)", v)
        case(f"{rule}{d}d", f"nn.{{}}({size}affine=True, track_running_stats=True).eval()", v)
    for rule in ("Conv", "ConvTranspose", "LazyConv", "LazyConvTranspose"):
        size = "" if "Lazy" in rule else "4, " if d == 3 else "6, "
        case(f"{rule}{d}d", f"nn.{{}}({size}10, 3, padding=1)", v)
        case(f"{rule}{d}d", f"nn.{{}}({size}12, 3, stride=2, groups=2, dilation=2, bias=False)", v)
    case(
        f"Conv{d}d", f"nn.{{}}({4 if d == 3 else 6}, 10, 3, padding=1, padding_mode='circular')", v
    )
    case(f"Conv{d}d", f"nn.{{}}({4 if d == 3 else 6}, 10, 3, padding='same')", v)
    case(f"Dropout{d}d", "nn.{}(0.2)", v)
case("BatchNorm1d", "nn.{}(33)", "f(16, 33)")
case("LazyBatchNorm1d", "nn.{}()", "f(16, 33)")
case("SyncBatchNorm", "nn.{}(6).eval()", V2)
case("GroupNorm", "nn.{}(3, 6)", V2)
case("GroupNorm", "nn.{}(3, 6, affine=False)", V2)
case("LayerNorm RMSNorm", "nn.{}(33)", V1)
case("LayerNorm RMSNorm", "nn.{}((6, 33), elementwise_affine=False)", V1)
case("LocalResponseNorm CrossMapLRN2d", "nn.{}(3)", V2)

case("CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU "
     "RReLU ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink "
     "Identity Flatten Dropout AlphaDropout FeatureAlphaDropout", "nn.{}()", V2)  # fmt: skip
case(
    "CELU ELU Hardsigmoid Hardswish Hardtanh LeakyReLU Mish RReLU ReLU ReLU6 SELU SiLU "
    "Dropout AlphaDropout FeatureAlphaDropout Dropout1d Dropout2d",
    "nn.{}(inplace=True)",
    V1,
)
case("RReLU Dropout AlphaDropout FeatureAlphaDropout", "nn.{}().eval()", V1)
case("GELU", "nn.{}(approximate='tanh')", V2)
case("PReLU", "nn.{}(6)", V2)
case("Threshold", "nn.{}(0.1, 2.0)", V2)
case("GLU", "nn.{}(1)", V2)
case("Softmax LogSoftmax Softmin", "nn.{}(-1)", V2)
case("Softmax2d", "nn.{}()", V2)
case("Unflatten", "nn.{}(1, (2, 3))", V2)
case("ChannelShuffle", "nn.{}(2)", V2)
case("PixelShuffle", "nn.{}(2)", "f(2, 8, 5, 7)")
case("PixelUnshuffle", "nn.{}(2)", "f(2, 8, 6, 10)")
case("Fold", "nn.{}((8, 10), 3, padding=1)", "f(2, 18, 80)")
case("Unfold", "nn.{}(3, padding=1)", V2)
case("FractionalMaxPool2d", "nn.{}(2, output_ratio=0.5)", V2)
case("FractionalMaxPool3d", "nn.{}(2, output_ratio=0.5)", V3)
case("Upsample UpsamplingNearest2d UpsamplingBilinear2d", "nn.{}(scale_factor=2)", V2)
for mode, v in (("linear", V1), ("bilinear", V2), ("bicubic", V2), ("trilinear", V3),
                ("nearest-exact", V2)):  # fmt: skip
    case("Upsample", f"nn.{{}}(scale_factor=1.5, mode={mode!r})", v)
case("Upsample", "nn.{}((9, 9), mode='bilinear', align_corners=True)", V2)

case("Linear", "nn.{}(33, 20)", V1)
case("Linear", "nn.{}(33, 20, bias=False)", "f(33)")
case("LazyLinear", "nn.{}(20)", V1)
case("Bilinear", "nn.{}(33, 20, 7)", "f(4, 6, 33)", "f(4, 6, 20)")
case("CosineSimilarity PairwiseDistance", "nn.{}()", "f(40, 33)", "f(40, 33)")
case("Embedding", "nn.{}(50, 16)", "ids(50, 8, 12)")
case("Embedding", "nn.{}(50, 16, padding_idx=0, sparse=True)", "ids(50, 8, 12)")
case("Embedding", "nn.{}(50, 16, max_norm=1.0, scale_grad_by_freq=True)", "ids(50, 8, 12)")
for mode, padding in itertools.product(("sum", "mean", "max"), (None, 3)):
    options = f"mode={mode!r}, padding_idx={padding}"
    for width in (16, 64):
        case("EmbeddingBag", f"nn.{{}}(50, {width}, {options})", "ids(50, 24, 12)")
        case("EmbeddingBag", f"nn.{{}}(50, {width}, {options})", "ids(50, 240)",
             "torch.arange(0, 240, 8)")  # fmt: skip
    case("EmbeddingBag", f"nn.{{}}(50, 16, {options}, include_last_offset=True)", "ids(50, 240)",
         "torch.arange(0, 241, 8)")  # fmt: skip
case("EmbeddingBag", "nn.{}(50, 16, mode='sum')", "ids(50, 24, 12)", "None", "positive(24, 12)")
case("EmbeddingBag", "nn.{}(50, 16, mode='sum', sparse=True)", "ids(50, 24, 12)")
case("EmbeddingBag", "nn.{}(50, 16, mode='mean', scale_grad_by_freq=True)", "ids(50, 24, 12)")

for options in ("", "num_layers=2", "batch_first=True", "bidirectional=True", "bias=False",
                "num_layers=3, dropout=0.3",
                "num_layers=2, dropout=0.3, bidirectional=True"):  # fmt: skip
    case("LSTM GRU RNN", f"nn.{{}}(24, 40, {options})", "f(5, 6, 24)")
    if "num_layers=3" in options or not options:
        case("LSTM GRU RNN", f"nn.{{}}(24, 40, {options}).eval()", "f(5, 6, 24)")
case("LSTM GRU RNN", "nn.{}(24, 40)", "f(10, 24)")
case("LSTM", "nn.{}(24, 40, proj_size=12)", "f(5, 6, 24)")
case("LSTM", "nn.{}(24, 40, num_layers=2, proj_size=12, bidirectional=True)", "f(5, 6, 24)")
case("LSTM", "nn.{}(24, 40)", "f(5, 6, 24)", "(f(1, 6, 40), f(1, 6, 40))")
case("GRU RNN", "nn.{}(24, 40)", "f(5, 6, 24)", "f(1, 6, 40)")
case("RNN", "nn.{}(24, 40, nonlinearity='relu')", "f(5, 6, 24)")
case("LSTM GRU RNN", "Packs(nn.{}(24, 40, 2, bidirectional=True))", "f(6, 10, 24)")
case("LSTMCell GRUCell RNNCell", "nn.{}(24, 40)", "f(6, 24)")
case("LSTMCell GRUCell RNNCell", "nn.{}(24, 40, bias=False)", "f(6, 24)")

A = "f(2, 12, 32)"
case("MultiheadAttention", "nn.{}(32, 4, batch_first=True)", A, A, A)
case("MultiheadAttention", "nn.{}(32, 4, dropout=0.1)", A, A, A)
case("MultiheadAttention", "nn.{}(32, 4, kdim=20, vdim=24, batch_first=True)", A, "f(2, 7, 20)",
     "f(2, 7, 24)")  # fmt: skip
case("MultiheadAttention", "SelfAttention(nn.{}(32, 4, batch_first=True), need_weights=False)", A)
case("MultiheadAttention", "SelfAttention(nn.{}(32, 4, batch_first=True), key_padding_mask="
     "torch.arange(12) > torch.tensor([[8], [12]]))", A)  # fmt: skip
case("MultiheadAttention", "SelfAttention(nn.{}(32, 4, add_bias_kv=True, add_zero_attn=True))", A)
case("TransformerEncoderLayer", "nn.{}(32, 4, 48)", A)
case(
    "TransformerEncoderLayer", "nn.{}(32, 4, 48, dropout=0, activation='gelu', norm_first=True)", A
)
case("TransformerEncoderLayer", "nn.{}(32, 4, 48, batch_first=True)", A, "None",
     "torch.arange(12) > torch.tensor([[8], [12]])")  # fmt: skip
case("TransformerEncoder", "nn.{}(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)", A)
case("TransformerEncoder", "nn.{}(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)", A,
     "nn.Transformer.generate_square_subsequent_mask(12)")  # fmt: skip
case("TransformerDecoderLayer", "nn.{}(32, 4, 48)", A, "f(2, 12, 32)")
case("TransformerDecoder", "nn.{}(nn.TransformerDecoderLayer(32, 4, 48), 2)", A, "f(2, 12, 32)")
case("Transformer", "nn.{}(32, 4, 1, 1, 48)", A, "f(2, 12, 32)")

X, Y = "f(40, 33)", "torch.randn(40, 33)"
for reduction in ("mean", "sum", "none"):
    r = f"reduction={reduction!r}"
    case("L1Loss MSELoss SmoothL1Loss HuberLoss PoissonNLLLoss", f"nn.{{}}({r})", X, Y)
    case("L1Loss MSELoss SmoothL1Loss HuberLoss", f"nn.{{}}({r})", X, X)
    case("BCELoss", f"nn.{{}}({r})", "positive(40, 33)", "torch.rand(40, 33)")
    case("BCEWithLogitsLoss", f"nn.{{}}({r})", X, "torch.rand(40, 33)")
    case("BCEWithLogitsLoss", f"nn.{{}}({r}, pos_weight=torch.rand(33))", X, "torch.rand(40, 33)")
    case("KLDivLoss", f"nn.{{}}({r})", X, "torch.rand(40, 33)")
    case("KLDivLoss", f"nn.{{}}({r}, log_target=True)", X, Y)
    case("CrossEntropyLoss NLLLoss MultiMarginLoss", f"nn.{{}}({r})", X, "ids(33, 40)")
    case("CrossEntropyLoss", f"nn.{{}}({r}, label_smoothing=0.1)", X, "ids(33, 40)")
    case("CrossEntropyLoss", f"nn.{{}}({r}, weight=torch.rand(33), ignore_index=0)", X,
         "ids(33, 40)")  # fmt: skip
    case("CrossEntropyLoss", f"nn.{{}}({r})", X, "torch.rand(40, 33)")
    case("CrossEntropyLoss NLLLoss NLLLoss2d", f"nn.{{}}({r})", V2, "ids(6, 4, 17, 19)")
    case("NLLLoss", f"nn.{{}}({r}, weight=torch.rand(33), ignore_index=3)", X, "ids(33, 40)")
    case("MultiMarginLoss", f"nn.{{}}(p=2, weight=torch.rand(33), {r})", X, "ids(33, 40)")
    case("MultiLabelMarginLoss", f"nn.{{}}({r})", X, "ids(33, 40, 33)")
    case("MultiLabelSoftMarginLoss SoftMarginLoss HingeEmbeddingLoss", f"nn.{{}}({r})", X,
         "signs(40, 33)")  # fmt: skip
    case("CosineEmbeddingLoss", f"nn.{{}}({r})", X, X, "signs(40)")
    case("MarginRankingLoss", f"nn.{{}}({r})", "f(1000)", "f(1000)", "signs(1000)")
    case("GaussianNLLLoss", f"nn.{{}}({r})", X, Y, "positive(40, 33)")
    case("GaussianNLLLoss", f"nn.{{}}(full=True, {r})", X, Y, "positive(40)")
    case(
        "PoissonNLLLoss",
        f"nn.{{}}(log_input=False, full=True, {r})",
        "positive(40, 33)",
        "torch.rand(40, 33) * 4",
    )
    case("TripletMarginLoss TripletMarginWithDistanceLoss", f"nn.{{}}({r})", X, X, X)
    case("TripletMarginLoss TripletMarginWithDistanceLoss", f"nn.{{}}(swap=True, {r})", X, X, X)
    case("CTCLoss", f"nn.{{}}({r})", "f(30, 4, 9).log_softmax(-1)", "ids(8, 4, 12) + 1",
         "torch.tensor([30, 28, 26, 30])", "torch.tensor([12, 10, 7, 9])")  # fmt: skip
    case("CTCLoss", f"nn.{{}}({r}, zero_infinity=True)", "f(30, 4, 9).log_softmax(-1)",
         "ids(8, 38) + 1", "(30, 28, 26, 30)", "(12, 10, 7, 9)")  # fmt: skip
    case("LinearCrossEntropyLoss", f"nn.{{}}(33, 50, {r})", X, "ids(50, 40)")
case("AdaptiveLogSoftmaxWithLoss", "nn.{}(33, 100, [10, 40])", X, "ids(100, 40)")


class Unpools(nn.Module):
    def __init__(self, dimensions):
        super().__init__()
        self.pool = getattr(nn, f"MaxPool{dimensions}d")(3, 3, return_indices=True)
        self.unpool = getattr(nn, f"MaxUnpool{dimensions}d")(3, 3)

    def forward(self, x):
        return self.unpool(*self.pool(x), output_size=x.shape)


class Packs(nn.Module):
    """Runs a recurrent layer over sequences of different lengths."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        lengths = torch.tensor([10, 7, 7, 5, 2, 1])
        return self.layer(pack_padded_sequence(x, lengths, batch_first=True))[0].data


class SelfAttention(nn.Module):
    def __init__(self, layer, **options):
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x):
        return self.layer(x, x, x, **self.options)[0]


class Started(nn.Module):
    """Makes activations of the inputs that require gradients."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return self.layer(*(_started(value) for value in inputs))


def _started(value):
    if isinstance(value, tuple) and isinstance(value[0], torch.Tensor):
        return tuple(map(_started, value))
    return value * 1 if isinstance(value, torch.Tensor) and value.requires_grad else value


def made(name, case):
    """A module of one of its cases, and inputs."""
    module, inputs = case
    packlight.manual_seed(0)
    layer, x = eval(module), [eval(text) for text in inputs]
    if name.startswith("Lazy"):
        layer(*x)
    return Started(layer), x
