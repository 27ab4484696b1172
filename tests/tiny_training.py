"""Data and options of training runs that take seconds."""

import json
from pathlib import Path

from datasets import DatasetDict
from tiny import tiny_tokenizer

from hf_alibi.training.data import load_file_corpus
from hf_alibi.training.packing import pack

TINY = ["--config_overrides", "hidden_size=32,num_hidden_layers=2,num_attention_heads=4,hidden_dropout=0.1"]
TINY += ["--vocab_size", "300", "--block_size", "16", "--use_cpu", "--disable_tqdm", "True"]
TINY += ["--per_device_train_batch_size", "2", "--learning_rate", "0.01"]


def write_rows(path: Path, documents: int = 100, lines: int = 7) -> str:
    """Writes documents of 1 to `lines` lines to a JSON Lines file, and returns its path."""
    texts = ["".join(f"line {line} of document {n}\n" for line in range(n % lines + 1)) for n in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def tiny_blocks(path: Path) -> DatasetDict:
    """Writes a text to `path`, and returns it in blocks of 32 tokens of `tiny_tokenizer`."""
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return pack(load_file_corpus(str(path), validation_percentage=0), tiny_tokenizer(), 32)
