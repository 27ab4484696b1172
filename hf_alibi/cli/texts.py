"""Which texts a command reads: options that `hf_alibi train` and `hf_alibi prepare` share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..training.data import Corpus, load_file_corpus, load_hub_corpus, matching_files, standard_library_corpus
from .options import in_range


@dataclass
class TextArguments:
    """Which texts to read."""

    dataset_name: list[str] | None = field(
        default=None, metadata={"help": "Dataset of the Hub; several with --train_weights."}
    )
    dataset_config_name: list[str] | None = field(
        default=None, metadata={"help": "Configuration of that dataset; one for each of several."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Text files (one document each), JSON Lines or Parquet files, or glob patterns."},
    )
    train_weights: list[float] | None = field(
        default=None, metadata={"help": "Share of the training blocks for each of several data sets."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "The same to evaluate on; default: part of the training documents, held out."}
    )
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Percentage of documents to hold out if no validation split is given."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the documents."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenise; default: this one."}
    )

    def check(self) -> None:
        """Raises `UserError` for options that exclude each other."""
        if self.dataset_name and (self.train_file or self.validation_file):
            raise UserError("give either --dataset_name or --train_file and --validation_file, not both")
        if self.dataset_config_name and not self.dataset_name:
            raise UserError("--dataset_config_name needs --dataset_name")
        if self.dataset_config_name and len(self.dataset_config_name) != len(self.dataset_name or []):
            raise UserError("--dataset_config_name needs one name for each of --dataset_name")
        if self.validation_file and not self.train_file:
            raise UserError("--validation_file needs --train_file")
        in_range(self, 0, "validation_split_percentage", highest=99)
        in_range(self, 1, "preprocessing_num_workers")
        if self.dataset_name and len(self.dataset_name) > 1 and not self.train_weights:
            raise UserError("several --dataset_name need --train_weights, one number for each")
        check_weights(self.train_weights, self.dataset_name or self.train_file)

    def datasets(self) -> list[tuple[str, str | None]]:
        """Returns the names of the datasets, each with its configuration."""
        names = self.dataset_name or []
        configs: Sequence[str | None] = self.dataset_config_name or [None] * len(names)
        return list(zip(names, configs, strict=True))

    def sources(self) -> list[dict[str, Any]]:
        """Returns the names of the datasets, or the names and sizes of the files in bytes."""
        if self.dataset_name:
            return [{"dataset": name, "config": config} for name, config in self.datasets()]
        patterns = [*(self.train_file or []), *([self.validation_file] if self.validation_file else [])]
        paths = [path for pattern in patterns for path in matching_files(pattern)]
        return [{"file": path, "bytes": Path(path).stat().st_size} for path in paths]


def check_weights(weights: Sequence[float] | None, names: Sequence[str] | None) -> None:
    """Raises `UserError` unless there is a positive weight for each name, or no weight."""
    if weights is None:
        return
    if len(weights) != len(names or []) or len(weights) < 2:
        raise UserError(f"--train_weights has {len(weights)} numbers for {len(names or [])} data sets")
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"--train_weights must be larger than 0, got {weights}")


def load_corpora(arguments: TextArguments, streaming: bool = False) -> list[Corpus]:
    """Returns the corpus that the arguments name, or those that they mix.

    They are datasets, files, or by default Python's standard library.
    """
    options: dict[str, Any] = {
        "text_column": arguments.text_column,
        "streaming": streaming,
        "validation_percentage": arguments.validation_split_percentage,
    }
    if arguments.dataset_name:
        return [load_hub_corpus(name, config, **options) for name, config in arguments.datasets()]
    if arguments.train_file and arguments.train_weights:
        first, *others = arguments.train_file
        if arguments.validation_file:
            # One validation file for the whole mixture.
            rest = options | {"validation_percentage": 0}
            return [
                load_file_corpus(first, arguments.validation_file, **options),
                *(load_file_corpus(name, **rest) for name in others),
            ]
        return [load_file_corpus(name, **options) for name in arguments.train_file]
    if arguments.train_file:
        return [load_file_corpus(arguments.train_file, arguments.validation_file, **options)]
    return [standard_library_corpus()]
