"""Layouts of tokens for the tests of attention: whole texts, padding, documents, the end of a cache."""

import torch
from torch import Tensor

from hf_alibi.model.alibi import alibi_slopes
from hf_alibi.model.layout import Shared, TokenLayout, token_layout


def layout_of(
    heads: int,
    batch: int,
    queries: int,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    device: str = "cpu",
) -> TokenLayout:
    """Returns the layout of a forward pass without a cache, with slopes in float32."""
    slopes = torch.tensor(alibi_slopes(heads), device=device)
    return token_layout(slopes, torch.empty(batch, queries, 1, device=device), mask, position_ids, None)


def end_of_cache(heads: int, queries: int, keys: int, device: str = "cpu") -> TokenLayout:
    """Returns the layout of the last queries of a text whose other tokens are in a cache."""
    positions = torch.arange(keys, device=device)[None]
    slopes = torch.tensor(alibi_slopes(heads), device=device)
    return TokenLayout(slopes, positions[:, -queries:], positions, Shared(), length=keys)


def documents(sizes: list[list[int]]) -> Tensor:
    """Returns the `position_ids` of rows of documents, `[batch, tokens]`."""
    return torch.stack([torch.cat([torch.arange(size) for size in row]) for row in sizes])


def same_document(position_ids: Tensor) -> Tensor:
    """Returns whether two tokens belong to the same document, `[batch, tokens, tokens]`."""
    document = (position_ids == 0).cumsum(1)
    return document[:, :, None] == document[:, None, :]
