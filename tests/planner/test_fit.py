"""`packlight fit`: what fits, and how large batches and sequences may be."""

import json
import pathlib
import sys
from typing import Any

import pytest
import torch

import packlight
from packlight.cli import main
from packlight.planner.adapted import FourBits, in_4_bits, lora_settings, with_lora
from packlight.planner.calibrate import calibrate
from packlight.planner.devices import Rates, device_of, parse_bytes, save_rates, shipped_rates
from packlight.planner.fit import fit, largest, resized
from packlight.planner.optimizers import OPTIMIZERS
from packlight.planner.walk import Walker
from tests.planner.models import on_meta


@pytest.mark.parametrize(
    ("usable", "expected"),
    [(1000, 100), (100 + 9 * 7, 7), (105, 0), (109, 1), (100 + 9 * 4096, 4096)],
)
def test_the_largest_size_is_found(usable: int, expected: int) -> None:
    looked: list[int] = []

    def peak(size: int) -> int:
        looked.append(size)
        return 100 + 9 * size

    found = largest(peak, usable, {4: peak(4)}, 1, None)
    assert found <= expected <= 1.02 * found + 1
    assert len(looked) <= 6


def test_the_largest_size_is_found_where_the_peak_bends() -> None:
    found = largest(lambda n: max(1000 + n, 40 * n, n * n // 8), 10_000, {8: 1008}, 1, None)
    assert 0.98 * 250 <= found <= 250


def test_sizes_come_in_units_and_have_an_end() -> None:
    assert largest(lambda n: 5 * n, 10_000, {512: 2560}, 64, None) % 64 == 0
    assert largest(lambda n: 5 * n, 10_000, {512: 2560}, 64, 1024) == 1024
    assert largest(lambda n: 10**9, 10_000, {64: 10**9}, 64, None) == 0


def test_inputs_are_resized_where_their_sizes_are() -> None:
    given = {"ids": torch.zeros(2, 8), "labels": torch.zeros(2), "other": torch.zeros(3, 8), "n": 1}
    found = resized(given, (2, 8), batch=5, length=16)
    assert found["ids"].shape == (5, 16)
    assert found["labels"].shape == (5,)
    assert found["other"].shape == (3, 8)
    assert found["n"] == 1


def test_rows_add_up_and_larger_batches_do_not_fit() -> None:
    model, tokens = on_meta(depth=6)
    device = device_of("700MiB")
    found = fit("a model", model, (tokens,), {}, device, OPTIMIZERS["adamw"])
    static = found.weights + found.optimizer + found.other
    for row in found.rows:
        assert row.peak == static + row.kept + row.gradients + row.working
        assert row.fits == (row.peak <= found.usable)
    named = {row.name: row for row in found.rows}
    assert named["packlight, tiles"].kept < named["packlight"].kept < named["PyTorch"].kept
    most = named["PyTorch"].largest_batch
    assert named["checkpointing"].largest_batch > most > 0
    assert named["checkpointing"].longest_sequence > named["PyTorch"].longest_sequence > 0
    for batch, fits in ((most, True), (int(1.03 * most) + 1, False)):
        more = tokens.new_empty(batch, tokens.shape[1])
        walker = Walker(model, (more,), {}, None, OPTIMIZERS["adamw"])
        assert (walker.walk(device).timeline.peak <= found.usable) == fits
    text = str(found)
    for part in ("fits", "the fastest that fits", "times are those of an H200"):
        assert part in text


def test_a_number_of_four_digits_is_a_card() -> None:
    assert device_of("4090").name == "RTX 4090"
    with pytest.raises(packlight.InputError, match="a device of 4711 bytes"):
        device_of("4711")


@pytest.fixture
def net(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "fit_net.py").write_text(
        "import torch\nfrom tests.planner.models import Model\n"
        "def make(depth=6):\n    return Model(depth), torch.empty(4, 64, dtype=torch.int64)\n"
    )
    monkeypatch.chdir(tmp_path)
    return "fit_net:make"


def test_the_command_prints_json_and_writes_plan_and_page(
    net: str, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    main(
        ["fit", net, "--gpu", "RTX 4090", "--optimizer", "adamw-8bit", "--quick", "--json",
         "--plan", "plan.toml", "--html", "fit.html"]
    )  # fmt: skip
    data = json.loads(capsys.readouterr().out)
    assert data["device"] == "RTX 4090"
    assert data["rows"][0]["name"] == "PyTorch"
    assert data["fastest"] in [row["name"] for row in data["rows"]]
    assert packlight.load_methods(tmp_path / "plan.toml")
    page = (tmp_path / "fit.html").read_text(encoding="utf-8")
    for part in ("<svg", "PyTorch", "blocks.0"):
        assert part in page
    assert "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ("a large one", "unknown device 'a large one'; known: H200"),
        ("300MiB", "a GPU of 300 MiB has no room for tensors"),
    ],
)
def test_the_command_says_which_card_it_cannot_take(
    net: str, capsys: pytest.CaptureFixture[str], gpu: str, said: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", net, "--gpu", gpu])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_command_takes_every_optimiser_and_says_what_writes_a_plan(
    net: str, capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    main(["fit", net, "--gpu", "1GiB", "--optimizer", optimizer, "--quick", "--json"])
    data = json.loads(capsys.readouterr().out)
    (plan,) = (row for row in data["rows"] if row["name"] == "plan")
    assert plan["code"].endswith('"plan.toml"), strict=False)  # --plan plan.toml writes that file')


_SMALL_LLAMA = (
    "hidden_size=64", "intermediate_size=128", "num_hidden_layers=5", "vocab_size=512",
    "num_attention_heads=4",
)  # fmt: skip


def _fit_of_a_llama(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    config = [word for entry in _SMALL_LLAMA for word in ("--config", entry)]
    main(
        ["fit", "hf:llama", *config, "--sequence", "64", "--batch", "2", "--dtype", "bf16",
         "--gpu", "1GiB", "--json", "--quick", *words]
    )  # fmt: skip
    return json.loads(capsys.readouterr().out)


def _without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As where they are not installed."""
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            monkeypatch.delitem(sys.modules, name)
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)


def test_a_model_of_transformers_with_adapters_on_4_bits_without_their_packages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    _without(monkeypatch, "peft", "bitsandbytes")
    data = _fit_of_a_llama(capsys, "--lora", "r=4,targets=all-linear", "--load-in-4bit")
    assert all(row["fits"] for row in data["rows"])
    # Adapters are trained, and their Adam has two numbers of 32 bits a weight.
    tensors = 2 * 7 * 5
    trained = 4 * 5 * 4 * (4 * 128 + 3 * 192)
    assert data["optimizer"] == 2 * trained + 512 * tensors  # and each a count of steps
    embeddings = 2 * 2 * 512 * 64
    linears = 5 * (4 * 64 * 64 + 3 * 64 * 128)
    assert data["weights"] == pytest.approx(embeddings + linears // 2 + trained, rel=0.1)


@pytest.mark.parametrize("dropout", ["0.1", "0"])
@pytest.mark.parametrize("in_4", [False, True], ids=["16 bits", "4 bits"])
def test_adapters_take_as_much_without_peft(
    monkeypatch: pytest.MonkeyPatch, in_4: bool, dropout: str
) -> None:
    pytest.importorskip("peft")
    settings = lora_settings({"r": "4", "targets": "up+down", "dropout": dropout})
    peaks, times = [], []
    for _ in range(2):
        model, tokens = on_meta(depth=3)
        model.to(torch.bfloat16)
        if in_4:
            in_4_bits(model)
        walker = Walker(with_lora(model, settings), (tokens,), {}, None, OPTIMIZERS["adamw"])
        for change in (lambda _: None, packlight.convert):
            with walker.imagined():
                change(walker.model)
            timeline = walker.walk(device_of("H200")).timeline
            peaks.append(timeline.peak)
            times.append(sum(segment.device_ms for segment in timeline.segments))
        _without(monkeypatch, "peft")
    assert peaks[2:] == pytest.approx(peaks[:2], rel=0.02)
    assert times[2] == pytest.approx(times[0], rel=0.02)
    assert times[3] == pytest.approx(times[1], rel=0.02 if dropout == "0" else 0.2)


def test_adapters_on_4_bits_are_foretold_by_the_kernels_that_run_there() -> None:
    pytest.importorskip("peft")
    found = {}
    for bits in (16, 4):
        model, tokens = on_meta(depth=3)
        model.to(torch.bfloat16)
        if bits == 4:
            in_4_bits(model)
        lora = with_lora(model, lora_settings({"r": "4", "targets": "up+down"}))
        walker = Walker(lora, (tokens,), {}, None, OPTIMIZERS["adamw"])
        with walker.imagined():
            packlight.convert(walker.model)
        timeline = walker.walk(device_of("H200")).timeline
        found[bits] = sum(segment.device_ms for segment in timeline.segments)
    # Beside 16 bits each pass decodes the weight, and nothing else.
    assert found[16] < found[4] < 1.2 * found[16]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("rank=4", "--lora has no rank; expected r=16"),
        ("r", "--lora r is not NAME=VALUE"),
        ("r=0", "--lora r=0: r is at least 1"),
        ("r=many", "--lora r=many: r and alpha are whole numbers"),
        ("targets=nothing", "--lora targets=nothing: "),
    ],
)
@pytest.mark.parametrize("with_peft", [True, False])
def test_settings_of_adapters_are_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lora: str, message: str,
    with_peft: bool,
) -> None:  # fmt: skip
    pytest.importorskip("transformers")
    if not with_peft:
        _without(monkeypatch, "peft")
    with pytest.raises(SystemExit):
        _fit_of_a_llama(capsys, "--lora", lora)
    assert message in capsys.readouterr().err


def test_weights_of_4_bits_take_half_a_byte_and_a_scale() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 512, bias=False))
    in_4_bits(model)
    layer = model[0]
    assert isinstance(layer, FourBits)
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert held == 256 * 512 // 2 + 4 * 256 * 512 // 64
    assert layer(torch.zeros(3, 256)).shape == (3, 512)


# ---- devices and rates ---------------------------------------------------------------------------


def test_bytes_are_read_with_their_units() -> None:
    assert parse_bytes("22GiB") == 22 * 2**30
    assert parse_bytes("1.5 gb") == 1_500_000_000
    assert parse_bytes("4090") == 4090
    assert parse_bytes("RTX 4090") is None
    assert parse_bytes("22 gallons") is None


def test_devices_have_names() -> None:
    assert device_of("NVIDIA H200").measured
    assert device_of("rtx4090").name == "RTX 4090"
    assert device_of("NVIDIA GeForce RTX 4090").name == "RTX 4090"
    assert not device_of("24GiB").measured
    assert device_of("24GiB").memory == 24 * 2**30


def test_rates_are_measured_and_kept(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = torch.get_float32_matmul_precision()
    rates = calibrate(device_of("H100"), tiny=True)
    assert isinstance(rates, Rates)
    # The host is so many times as slow as the one that is known, in all that it does.
    known = shipped_rates()
    share = rates.host_us / known.host_us
    assert share > 0
    for name in ("host_us_packlight", "module_us", "hooks_us"):
        assert getattr(rates, name) == pytest.approx(share * getattr(known, name), rel=2e-3)
    assert min(rates.others, rates.others_packlight) > 0
    assert {"aten::mm of a short side", "packlight::group_quantize"} <= set(rates.factors)
    # The kernels' products of low rank, in float32 and in TF32.
    assert {"packlight::low_rank_outer", "packlight::low_rank_outer in TF32"} <= set(rates.factors)
    assert torch.get_float32_matmul_precision() == before
    from packlight.planner.devices import cache

    save_rates("H100", rates, cache())
    try:
        assert device_of("H100").measured
        assert device_of("H100").rates == rates
    finally:
        cache().unlink()
        from packlight.planner import devices

        devices._known_rates.cache_clear()
    assert not device_of("H100").measured
