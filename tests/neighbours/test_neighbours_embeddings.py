"""sentence-transformers: training, saving and loading of an embedder, and texts longer than the trained length."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from recipes import TRAINING_LENGTH, difference, recipe
from tiny import tiny_tokenizer
from transformers import AutoModel

pytest.importorskip("sentence_transformers")

TEXTS = ["the lazy dog", "jumps over " * 40, "the quick brown fox " * 60]


def trained(cook: Callable[..., Any], pooling: str = "mean") -> Any:
    """Runs the recipe with a few pairs, and returns all its names."""
    pairs = Dataset.from_dict({"anchor": TEXTS * 2, "positive": [text.title() for text in TEXTS * 2]})
    (code,) = recipe("Embeddings")
    arguments = "args=SentenceTransformerTrainingArguments('runs/st', max_steps=2, use_cpu=True, report_to='none')"
    code = "from sentence_transformers import SentenceTransformerTrainingArguments\n" + code
    return cook(code.replace("(model, ", f"(model, {arguments}, ").replace('"mean"', f'"{pooling}"'), pairs=pairs)


@torch.no_grad()
def pooled(text: str, pooling: str) -> torch.Tensor:
    """Returns the mean or the last of the last hidden states of one text."""
    ids = torch.tensor([tiny_tokenizer()(text).input_ids])
    assert text == TEXTS[0] or ids.shape[1] > 2 * TRAINING_LENGTH
    states = AutoModel.from_pretrained("runs/embedder").eval()(ids).last_hidden_state[0]
    return states.mean(0) if pooling == "mean" else states[-1]


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_an_embedder(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None], pooling: str) -> None:
    from sentence_transformers import SentenceTransformer

    before = AutoModel.from_pretrained(books).get_input_embeddings().weight
    trained(cook, pooling)
    assert not torch.equal(before, AutoModel.from_pretrained("runs/embedder").get_input_embeddings().weight)
    loaded = SentenceTransformer("runs/embedder", device="cpu")
    expected = torch.stack([pooled(text, pooling) for text in TEXTS])
    for side in ("left", "right"):
        loaded.tokenizer.padding_side = side
        error = difference(loaded.encode(TEXTS, convert_to_tensor=True), expected)
        assert error < 1e-5
    shown(
        "sentence-transformers",
        f"{pooling} pooling: trained, saved and loaded, texts up to {len(tiny_tokenizer()(TEXTS[2]).input_ids)} "
        f"tokens, padded left or right, to {error:.0e}",
    )


def test_the_script(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "train_embedder.py"
    sizes = {"max_steps": 2, "held_out": 4, "training_length": 64, "hidden_size": 32, "batch_size": 4}
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    command = [sys.executable, str(script), "--output_dir", str(tmp_path), "--lengths", "64", "128", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "retrieval.json").read_text())
    assert (first["files"], second["files"]) == (4, 4)
    assert f"| 128 | 4 | {second['recall']:.2f} |" in done.stdout


def test_why_the_recipe_says_that_a_text_is_a_text(books: str) -> None:
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(books, device="cpu")
    (features,) = plain.preprocess(["the"])["input_ids"].tolist()
    assert tiny_tokenizer().decode(features).startswith("user\nthe")
