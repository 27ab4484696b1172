"""Perplexity against length for one or several checkpoints: a table, and with --output_prefix a JSON file and a plot.

    hf_alibi evaluate --model_name_or_path runs/demo/alibi runs/demo/sinusoidal \
        --lengths 256 512 1024 2048 4096 --output_prefix runs/demo/extrapolation

writes runs/demo/extrapolation.json and runs/demo/extrapolation.png. Without --stride the windows do not overlap; with
--stride S they begin S tokens apart and the last S targets of each are scored. The protocols and units are explained
in hf_alibi/evaluation.py. The text is the validation split of the standard library's source files, of a dataset
(--dataset_name), or a file of your own (--validation_file). Each checkpoint reads it with its own tokenizer: where
these differ, compare bits per byte and not perplexity. --config_overrides "alibi_scaling={'type': 'dynamic'}" shows
what position interpolation does; for that, --tokens_per_forward must be the longest length or more, because slopes
that depend on the length do so for each forward pass.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from ..errors import UserError, parse_arguments
from ..evaluation.perplexity import encode_stream, mean_by_doubling, perplexity_by_length
from ..evaluation.plots import Curve, plot_extrapolation
from ..hub.checkpoints import LoadingArguments, load_causal_lm, load_config
from ..training.data import load_file_corpus, load_hub_corpus, standard_library_corpus


@dataclass
class EvaluationArguments:
    """What is evaluated, on which text, and where the results go."""

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
    max_tokens: int = field(default=65_536, metadata={"help": "Tokens to score at most, from the start of the text."})
    tokens_per_forward: int = field(
        default=2048, metadata={"help": "Tokens in one forward pass at most; memory grows with it."}
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
    streaming: bool = field(default=False, metadata={"help": "Read the dataset or file as far as it is needed."})


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line `argv` (default: the process's own) says."""
    parser = HfArgumentParser(
        [EvaluationArguments, LoadingArguments],  # type: ignore[list-item]  # Transformers' annotation is too narrow
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
    )
    arguments, loading = parse_arguments(parser, argv)
    paths = arguments.model_name_or_path
    labels = arguments.labels or [Path(path).name for path in paths]
    if len(labels) != len(paths):
        raise UserError(f"there are {len(labels)} --labels for {len(paths)} checkpoints; give one for each")
    for path in paths:  # a mistake in the last one should not show after hours of evaluating the first
        load_config(path, trust_remote_code=loading.trust_remote_code, config_overrides=loading.config_overrides)
    documents = load_documents(arguments)
    lengths = sorted(set(arguments.lengths))
    curves = []
    for path, label in zip(paths, labels, strict=True):
        model, tokenizer = load_causal_lm(path, **asdict(loading))
        results = perplexity_by_length(
            model,
            encode_stream(tokenizer, documents, arguments.max_tokens + 1),
            lengths,
            arguments.stride,
            tokenizer=tokenizer,
            tokens_per_forward=arguments.tokens_per_forward,
            progress=True,
        )
        longest = getattr(model.config, "max_position_embeddings", None)  # what other models were trained at
        curves.append(Curve(label, getattr(model.config, "training_length", longest), results))
    windows = "non-overlapping windows" if arguments.stride is None else f"windows {arguments.stride} tokens apart"
    print(table(curves))
    print(f"perplexity per token (bits per byte), the same target tokens at every length, {windows}")
    if arguments.output_prefix is not None:
        write(curves, arguments.output_prefix)


def load_documents(arguments: EvaluationArguments) -> Iterable[str]:
    """The documents that the arguments name."""
    source: dict[str, Any] = {"text_column": arguments.text_column, "streaming": arguments.streaming}
    if arguments.dataset_name and arguments.validation_file:
        raise UserError("give either --dataset_name or --validation_file, not both")
    if arguments.dataset_name:
        return load_hub_corpus(arguments.dataset_name, arguments.dataset_config_name, **source)["validation"]["text"]
    if arguments.validation_file:
        return load_file_corpus(arguments.validation_file, validation_percentage=0, **source)["train"]["text"]
    return standard_library_corpus()["validation"]["text"]


def table(curves: Sequence[Curve]) -> str:
    """Perplexity and bits per byte: a row for each length, a column for each checkpoint, the targets below."""
    rows = [["length", *(curve.label for curve in curves)]]
    for results in zip(*(curve.results for curve in curves), strict=True):
        rows.append([str(results[0].length), *(f"{r.perplexity:.2f} ({r.bits_per_byte:.3f})" for r in results)])
    rows.append(["tokens", *(f"{curve.results[0].num_targets:,}" for curve in curves)])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def write(curves: Sequence[Curve], prefix: Path) -> None:
    """Write PREFIX.json, with the loss by position as means over doubling ranges, and PREFIX.png."""
    models = []
    for curve in curves:
        results = [asdict(r) | {"nats_by_position": mean_by_doubling(r.nats_by_position)} for r in curve.results]
        models.append({"label": curve.label, "training_length": curve.training_length, "results": results})
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(prefix.name + ".json").write_text(json.dumps({"models": models}, indent=2) + "\n")
    plot_extrapolation(curves, prefix.with_name(prefix.name + ".png"))
