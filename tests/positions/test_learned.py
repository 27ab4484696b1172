"""Learned positions are a table: a row is added to each token, and there is nothing beyond the last row."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_alibi.evaluation.perplexity import position_limit
from hf_alibi.positions.learned import LearnedGPTForCausalLM

LENGTH = 24


@pytest.fixture
def model() -> LearnedGPTForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 97, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = AutoConfig.for_model("learned_gpt", training_length=LENGTH, initializer_range=0.2, **shape)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_row_of_the_table_is_added_to_each_token(model: LearnedGPTForCausalLM) -> None:
    input_ids = torch.randint(3, 97, (2, LENGTH))
    nope = AutoModelForCausalLM.from_config(AutoConfig.for_model("nope_gpt", **shape_of(model))).eval()
    nope.load_state_dict(model.state_dict(), strict=False)
    table = model.model.position_embeddings.weight
    assert table.std().item() == pytest.approx(0.2, rel=0.05)
    expected = nope(inputs_embeds=model.model.embed_tokens(input_ids) + table).logits
    torch.testing.assert_close(model(input_ids).logits, expected)


def shape_of(model: LearnedGPTForCausalLM) -> dict[str, Any]:
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
    return {name: getattr(model.config, name) for name in names}


def test_positions_beyond_the_table_are_refused(model: LearnedGPTForCausalLM) -> None:
    input_ids = torch.randint(3, 97, (1, LENGTH + 1))
    with pytest.raises(ValueError, match=r"positions 0 to 23, its training length, but .* positions from 0 to 24"):
        model(input_ids)
    cache = DynamicCache(config=model.config)
    model(input_ids[:, :-1], past_key_values=cache)
    with pytest.raises(ValueError, match="positions from 24 to 24"):
        model(input_ids[:, -1:], past_key_values=cache)
    # Two documents, each of which fits.
    assert model(input_ids, position_ids=torch.cat([torch.arange(13), torch.arange(12)])[None]).logits.isfinite().all()


def test_padding_does_not_count(model: LearnedGPTForCausalLM) -> None:
    input_ids = torch.randint(3, 97, (1, LENGTH))
    padded, mask = (torch.nn.functional.pad(x, (5, 0)) for x in (input_ids, torch.ones_like(input_ids)))
    found = model(padded, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(found, model(input_ids).logits)


def test_other_tools_see_the_limit(model: LearnedGPTForCausalLM) -> None:
    assert model.config.max_position_embeddings == position_limit(model) == LENGTH
    model.config.max_position_embeddings = 48
    assert model.config.training_length == 48
