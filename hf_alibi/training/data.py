"""Corpora, and a tokenizer trained on the spot.

A *corpus* is a `datasets.DatasetDict` (an `IterableDatasetDict` when streaming) with the splits `train` and
`validation`, and one column, `text`, with one document per row. It comes from the Hub, from local files, or from the
source files of Python's standard library, which need no network. Three lines prepare a training run:

    corpus = standard_library_corpus()
    tokenizer = train_tokenizer(corpus["train"]["text"], vocab_size=4096)
    blocks = pack(corpus, tokenizer, block_size=256)

`pack` (in `packing`) loses no token: each document ends with the end-of-text token, and each of these tokens is in
exactly one block.
"""

import glob
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice, zip_longest
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeAlias, TypeVar

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..errors import UserError
from ..hub.files import PreTrainedTokenizerFast
from ..text.cutting import Cutter
from ..text.encoding import PIECE_SIZE

Corpus: TypeAlias = DatasetDict | IterableDatasetDict
AnySplit = TypeVar("AnySplit", Dataset, IterableDataset)

MOST_AT_ONCE, CHARACTERS_AT_ONCE = 1000, 1 << 24
"""Documents that are in memory together. Fewer, larger batches leave fewer short blocks."""

READERS = {".txt": "text", ".md": "text", ".py": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""The `datasets` builder that reads a file, by the file's extension."""

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"

CHAT_TEMPLATE = r"""
{%- if tools %}{{ raise_exception('this chat template has no form for tools') }}{% endif %}
{%- if documents %}{{ raise_exception('this chat template has no form for documents') }}{% endif %}
{%- for message in messages %}
{%- if message['tool_calls'] %}{{ raise_exception('this chat template has no form for tool_calls') }}{% endif %}
{%- set content = namespace(text='') %}
{%- if message['content'] is string %}
{%- set content.text = message['content'] %}
{%- elif message['content'] is not iterable or message['content'] is mapping or not message['content'] %}
{{- raise_exception('the content of a message must be a text or a list of parts of type text') }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] != 'text' %}
{{- raise_exception('this chat template has no form for a part of type ' ~ part['type'] ~ ', only for text') }}
{%- endif %}
{%- set content.text = content.text + part['text'] %}
{%- endfor %}
{%- endif %}
{{- message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ content.text + eos_token }}{% endgeneration %}
{%- else %}
{{- content.text + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"""
"""A conversation in the form of training texts: each message is a document whose first line is the role.

Content is a text, or a list of parts of type text, which are joined. The assistant's words and the token that ends
them are marked for trainers that learn only from these (TRL's `assistant_only_loss`). Rendering the first messages of
a conversation gives the beginning of the rendered conversation.
"""

# Left out: tests, which are larger than the library; `encodings`, which is tables rather than text; packages and build
# settings, which differ between machines.
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
SKIPPED_PREFIX = "_sysconfigdata"


def standard_library_corpus() -> DatasetDict:
    """Returns the Python source files of the running interpreter's standard library, one document per file.

    There are about 600 files with 10 MB. A tenth of them, several with more than 16,384 tokens, are in the validation
    split. The split depends only on a file's path, so it is the same on every machine and for every Python version.

    Raises:
        UserError: If this Python has no source files of its library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for path in sorted(path.relative_to(library).as_posix() for path in library.rglob("*.py")):
        if SKIPPED_DIRECTORIES.isdisjoint(path.split("/")) and not path.startswith(SKIPPED_PREFIX):
            try:
                text = (library / path).read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            split = "validation" if _is_held_out(path, percentage=10) else "train"
            splits[split].append(text)
    corpus = DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in splits.items()})
    return _with_documents(corpus.filter(_is_document, input_columns="text"))


def load_hub_corpus(
    name: str,
    config_name: str | None = None,
    *,
    text_column: str = "text",
    streaming: bool = False,
    validation_percentage: int = 5,
) -> Corpus:
    """Returns a dataset of the Hub (or of a local folder of the same form), one document per row.

    If the dataset has a `validation` split, that is used. Otherwise `validation_percentage` of the documents of
    `train` are held out (none if 0). A hash of the text chooses them, so copies of a document are in the same split.

    Raises:
        UserError: If the dataset cannot be read, or has no `train` split, no column `text_column`, or no text.
    """
    source = {"path": name, "name": config_name, "streaming": streaming}
    return _as_corpus(name, source, text_column, validation_percentage)


def load_file_corpus(
    train_file: str | Sequence[str],
    validation_file: str | None = None,
    *,
    text_column: str = "text",
    streaming: bool = False,
    validation_percentage: int = 5,
) -> Corpus:
    """Returns the text of local files, given as paths or as glob patterns (`"books/**/*.txt"`).

    A plain text file is one document. A JSON Lines or Parquet file has one document per row, in `text_column`. Without
    `validation_file`, documents are held out as in `load_hub_corpus`.

    Raises:
        UserError: If there is no such file, its extension is not in `READERS`, or it has no `text_column` or no text.
    """
    patterns = {"train": [train_file] if isinstance(train_file, str) else list(train_file)}
    if validation_file:
        patterns["validation"] = [validation_file]
    data_files = {
        split: [path for name in names for path in matching_files(name)] for split, names in patterns.items()
    }
    readers = sorted({_reader(path) for paths in data_files.values() for path in paths})
    if len(readers) > 1:
        raise UserError(f"the files of one corpus must be of one kind, not {' and '.join(readers)}")
    # `load_dataset` takes file names for patterns.
    escaped = {split: [glob.escape(path) for path in paths] for split, paths in data_files.items()}
    source = {"path": readers[0], "data_files": escaped, "streaming": streaming}
    if readers[0] == "text":
        source["sample_by"] = "document"
    return _as_corpus(" and ".join(chain(*patterns.values())), source, text_column, validation_percentage)


def matching_files(pattern: str) -> list[str]:
    """Returns the files that a path or glob pattern names, sorted and without empty ones.

    If a file has exactly this name, it is the only one: brackets, stars and question marks in it are no pattern.
    """
    found = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
    paths = sorted(path for path in found if Path(path).is_file())
    if not paths:
        raise UserError(f"no such file: {pattern}")
    filled = [path for path in paths if Path(path).stat().st_size > 0]
    if not filled:
        raise UserError(f"{pattern} is empty: a corpus needs at least one document with text in it")
    return filled


def _reader(path: str) -> str:
    extension = Path(path).suffix
    if extension not in READERS:
        raise UserError(f"{path}: cannot read '{extension}' files, only {', '.join(READERS)}")
    return READERS[extension]


def _as_corpus(name: str, source: dict[str, Any], text_column: str, validation_percentage: int) -> Corpus:
    """Loads `source` with `load_dataset`, checks it, and returns it as a corpus."""
    try:
        splits = load_dataset(**source)
        used = [split for split in ("train", "validation") if split in splits]
        # Types only: the first document may be large.
        columns = {split: {name: type(value) for name, value in _first(splits[split]).items()} for split in used}
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"cannot read {name}: {shorten(str(error.__cause__ or error), 200)}") from error
    if "train" not in columns:
        raise UserError(f"{name} has no split 'train', only {', '.join(splits)}")
    for types in columns.values():
        if types and text_column not in types:
            raise UserError(f"{name} has no column '{text_column}', only {', '.join(types)}")
        if not issubclass(types.get(text_column, str), str | None):
            raise UserError(f"column '{text_column}' of {name} holds {types[text_column].__name__}, not text")
    corpus = type(splits)({split: splits[split].select_columns([text_column]) for split in columns})
    if text_column != "text":
        corpus = corpus.rename_column(text_column, "text")
    try:
        corpus = type(corpus)({split: _filter(documents, _is_document) for split, documents in corpus.items()})
        if "validation" not in corpus and validation_percentage:
            corpus = _hold_out(corpus, validation_percentage)
        return _with_documents(corpus)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"cannot read {name}: {shorten(str(error.__cause__ or error), 200)}") from error


def _first(rows: Dataset | IterableDataset) -> dict[str, Any]:
    return next(iter(rows), {})


@contextmanager
def reading_errors() -> Iterator[None]:
    """Raises `UserError` for errors in streamed data, which only show when the stream reaches them."""
    try:
        yield
    except (UnicodeDecodeError, DatasetsError) as error:
        raise UserError(f"cannot read the data further: {shorten(str(error.__cause__ or error), 200)}") from error


def _is_document(text: Any) -> bool:
    """Returns whether a row holds text that is not empty. Raises `UserError` if it holds something else."""
    if not isinstance(text, str | None):
        raise UserError(f"the column of the text holds {type(text).__name__} further on: {shorten(str(text), 60)}")
    return bool(text)


def _hold_out(corpus: Corpus, percentage: int) -> Corpus:
    """Moves about `percentage` of the documents of `train` to a new split `validation`."""
    documents = corpus["train"]
    corpus["train"] = _filter(documents, lambda text: not _is_held_out(text, percentage))
    corpus["validation"] = _filter(documents, lambda text: _is_held_out(text, percentage))
    return corpus


def _filter(documents: AnySplit, keep: Callable[[Any], bool]) -> AnySplit:
    """Returns the documents whose text `keep` accepts. A few are in memory at a time."""
    return documents.filter(keep, input_columns="text", batch_size=documents_at_once(documents))


def documents_at_once(documents: Dataset | IterableDataset) -> int:
    """Returns how many documents to process together: at most 1,000, and about `CHARACTERS_AT_ONCE` characters."""
    characters = 0
    for number, row in enumerate(islice(documents, MOST_AT_ONCE), 1):
        characters += len(row["text"]) if isinstance(row["text"], str) else 0
        if characters >= CHARACTERS_AT_ONCE:
            return number
    return MOST_AT_ONCE


def _is_held_out(key: str, percentage: int) -> bool:
    """Returns whether `key` is held out: the same in every process and on every machine, unlike Python's hash."""
    return zlib.crc32(key.encode("utf-8")) % 100 < percentage


def _with_documents(corpus: Corpus) -> Corpus:
    """Returns `corpus`. Raises `UserError` if one of its splits has no document."""
    for split, documents in corpus.items():
        if next(iter(documents), None) is None:
            raise UserError(
                f"the {split} split has no document with text in it"
                + ("; give a validation file, or hold out more documents, or 0%" if split == "validation" else "")
            )
    return corpus


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, max_characters: int = 50_000_000
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer (Radford et al. 2019) on the first `max_characters` of the documents.

    Encoding and decoding leave any text unchanged. `<|endoftext|>` begins and ends documents, `<|padding|>` pads, and
    `CHAT_TEMPLATE` formats conversations. The same documents give the same tokenizer. It has `vocab_size` entries, or
    fewer if the text is too short for that many.

    Raises:
        UserError: If `vocab_size` has no room for the 256 bytes and the two special tokens.
    """
    special_tokens = [END_OF_TEXT, PADDING]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special_tokens) + len(alphabet):
        raise UserError(
            f"a byte-level tokenizer needs at least {len(special_tokens) + len(alphabet)} entries, not {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    # In pieces that have the same words, because training takes much memory for a long text.
    cutter = Cutter(tokenizer)
    texts = _first_characters(documents, max_characters)
    tokenizer.train_from_iterator((piece for text in texts for piece in cutter.pieces(text, PIECE_SIZE)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def documents_in_turn(corpora: Sequence[Corpus]) -> Iterator[str]:
    """Yields the training documents of each corpus in turn, one of each, until all are read."""
    readers = [iter(corpus["train"]) for corpus in corpora]
    for row in chain.from_iterable(zip_longest(*readers)):
        if row is not None:
            yield row["text"]


def _first_characters(documents: Iterable[str], count: int) -> Iterator[str]:
    """Yields documents until they have `count` characters together. The last one is cut there."""
    for document in documents:
        if count <= 0:
            return
        yield document[:count]
        count -= len(document)
