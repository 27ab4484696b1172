"""Changes to saved checkpoints that a reader must notice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bomb import write_bomb
from safetensors.torch import load_file, save_file
from tiny import VOCAB_SIZE
from transformers import AutoModelForCausalLM

from hf_alibi.positions.sinusoidal import SinusoidalGPTConfig


def edit_json(path: Path, **values: Any) -> None:
    """Sets these fields of the object in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_config(folder: Path, **values: Any) -> None:
    """Sets these fields of the config."""
    edit_json(folder / "config.json", **values)


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Saves all weights again, in one file, after `change`."""
    files = list(folder.glob("*.safetensors"))
    weights = {name: weight for file in files for name, weight in load_file(file).items()}
    for file in [*files, folder / "model.safetensors.index.json"]:
        file.unlink(missing_ok=True)
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(path: Path) -> None:
    """Removes the last 100 bytes of a file."""
    path.write_bytes(path.read_bytes()[:-100])


def pickle_weights(folder: Path) -> None:
    """Replaces the weights with a pickle that makes the folder `crater` when it is read."""
    (folder / "model.safetensors").unlink()
    write_bomb(folder / "pytorch_model.bin", folder / "crater")


def save_baseline(folder: Path) -> None:
    """Replaces the model with the sinusoidal baseline."""
    config = SinusoidalGPTConfig(vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
