"""Forward passes without data, on the meta device and with fake tensors: they give shapes, and read no values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, PreTrainedModel, StaticCache

import hf_alibi
from hf_alibi import AlibiGPTConfig, positions

BATCH, LENGTH = 2, 12
ONES = torch.ones(BATCH, LENGTH, dtype=torch.long)
LEFT, RIGHT = ONES.clone(), ONES.clone()
LEFT[0, :4] = 0
RIGHT[0, -4:] = 0

ARGUMENTS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "left": {"attention_mask": LEFT},
    "right": {"attention_mask": RIGHT},
    "boolean": {"attention_mask": LEFT.bool()},
    "position_ids": {"position_ids": torch.arange(LENGTH)[None]},
    "documents": {"attention_mask": RIGHT, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])},
    "seq_idx": {"seq_idx": torch.zeros(BATCH, LENGTH, dtype=torch.long)},
    "cu_seq_lens": {"cu_seq_lens_q": torch.tensor([0, 12, 24]), "cu_seq_lens_k": torch.tensor([0, 12, 24])},
    "token_type_ids": {"token_type_ids": torch.zeros(BATCH, LENGTH, dtype=torch.long)},
}
FOUR_DIMENSIONS: dict[str, dict[str, Any]] = {
    "boolean": {"attention_mask": torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)},
    "added": {"attention_mask": torch.zeros(BATCH, 1, LENGTH, LENGTH), "position_ids": torch.arange(LENGTH)[None]},
}
CLASSES = torch.ones(BATCH, dtype=torch.long)
# Each class with its labels and the shape of its first output after the loss.
HEADS: dict[str, tuple[dict[str, Tensor], tuple[int, ...]]] = {
    "AlibiGPTModel": ({}, (BATCH, LENGTH, 96)),
    "AlibiGPTForCausalLM": ({"labels": ONES}, (BATCH, LENGTH, 97)),
    "AlibiGPTForSequenceClassification": ({"labels": CLASSES}, (BATCH, 2)),
    "AlibiGPTForTokenClassification": ({"labels": ONES}, (BATCH, LENGTH, 2)),
    "AlibiGPTForQuestionAnswering": ({"start_positions": CLASSES, "end_positions": CLASSES}, (BATCH, LENGTH)),
}
POSITIONS = [name.removesuffix("GPTConfig") for name in positions.__all__ if name.endswith("Config")]
SHAPE = {"vocab_size": 97, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "pad_token_id": 0}
Mover = Callable[[Tensor], Tensor]


@contextmanager
def meta() -> Iterator[Mover]:
    with init_empty_weights(include_buffers=True):
        yield lambda states: states.to("meta")


@contextmanager
def fake() -> Iterator[Mover]:
    with FakeTensorMode() as mode:
        yield mode.from_tensor


each_kind = pytest.mark.parametrize("kind", [meta, fake], ids=["meta", "fake"])
each_backend = pytest.mark.parametrize("backend", ["sdpa", "eager"])


def new_model(model_class: type, config: Any, backend: str) -> PreTrainedModel:
    model = model_class(config).eval()
    model.set_attn_implementation(backend)
    return model


def moved(move: Mover, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: move(states) for name, states in arguments.items()}


@each_kind
@each_backend
@pytest.mark.parametrize("name", HEADS)
def test_every_head_gives_shapes(kind: Any, backend: str, name: str) -> None:
    labels, shape = HEADS[name]
    with kind() as move:
        model = new_model(getattr(hf_alibi, name), AlibiGPTConfig(**SHAPE), backend)
        masks = {} if "Sequence" in name else FOUR_DIMENSIONS
        for arguments in (*ARGUMENTS.values(), *masks.values()):
            outputs = model(move(ONES), **moved(move, arguments))
            assert outputs[0].shape == shape
        if labels:
            outputs = model(move(ONES), **moved(move, {"attention_mask": LEFT} | labels))
            assert outputs.loss.shape == ()
            assert outputs[1].shape == shape


@each_kind
@pytest.mark.parametrize("name", POSITIONS)
def test_other_positions_give_shapes(kind: Any, name: str) -> None:
    config = getattr(positions, f"{name}GPTConfig")(**SHAPE)
    with kind() as move:
        model = new_model(getattr(positions, f"{name}GPTForCausalLM"), config, "sdpa")
        for arguments in (*ARGUMENTS.values(), *FOUR_DIMENSIONS.values()):
            assert model(move(ONES), **moved(move, arguments)).logits.shape == (BATCH, LENGTH, 97)


@each_kind
@each_backend
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["no mask", "left", "right"])
def test_caches_grow_without_data(kind: Any, backend: str, mask: Tensor | None) -> None:
    config = AlibiGPTConfig(**SHAPE)
    longer = None if mask is None else torch.cat([mask, torch.ones(BATCH, 2, dtype=torch.long)], 1)
    with kind() as move:
        model = new_model(hf_alibi.AlibiGPTForCausalLM, config, backend)
        for cache in (DynamicCache(), model.model.new_cache(windowed=False), StaticCache(config, max_cache_len=20)):
            for tokens, shown in ((move(ONES), mask), (move(ONES)[:, :2], longer)):
                arguments = {} if shown is None else {"attention_mask": move(shown)}
                assert model(tokens, past_key_values=cache, **arguments).logits.shape == (*tokens.shape, 97)
        cache = DynamicCache()
        model(move(ONES), past_key_values=cache)
        step = move(ONES)[:, :1]
        assert model(step, position_ids=LENGTH * step, past_key_values=cache).logits.shape == (BATCH, 1, 97)
        assert cache.get_seq_length() == LENGTH + 1


@each_kind
def test_a_training_step_without_data(kind: Any) -> None:
    with kind() as move:
        model = hf_alibi.AlibiGPTForCausalLM(AlibiGPTConfig(alibi_slopes_trainable=True, **SHAPE))
        model(move(ONES), attention_mask=move(RIGHT), labels=move(ONES)).loss.backward()
        assert all(weight.grad.shape == weight.shape for weight in model.parameters())


@each_kind
def test_wrong_shapes_are_still_refused(kind: Any) -> None:
    with kind() as move:
        model = hf_alibi.AlibiGPTForCausalLM(AlibiGPTConfig(**SHAPE))
        with pytest.raises(ValueError, match=r"covers 11 tokens; it must cover the 0 cached and the 12 new ones"):
            model(move(ONES), attention_mask=move(ONES)[:, :11])
        with pytest.raises(ValueError, match="position_ids has 11 columns; it must have 12"):
            model(move(ONES), position_ids=move(ONES)[:, :11])
