"""What the scripts share: models by name or tiny ones, and a text to train on."""

import argparse
import sysconfig
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def arguments(description: str, model: str) -> argparse.ArgumentParser:
    """A parser with what every script takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=model, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=4096, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences a step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, as in CI")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.tiny:
        options.length, options.batch, options.steps = 64, 2, 2
        options.model = str(tiny_llama(options.out / "base"))
    return options


def tiny_llama(folder: Path) -> Path:
    """A model that knows nothing and a tokenizer of bytes, as from the hub."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(words),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def text() -> str:
    """Python's own modules: a text that is on every machine. Yours goes here."""
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("a*.py")))


def rows(model: str, length: int, count: int) -> list[dict[str, torch.Tensor]]:
    """`count` sequences of `length` tokens of the text, from its beginning again where it ends."""
    ids = transformers.AutoTokenizer.from_pretrained(model)(text())["input_ids"]
    tokens = torch.tensor(ids).repeat(1 + count * length // len(ids))
    sequences = tokens[: count * length].view(count, length)
    return [{"input_ids": row, "labels": row} for row in sequences]


def training_arguments(options: argparse.Namespace, **more: object):
    return transformers.TrainingArguments(**settings(options), **more)


def settings(options: argparse.Namespace) -> dict[str, object]:
    """What a Trainer of transformers or TRL is told."""
    return {
        "output_dir": str(options.out),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": 2e-4,
        "logging_steps": 1 if options.tiny else 10,
        "bf16": not options.tiny,
        "use_cpu": options.tiny,
        "dataloader_pin_memory": not options.tiny,
        "report_to": [],
        "save_strategy": "no",
    }
