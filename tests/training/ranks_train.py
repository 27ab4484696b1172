"""A program for two or four processes: every way of sharing the training of a model gives one process's numbers.

    torchrun --nproc_per_node=2 tests/training/ranks_train.py FOLDER
    torchrun --nproc_per_node=4 tests/training/ranks_train.py FOLDER

With four, two pairs share the weights, and each pair shares the heads. All processes make all comparisons.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, DistributedConfig

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM
from hf_alibi.training import ContextParallel

STEPS = 20
Batch = dict[str, Tensor]
Ways = dict[str, Callable[[Path], tuple[Any, Callable[[Batch], dict[str, Any]]]]]

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "alibi_max_bias": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, 12 heads, trained slopes": {
        "tie_word_embeddings": False,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "alibi_slopes_trainable": True,
        "mlp_gated": True,
    },
}


def batch() -> Batch:
    """Returns two rows of 160 tokens in two documents each, with equally many labels."""
    input_ids = torch.randint(0, 96, (2, 160), generator=torch.Generator().manual_seed(1))
    position_ids = torch.cat([torch.arange(110), torch.arange(50)]).expand(2, -1).contiguous()
    labels = input_ids.masked_fill(position_ids == 0, -100)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def one_row(rows: Batch) -> Batch:
    row = dist.get_rank() * 2 // dist.get_world_size()
    return {name: values[row][None] for name, values in rows.items()}


def checkpointed(model: Any) -> Any:
    """Switches activation checkpointing on, under its name since Transformers 5.24 or the one before."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


def loaded(folder: Path, **sizes: Any) -> Any:
    config = DistributedConfig(**sizes) if sizes else None
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


def sharded(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


WAYS: Ways = {
    "DDP": lambda folder: (DistributedDataParallel(loaded(folder)), one_row),
    "DDP, checkpointed": lambda folder: (DistributedDataParallel(checkpointed(loaded(folder))), one_row),
    "FSDP2": lambda folder: (loaded(folder, fsdp_size=2), one_row),
    "FSDP2, checkpointed": lambda folder: (checkpointed(loaded(folder, fsdp_size=2)), one_row),
    "TP": lambda folder: (loaded(folder, tp_size=2), dict),
    "CP": lambda folder: (DistributedDataParallel(loaded(folder)), ContextParallel(balanced=False).split),
    "CP balanced": lambda folder: (DistributedDataParallel(loaded(folder)), ContextParallel().split),
    "CP, FSDP2, checkpointed": lambda folder: (checkpointed(sharded(loaded(folder))), ContextParallel().split),
}
WAYS_OF_FOUR: Ways = {"TP, FSDP2": lambda folder: (loaded(folder, tp_size=2, fsdp_size=2), one_row)}


def trained(model: Any, rows: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Trains for some steps. Returns the losses, and the gradients of the first step, of all ranks."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, gradients = [], {}
    for step in range(STEPS):
        loss = model(**rows).loss
        loss.backward()
        if step == 0:
            gradients = {name.removeprefix("module."): whole(x.grad).clone() for name, x in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
    return [loss.item() for loss in losses], gradients


def whole(states: Any) -> Tensor:
    return states.full_tensor() if hasattr(states, "full_tensor") else states


def mean_of_ranks(losses: list[float]) -> Tensor:
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def check(name: str, way: str, folder: Path, expected: list[float], right: dict[str, Tensor], final: Tensor) -> None:
    """Trains in one way, compares with one process, saves, and loads what was saved."""
    model, feed = (WAYS | WAYS_OF_FOUR)[way](folder)
    losses, gradients = trained(model, feed(batch()))
    difference = (mean_of_ranks(losses) - torch.tensor(expected, dtype=torch.float64)).abs().max().item()
    assert difference < 1e-4, (name, way, difference)
    for parameter, gradient in gradients.items():
        error = (gradient - right[parameter]).abs().max() / right[parameter].abs().max()
        assert error < 1e-5, (name, way, parameter, error.item())
    inner: Any = getattr(model, "module", model)
    if "CP, FSDP2" in way:
        # Sharded by torch, not by Transformers, which then cannot save it.
        return
    saved = folder.parent / f"{name} {way}"
    if "DDP" not in way or dist.get_rank() == 0:
        inner.save_pretrained(saved)
    dist.barrier()
    with torch.no_grad():
        logits = loaded(saved)(batch()["input_ids"]).logits
    torch.testing.assert_close(logits, final, rtol=0, atol=2e-3)


def mixed(name: str, folder: Path, expected: list[float]) -> None:
    """FSDP2 with mixed precision follows the losses of float32, or refuses trained slopes."""
    model = loaded(folder, fsdp_size=2, fsdp_mixed_precision=True)
    if "trained slopes" in name:
        with pytest.raises(ValueError, match=r"under torch\.autocast"):
            model(**one_row(batch()))
        return
    losses, _ = trained(model, one_row(batch()))
    difference = (mean_of_ranks(losses) - torch.tensor(expected, dtype=torch.float64)).abs().max().item()
    assert difference < 0.05, (name, difference)


def main() -> None:
    """Runs all ways with all models."""
    dist.init_process_group("gloo")
    assert dist.get_world_size() in (2, 4)
    is_pair = dist.get_world_size() == 2
    folder = Path(sys.argv[1])
    for name, fields in MODELS.items():
        torch.manual_seed(0)
        if not is_pair and name == "tied":
            # Four ranks cannot share the tied embeddings of 97 tokens.
            fields = {"vocab_size": 96}
        one = AlibiGPTForCausalLM(AlibiGPTConfig(**SHAPE | {"initializer_range": 0.1} | fields))
        start = folder / name
        if dist.get_rank() == 0:
            one.save_pretrained(start)
        dist.barrier()
        expected, right = trained(one := loaded(start), batch())
        with torch.no_grad():
            final = one.eval()(batch()["input_ids"]).logits
        assert expected[-1] < expected[0] - 0.5
        for way in WAYS if is_pair else WAYS_OF_FOUR:
            check(name, way, start, expected, right, final)
            if dist.get_rank() == 0:
                print(f"{name}: {way}: as one process", flush=True)
        if is_pair:
            mixed(name, start, expected)
    if not is_pair:
        one = AlibiGPTForCausalLM(AlibiGPTConfig(**SHAPE))
        if dist.get_rank() == 0:
            one.save_pretrained(folder / "odd")
        dist.barrier()
        with pytest.raises(ValueError, match=r"97 tokens, tied .* must be a multiple of 4"):
            loaded(folder / "odd", tp_size=2, fsdp_size=2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
