"""The demo: its text, its model, and runs that differ in what is kept and nothing else."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import packlight
from packlight import fewbit, groupquant, inverted
from packlight.cli import demo
from packlight.cli.demo import comparison
from packlight.cli.demo.further import print_further
from packlight.cli.demo.model import Block
from packlight.errors import InputError, MissingDependencyError

TINY = {"steps": 30, "layers": 1, "width": 32, "heads": 2, "context": 24, "batch": 4}


def tiny(bits: int = 3, seed: int = 0, **choices: int) -> demo.Settings:
    return demo.make_settings("cpu", bits, seed, **{**TINY, **choices})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> demo.Text:
    root = tmp_path_factory.mktemp("text")
    for index in range(40):
        source = "".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(index, index + 5))
        (root / f"module{index:02}.py").write_text(source)
    return demo.load_text(root)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def results(text: demo.Text, out: Path) -> dict[str, demo.Result]:
    return demo.run(tiny(), out, text=text)


# ---- the text ------------------------------------------------------------------------------------


def test_every_twentieth_file_is_for_validation(tmp_path: Path) -> None:
    for index in range(41):
        (tmp_path / f"{index:02}.py").write_bytes(b"%02d\n" % index)
    text = demo.load_text(tmp_path)
    assert bytes(text.validation.tolist()) == b"00\n20\n40\n"
    training = b"".join(b"%02d\n" % index for index in range(41) if index % 20)
    assert bytes(text.training.tolist()) == training


def test_other_files_are_left_out_and_line_ends_are_one_byte(tmp_path: Path) -> None:
    for name in ("test/x.py", "a/site-packages/x.py", "a/tests/x.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("left out")
    (tmp_path / "a" / "x.py").write_bytes(b"a\r\nb")
    (tmp_path / "b.py").write_bytes(b"c\r\nd")
    text = demo.load_text(tmp_path)
    assert bytes(text.validation.tolist()) == b"a\nb"
    assert bytes(text.training.tolist()) == b"c\nd"


def test_the_standard_library_is_a_few_megabytes_and_always_the_same() -> None:
    text = demo.load_text()
    assert text.training.dtype == torch.uint8
    assert len(text.training) > 2e6
    assert len(text.validation) > 1e5
    assert b"import" in bytes(text.validation.tolist())
    again = demo.load_text()
    assert torch.equal(text.training, again.training)
    assert torch.equal(text.validation, again.validation)


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 Python files"):
        demo.load_text(tmp_path)


def test_targets_are_the_next_bytes(text: demo.Text) -> None:
    inputs, targets = demo.windows(text.training, torch.tensor([0, 7]), 5)
    assert torch.equal(inputs[0], text.training[:5])
    assert torch.equal(targets[1], text.training[8:13])


def test_windows_reach_both_ends_of_a_text_and_no_further() -> None:
    settings = tiny(context=8, batch=4, steps=50)
    numbers = torch.arange(10, dtype=torch.uint8)
    text = demo.Text(numbers, numbers)
    for batches in (demo.training_batches(text, settings), demo.validation_batches(text, settings)):
        pairs = list(batches)
        assert min(int(inputs.min()) for inputs, _ in pairs) == 0
        assert max(int(targets.max()) for _, targets in pairs) in (8, 9)


def test_batches_follow_the_seed(text: demo.Text) -> None:
    def batches(seed: int) -> Tensor:
        return torch.stack([x for x, _ in demo.training_batches(text, tiny(seed=seed))])

    assert torch.equal(batches(0), batches(0))
    assert not torch.equal(batches(0), batches(1))
    first, second = (demo.validation_batches(text, tiny(seed=seed)) for seed in (0, 1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert [len(inputs) for inputs, _ in first] == [4] * 8


# ---- the model -----------------------------------------------------------------------------------


def test_the_model_does_not_see_the_future() -> None:
    packlight.manual_seed(0)
    model = demo.GPT(layers=2, width=32, heads=2, context=8)
    text = torch.randint(256, (3, 8))
    other = text.clone()
    other[:, -1] = (other[:, -1] + 1) % 256
    assert model(text).shape == (3, 8, 256)
    torch.testing.assert_close(model(text)[:, :-1], model(other)[:, :-1])
    assert not torch.equal(model(text)[:, -1], model(other)[:, -1])


def test_a_block_is_that_of_torch() -> None:
    block = Block(32, 2)
    plain = nn.TransformerEncoderLayer(
        32, 2, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    names = {
        "attention.qkv.": "self_attn.in_proj_",
        "attention.out": "self_attn.out_proj",
        "mlp.fc": "linear",
    }
    state = block.state_dict()
    for ours, theirs in names.items():
        state = {name.replace(ours, theirs): value for name, value in state.items()}
    plain.load_state_dict(state)
    x, mask = torch.randn(3, 8, 32), nn.Transformer.generate_square_subsequent_mask(8)
    torch.testing.assert_close(block(x), plain(x, mask, is_causal=True))


@pytest.mark.parametrize(
    ("variant", "kinds"),
    [
        ("PyTorch", {nn.GELU, nn.LayerNorm, nn.Linear}),
        ("FewBit", {fewbit.GELU, nn.LayerNorm, nn.Linear}),
        ("Inverted", {inverted.GELU, inverted.LayerNorm, inverted.Linear}),
        ("default", {groupquant.GELU, groupquant.LayerNorm, groupquant.Linear}),
    ],
)
def test_variants_change_layers_and_no_parameter(variant: str, kinds: set[type]) -> None:
    model = demo.GPT(layers=2, width=32, heads=2, context=8)
    before, state = dict(model.named_parameters()), torch.get_rng_state()
    demo.VARIANTS[variant](model, 2)
    leaves = {type(module) for module in model.modules() if not list(module.children())}
    assert leaves - {nn.Embedding} == kinds
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert torch.equal(torch.get_rng_state(), state)


# ---- the runs ------------------------------------------------------------------------------------


def test_the_first_losses_are_equal_bit_for_bit(results: dict[str, demo.Result]) -> None:
    plain, *others = results.values()
    for other in others:
        assert plain.training_losses[0] == other.training_losses[0]
        assert plain.validation_losses[0] == other.validation_losses[0]
    # Before training no byte is more likely than another.
    assert plain.training_losses[0] == pytest.approx(math.log(256), abs=0.3)


def test_losses_are_finite_and_fall_alike(results: dict[str, demo.Result]) -> None:
    for result in results.values():
        assert len(result.training_losses) == len(result.step_ms) == TINY["steps"]
        assert result.validation_steps[0] == 0
        assert result.validation_steps[-1] == TINY["steps"]
        assert len(result.validation_steps) == len(result.validation_losses) == 11
        assert all(math.isfinite(loss) for loss in result.training_losses)
        assert result.training_loss < result.training_losses[0] - 1
        assert result.validation_losses[-1] < result.validation_losses[0] - 1
        assert result.median_step_ms > 0
        assert result.peak_bytes is None
    plain, *others = results.values()
    for other in others:
        # The gradients differ, so the losses must too. Four seeds differed by at most 0.0015.
        assert plain.training_losses != other.training_losses
        assert plain.validation_losses[-1] == pytest.approx(other.validation_losses[-1], abs=0.01)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("layers", "context"), [(1, 24), (3, 7)])
def test_bytes_fall_by_what_gelu_keeps_less(
    text: demo.Text, bits: int, layers: int, context: int
) -> None:
    settings = tiny(bits, layers=layers, context=context, steps=1)
    plain, packed = (
        demo.train(demo.VARIANTS[name], text, settings).kept_bytes for name in ("PyTorch", "FewBit")
    )
    elements = 4 * context * 4 * 32
    assert demo.gelu_elements(settings) == layers * elements
    assert plain.pop("GELU") == layers * 4 * elements
    # Codes come in groups of 64; one byte a call says whether an input was not finite.
    assert packed.pop("GELU") == layers * (math.ceil(elements / 64) * 8 * bits + 1)
    assert plain == packed
    assert {"Linear", "Attention", "LayerNorm", "loss"} <= plain.keys()


def test_all_runs_see_the_same_weights_and_batches(
    text: demo.Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    forward = demo.GPT.forward

    def recording(model: demo.GPT, batch: Tensor) -> Tensor:
        seen.append((batch, model.head.weight.detach().clone()))
        return forward(model, batch)

    monkeypatch.setattr(demo.GPT, "forward", recording)
    for change in demo.VARIANTS.values():
        demo.train(change, text, tiny(steps=3))
    runs = len(demo.VARIANTS)
    length = len(seen) // runs
    first = seen[:length]
    for run in range(1, runs):
        other = seen[run * length : (run + 1) * length]
        assert torch.equal(first[0][1], other[0][1])
        for (batch, _), (same, _) in zip(first, other, strict=True):
            assert torch.equal(batch, same)


def test_a_run_repeats_and_another_seed_differs(text: demo.Text) -> None:
    def losses(seed: int) -> list[float]:
        settings = tiny(seed=seed, steps=3)
        return demo.train(demo.VARIANTS["FewBit"], text, settings).training_losses

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_every_step_is_reported(text: demo.Text) -> None:
    counts: list[int] = []
    demo.train(
        demo.VARIANTS["PyTorch"],
        text,
        tiny(steps=4),
        lambda result: counts.append(len(result.training_losses)),
    )
    assert counts == [1, 2, 3, 4]


def test_the_learning_rate_rises_and_falls() -> None:
    settings = tiny(steps=100)
    rates = [demo.learning_rate(step, settings) for step in range(100)]
    assert rates[9] == max(rates) == pytest.approx(3e-3)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(3e-4, rel=0.02)
    assert demo.learning_rate(0, dataclasses.replace(settings, steps=1, width=768)) < 6e-4


# ---- the report ----------------------------------------------------------------------------------


def test_the_report_names_what_was_saved_and_the_difference(
    results: dict[str, demo.Result], capsys: pytest.CaptureFixture[str]
) -> None:
    demo.print_report(results, tiny(), Console(width=160))
    printed = capsys.readouterr().out
    for words in ("kept for the backward pass", "by GELU", "by Linear", "a step, median"):
        assert words in printed
    assert "PyTorch: GELU keeps 4.000 bytes an element" in printed
    assert "FewBit: GELU keeps 0.375 bytes an element" in printed
    plain, packed = results["PyTorch"], results["FewBit"]
    difference = packed.validation_losses[-1] - plain.validation_losses[-1]
    assert f"validation loss {difference:+z.4f}" in printed
    assert f"{packed.total_bytes / plain.total_bytes - 1:+.1%}" in printed
    assert "peak memory" not in printed
    assert "another seed" not in printed
    again = dataclasses.replace(plain, validation_losses=[plain.validation_losses[-1] + 0.25])
    demo.print_report(results, tiny(), Console(width=160), again)
    assert (
        "PyTorch with another seed minus PyTorch: training loss +0.0000, validation loss +0.2"
        in (capsys.readouterr().out)
    )


def test_the_head_and_a_plan_are_foretold(capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny(layers=4, width=32, heads=2, context=64, batch=8)
    print_further(settings, Console(width=160))
    printed = capsys.readouterr().out
    assert 'convert(model, head="head") keeps' in printed
    assert "times less: no logits" in printed
    assert "memory=0.12): keeps" in printed
    assert "blocks: 4 x " in printed


def test_the_report_shows_peaks_where_there_are_any(
    results: dict[str, demo.Result], capsys: pytest.CaptureFixture[str]
) -> None:
    peaked = {
        name: dataclasses.replace(result, peak_bytes=(2 - place) * 2**30)
        for place, (name, result) in enumerate(results.items())
    }
    demo.print_report(peaked, tiny(), Console(width=160))
    printed = capsys.readouterr().out
    assert "peak memory on the GPU" in printed
    assert "1.00 GiB (-50.0%)" in printed


def test_the_numbers_are_saved(results: dict[str, demo.Result], out: Path) -> None:
    data = json.loads((out / "demo.json").read_text())
    assert data["torch"] == torch.__version__
    assert data["processor"] == "cpu"
    assert data["settings"] == {**dataclasses.asdict(tiny()), "autocast": False}
    assert data["results"] == {name: dataclasses.asdict(r) for name, r in results.items()}
    plain = dataclasses.asdict(results["PyTorch"])
    assert data["again"]["kept_bytes"] == plain["kept_bytes"]
    assert data["again"]["training_losses"] != plain["training_losses"]


def test_the_picture_shows_something(results: dict[str, demo.Result], out: Path) -> None:
    assert results.keys() == set(demo.VARIANTS)
    pixels = _pixels(out / "demo.png")
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    # A curve, a marker, or a bar of each colour that means something.
    for colour in (*demo.RUN_COLOURS[:2], demo.GELU_COLOUR, demo.OTHER_COLOURS[-1]):
        wanted = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert ((pixels[..., :3] - wanted).abs().amax(-1) < 0.01).sum() > 100, colour


def test_the_picture_draws_what_a_variant_alone_keeps(
    results: dict[str, demo.Result], tmp_path: Path
) -> None:
    odd = dataclasses.replace(results["PyTorch"], kept_bytes={"Sketch": 2**20})
    demo.save_picture({**results, "odd": odd}, tiny(), tmp_path / "odd.png")
    assert _pixels(tmp_path / "odd.png").std() > 0


def _pixels(path: Path) -> Tensor:
    from matplotlib.image import imread

    return torch.from_numpy(imread(path))


def test_smoothing_looks_back() -> None:
    assert demo.smoothed([4.0, 2.0, 0.0, 6.0], 2) == [4.0, 3.0, 1.0, 3.0]
    assert demo.smoothed([4.0, 2.0], 1) == [4.0, 2.0]


# ---- what is refused, before any training --------------------------------------------------------


def hide_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*arguments: object) -> None:
        pytest.fail("training began")

    monkeypatch.setattr(comparison, "train", train)


def test_a_missing_matplotlib_is_said_before_training(
    text: demo.Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_matplotlib(monkeypatch)
    forbid_training(monkeypatch)
    with pytest.raises(MissingDependencyError, match=r"pip install 'packlight\[plot\]'"):
        demo.run(tiny(), tmp_path, text=text)


def test_without_a_picture_matplotlib_is_not_needed(
    text: demo.Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_matplotlib(monkeypatch)
    demo.run(tiny(steps=2), tmp_path / "new" / "folder", plot=False, text=text)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["demo.json"]


def test_a_text_shorter_than_the_context_is_refused(
    text: demo.Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_training(monkeypatch)
    settings = tiny(context=len(text.validation))
    with pytest.raises(InputError, match="choose a smaller --context"):
        demo.run(settings, tmp_path, plot=False, text=text)


def test_too_little_memory_is_said_in_one_line(
    text: demo.Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(comparison, "train", train)
    with pytest.raises(InputError, match="choose a smaller --batch"):
        demo.run(tiny(), tmp_path, plot=False, text=text)


@pytest.mark.parametrize("name", ["steps", "layers", "width", "heads", "context", "batch"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_must_be_positive(name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"{name}={value} is not a positive whole number"):
        tiny(**{name: value})


def test_settings_name_what_is_wrong() -> None:
    with pytest.raises(InputError, match="width=30 is not divisible by heads=4"):
        tiny(width=30, heads=4)
    for bits in (0, 9):
        with pytest.raises(InputError, match=f"bits={bits}"):
            tiny(bits=bits)
    with pytest.raises(InputError, match="seed=-1"):
        tiny(seed=-1)
    for device in ("gpu", "meta", "cuda:x", ""):
        with pytest.raises(InputError, match="is not a device of this demo"):
            demo.check_device(device)


def test_a_device_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, missing in ((0, ("cuda", "cuda:0")), (2, ("cuda:2", "cuda:99"))):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        for device in missing:
            with pytest.raises(InputError, match=f"does not exist: PyTorch sees {count}"):
                demo.check_device(device)
    for device in ("cuda", "cuda:0", "cuda:1", "cpu"):
        assert demo.check_device(device) == device
    assert demo.check_device("cpu:0") == "cpu"


def test_defaults_depend_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.make_settings("cpu:0").device == "cpu"
    assert demo.make_settings("cpu", steps=None, width=64).width == 64
    assert demo.make_settings("cpu", steps=None).steps == demo.DEFAULTS["cpu"]["steps"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert demo.make_settings().device == "cuda"
    assert demo.make_settings().width == demo.DEFAULTS["cuda"]["width"]


@pytest.mark.gpu
def test_the_demo_on_a_gpu(text: demo.Text, tmp_path: Path) -> None:
    settings = demo.make_settings("cuda", **TINY)
    results = demo.run(settings, tmp_path, plot=False, text=text)
    plain, packed = results["PyTorch"], results["FewBit"]
    element_bytes = 2 if settings.autocast else 4
    assert plain.kept_bytes["GELU"] == element_bytes * demo.gelu_elements(settings)
    assert packed.kept_bytes["GELU"] == math.ceil(demo.gelu_elements(settings) / 64) * 24 + 1
    assert plain.peak_bytes is not None
    assert packed.peak_bytes is not None
    assert packed.training_loss == pytest.approx(plain.training_loss, abs=0.1)
