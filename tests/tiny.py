"""A tokenizer and checkpoints that are small enough for tests."""

from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto import AutoModelForCausalLM

from hf_alibi import AlibiGPTConfig
from hf_alibi.training.data import train_tokenizer

VOCAB_SIZE = 290


@cache
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Returns a byte-level tokenizer with `VOCAB_SIZE` entries."""
    return train_tokenizer(["the quick brown fox jumps over the lazy dog\n" * 50], VOCAB_SIZE)


def save_checkpoint(folder: Path, config: PreTrainedConfig | None = None) -> Path:
    """Saves a new model (an AlibiGPT without `config`) and the tokenizer in `folder`, and returns it."""
    torch.manual_seed(0)
    if config is None:
        config = AlibiGPTConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            training_length=32,
            # Large enough for the context to matter.
            initializer_range=0.3,
            bos_token_id=tiny_tokenizer().bos_token_id,
            eos_token_id=tiny_tokenizer().eos_token_id,
        )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
