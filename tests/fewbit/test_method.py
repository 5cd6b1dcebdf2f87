"""`FewBit` with a codebook or a weight: what it is as a value, and which layers take it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight import FewBit, fit_codebook
from packlight.errors import CannotConvertError, InputError
from packlight.fewbit import gelu
from packlight.fewbit.activations import CONTINUOUS
from packlight.fewbit.codebook import default_codebook, why_of_another
from packlight.method import Method
from packlight.method_files import format_methods, parse_methods
from tests.helpers import gradient, sample

BOOK = fit_codebook(F.gelu, 2, weight=("normal", 1.0))
SHIFTED = fit_codebook(lambda x: torch.sigmoid(x - 2), 3, domain=(-8, 12))
SAMPLES = torch.linspace(-1, 2, 40) ** 3
METHODS = [
    FewBit(codebook=BOOK),
    FewBit(codebook=SHIFTED),
    FewBit(8, codebook=packlight.Codebook(1, (0.5,), (0.0, 1.0))),
    FewBit(3, weight="uniform"),
    FewBit(2, weight=("normal", 1)),
    FewBit(4, weight=SAMPLES),
    FewBit(4, weight=np.histogram(SAMPLES.numpy(), 5)),
    FewBit(1, weight=SAMPLES.tolist()),
]


@pytest.mark.parametrize("method", METHODS, ids=range(len(METHODS)))
def test_a_method_is_a_plain_value(method):
    assert hash(method) == hash(parse_methods(format_methods(method)))
    assert parse_methods(format_methods(method)) == method
    assert Method.from_dict(json.loads(json.dumps(method.to_dict(), allow_nan=False))) == method
    assert method != FewBit(method.bits)
    assert repr(FewBit(2)) == "FewBit(bits=2)"


def test_a_codebook_sets_the_bits_and_a_weight_is_a_histogram():
    assert FewBit(codebook=BOOK).bits == FewBit(7, codebook=BOOK).bits == 2
    counts, edges = FewBit(4, weight=SAMPLES).weight
    assert sum(counts) == 40
    assert (edges[0], edges[-1]) == (-1, 8)
    assert FewBit(4, weight=SAMPLES) == FewBit(4, weight=SAMPLES.numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook": 3}, "codebook=3 is not a Codebook"),
        ({"codebook": {"bits": 3}}, "codebook fields"),
        ({"codebook": BOOK, "weight": "uniform"}, "a weight or a codebook"),
        ({"weight": "uniformly"}, "weight='uniformly'"),
        ({"weight": ("normal", -1)}, "positive standard deviation"),
        ({"weight": abs}, "is a function, and a method has plain values alone"),
        ({"weight": ([1.0], [1.0])}, "expected n counts and n"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        FewBit(**arguments)


def test_a_book_in_a_text_is_checked_as_one_in_python():
    with pytest.raises(InputError, match=r"Codebook\(1, \(\), \(0, 1\)\): 0 borders"):
        parse_methods("FewBit(codebook=Codebook(1, (), (0, 1)))")
    with pytest.raises(
        InputError, match=r"does not fit Codebook\(bits, borders, levels, error=nan"
    ):
        parse_methods("FewBit(codebook=Codebook(1))")
    with pytest.raises(InputError, match="unknown method 'Codebook'"):
        parse_methods("Codebook(1, (0,), (0, 1))")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.ReLU())


def test_a_converted_layer_multiplies_by_the_levels_of_the_book():
    net, x = model(), sample(5, 6)
    conversion = packlight.convert(net, {nn.GELU: FewBit(codebook=BOOK)})
    assert "FewBit(bits=2, codebook=Codebook(...)) 1" in " ".join(str(conversion).split())
    assert "codebook=custom" in repr(net[1])
    assert torch.equal(gradient(net[1], x)[1], gradient(lambda x: gelu(x, codebook=BOOK), x)[1])
    packlight.revert(net)
    assert type(net[1]) is nn.GELU
    assert "codebook" not in vars(net[1])


def test_each_function_has_a_codebook_of_its_own_under_a_weight():
    net, x = model(), sample(5, 6)
    packlight.convert(net, FewBit(2, weight=("normal", 1.0)))
    assert "codebook=weighted" in repr(net[1])
    for layer, function in ((net[1], F.gelu), (net[3], torch.tanh)):
        book = fit_codebook(function, 2, weight=("normal", 1.0))
        expected = torch.from_numpy(book.derivative(x.numpy())).float()
        torch.testing.assert_close(gradient(layer, x)[1], expected)


def test_a_layer_takes_what_the_method_takes():
    x = sample(5, 6)
    for options in ({"codebook": BOOK}, {"bits": 2, "weight": ("normal", 1.0)}):
        layer = packlight.fewbit.GELU(**options)
        assert layer.bits == 2
        assert torch.equal(gradient(layer, x)[1], gradient(lambda x: gelu(x, codebook=BOOK), x)[1])
    with pytest.raises(InputError, match="a weight or a codebook"):
        packlight.fewbit.GELU(weight="uniform", codebook=BOOK)


def test_calls_are_covered_with_the_codebook_and_with_the_weight():
    class Net(nn.Module):
        def forward(self, x):
            return F.gelu(x)

    x = sample(5, 6)
    for method in (FewBit(codebook=BOOK), FewBit(2, weight=("normal", 1.0))):
        net = Net()
        packlight.convert(net, method, functional=True)
        assert torch.equal(gradient(net, x)[1], gradient(lambda x: gelu(x, codebook=BOOK), x)[1])


@pytest.mark.parametrize("method", [FewBit(codebook=BOOK), FewBit(2, weight=("normal", 1.0))])
def test_converted_layers_compile(method, fresh_compiler):
    net, x = model()[:3], sample(5, 6)
    packlight.convert(net, {nn.GELU: method})
    expected = torch.autograd.grad(net(x).sum(), net[0].weight)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), net[0].weight)[0], expected[0])


def test_layers_of_another_function_refuse_a_codebook():
    net = model()
    with pytest.raises(CannotConvertError, match=r"'3' \(Tanh\): the codebook .* not of Tanh"):
        packlight.convert(net, FewBit(codebook=BOOK))
    assert type(net[1]) is nn.GELU
    conversion = packlight.convert(net, FewBit(codebook=BOOK), strict=False)
    assert [row.kind for row in conversion.replaced] == ["GELU", "ReLU"]
    with pytest.raises(InputError, match="the codebook is not of tanh: it has"):
        packlight.fewbit.tanh(sample(3).requires_grad_(), codebook=BOOK)
    inplace = nn.Sequential(nn.ELU(0.5, inplace=True))
    packlight.convert(inplace, FewBit(codebook=fit_codebook(lambda x: F.elu(x, 0.5), 3)))
    with pytest.raises(CannotConvertError):
        packlight.convert(inplace, FewBit(codebook=default_codebook("elu", 3)))


FITS = [
    {},
    {"pin_tails": "where_bounded"},
    {"objective": "primitive"},
    {"weight": ("normal", 0.3)},
    {"weight": SAMPLES},
    {"domain": (-1.0, 1.0)},
]


@pytest.mark.parametrize("options", FITS, ids=str)
@pytest.mark.parametrize("name", CONTINUOUS)
def test_no_layer_refuses_a_codebook_of_its_own_function(name, options):
    row = CONTINUOUS[name]

    def function(x):
        return row.function(x, *row.parameters.values())

    for bits in (1, 3):
        assert why_of_another(fit_codebook(function, bits, **options), function) is None
    other = "tanh" if name not in ("tanh", "softsign") else "gelu"
    assert why_of_another(default_codebook(other, 3), function) is not None
