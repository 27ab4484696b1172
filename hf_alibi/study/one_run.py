"""The process of one run: it trains and tests a model, and writes one JSON file.

    python -m hf_alibi.study.one_run FOLDER < request.json

The request holds the settings of the run, what the record says beside its results, and the process of the study.
Trained models are kept in the folder of the study. A run whose model exists only tests it: if its process was killed
after training, or if another run has trained the same, such as the best run of a sweep with as many tokens.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..benchmark.measuring import environment
from ..errors import run
from ..planning.memory import peak_mib
from .associative import associative_recall
from .files import read_json, run_file, write_json
from .runs import RECALL, SPEED, SWEEP, training_settings
from .speed import measure_speed
from .testing import by_length, copies, interpolated, windows_checked
from .training import train_run


def main() -> None:
    """Runs what the request on the standard input asks for."""
    folder = Path(sys.argv[1])
    request = json.load(sys.stdin)
    settings = request["settings"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = {key: request[key] for key in ("settings", "text", "command")} | {"environment": environment(device)}
    if settings["question"] == SPEED:
        record["speed"] = measure_speed(settings, request["configs"])
    else:
        place, record["training"] = trained(settings, request["text"], folder, request["study"])
        if settings["question"] != SWEEP:
            # The model in memory would go on computing in bfloat16 if it was trained with autocast.
            model: Any = AutoModelForCausalLM.from_pretrained(place)
            record |= tested(model.to(device).eval(), settings, request["text"]["tests"], folder / "text")
    record["peak_mib"] = round(peak_mib(), 1)
    write_json(run_file(folder, settings["name"]), record)


def trained(settings: dict[str, Any], text: dict[str, Any], folder: Path, parent: int) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of a run's model and the record of its training. Trains it if no run of the study has."""
    place, asked = folder / "models" / settings["name"], training_settings(settings)
    for earlier in sorted(folder.glob("models/*/study.json")):
        found = read_json(earlier)
        if (training_settings(found["settings"]), found["text"]) == (asked, text):
            return earlier.parent, found["training"]
    shutil.rmtree(place, ignore_errors=True)
    start = peak_mib()
    model, training = train_run(settings, folder / "text", place, parent)
    training |= {"peak_mib": round(peak_mib(), 1), "start_mib": round(start, 1)}
    model.save_pretrained(place)
    # Written last, so what it describes is complete.
    write_json(place / "study.json", {"settings": settings, "text": text, "training": training})
    return place, training


def tested(model: PreTrainedModel, settings: dict[str, Any], tests: list[str], text: Path) -> dict[str, Any]:
    """Returns the results of all tests on each text."""
    tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
    streams = {name: torch.from_numpy(np.load(text / f"{name}.npy").astype(np.int64)) for name in tests}
    results: dict[str, Any] = {"tests": {}}
    for name, ids in streams.items():
        results["tests"][name] = by_length(model, ids, settings, tokenizer)
    first = streams[tests[0]]
    results["copies"] = copies(model, first, settings)
    results["windows"] = windows_checked(model, first, settings)
    if model.config.model_type == "alibi_gpt":
        results["interpolated"] = interpolated(model, first, settings)
    if settings["question"] == RECALL:
        asked = settings["recall"]
        results["recall"] = associative_recall(
            model, first, asked["pairs"], asked["distances"], asked["rows"], settings["test"]["tokens_per_forward"]
        )
    return results


if __name__ == "__main__":
    run(main)
