"""Every way to generate agrees with plain forward passes, with the windowed cache and all other caches."""

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from conftest import ModelFactory, checkpoint_activations
from tiny import tiny_tokenizer
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, TextIteratorStreamer

from hf_alibi import AlibiGPTForCausalLM, GrowingCache, WindowedCache
from hf_alibi.model import cache, generation, growing, inputs, tiles

NEW = 40
SHAPE: dict[str, Any] = {"num_attention_heads": 6, "alibi_slopes": [4.0, 2.0, 1.0, 0.5, 3.0, 0.7], "vocab_size": 290}


@pytest.fixture(autouse=True)
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings, buffers and chunks that short texts use many of, and windows for few keys."""
    monkeypatch.setattr(cache, "SPARE", 5)
    monkeypatch.setattr(growing, "MIN_GROWTH", 5)
    monkeypatch.setattr(inputs, "FEW_KEYS", 10)
    monkeypatch.setattr(tiles, "FEW_KEYS", 10)
    monkeypatch.setattr(tiles, "SHARED_KEYS", 12)
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 50)


@pytest.fixture(params=[True, False], ids=["windowed", "growing"])
def model(make_model: ModelFactory, request: pytest.FixtureRequest) -> AlibiGPTForCausalLM:
    made = make_model(**SHAPE, qk_norm=request.param)
    made.generation_config.pad_token_id = 0
    return made


def prompt(length: int = 160, batch: int = 1) -> Tensor:
    return torch.randint(3, 290, (batch, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def greedy(model: AlibiGPTForCausalLM, input_ids: Tensor, new_tokens: int = NEW) -> Tensor:
    """Generates with the reference: each token is the most probable one after a forward pass over the whole text."""
    for _ in range(new_tokens):
        last = model(input_ids, use_cache=False).logits[:, -1]
        input_ids = torch.cat([input_ids, last.argmax(-1, keepdim=True)], 1)
    return input_ids


def test_a_cache_of_our_own_is_the_default(model: AlibiGPTForCausalLM) -> None:
    output = model.generate(prompt(), max_new_tokens=1, return_dict_in_generate=True)
    assert type(output.past_key_values) is (WindowedCache if model.config.qk_norm else GrowingCache)
    output = model.generate(prompt(), max_new_tokens=1, return_dict_in_generate=True, cache_implementation="dynamic")
    assert type(output.past_key_values) is DynamicCache


def test_prompts_are_read_in_chunks(model: AlibiGPTForCausalLM) -> None:
    lengths = []
    model.model.register_forward_hook(
        lambda _, args, kwargs, output: lengths.append(output[0].shape[1]), with_kwargs=True
    )
    model.generate(prompt(), max_new_tokens=3)
    assert lengths == [50, 50, 50, 10, 1, 1]


@pytest.mark.parametrize("length", [1, 7, 160])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 16},
        {"cache_implementation": "dynamic", "prefill_chunk_size": 16},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 4},
        {"prompt_lookup_num_tokens": 9, "cache_implementation": "dynamic"},
    ],
    ids=str,
)
def test_greedy(model: AlibiGPTForCausalLM, how: dict[str, Any], length: int) -> None:
    input_ids = prompt(length)
    assert torch.equal(model.generate(input_ids, max_new_tokens=NEW, do_sample=False, **how), greedy(model, input_ids))


@pytest.mark.parametrize("qk_norm", [True, False], ids=["windowed", "growing"])
def test_greedy_with_grouped_heads(make_model: ModelFactory, qk_norm: bool) -> None:
    other = make_model(**SHAPE, num_key_value_heads=2, qk_norm=qk_norm)
    assert torch.equal(other.generate(prompt(), max_new_tokens=NEW, do_sample=False), greedy(other, prompt()))


def test_greedy_over_a_thousand_tokens(model: AlibiGPTForCausalLM) -> None:
    input_ids = prompt()
    expected = model.generate(input_ids, max_new_tokens=1000, do_sample=False, cache_implementation="dynamic")
    assert torch.equal(model.generate(input_ids, max_new_tokens=1000, do_sample=False), expected)


def test_assisted(model: AlibiGPTForCausalLM, make_model: ModelFactory) -> None:
    # The assistant agrees with the model often, but not always.
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    expected = greedy(model, prompt())
    assert torch.equal(
        model.generate(prompt(), max_new_tokens=NEW, do_sample=False, assistant_model=assistant), expected
    )
    itself = copy.deepcopy(model)
    assert torch.equal(model.generate(prompt(), max_new_tokens=NEW, do_sample=False, assistant_model=itself), expected)


def test_assisted_by_its_first_layer(model: AlibiGPTForCausalLM) -> None:
    expected = greedy(model, prompt())
    calls = [0, 0]
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    found = model.generate(prompt(), max_new_tokens=NEW, do_sample=False, assistant_early_exit=1)
    assert torch.equal(found, expected)
    assert calls[0] > calls[1]


# Earlier versions of Transformers use checkpointing even without gradients.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("how", [None, "dynamic", "static"], ids=["windowed", "dynamic", "static"])
def test_a_model_in_training_with_gradient_checkpointing(
    model: AlibiGPTForCausalLM, how: str | None, use_reentrant: bool
) -> None:
    """It generates samples between two training steps, also with padding on the left."""
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :20] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "cache_implementation": how}
    expected = model.generate(prompt(60, 2), do_sample=False, **options)
    model.train()
    checkpoint_activations(model, use_reentrant)
    assert torch.equal(model.generate(prompt(60, 2), do_sample=False, **options), expected)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 4}], ids=str)
def test_beam_search(model: AlibiGPTForCausalLM, how: dict[str, Any]) -> None:
    input_ids = prompt(batch=2)
    expected = model.generate(input_ids, max_new_tokens=NEW, do_sample=False, use_cache=False, **how)
    assert torch.equal(model.generate(input_ids, max_new_tokens=NEW, do_sample=False, **how), expected)


@pytest.mark.parametrize("how", [{}, {"num_return_sequences": 3}, {"num_beams": 2}], ids=str)
def test_sampling_with_a_seed(model: AlibiGPTForCausalLM, how: dict[str, Any]) -> None:
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        sampled.append(
            model.generate(prompt(), max_new_tokens=NEW, do_sample=True, top_k=20, use_cache=use_cache, **how)
        )
    assert torch.equal(*sampled)


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "dynamic"}, {"prefill_chunk_size": 16}], ids=str)
def test_prompts_of_unequal_length(model: AlibiGPTForCausalLM, how: dict[str, Any]) -> None:
    lengths, longest = [160, 100, 31, 1], 160
    prompts = [prompt(length) for length in lengths]
    input_ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in prompts])
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    found = model.generate(input_ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **how)
    for row, alone in zip(found, prompts, strict=True):
        assert torch.equal(row[longest - alone.shape[1] :], greedy(model, alone)[0])


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "dynamic"}, {"use_cache": False}], ids=str)
def test_prompts_padded_on_the_right(model: AlibiGPTForCausalLM, how: dict[str, Any]) -> None:
    """The last padding token sees the prompt, so generation continues the prompt."""
    input_ids = prompt(60, batch=3)
    mask = (torch.arange(60) < torch.tensor([60, 41, 7])[:, None]).long()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = input_ids
        for step in range(NEW):
            seen = torch.nn.functional.pad(mask, (0, step), value=1)
            last = model(expected, attention_mask=seen, use_cache=False).logits[:, -1]
            expected = torch.cat([expected, last.argmax(-1, keepdim=True)], 1)
    model.set_attn_implementation("sdpa")
    found = model.generate(input_ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **how)
    assert torch.equal(found, expected)


def test_continuing_from_a_returned_cache(model: AlibiGPTForCausalLM) -> None:
    expected = greedy(model, prompt(), 3 * NEW)
    input_ids, past = prompt(), None
    for _ in range(3):
        output = model.generate(
            input_ids, past_key_values=past, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True
        )
        input_ids, past = output.sequences, output.past_key_values
    assert torch.equal(input_ids, expected)
    # The prompt is longer than the spare slots of the rings.
    more = prompt(120)
    input_ids = torch.cat([input_ids, more], 1)
    found = model.generate(input_ids, past_key_values=past, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, greedy(model, input_ids))


def test_from_embeddings(model: AlibiGPTForCausalLM) -> None:
    embeds = model.get_input_embeddings()(prompt())
    found = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, greedy(model, prompt())[:, -NEW:])


def test_learned_keys_instead_of_an_empty_cache(model: AlibiGPTForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PEFT does it: the method that prepares a pass is replaced, and finds the cache as `past_key_values`."""
    learned, prepare = prompt(7), model.prepare_inputs_for_generation

    def with_learned_keys(input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        # Without positions, they follow the keys.
        inputs = {**prepare(input_ids, **kwargs), "attention_mask": None, "position_ids": None}
        if not inputs["past_key_values"].get_seq_length():
            assert inputs["input_ids"].shape == (1, 160)
            inputs["past_key_values"] = model(learned, use_cache=True).past_key_values
        return inputs

    monkeypatch.setattr(model, "prepare_inputs_for_generation", with_learned_keys)
    found = model.generate(prompt(), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found[:, 160:], greedy(model, torch.cat([learned, prompt()], 1))[:, 167:])


def test_hidden_states_are_those_of_the_whole_prompt(model: AlibiGPTForCausalLM) -> None:
    output = model.generate(prompt(), max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True)
    assert output.hidden_states[0][-1].shape[:2] == (1, 160)


def test_streaming_and_stop_strings(model: AlibiGPTForCausalLM) -> None:
    tokenizer: Any = tiny_tokenizer()
    whole = greedy(model, prompt())[0, 160:]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(prompt(), max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(whole)

    words = [tokenizer.decode(token) for token in whole]
    stop = next(word for word in words[5:] if word.isascii() and word.strip() and word not in words[:5])
    found = model.generate(prompt(), max_new_tokens=NEW, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(found[0, 160:], whole[: words.index(stop) + 1])


@pytest.mark.skipif(find_spec("optimum") is None, reason="needs optimum-quanto")
def test_a_quantized_cache_is_off_by_its_rounding_only(make_model: ModelFactory) -> None:
    model = make_model(**SHAPE, hidden_size=192)
    input_ids, past = prompt(), QuantizedCache(backend="quanto", config=model.config)
    with torch.no_grad():
        model(input_ids[:, :140], past_key_values=past)
        found = torch.cat([model(token, past_key_values=past).logits for token in input_ids[:, 140:].split(1, 1)], 1)
        expected = model(input_ids, use_cache=False).logits[:, 140:]
    error = (found - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.15, "keys and values are rounded to 4 bits"


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_there_is_nothing_to_offload_from_the_cpu(model: AlibiGPTForCausalLM, implementation: str) -> None:
    with pytest.raises(ValueError, match="leave it out"):
        model.generate(prompt(), max_new_tokens=1, cache_implementation=implementation)


def test_attention_weights_need_eager_and_get_it(make_model: ModelFactory) -> None:
    eager = make_model(**SHAPE)
    eager.set_attn_implementation("eager")
    output = eager.generate(
        prompt(), max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    assert output.attentions[-1][0].shape == (1, 6, 1, 162)
    assert type(output.past_key_values) is GrowingCache
