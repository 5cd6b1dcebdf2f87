"""`predict` beside `profile` for every module of torch.nn that trains."""

import pytest
import torch
from torch import nn

from packlight import GroupQuant, convert, predict, profile
from tests.torch_modules import BASES, CASES, Started, f, ids, made


def test_every_module_is_here():
    named = {name for name in nn.modules.__all__ if isinstance(getattr(nn, name), type)}
    assert named - BASES == CASES.keys()


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning"
)  # of modules that are deprecated, or used oddly
@pytest.mark.parametrize("name", CASES)
def test_the_prediction_is_what_a_run_keeps(name):
    for case in CASES[name]:
        model, x = made(name, case)
        run, predicted = profile(model, *x), predict(model, *x)
        error = abs(predicted.activation_bytes - run.activation_bytes)
        assert error <= 0.03 * run.activation_bytes, case
        assert predicted.input_bytes == pytest.approx(run.input_bytes, rel=0.2), case


@pytest.mark.parametrize("steps", [1, 33])
@pytest.mark.parametrize(("batch", "width", "hidden"), [(1, 3, 5), (7, 64, 256), (32, 700, 128)])
def test_the_workspace_of_an_lstm_is_right_to_the_byte(steps, batch, width, hidden):
    layer, x = Started(nn.LSTM(width, hidden)), f(steps, batch, width)
    assert predict(layer, x) == profile(layer, x)


def test_the_workspace_of_an_lstm_is_taken_for_no_mask():
    """Bytes without values count as a mask, of which a bit each is kept, where they may be one."""
    layers, x = nn.Sequential(nn.Linear(16, 16), nn.LSTM(16, 16)), f(9, 4, 16)
    convert(layers, GroupQuant(bits=4), rest=GroupQuant(bits=4))
    assert predict(layers, x) == profile(layers, x)


def test_a_large_lstm_takes_no_memory():
    with torch.device("meta"):
        layer, x = nn.LSTM(16384, 32768), torch.empty(512, 256, 16384)
    # Gates and cells of each step at the least.
    assert predict(layer, x).activation_bytes > 512 * 256 * 32768 * 4 * 6


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
def test_what_an_embedding_bag_keeps_is_right_to_the_byte(mode, last):
    layer = Started(nn.EmbeddingBag(50, 4, mode=mode, include_last_offset=last))
    x, offsets = ids(50, 9), torch.tensor([0, 3, 9][: 2 + last])
    run, predicted = profile(layer, x, offsets), predict(layer, x, offsets)
    assert predicted.activation_bytes == run.activation_bytes
