"""Layouts of tokens for the tests of attention: whole texts, padding, documents, the end of a cache."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_alibi import AlibiGPTForCausalLM
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


# For two rows of n tokens, more than 40: the arguments of a model, and the row and columns of every text in them.
TEXTS: dict[str, tuple[Callable[[int], dict[str, Tensor]], Callable[[int], list[tuple[int, Tensor]]]]] = {
    "whole": (lambda n: {}, lambda n: [(0, torch.arange(n)), (1, torch.arange(n))]),
    "left": (
        lambda n: {"attention_mask": (torch.arange(n) >= torch.tensor([[0], [9]])).long()},
        lambda n: [(0, torch.arange(n)), (1, torch.arange(9, n))],
    ),
    "right": (
        lambda n: {"attention_mask": (torch.arange(n) < n - torch.tensor([[0], [9]])).long()},
        lambda n: [(0, torch.arange(n)), (1, torch.arange(n - 9))],
    ),
    "hole": (
        lambda n: {"attention_mask": torch.stack([torch.ones(n), (torch.arange(n) - 20).abs() > 4]).long()},
        lambda n: [(0, torch.arange(n)), (1, torch.cat([torch.arange(16), torch.arange(25, n)]))],
    ),
    "documents": (
        lambda n: {"position_ids": torch.cat([torch.arange(40), torch.arange(n - 40)])[None].repeat(2, 1)},
        lambda n: [(row, part) for row in (0, 1) for part in (torch.arange(40), torch.arange(40, n))],
    ),
}


def assert_equals_formula(
    model: AlibiGPTForCausalLM,
    weights: Mapping[str, Tensor],
    input_ids: Tensor,
    batch: str,
    formula: Callable[[Tensor], Tensor],
) -> None:
    """Compares the logits and the gradients of all parameters of a float64 model with those of a formula.

    Args:
        model: The model.
        weights: Copies of its parameters by name, which need gradients. The formula uses them.
        input_ids: Two rows of tokens.
        batch: The name of their arguments in `TEXTS`.
        formula: Returns the logits of a single text.
    """
    length = input_ids.shape[1]
    arguments, parts = TEXTS[batch][0](length), TEXTS[batch][1](length)
    logits = model(input_ids, **arguments).logits
    found = torch.cat([logits[row, part] for row, part in parts])
    expected = torch.cat([formula(input_ids[row, part]) for row, part in parts])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(expected)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in model.named_parameters():
        true = weights[name].grad
        assert parameter.grad is not None
        assert true is not None
        torch.testing.assert_close(parameter.grad, true, rtol=0, atol=1e-11 * true.abs().max().item() + 1e-12)
