"""mergekit: the weights of a merged model, and the code that comes with it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import difference, model_of, recipe, tokens

pytest.importorskip("mergekit")

WITHOUT_THE_PACKAGE = """
import sys
sys.modules["hf_alibi"] = None
from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM.from_pretrained("runs/merged", trust_remote_code=True).num_parameters())
"""


@torch.no_grad()
def test_a_mean_of_two(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    first, second = model_of(books), model_of(books)
    for parameter in second.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    second.save_pretrained("runs/other")
    cook(*recipe("Merging models"))
    for parameter, other in zip(first.parameters(), second.parameters(), strict=True):
        parameter.copy_((parameter + other) / 2)
    error = difference(model_of("runs/merged")(tokens(2, 90)).logits, first(tokens(2, 90)).logits)
    assert error < 1e-5
    assert {path.name for path in Path(books).glob("*.py")} == {path.name for path in Path("runs/merged").glob("*.py")}
    done = subprocess.run([sys.executable, "-c", WITHOUT_THE_PACKAGE], capture_output=True, text=True)
    assert done.stdout.strip() == str(first.num_parameters()), done.stderr
    shown("mergekit", f"linear: logits of the mean of the weights to {error:.0e}; loads from its own code")
