"""Documents in a row: every way to describe them, and each document alone, the reference.

Weights are large, so that a token which sees another document changes visibly.
"""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from test_flash import flash_attn_func, flash_attn_varlen_func
from torch import Tensor
from transformers import DynamicCache, modeling_flash_attention_utils

from hf_alibi import AlibiGPTForCausalLM

SIZES = [5, 1, 4, 7]
LENGTH = sum(SIZES)
flex = pytest.param(
    "flex_attention",
    marks=[
        # It is slow because kernels are compiled.
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on the CPU needs a C++ compiler"),
        pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    ],
)
each_backend = pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2", flex])
no_grad = torch.no_grad()


def models_by_backend(
    make_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], AlibiGPTForCausalLM]:
    """Returns a function from a backend to a model. FlashAttention gets the kernels of its tests, and no package."""

    def make(backend: str) -> AlibiGPTForCausalLM:
        model = make_model(num_attention_heads=4, hidden_size=64)
        kernels = (flash_attn_func, flash_attn_varlen_func), None
        monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda name: kernels)
        if backend == "flash_attention_2":
            model.to(torch.bfloat16)
        model.config._attn_implementation = backend
        return model

    return make


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Asserts equality up to the rounding of the model's dtype in two layers."""
    tolerance = 0.03 if expected.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def tokens(batch: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def alone(model: AlibiGPTForCausalLM, input_ids: Tensor, sizes: list[int]) -> Tensor:
    """Returns the logits of each document alone, `[1, tokens, vocab_size]`."""
    return torch.cat([model(piece, use_cache=False).logits for piece in input_ids.split(sizes, 1)], 1)


def numbers(sizes: list[int], start: int = 0) -> Tensor:
    return torch.repeat_interleave(torch.arange(start, start + len(sizes)), torch.tensor(sizes))[None]


def positions(sizes: list[int], *starts: int) -> Tensor:
    """Returns the positions of documents that begin at `starts` in turn."""
    return torch.cat([torch.arange(size) + starts[i % len(starts)] for i, size in enumerate(sizes)])[None]


def bounds(sizes: list[int], past: int = 0) -> dict[str, Any]:
    """Returns cumulative lengths. The first `past` tokens are cached."""
    of_keys = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    of_queries = (of_keys - past).clamp(min=0)
    longest = {"max_length_q": int(of_queries.diff().max()), "max_length_k": max(sizes)}
    return {"cu_seq_lens_q": of_queries, "cu_seq_lens_k": of_keys, **longest}


WAYS: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "positions-from-0": lambda sizes: {"position_ids": positions(sizes, 0)},
    "positions-from-1": lambda sizes: {"position_ids": positions(sizes, 1)},
    "positions-from-2": lambda sizes: {"position_ids": positions(sizes, 2)},
    "positions-from-anywhere": lambda sizes: {"position_ids": positions(sizes, 57, 3, 2, 0)},
    "positions-and-ones": lambda sizes: {
        "position_ids": positions(sizes, 2),
        "attention_mask": torch.ones(1, sum(sizes), dtype=torch.long),
    },
    "mask-of-numbers": lambda sizes: {"attention_mask": numbers(sizes, 1)},
    "mask-of-numbers-in-float": lambda sizes: {"attention_mask": numbers(sizes, 4).float()},
    "seq-idx": lambda sizes: {"seq_idx": numbers(sizes).int()},
    "cumulative-lengths": bounds,
    "seq-idx-and-positions-that-jump": lambda sizes: {
        "position_ids": positions(sizes, 7, 50, 100, 300),
        "seq_idx": numbers(sizes),
    },
    "all-at-once": lambda sizes: {
        "position_ids": positions(sizes, 0),
        "attention_mask": numbers(sizes, 1),
        "seq_idx": numbers(sizes),
        **bounds(sizes),
    },
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def part(arguments: dict[str, Any], sizes: list[int], start: int, end: int) -> dict[str, Any]:
    """Returns the arguments of a pass over the tokens from `start` to `end`. Earlier tokens are cached."""
    result = {}
    for name, value in arguments.items():
        if name == "position_ids":
            result[name] = value[:, start:end]
        elif name in ("attention_mask", "seq_idx"):
            result[name] = value[:, :end]
    if "cu_seq_lens_q" in arguments:
        kept, total = [], 0
        for size in sizes:
            kept.append(min(size, end - total))
            total += kept[-1]
            if total == end:
                break
        result |= bounds(kept, start)
    return result


ROWS = [[5, 1, 4, 7], [12], [2, 2, 2]]


def padded(side: str) -> tuple[Tensor, list[slice], dict[str, dict[str, Any]]]:
    """Three rows of documents with padding: tokens, a mask of real tokens, and the ways to describe them."""
    real = []
    ways: dict[str, list[Tensor]] = {"mask": [], "ones": [], "numbers": [], "positions": []}
    for sizes in ROWS:
        length = sum(sizes)
        left = {"left": LENGTH - length, "right": 0, "both": (LENGTH - length) // 2}[side]
        real.append(slice(left, left + length))
        row = {name: torch.zeros(1, LENGTH, dtype=torch.long) for name in ways}
        row["mask"][:, real[-1]], row["ones"][:, real[-1]] = numbers(sizes, 1), 1
        row["numbers"][:, real[-1]] = numbers(sizes)
        row["numbers"][:, left + length :] = len(sizes) - 1
        row["positions"][:, real[-1]] = positions(sizes, 2)
        for name, value in row.items():
            ways[name].append(value)
    mask, ones, seq_idx, position_ids = (torch.cat(rows) for rows in ways.values())
    encodings = {
        "mask-of-numbers": {"attention_mask": mask},
        "positions-and-mask": {"attention_mask": ones, "position_ids": position_ids},
        "positions-and-boolean-mask": {"attention_mask": ones.bool(), "position_ids": position_ids},
        "seq-idx-and-mask": {"attention_mask": ones, "seq_idx": seq_idx},
        "positions-and-numbers": {"attention_mask": mask, "position_ids": position_ids, "seq_idx": seq_idx},
    }
    return tokens(3), real, encodings


def cached(model: AlibiGPTForCausalLM, **arguments: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(tokens(), past_key_values=cache, **arguments)
    return cache
