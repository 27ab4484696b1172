"""Each position method equals its formula, saves its code, has a cache, and otherwise equals AlibiGPT."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import Request, run_fresh
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM
from hf_alibi.positions.rotary import rotated

# The parameters that each method adds to those of AlibiGPT.
ADDED: dict[str, set[str]] = {
    "sinusoidal_gpt": set(),
    "rotary_gpt": set(),
    "nope_gpt": set(),
    "learned_gpt": {"model.position_embeddings.weight"},
    "t5_gpt": {"model.distance_bias.table"},
    "kerple_gpt": {"model.distance_bias.log_r1", "model.distance_bias.log_r2"},
    "hype_gpt": {"model.distance_bias.log_tau", "model.distance_bias.log_mu"},
    "fox_gpt": {f"model.layers.{i}.self_attn.forget_proj.{name}" for i in (0, 1) for name in ("weight", "bias")},
}
METHODS = list(ADDED)
# ALiBi with trained slopes is a method of its own in comparisons.
TRAINED_SLOPES = "alibi_gpt"
ADDED[TRAINED_SLOPES] = {"model.bias_log_slopes"}
SHAPE = {"vocab_size": 97, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}


def make(model_type: str, **fields: Any) -> AlibiGPTForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"initializer_range": 0.2, "num_key_value_heads": 3, "training_length": 1200} | SHAPE
    if model_type == TRAINED_SLOPES:
        shape["alibi_slopes_trainable"] = True
    config = AutoConfig.for_model(model_type, **(shape | fields))
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(1))


def assert_equal_logits(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("model_type", METHODS)
def test_its_parameters_are_those_of_alibi(model_type: str) -> None:
    alibi = AlibiGPTForCausalLM(AlibiGPTConfig(num_key_value_heads=3, **SHAPE))
    found, expected = ({n: weight.shape for n, weight in m.named_parameters()} for m in (make(model_type), alibi))
    assert found.keys() - expected.keys() == ADDED[model_type]
    assert expected.items() <= found.items()


@pytest.mark.parametrize("model_type", [name for name in METHODS if name not in ("sinusoidal_gpt", "fox_gpt")])
def test_its_first_weights_are_those_of_alibi(model_type: str) -> None:
    torch.manual_seed(0)
    alibi = AlibiGPTForCausalLM(AlibiGPTConfig(initializer_range=0.2, num_key_value_heads=3, **SHAPE))
    found = make(model_type).state_dict()
    for name, weight in alibi.state_dict().items():
        assert torch.equal(weight, found[name]), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("length", [63, 1100])
@pytest.mark.parametrize("model_type", [*METHODS, TRAINED_SLOPES])
def test_cached_logits_equal_the_full_forward(model_type: str, length: int, implementation: str) -> None:
    model = make(model_type)
    model.set_attn_implementation(implementation)
    input_ids = tokens(2, length)
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in input_ids.split([length - 11, 10, 1], dim=1)]
    assert_equal_logits(torch.cat(pieces, 1), model(input_ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", [*METHODS, TRAINED_SLOPES])
def test_padding_changes_nothing(model_type: str, side: str) -> None:
    model, input_ids = make(model_type), tokens(1, 20)
    room = (7, 0) if side == "left" else (0, 7)
    padded = torch.nn.functional.pad(input_ids, room)
    mask = torch.nn.functional.pad(torch.ones_like(input_ids), room)
    found = model(padded, attention_mask=mask).logits[:, room[0] : room[0] + 20]
    assert_equal_logits(found, model(input_ids).logits)


@pytest.mark.parametrize("model_type", [*METHODS, TRAINED_SLOPES])
def test_packed_documents_are_read_alone(model_type: str) -> None:
    model, input_ids = make(model_type), tokens(1, 30)
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    alone = torch.cat([model(input_ids[:, :12]).logits, model(input_ids[:, 12:]).logits], 1)
    assert_equal_logits(model(input_ids, position_ids=positions).logits, alone)


WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams-static": {"num_beams": 3, "cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4},
    "chunks-static": {"prefill_chunk_size": 4, "cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", [*METHODS, TRAINED_SLOPES])
def test_generation_is_the_same_without_a_cache(model_type: str, way: str) -> None:
    model, input_ids = make(model_type), tokens(2, 11)
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "attention_mask": mask} | WAYS[way]
    expected = model.generate(
        input_ids, use_cache=False, **(options | {"cache_implementation": None, "prefill_chunk_size": None})
    )
    assert torch.equal(model.generate(input_ids, **options), expected)


@pytest.mark.parametrize("model_type", [*METHODS, TRAINED_SLOPES])
def test_prompt_lookup_takes_wrong_guesses_back(model_type: str) -> None:
    model, input_ids = make(model_type), tokens(1, 11).repeat(1, 2)
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(input_ids)}
    expected = model.generate(input_ids, use_cache=False, **options)
    assert torch.equal(model.generate(input_ids, prompt_lookup_num_tokens=3, **options), expected)


@pytest.mark.parametrize("model_type", [*METHODS, TRAINED_SLOPES])
def test_it_learns_with_trainer_and_loads_as_it_was_saved(model_type: str, tmp_path: Path) -> None:
    model = make(model_type, initializer_range=0.02, tie_word_embeddings=False)
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 24)]
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=8, learning_rate=0.01, use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    with torch.no_grad():
        first = model(tokens(4, 24), labels=tokens(4, 24)).loss
    Trainer(model, arguments, train_dataset=rows).train()
    with torch.no_grad():
        last = model.eval()(tokens(4, 24), labels=tokens(4, 24)).loss
    assert last < 0.7 * first
    for name in ADDED[model_type]:
        assert not torch.equal(before[name], model.get_parameter(name)), name
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


@pytest.mark.parametrize("model_type", METHODS)
def test_slopes_are_refused(model_type: str) -> None:
    for field in ({"alibi_slopes": [0.1] * 6}, {"alibi_slopes_trainable": True}):
        with pytest.raises(StrictDataclassError, match=f"{model_type} has no slopes, so alibi_slopes="):
            make(model_type, **field)


def test_rotation_is_the_papers() -> None:
    states = torch.randn(1, 1, 5, 8, dtype=torch.float64)
    found = rotated(states, torch.arange(5)[None])
    for position in range(5):
        for pair in range(4):
            angle = position * 10_000 ** (-2 * pair / 8)
            vector = complex(states[0, 0, position, pair], states[0, 0, position, pair + 4])
            expected = vector * complex(math.cos(angle), math.sin(angle))
            assert found[0, 0, position, pair].item() == pytest.approx(expected.real, abs=1e-12)
            assert found[0, 0, position, pair + 4].item() == pytest.approx(expected.imag, abs=1e-12)


def test_rotary_scores_depend_on_distance_alone() -> None:
    query, key = torch.randn(2, 1, 2, 9, 8, dtype=torch.float64)
    near, far = (
        rotated(query, positions) @ rotated(key, positions).mT
        for positions in (torch.arange(9)[None], torch.arange(500, 509)[None])
    )
    torch.testing.assert_close(near, far, rtol=0, atol=1e-12)
    assert not torch.allclose(near, query @ key.mT)


def test_order_is_known_without_positions_but_not_distance() -> None:
    nope, rotary, input_ids = make("nope_gpt"), make("rotary_gpt"), tokens(1, 20)
    assert not torch.allclose(nope(input_ids).logits, rotary(input_ids).logits, atol=1e-3)
    swapped = input_ids.clone()
    swapped[:, 1:3] = input_ids[:, [2, 1]]
    assert not torch.allclose(nope(swapped).logits[:, -1], nope(input_ids).logits[:, -1], atol=1e-6)


def test_rotary_needs_pairs() -> None:
    with pytest.raises(StrictDataclassError, match="head_dim must be even, got 5"):
        AutoConfig.for_model("rotary_gpt", head_dim=5, **SHAPE)


def test_they_load_without_the_package(tmp_path: Path) -> None:
    input_ids = tokens(1, 20)
    models = {model_type: make(model_type) for model_type in METHODS}
    for model_type, model in models.items():
        model.save_pretrained(tmp_path / model_type)
    requests = {name: Request(str(tmp_path / name), input_ids.tolist(), caches=["dynamic"]) for name in METHODS}
    (tmp_path / "fresh").mkdir()
    found = run_fresh(requests, tmp_path / "fresh")
    for name, model in models.items():
        assert found[f"{name} is remote"]
        assert_equal_logits(found[f"{name} logits"], model(input_ids).logits)
        expected = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=8)
        assert torch.equal(found[f"{name} dynamic"], expected)
