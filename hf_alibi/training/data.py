"""From text to blocks of tokens: corpora, a tokenizer trained on the spot, and packing.

A *corpus* is a `datasets.DatasetDict` (an `IterableDatasetDict` when streaming) with the splits `train` and
`validation`, and one column, `text`, with one document per row. It comes from the Hub, from local files, or from the
source files of Python's standard library, which need no network. Three lines prepare a training run:

    corpus = standard_library_corpus()
    tokenizer = train_tokenizer(corpus["train"]["text"], vocab_size=4096)
    blocks = pack(corpus, tokenizer, block_size=256)

`pack` loses no token: each document is tokenised whole and ends with the end-of-text token, and each of these tokens
is in exactly one block. `collate_blocks` turns blocks into the tensors that a causal language model trains on.
"""

import glob
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..hub.files import PreTrainedTokenizerFast

Corpus: TypeAlias = DatasetDict | IterableDatasetDict
AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset, DatasetDict, IterableDatasetDict)

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
    train_file: str,
    validation_file: str | None = None,
    *,
    text_column: str = "text",
    streaming: bool = False,
    validation_percentage: int = 5,
) -> Corpus:
    """Returns the text of local files, each given as a path or as a glob pattern (`"books/**/*.txt"`).

    A plain text file is one document. A JSON Lines or Parquet file has one document per row, in `text_column`. Without
    `validation_file`, documents are held out as in `load_hub_corpus`.

    Raises:
        UserError: If there is no such file, its extension is not in `READERS`, or it has no `text_column` or no text.
    """
    patterns = {"train": train_file} | ({"validation": validation_file} if validation_file else {})
    data_files = {split: _matching_files(pattern) for split, pattern in patterns.items()}
    readers = sorted({_reader(path) for paths in data_files.values() for path in paths})
    if len(readers) > 1:
        raise UserError(f"the files of one corpus must be of one kind, not {' and '.join(readers)}")
    # `load_dataset` takes file names for patterns.
    escaped = {split: [glob.escape(path) for path in paths] for split, paths in data_files.items()}
    source = {"path": readers[0], "data_files": escaped, "streaming": streaming}
    if readers[0] == "text":
        source["sample_by"] = "document"
    return _as_corpus(" and ".join(patterns.values()), source, text_column, validation_percentage)


def _matching_files(pattern: str) -> list[str]:
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
        first_rows: dict[str, dict[str, Any]] = {split: next(iter(splits[split]), {}) for split in used}
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"cannot read {name}: {shorten(str(error.__cause__ or error), 200)}") from error
    if "train" not in first_rows:
        raise UserError(f"{name} has no split 'train', only {', '.join(splits)}")
    for row in first_rows.values():
        if row and text_column not in row:
            raise UserError(f"{name} has no column '{text_column}', only {', '.join(row)}")
        if not isinstance(row.get(text_column, ""), str | None):
            raise UserError(f"column '{text_column}' of {name} holds {type(row[text_column]).__name__}, not text")
    corpus = type(splits)({split: splits[split].select_columns([text_column]) for split in first_rows})
    if text_column != "text":
        corpus = corpus.rename_column(text_column, "text")
    try:
        corpus = corpus.filter(_is_document, input_columns="text")
        if "validation" not in corpus and validation_percentage:
            corpus = _hold_out(corpus, validation_percentage)
        return _with_documents(corpus)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"cannot read {name}: {shorten(str(error.__cause__ or error), 200)}") from error


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
    corpus["train"] = documents.filter(lambda text: not _is_held_out(text, percentage), input_columns="text")
    corpus["validation"] = documents.filter(lambda text: _is_held_out(text, percentage), input_columns="text")
    return corpus


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
    tokenizer.train_from_iterator(_first_characters(documents, max_characters), trainer)
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


def _first_characters(documents: Iterable[str], count: int) -> Iterator[str]:
    """Yields documents until they have `count` characters together. The last one is cut there."""
    for document in documents:
        if count <= 0:
            return
        yield document[:count]
        count -= len(document)


