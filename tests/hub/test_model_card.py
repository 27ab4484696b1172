"""The model card has all known facts and no others, and the Hub's client can read its metadata."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from huggingface_hub import ModelCard
from transformers import TrainingArguments

from hf_alibi.cli import evaluate as evaluate_command
from hf_alibi.errors import UserError
from hf_alibi.evaluation.perplexity import Result
from hf_alibi.evaluation.plots import Curve, plot_extrapolation
from hf_alibi.hub.model_card import PLOT_NAME, CardArguments, model_card, usage


def result(length: int, stride: int, perplexity: float) -> Result:
    return Result(length, stride, 1000, math.log(perplexity), None, perplexity, perplexity / 10, (1.0,) * length)


def write_evaluation(path: Path, *curves: Curve) -> CardArguments:
    """Writes PREFIX.json and PREFIX.png as hf_alibi evaluate does, and returns arguments that name them."""
    evaluate_command.write_results(curves, path.with_suffix(""))
    plot_extrapolation(curves, path.with_suffix(".png"))
    return CardArguments(evaluation=path, evaluation_text="some/text")


def edit(arguments: CardArguments, field: str, value: object) -> None:
    """Changes a field of the first result."""
    assert arguments.evaluation is not None
    written = json.loads(arguments.evaluation.read_text())
    written["models"][0]["results"][0][field] = value
    arguments.evaluation.write_text(json.dumps(written))


def read(card: ModelCard) -> ModelCard:
    """Returns the card as the Hub's client reads it from its file. The client checks the metadata."""
    return ModelCard(str(card))


def test_without_anything_known_it_says_so(make_model: ModelFactory, tmp_path: Path) -> None:
    model = make_model(training_length=64)
    card = read(model_card(model, "me/books", tmp_path))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["alibi"],
    }
    assert f"{sum(weight.numel() for weight in model.parameters()):,} parameters" in card.text
    assert "longer than the 64 tokens" in card.text
    assert 'from_pretrained("me/books", trust_remote_code=True)' in card.text
    for text in ("Nothing about its training is recorded", "evaluated at no length", "None is stated for the weights"):
        assert text in card.text
    assert "## Evaluation" not in card.text


def test_what_its_author_says_is_in_metadata_and_text(make_model: ModelFactory, tmp_path: Path) -> None:
    arguments = CardArguments("mit", ["en"], "me/base", ["me/novels", "me/plays"], "novels and plays")
    card = read(model_card(make_model(), "me/books", tmp_path, arguments))
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", ["en"], "me/base")
    assert card.data.datasets == ["me/novels", "me/plays"]
    assert "The weights: mit." in card.text
    assert "| Began with | me/base |\n| Data | me/novels; me/plays; novels and plays |" in card.text


def test_what_training_left_behind_is_in_it(make_model: ModelFactory, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), learning_rate=3e-4, per_device_train_batch_size=16, seed=7, use_cpu=True)
    (tmp_path / "training_args.json").write_text(args.to_json_string())
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"global_step": 12_000, "epoch": 2.5, "best_metric": None})
    )
    (tmp_path / "all_results.json").write_text(json.dumps({"eval_perplexity": 18.4049, "train_runtime": 3.0}))
    text = model_card(make_model(), "me/books", tmp_path).text
    for row in ("Learning rate | 0.0003", "Seed | 7", "Steps | 12,000", "Epochs | 2.5", "(per token) | 18.4"):
        assert f"{row} |" in text
    assert "runtime" not in text


def test_what_is_damaged_is_refused(make_model: ModelFactory, tmp_path: Path) -> None:
    for damaged in (b'{"global_step": 1', b"[1]", b"\xff\xfe"):
        (tmp_path / "trainer_state.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"trainer_state.json is damaged: .*; put it right or remove it"):
            model_card(make_model(), "me/books", tmp_path)


def test_the_evaluation_is_a_table_a_picture_and_a_model_index(make_model: ModelFactory, tmp_path: Path) -> None:
    results = [result(64, 64, 20.0), result(256, 64, 18.5)]
    arguments = write_evaluation(tmp_path / "v1.2.json", Curve("books", 64, results), Curve("rival", 64, results[:1]))
    card = read(model_card(make_model(training_length=64), "me/model", tmp_path / "books", arguments))
    assert "On some/text, in windows that begin 64 tokens apart and score their last 64 targets." in card.text
    assert "| 64 | 20.00 | 2.000 | 1,000 |\n| 256 | 18.50 | 1.850 | 1,000 |" in card.text
    assert f"]({PLOT_NAME})" in card.text
    assert "evaluated up to 256 tokens; nothing is known beyond" in card.text
    assert card.data.model_name == "model"
    found = [(entry.dataset_name, entry.metric_type, entry.metric_value) for entry in card.data.eval_results or []]
    values = [("perplexity", 20.0), ("bits_per_byte", 2.0), ("perplexity", 18.5), ("bits_per_byte", 1.85)]
    assert found == [("some/text", *value) for value in values]


def test_its_code_runs_without_the_package_and_asks_nothing(tiny_checkpoint: Path) -> None:
    code = usage(str(tiny_checkpoint)).partition("```python\n")[2].partition("```")[0]
    hidden = "import sys; sys.modules['hf_alibi'] = None\n"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", hidden + code], env=environment, input="", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")


