"""Models small enough for tests, with weights large enough that attention matters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM

# Tests are many tiny operations, which several threads only slow down.
torch.set_num_threads(1)

ModelFactory = Callable[..., AlibiGPTForCausalLM]


def checkpoint_activations(model: AlibiGPTForCausalLM, use_reentrant: bool = False) -> None:
    """Switches gradient checkpointing on, under its name since Transformers 5.24 or the one before."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


@pytest.fixture
def make_model() -> ModelFactory:
    """Returns a factory of models with two layers in evaluation mode. Keyword arguments go to the config.

    With weights of the usual initial size, attention hardly matters, and a model that ignores its bias would pass most
    tests. So the weights are ten times larger.
    """

    def make(**kwargs: Any) -> AlibiGPTForCausalLM:
        torch.manual_seed(0)
        shape: dict[str, Any] = {"vocab_size": 97, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
        model = AlibiGPTForCausalLM(AlibiGPTConfig(initializer_range=0.2, **(shape | kwargs)))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of an untrained AlibiGPT. Tests must not change it."""
    # Tests of the model alone need no data packages.
    from tiny import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `datasets` cache in the folder of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
