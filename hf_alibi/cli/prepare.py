r"""Tokenises texts once, into a folder that any number of training runs read.

    hf_alibi prepare --train_file "web/*.jsonl" --tokenizer_name runs/books --output_dir data/web \
        --preprocessing_num_workers 8
    hf_alibi train --prepared_data data/web --block_size 2048 --output_dir runs/web

Memory grows neither with the corpus nor with a document. If the command is killed, repeat it: it continues where it
stopped, and the folder becomes the same. Without --tokenizer_name, a byte-level BPE is trained on the texts first.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import UserError
from ..hub.checkpoints import load_tokenizer
from ..training.data import documents_in_turn, reading_errors, train_tokenizer
from ..training.prepare import RECORD, prepare
from .options import OptionParser, in_range, parse
from .texts import TextArguments, load_corpora


@dataclass
class PrepareArguments:
    """Where the tokens go, and which tokenizer makes them."""

    output_dir: Path = field(metadata={"help": "New folder, or one that an interrupted run of this command left."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, a folder or Hub id; default: a new byte-level BPE."}
    )
    vocab_size: int = field(default=8192, metadata={"help": "Entries of a new tokenizer."})


# What does not change the result: the number of workers, and paths, because texts are compared by content.
FREE = {"preprocessing_num_workers", "train_file", "validation_file", "dataset_name", "output_dir"}


@reading_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Prepares as the command line `argv` (default: the process's own) says."""
    parser = OptionParser([PrepareArguments, TextArguments], description=__doc__.partition("\n")[0])
    arguments, texts = parse(parser, argv)
    in_range(arguments, 1, "vocab_size")
    texts.check()
    if texts.train_weights:
        raise UserError("--train_weights: prepare each data set by itself, and give the weights to hf_alibi train")
    # `datasets` would copy all texts to its cache first, if they were not a stream.
    (corpus,) = load_corpora(texts, streaming=True)
    if arguments.tokenizer_name:
        tokenizer = load_tokenizer(arguments.tokenizer_name)
    elif (arguments.output_dir / RECORD).is_file() and (arguments.output_dir / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(arguments.output_dir)
    else:
        tokenizer = train_tokenizer(documents_in_turn([corpus]), arguments.vocab_size)
    named = {name: value for name, value in (asdict(arguments) | asdict(texts)).items() if name not in FREE}
    record = {"arguments": named, "sources": texts.sources()}
    splits = prepare(corpus, tokenizer, arguments.output_dir, record, texts.preprocessing_num_workers)
    print(f"{arguments.output_dir}: {', '.join(splits)}; read it with hf_alibi train --prepared_data")
