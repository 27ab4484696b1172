"""What `hf_alibi benchmark converted` measures: the same weights in Transformers' own class and, converted, in ours.

The weights are random and in bfloat16, as most published ones are. Other dtypes hold them without rounding, so all
models of a family compute the same function. Their standard deviation is 1 / sqrt(width): then scores have a variance
of about 1, and attention differs from a mean over all keys. With the 0.02 of the configs it hardly would.

The own class runs as its users run it: with its default attention and a `DynamicCache`.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, MptConfig, PreTrainedConfig

from ..conversion import convert
from ..conversion.verify import quiet_transformers
from .measuring import IMPLEMENTATION, LENGTH, MEAN_ERROR, REASON, Record
from .subjects import Shape, random_tokens

FAMILIES = BLOOM, MPT, FALCON = "BLOOM", "MPT", "Falcon"
# Tokens over which the error at a position is a mean: those up to it.
ERROR_SPAN = 32


def config_of(family: str, shape: Shape) -> PreTrainedConfig:
    """Returns the config of a model of `family`, a Falcon being like Falcon-RW."""
    size, layers, heads = shape.hidden_size, shape.num_layers, shape.num_heads
    common: dict[str, Any] = {"vocab_size": shape.vocab_size, "initializer_range": size**-0.5}
    common |= {"bos_token_id": None, "eos_token_id": None}
    if family == BLOOM:
        return BloomConfig(hidden_size=size, n_layer=layers, n_head=heads, **common)
    if family == MPT:
        # Its class cannot read more than max_seq_len tokens.
        return MptConfig(d_model=size, n_layers=layers, n_heads=heads, max_seq_len=shape.max_positions, **common)
    like_rw: dict[str, Any] = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
    return FalconConfig(hidden_size=size, num_hidden_layers=layers, num_attention_heads=heads, **like_rw, **common)


def save_both(family: str, shape: Shape, folder: Path) -> dict[str, Path]:
    """Saves a model of `family` in `folder`, and converted, and returns the folders of both by their names."""
    own, ours = folders = {family: folder / family, f"{family}, converted": folder / f"{family}-converted"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, shape), dtype=torch.bfloat16)
    with quiet_transformers():
        model.save_pretrained(folders[own])
    convert(folders[own], folders[ours])
    return folders


@cache
def load(folder: Path, dtype: str, device: str, attn_implementation: str | None = None) -> Any:
    """Returns the model in `folder`, always the same one."""
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attn_implementation
        )
    return model.to(device).eval()


@torch.no_grad()
def errors_by_position(folders: Mapping[str, Path], positions: Sequence[int], device: str) -> list[Record]:
    """Returns the mean absolute error of the logits in bfloat16 at each position, for the models in `folders`.

    The exact logits are those of the last model in float64 with the `eager` attention, which is the formula.

    Args:
        folders: By name, a model's own class and ours with the same weights.
        positions: Counted from 1. A mean is over the vocabulary and the `ERROR_SPAN` tokens up to the position.
        device: Where they run.
    """
    exact = load(list(folders.values())[-1], "float64", device, "eager")
    input_ids = random_tokens(exact, max(positions))

    def logits(model: Any) -> list[Tensor]:
        found = model(input_ids=input_ids, use_cache=False).logits[0]
        return [found[max(0, position - ERROR_SPAN) : position].double() for position in positions]

    expected = logits(exact)
    records: list[Record] = []
    for name, folder in folders.items():
        for position, found, true in zip(positions, logits(load(folder, "bfloat16", device)), expected, strict=True):
            error = (found - true).abs().mean().item()
            records.append({IMPLEMENTATION: name, LENGTH: position, MEAN_ERROR: error, REASON: None})
    return records
