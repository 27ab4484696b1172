"""A program for two processes: rows that are divided among ranks give one process's losses and gradients.

    torchrun --nproc_per_node=2 tests/training/ranks_context.py

It prints the bytes that ranks exchange, by head, for a row of 8,192 tokens in packed documents.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hf_alibi.training.context_parallel as context_parallel
from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM, AlibiGPTForSequenceClassification
from hf_alibi.positions import (
    FoxGPTConfig,
    FoxGPTForCausalLM,
    KerpleGPTConfig,
    KerpleGPTForCausalLM,
    RotaryGPTConfig,
    RotaryGPTForCausalLM,
    SinusoidalGPTConfig,
    SinusoidalGPTForCausalLM,
)
from hf_alibi.training import ContextParallel

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "alibi_max_bias": 4,
}
TWELVE: dict[str, Any] = {"num_attention_heads": 12, "num_key_value_heads": 4, "alibi_slopes_trainable": True}


def documents(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def numbers(*lengths: int) -> Tensor:
    return torch.cat([torch.full((length,), number + 1) for number, length in enumerate(lengths)])[None]


# The model's class and config, the length of rows, and further arguments.
CASES: dict[str, tuple[Any, Any, dict[str, Any], int, dict[str, Tensor]]] = {
    "one document": (AlibiGPTForCausalLM, AlibiGPTConfig, {}, 301, {}),
    "packed": (AlibiGPTForCausalLM, AlibiGPTConfig, TWELVE, 300, {"position_ids": documents(40, 110, 150)}),
    "numbered, padded": (
        AlibiGPTForCausalLM,
        AlibiGPTConfig,
        {"use_parallel_residual": True},
        300,
        {"attention_mask": torch.cat([torch.zeros(1, 30).long(), numbers(100, 100), torch.zeros(1, 70).long()], 1)},
    ),
    "padding inside": (
        AlibiGPTForCausalLM,
        AlibiGPTConfig,
        {},
        300,
        {"attention_mask": (torch.arange(300) % 100 > 20).long()[None]},
    ),
    "no QK-norm": (AlibiGPTForCausalLM, AlibiGPTConfig, {"qk_norm": False, "alibi_max_bias": 3}, 300, {}),
    "dynamic slopes": (
        AlibiGPTForCausalLM,
        AlibiGPTConfig,
        {"alibi_scaling": {"type": "dynamic"}, "training_length": 100},
        300,
        {},
    ),
    "rotary": (RotaryGPTForCausalLM, RotaryGPTConfig, {}, 300, {"position_ids": documents(140, 160)}),
    "sinusoidal": (SinusoidalGPTForCausalLM, SinusoidalGPTConfig, {}, 300, {"position_ids": documents(140, 160)}),
    "FoX": (FoxGPTForCausalLM, FoxGPTConfig, {}, 300, {"position_ids": documents(140, 160)}),
    "KERPLE": (KerpleGPTForCausalLM, KerpleGPTConfig, {}, 300, {"position_ids": documents(140, 160)}),
    "fewer tokens than parts": (AlibiGPTForCausalLM, AlibiGPTConfig, {}, 3, {}),
    "8,192 tokens": (
        AlibiGPTForCausalLM,
        AlibiGPTConfig,
        {"num_attention_heads": 8, "alibi_max_bias": 8},
        8192,
        {"position_ids": documents(2000, 700, 3500, 1992)},
    ),
}


class Counter:
    """Counts the bytes that the ranks really send, through PyTorch's own function."""

    def __init__(self) -> None:
        self.bytes = 0
        self.send = dist.all_to_all_single

    def __call__(self, output: Tensor, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Sends."""
        self.bytes += states.numel() * states.element_size()
        return self.send(output, states, *args, **kwargs)


def total(states: Tensor) -> Tensor:
    states = states.clone()
    dist.all_reduce(states)
    return states


def compare(name: str, backend: str, balanced: bool, counter: Counter) -> None:
    """Compares logits, loss and gradients with those of one process."""
    model_class, config_class, fields, length, inputs = CASES[name]
    torch.manual_seed(0)
    model = model_class(config_class(**SHAPE | {"initializer_range": 0.2} | fields)).eval()
    model.set_attn_implementation(backend)
    rows = 1 if length > 1000 else 2
    input_ids = torch.randint(0, 97, (rows, length))
    batch = {"input_ids": input_ids} | {key: value.expand(rows, -1).contiguous() for key, value in inputs.items()}
    real = batch["attention_mask"] > 0 if "attention_mask" in batch else torch.ones_like(input_ids, dtype=torch.bool)
    # Nothing predicts the first token of a text: what precedes it is padding that sees no key.
    is_scored = real & (real.cumsum(1) > 1) & (torch.arange(length) % 7 != 3)
    batch["labels"] = input_ids.masked_fill(~is_scored, -100)
    one = model(**batch)
    one.loss.backward()
    right = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()

    part = ContextParallel(balanced=balanced).split(batch)
    shard = part["context_shard"]
    counter.bytes = 0
    output = model(**part)
    sent = total(torch.tensor(counter.bytes)).item()
    output.loss.backward()
    own = shard.own_index
    by_head = total(torch.tensor(shard.bytes_by_head or [0])).tolist()
    assert sent == sum(by_head), (sent, by_head)
    assert output.logits.shape[1] == len(own) < length or length < 4
    error = (output.logits - one.logits[:, own])[real[:, own]].abs().max() / one.logits.abs().max()
    assert error < 3e-6, (name, backend, balanced, error)
    loss = total(output.loss.detach()) / 2
    assert abs(loss - one.loss) < 2e-6 * one.loss, (name, backend, balanced, loss, one.loss)
    for key, parameter in model.named_parameters():
        error = (total(parameter.grad) / 2 - right[key]).abs().max() / right[key].abs().max()
        # The gradients of gates are sums of large terms that cancel, so one process rounds them as much.
        assert error < (5e-5 if "forget_proj" in key else 1e-5), (name, backend, balanced, key, error)
    # Ring attention passes the keys and values of each rank on to all others, in every layer.
    ring = rows * length * 2 * model.config.head_dim * 4 * model.config.num_hidden_layers
    if dist.get_rank() == 0:
        kind = "balanced" if balanced else "contiguous"
        table = " ".join(f"{sent:,}" for sent in by_head)
        print(f"{name}, {backend}, {kind}: bytes by head {table}; ring attention {ring:,} for each", flush=True)


def refusals() -> None:
    """Checks what cannot be divided."""
    model = AlibiGPTForCausalLM(AlibiGPTConfig(**SHAPE))
    classifier = AlibiGPTForSequenceClassification(AlibiGPTConfig(**SHAPE, pad_token_id=0))
    input_ids = torch.arange(8)[None]
    part = ContextParallel().split({"input_ids": input_ids})
    calls = {
        r"shape \(1, 1, 8, 8\)": lambda: ContextParallel().split(
            {"input_ids": input_ids, "attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
        ),
        "leave out past_key_values": lambda: model(**part | {"attention_mask": torch.ones(1, 8).long()}),
        "for language models": lambda: classifier(**part),
    }
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words):
            call()


def main() -> None:
    """Runs all comparisons."""
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    counter = Counter()
    context_parallel.dist.all_to_all_single = counter
    for name, case in CASES.items():
        for backend in ("sdpa",) if case[3] > 1000 else ("sdpa", "eager"):
            for balanced in (False, True):
                compare(name, backend, balanced, counter)
    refusals()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
