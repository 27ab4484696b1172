"""Data, tokenizer, packing, and training with Transformers' Trainer."""

try:
    import datasets  # noqa: F401
except ModuleNotFoundError as error:
    message = "hf_alibi.training needs the package datasets: pip install 'hf_alibi[train]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from .data import load_file_corpus, load_hub_corpus, standard_library_corpus, train_tokenizer
from .packing import collate_blocks, pack
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
