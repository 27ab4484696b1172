"""Data, tokenizer, packing, and training with Transformers' Trainer."""

from ..errors import missing_package

try:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
except ModuleNotFoundError as error:
    raise missing_package("hf_alibi.training", "train", error) from error

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
