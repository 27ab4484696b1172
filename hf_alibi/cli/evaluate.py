"""Evaluates perplexity against length: prints a table, and with --output_prefix writes a JSON file and a plot.

    hf_alibi evaluate --model_name_or_path runs/demo/alibi runs/demo/sinusoidal \
        --lengths 256 512 1024 2048 4096 --output_prefix runs/demo/extrapolation

writes runs/demo/extrapolation.json and runs/demo/extrapolation.png. Without --stride the windows do not overlap. With
--stride S they start S tokens apart, and the last S targets of each are scored. hf_alibi/evaluation/perplexity.py
explains the protocols and units.

The text is the validation split of the standard library's source files, the validation split of a dataset
(--dataset_name), or your own file (--validation_file). Each checkpoint reads it with its own tokenizer. If these
differ, compare bits per byte and not perplexity.

--config_overrides "alibi_scaling={'type': 'dynamic'}" shows the effect of position interpolation. It needs
--tokens_per_forward of at least the longest length, because dynamic slopes follow from the length of one forward pass.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.perplexity import encode_stream, mean_by_doubling, perplexity_by_length
from ..evaluation.plots import Curve, plot_extrapolation
from ..hub.checkpoints import LoadingArguments, available_device, load_causal_lm, load_config
from ..tables import aligned
from ..training.data import load_file_corpus, load_hub_corpus, reading_errors, standard_library_corpus
from .options import OptionParser, check_output, in_range, output_path, parse


@dataclass
class EvaluationArguments:
    """What to evaluate, on which text, and where to write the results."""

    model_name_or_path: list[str] = field(metadata={"help": "Checkpoints: folders, or model ids of the Hub."})
    labels: list[str] | None = field(
        default=None, metadata={"help": "Names of the checkpoints in table and plot; if omitted, their folders'."}
    )
    lengths: list[int] = field(
        default_factory=lambda: [256, 512, 1024, 2048, 4096], metadata={"help": "Lengths of the windows, in tokens."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens between the starts of sliding windows; if omitted, no overlap."}
    )
    max_tokens: int = field(default=65_536, metadata={"help": "Most tokens to score, from the start of the text."})
    tokens_per_forward: int = field(
        default=2048, metadata={"help": "Most tokens in one forward pass; memory grows with it."}
    )
    output_prefix: Path | None = field(
        default=None, metadata={"help": "Write PREFIX.json and PREFIX.png; if omitted, only the table is printed."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Evaluate on the validation split of this dataset of the Hub."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Evaluate on this text, JSON Lines or Parquet file (or glob pattern)."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the documents."})
    streaming: bool = field(default=False, metadata={"help": "Read only the needed part of the dataset or file."})


@reading_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates as the command line `argv` (default: the process's own) says."""
    parser = OptionParser([EvaluationArguments, LoadingArguments], description=__doc__.partition("\n")[0])
    arguments, loading = parse(parser, argv)
    labels = check(arguments, loading)
    documents = load_documents(arguments)
    curves: list[Curve] = []
    for path, label in zip(arguments.model_name_or_path, labels, strict=True):
        model, tokenizer = load_causal_lm(path, **asdict(loading))
        results = perplexity_by_length(
            model,
            encode_stream(tokenizer, documents, arguments.max_tokens + 1),
            sorted(set(arguments.lengths)),
            arguments.stride,
            tokenizer=tokenizer,
            tokens_per_forward=arguments.tokens_per_forward,
            progress=True,
        )
        # Other models record their training length here.
        longest = getattr(model.config, "max_position_embeddings", None)
        curves.append(Curve(label, getattr(model.config, "training_length", longest), results))
        if arguments.output_prefix is not None:
            # Written after each checkpoint, so that a failure of a later one loses nothing.
            write_results(curves, arguments.output_prefix)
    windows = "non-overlapping windows" if arguments.stride is None else f"windows {arguments.stride} tokens apart"
    print(table(curves))
    print(f"perplexity per token (bits per byte), the same target tokens at every length, {windows}")
    if arguments.output_prefix is not None:
        plot_extrapolation(curves, output_path(arguments.output_prefix, ".png"))


def check(arguments: EvaluationArguments, loading: LoadingArguments) -> list[str]:
    """Returns the labels. Raises `UserError` for mistakes that would only show after hours."""
    paths = arguments.model_name_or_path
    labels = arguments.labels or [Path(path).resolve().name for path in paths]
    if len(labels) != len(paths):
        raise UserError(f"there are {len(labels)} --labels for {len(paths)} checkpoints; give one for each")
    if arguments.dataset_name and arguments.validation_file:
        raise UserError("give either --dataset_name or --validation_file, not both")
    if arguments.dataset_config_name and not arguments.dataset_name:
        raise UserError("--dataset_config_name needs --dataset_name")
    in_range(arguments, 1, "lengths", "stride", "max_tokens", "tokens_per_forward")
    if arguments.stride is not None and arguments.stride > min(arguments.lengths):
        raise UserError(
            f"the stride must be from 1 to the length, but stride is {arguments.stride} "
            f"and length {min(arguments.lengths)}"
        )
    if max(arguments.lengths) > arguments.max_tokens:
        raise UserError(f"--max_tokens {arguments.max_tokens} is less than the longest of --lengths")
    available_device(loading.device)
    for path in paths:
        load_config(path, trust_remote_code=loading.trust_remote_code, config_overrides=loading.config_overrides)
    check_output(arguments.output_prefix)
    return labels


def load_documents(arguments: EvaluationArguments) -> Iterable[str]:
    """Returns the documents that the arguments name."""
    source: dict[str, Any] = {"text_column": arguments.text_column, "streaming": arguments.streaming}
    if arguments.dataset_name:
        return load_hub_corpus(arguments.dataset_name, arguments.dataset_config_name, **source)["validation"]["text"]
    if arguments.validation_file:
        return load_file_corpus(arguments.validation_file, validation_percentage=0, **source)["train"]["text"]
    return standard_library_corpus()["validation"]["text"]


def table(curves: Sequence[Curve]) -> str:
    """Returns a table of perplexity and bits per byte.

    It has a row for each length, a column for each checkpoint, and the number of targets in the last row.
    """
    rows = [["length", *(curve.label for curve in curves)]]
    for results in zip(*(curve.results for curve in curves), strict=True):
        cells = []
        for result in results:
            bits = "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.3f}"
            cells.append(f"{result.perplexity:.2f} ({bits})")
        rows.append([str(results[0].length), *cells])
    rows.append(["tokens", *(f"{curve.results[0].num_targets:,}" for curve in curves)])
    return aligned(rows)


def write_results(curves: Sequence[Curve], prefix: Path) -> None:
    """Writes PREFIX.json. The loss by position is given as means over doubling ranges."""
    models = []
    for curve in curves:
        results = [asdict(r) | {"nats_by_position": mean_by_doubling(r.nats_by_position)} for r in curve.results]
        models.append({"label": curve.label, "training_length": curve.training_length, "results": results})
    output_path(prefix, ".json").write_text(json.dumps({"models": models}, indent=2) + "\n", "utf-8")
