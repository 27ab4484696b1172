"""What watches runs and keeps models: wandb, trackio, MLflow, and Optuna's search."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from recipes import model_of, recipe
from tiny import tiny_tokenizer
from transformers import pipeline

PROMPT = "the quick brown"
IDS = tiny_tokenizer()("the quick brown fox jumps").input_ids
TEXTS = Dataset.from_dict({"input_ids": [IDS] * 8, "labels": [IDS] * 8})
QUICK = "use_cpu=True, max_steps=2, save_strategy='no', learning_rate=1e-3"


@torch.no_grad()
def loss_of(books: str) -> float:
    """Returns the loss of the untrained model."""
    ids = torch.tensor([IDS])
    return model_of(books)(ids, labels=ids).loss.item()


def watched(cook: Callable[..., Any], name: str, more: str = "") -> list[float]:
    """Runs the recipe with another tracker, and returns the losses of both steps."""
    (code,) = recipe("Watching a run")
    code = code.replace('report_to="wandb"', f'report_to="{name}", {more}{QUICK}')
    history = cook(code, texts=TEXTS)["trainer"].state.log_history
    first, second = [entry["loss"] for entry in history if "loss" in entry]
    assert second < first
    return [first, second]


def test_wandb(
    books: str, cook: Callable[..., Any], shown: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    losses = watched(cook, "wandb")
    try:
        run = wandb.run
        assert run.summary["train/loss"] == losses[1]
        assert run.config["model_type"] == "alibi_gpt"
        assert run.config["training_length"] == model_of(books).config.training_length
    finally:
        wandb.finish()
    assert losses[0] == pytest.approx(loss_of(books), rel=1e-5)
    (file,) = Path("wandb").glob("offline-run-*/*.wandb")
    assert file.stat().st_size > 0
    shown("wandb", f"offline: the last loss of a run, {losses[1]:.4f}, and the model's config are recorded")


def test_trackio(
    books: str, cook: Callable[..., Any], shown: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr(utils, "TRACKIO_DIR", Path("runs/trackio"))
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", Path("runs/trackio"))
    losses = watched(cook, "trackio", "project='books', run_name='first', ")
    rows = [row["train/loss"] for row in SQLiteStorage.get_logs("books", run="first") if "train/loss" in row]
    assert rows == losses
    assert losses[0] == pytest.approx(loss_of(books), rel=1e-5)
    shown("trackio", f"the losses in its local database, from {rows[0]:.4f}, are those of the run")


def test_mlflow_runs(
    books: str, cook: Callable[..., Any], shown: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mlflow.db")
    losses = watched(cook, "mlflow")
    mlflow.end_run()
    (run,) = mlflow.search_runs(output_format="list")
    rows = [metric.value for metric in mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")]
    assert rows == losses
    assert run.data.params["model_type"] == "alibi_gpt"
    shown("mlflow", f"the losses of a run, from {rows[0]:.4f}, and the model's config are recorded")


def test_mlflow_models(
    books: str, cook: Callable[..., Any], shown: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mlflow.db")
    names = cook(*recipe("Models in MLflow"))
    uri, options = names["logged"].model_uri, names["options"]
    expected = pipeline("text-generation", books)(PROMPT, **options)
    assert mlflow.transformers.load_model(uri)(PROMPT, **options) == expected
    # MLflow removes white space at the ends.
    assert mlflow.pyfunc.load_model(uri).predict(PROMPT) == [expected[0]["generated_text"].strip()]
    shown("mlflow", "a logged and loaded model gives the greedy answer of the pipeline")


def test_optuna(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.disable_default_handler()
    (code,) = recipe("Searching hyperparameters")
    settings = "max_steps=2, use_cpu=True, save_strategy='no', eval_strategy='steps', eval_steps=2, report_to='none'"
    names = cook(code.replace("max_steps=20", settings), texts=TEXTS)
    best, trainer = names["best"], names["trainer"]
    # One more run with what was found gives the same loss: each trial begins with a new model.
    trainer.args.learning_rate = best.hyperparameters["learning_rate"]
    trainer.train()
    again = trainer.evaluate()["eval_loss"]
    assert best.objective == pytest.approx(again, rel=1e-5)
    assert again < loss_of(books)
    shown("optuna", f"the best of four trials has the loss {best.objective:.4f}; a run with its rate has {again:.4f}")
