"""Data, tokenizer, packing, and training with Transformers' Trainer."""

try:
    import datasets  # noqa: F401
except ModuleNotFoundError as error:
    message = "hf_alibi.training needs the package datasets: pip install 'hf_alibi[train]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from .context_parallel import ContextParallel
from .data import load_file_corpus, load_hub_corpus, standard_library_corpus, train_tokenizer
from .mixture import Mixture
from .packing import collate_blocks, pack
from .prepare import load_prepared, prepare
from .resume import find_checkpoint
from .safe_trainer import SafeTrainer
from .trainer import train

__all__ = [
    "ContextParallel",
    "Mixture",
    "SafeTrainer",
    "collate_blocks",
    "find_checkpoint",
    "load_file_corpus",
    "load_hub_corpus",
    "load_prepared",
    "pack",
    "prepare",
    "standard_library_corpus",
    "train",
    "train_tokenizer",
]
