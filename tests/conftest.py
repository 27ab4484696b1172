"""Models small enough for tests, with weights large enough that attention matters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM

torch.set_num_threads(1)  # tests are many tiny operations, which more threads only slow down

ModelFactory = Callable[..., AlibiGPTForCausalLM]


def checkpoint_activations(model: AlibiGPTForCausalLM, use_reentrant: bool = False) -> None:
    """Switches gradient checkpointing on, under its name since Transformers 5.24 or the one before."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


@pytest.fixture
def make_model() -> ModelFactory:
    """A factory of models of two layers in evaluation mode; keyword arguments go to the config.

    Freshly initialised weights hardly attend, and a model that ignores its bias would pass most tests;
    these are ten times larger.
    """

    def make(**kwargs: Any) -> AlibiGPTForCausalLM:
        torch.manual_seed(0)
        shape: dict[str, Any] = {"vocab_size": 97, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
        model = AlibiGPTForCausalLM(AlibiGPTConfig(initializer_range=0.2, **(shape | kwargs)))
        return model.eval()

    return make
