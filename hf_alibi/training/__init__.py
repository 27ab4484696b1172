"""Data, tokenizer, packing, and training with Transformers' Trainer."""

from .data import collate_blocks, load_file_corpus, load_hub_corpus, pack, standard_library_corpus, train_tokenizer
from .resume import find_checkpoint
from .safe_trainer import SafeTrainer
from .trainer import train

__all__ = [
    "SafeTrainer",
    "collate_blocks",
    "find_checkpoint",
    "load_file_corpus",
    "load_hub_corpus",
    "pack",
    "standard_library_corpus",
    "train",
    "train_tokenizer",
]