def windows(card: ModelCard) -> list[int]:
    rows = (
        card.text.partition("head       slope       U      window\n")[2]
        .partition("\nall heads together")[0]
        .splitlines()
    )
    return [int(row.split()[3].replace(",", "")) for row in rows]


@torch.no_grad()
def test_windows_follow_from_the_trained_gains(make_model: ModelFactory, tmp_path: Path) -> None:
    model = make_model(window_tolerance=0.001)
    attention = model.model.layers[1].self_attn
    attention.q_norm.weight.fill_(3.0)
    # The largest score, with 1% for rounding.
    bound = 1.01 * 3.0 * math.sqrt(model.config.head_dim)
    expected = [math.ceil((2 * bound + math.log(1000)) / slope) for slope in model.config.slopes]
    assert windows(model_card(model, "me/books", tmp_path)) == expected


@torch.no_grad()
def test_learned_slopes_are_those_of_the_weights(make_model: ModelFactory, tmp_path: Path) -> None:
    model = make_model(alibi_slopes_trainable=True)
    before = windows(model_card(model, "me/books", tmp_path))
    model.model.bias_log_slopes += math.log(2)
    card = model_card(model, "me/books", tmp_path)
    assert windows(card) == pytest.approx([window / 2 for window in before], abs=1)
    assert "subtracts a learned multiple" in card.text
    assert "| Slopes of the heads | 0.5, 0.125," in card.text


@pytest.mark.parametrize(
    ("config", "text"),
    [({"window_tolerance": 0}, "Off: every query"), ({"qk_norm": False}, "Without QK-norm, each call computes")],
    ids=["off", "no QK-norm"],
)
def test_windows_that_are_not_known_beforehand(
    make_model: ModelFactory, tmp_path: Path, config: dict[str, Any], text: str
) -> None:
    assert text in model_card(make_model(**config), "me/books", tmp_path).text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda arguments: arguments.evaluation.unlink(), "is not what hf_alibi evaluate writes: FileNotFoundError"),
        (
            lambda arguments: arguments.evaluation.write_text("[1]"),
            "is not what hf_alibi evaluate writes: TypeError",
        ),
        (lambda arguments: arguments.evaluation.write_text("{"), "is not what hf_alibi evaluate writes: JSONDecode"),
        (
            lambda arguments: arguments.evaluation.write_bytes(b"\x89PNG\xff\xfe"),
            "is not what hf_alibi evaluate writes: UnicodeDecodeError",
        ),
        (lambda arguments: edit(arguments, "perplexity", "x"), "is not what hf_alibi evaluate writes: TypeError"),
        (lambda arguments: edit(arguments, "perplexity", math.nan), "is not what hf_alibi evaluate writes: TypeError"),
        (lambda arguments: edit(arguments, "length", None), "is not what hf_alibi evaluate writes: TypeError"),
        (
            lambda arguments: arguments.evaluation.write_text('{"models": [{"results": [], "training_length": 512}]}'),
            "it has no results",
        ),
        (lambda arguments: arguments.plot.unlink(), "has no plot results.png beside it"),
        (lambda arguments: setattr(arguments, "evaluation_text", None), "--evaluation needs --evaluation_text"),
    ],
    ids=[
        "no file",
        "not ours",
        "no JSON",
        "binary",
        "text",
        "nan",
        "no length",
        "empty",
        "no plot",
        "no name of the text",
    ],
)
def test_an_evaluation_that_cannot_be_used_is_refused(
    make_model: ModelFactory, tmp_path: Path, spoil: Callable[[CardArguments], Any], message: str
) -> None:
    arguments = write_evaluation(tmp_path / "results.json", Curve("books", 512, [result(64, 64, 20.0)]))
    spoil(arguments)
    with pytest.raises(UserError, match=message):
        model_card(make_model(), "me/books", tmp_path / "books", arguments)


def test_an_evaluation_of_another_model_is_refused(make_model: ModelFactory, tmp_path: Path) -> None:
    curves = [Curve(label, 256, [result(64, 64, 20.0)]) for label in ("novels", "plays")]
    arguments = write_evaluation(tmp_path / "results.json", *curves)
    with pytest.raises(UserError, match="has 0 models with the label 'books'; expected one"):
        model_card(make_model(), "me/books", tmp_path / "books", arguments)
    with pytest.raises(UserError, match="is of a model trained at length 256, this one was at 512"):
        model_card(make_model(), "me/books", tmp_path / "plays", arguments)