def pack(
    documents: AnyDataset, tokenizer: PreTrainedTokenizerBase, block_size: int, isolate_documents: bool = False
) -> AnyDataset:
    """Tokenises `documents` and cuts them into blocks of `block_size` tokens, without loss.

    Batches of 1,000 documents are concatenated, each document ending with the end-of-text token, and cut every
    `block_size` tokens. The last block of a batch may be shorter. If it had only one token, it gets a second one from
    the block before, because a single token predicts nothing. Special tokens that are spelled out in a document are
    plain text.

    Args:
        documents: One split or a corpus, map-style or streaming, with the column `text`.
        tokenizer: It must have an end-of-text token.
        block_size: Tokens per block, at least 3.
        isolate_documents: If False, blocks have only the column `input_ids`, and attention crosses the borders of
            documents. If True, a column `position_ids` restarts at 0 with each document and each block. The model
            takes a restart for a border that attention does not cross.

    Raises:
        UserError: If the tokenizer has no end-of-text token, or `block_size` is less than 3.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token (eos_token) to close documents with")
    if block_size < 3:
        raise UserError(f"block_size must be at least 3, so that every block has a token to predict, not {block_size}")
    options = {"tokenizer": tokenizer, "block_size": block_size, "isolate_documents": isolate_documents}
    return documents.map(_pack_batch, batched=True, batch_size=1000, remove_columns=["text"], fn_kwargs=options)


def _pack_batch(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, block_size: int, isolate_documents: bool
) -> dict[str, list[np.ndarray]]:
    encoded = tokenizer(
        batch["text"],
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        # Would warn of documents longer than `model_max_length`. Blocks are shorter.
        verbose=False,
    )
    documents = [np.array([*ids, tokenizer.eos_token_id], dtype=np.int32) for ids in encoded["input_ids"]]
    lengths = [len(ids) for ids in documents]
    cuts = np.arange(block_size, sum(lengths), block_size)
    if sum(lengths) % block_size == 1:
        # A block of one token has nothing to predict, so its loss would be undefined.
        cuts[-1:] -= 1
    columns = {"input_ids": np.concatenate(documents)}
    if isolate_documents:
        starts = np.union1d(np.cumsum([0, *lengths[:-1]]), cuts)
        spans = np.diff(starts, append=sum(lengths))
        columns["position_ids"] = np.concatenate([np.arange(span, dtype=np.int32) for span in spans])
    return {name: np.split(values, cuts) for name, values in columns.items()}


BLOCK_COLUMNS = {"input_ids", "position_ids", "seq_idx", "attention_mask"}


def collate_blocks(blocks: list[dict[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
    """Stacks blocks into `input_ids`, `labels`, and the columns that mark documents, all `[batch, length]`.

    Blocks may mark documents with `position_ids` (as `pack` does), `seq_idx`, or an `attention_mask` of document
    numbers. See `hf_alibi.model.documents`.

    Labels equal the inputs, because the model shifts them by one. They are -100, which the loss ignores, at padding
    and at the first token of each document, because nothing before it predicts it.

    Shorter blocks are padded on the right. That needs no attention mask: attention is causal, so no token sees the
    padding, and the positions of padding make it a document of its own.

    Raises:
        UserError: If blocks have a column that this function cannot pad.
    """
    if unknown := sorted(set(blocks[0]) - BLOCK_COLUMNS):
        raise UserError(f"blocks have columns that cannot be stacked: {', '.join(unknown)}; remove them")
    batch = {
        column: pad_sequence([torch.tensor(block[column], dtype=torch.long) for block in blocks], batch_first=True)
        for column in blocks[0]
    }
    lengths = torch.tensor([[len(block["input_ids"])] for block in blocks])
    beyond_end = torch.arange(batch["input_ids"].shape[1]) - lengths  # [batch, length], negative before the padding
    is_padding = beyond_end >= 0
    begins = torch.zeros_like(is_padding)
    if "position_ids" in batch:
        batch["position_ids"] = torch.where(is_padding, beyond_end, batch["position_ids"])
        begins |= F.pad(batch["position_ids"].diff(dim=1) < 1, (1, 0), value=True)
    if "seq_idx" in batch:
        batch["seq_idx"] = torch.where(is_padding, batch["seq_idx"].max() + 1, batch["seq_idx"])
        begins |= F.pad(batch["seq_idx"].diff(dim=1) != 0, (1, 0), value=True)
    if "attention_mask" in batch:
        begins |= F.pad(batch["attention_mask"].diff(dim=1) != 0, (1, 0), value=True)
        is_padding |= batch["attention_mask"] == 0
    batch["labels"] = torch.where(begins | is_padding, -100, batch["input_ids"])
    return batch
