"""The code in the docs, which tests run, and models and texts to run it with."""

import re
from pathlib import Path

import torch
from torch import Tensor

from hf_alibi import AlibiGPTForCausalLM

DOCS = Path(__file__).parents[1] / "docs"
TRAINING_LENGTH = 32


def recipe(title: str, page: str = "neighbours.md") -> list[str]:
    """Returns the Python code under the heading `title` of a page of the docs, block by block."""
    text = (DOCS / page).read_text(encoding="utf-8")
    _, found, rest = text.partition(f"\n## {title}\n")
    blocks = re.findall(r"```python\n(.*?)```", rest.partition("\n## ")[0], flags=re.DOTALL)
    if not found or not blocks:
        raise ValueError(f"docs/{page} has no code under a heading {title!r}")
    return blocks


def model_of(folder: str) -> AlibiGPTForCausalLM:
    """Loads a model in evaluation mode."""
    return AlibiGPTForCausalLM.from_pretrained(folder).eval()


def tokens(batch: int, length: int) -> Tensor:
    """Returns random tokens, `[batch, length]`, always the same for a length."""
    return torch.randint(3, 280, (batch, length), generator=torch.Generator().manual_seed(length))


def difference(one: Tensor, other: Tensor) -> float:
    """Returns the largest difference, relative to the largest value of `other`."""
    return ((one - other).abs().max() / other.abs().max()).item()
