"""From documents to blocks of tokens, and from blocks to the tensors that a causal language model trains on."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..text.encoding import Encoder
from .data import documents_at_once

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset, DatasetDict, IterableDatasetDict)


def pack(
    documents: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    isolate_documents: bool = False,
    num_workers: int | None = None,
) -> AnyDataset:
    """Tokenises `documents` and cuts them into blocks of `block_size` tokens, without loss.

    Batches of 1,000 documents (fewer if they are long) are concatenated, each document ending with the end-of-text
    token, and cut every `block_size` tokens. The last block of a batch may be shorter. If it had only one token, it
    gets a second one from the block before, because a single token predicts nothing. Special tokens that are spelled
    out in a document are plain text.

    Args:
        documents: One split or a corpus, map-style or streaming, with the column `text`.
        tokenizer: It must have an end-of-text token.
        block_size: Tokens per block, at least 3.
        isolate_documents: If False, blocks have only the column `input_ids`, and attention crosses the borders of
            documents. If True, a column `position_ids` restarts at 0 with each document and each block. The model
            takes a restart for a border that attention does not cross.
        num_workers: Processes that tokenise; None for this process alone. The blocks do not depend on it. A stream is
            tokenised where it is read.

    Raises:
        UserError: If the tokenizer has no end-of-text token, or `block_size` is less than 3.
    """
    require_end_of_text(tokenizer)
    if block_size < 3:
        raise UserError(f"block_size must be at least 3, so that every block has a token to predict, not {block_size}")
    if isinstance(documents, DatasetDict | IterableDatasetDict):
        packed = {
            split: pack(part, tokenizer, block_size, isolate_documents, num_workers)
            for split, part in documents.items()
        }
        return type(documents)(packed)
    encode: dict[str, Any] = {"encoder": Encoder(tokenizer)}
    cut: dict[str, Any] = {"block_size": block_size, "isolate_documents": isolate_documents}
    options: dict[str, Any] = {"batched": True, "batch_size": documents_at_once(documents)}
    if isinstance(documents, IterableDataset):
        return documents.map(_encode_and_cut, fn_kwargs=encode | cut, remove_columns=["text"], **options)
    options["writer_batch_size"] = options["batch_size"]
    workers = None if num_workers is None or num_workers < 2 else min(num_workers, len(documents))
    encoded = documents.map(_encode, fn_kwargs=encode, remove_columns=["text"], num_proc=workers, **options)
    blocks = encoded.with_format("numpy", dtype=np.int32).map(_cut, fn_kwargs=cut, **options)
    return blocks.with_format(None)


def require_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `UserError` if the tokenizer has no end-of-text token."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token (eos_token) to close documents with")


def _encode(batch: dict[str, list[str]], encoder: Encoder) -> dict[str, list[np.ndarray]]:
    end = np.array([encoder.tokenizer.eos_token_id], dtype=np.int32)
    return {"input_ids": [np.concatenate([ids, end]) for ids in encoder(batch["text"])]}


def _cut(
    batch: Mapping[str, Sequence[np.ndarray]], block_size: int, isolate_documents: bool
) -> dict[str, list[np.ndarray]]:
    lengths = [len(ids) for ids in batch["input_ids"]]
    cuts = np.arange(block_size, sum(lengths), block_size)
    if sum(lengths) % block_size == 1:
        # A block of one token has nothing to predict, so its loss would be undefined.
        cuts[-1:] -= 1
    columns = {"input_ids": np.concatenate(list(batch["input_ids"]))}
    if isolate_documents:
        starts = np.union1d(np.cumsum([0, *lengths[:-1]]), cuts)
        columns["position_ids"] = positions(starts, sum(lengths))
    return {name: np.split(values, cuts) for name, values in columns.items()}


def positions(starts: np.ndarray, num_tokens: int) -> np.ndarray:
    """Returns positions that restart at 0 at each of `starts`, the first of which is 0."""
    spans = np.diff(starts, append=num_tokens)
    return (np.arange(num_tokens) - np.repeat(starts, spans)).astype(np.int32)


def _encode_and_cut(
    batch: dict[str, list[str]], encoder: Encoder, block_size: int, isolate_documents: bool
) -> dict[str, list[np.ndarray]]:
    return _cut(_encode(batch, encoder), block_size, isolate_documents)


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
