"""The model: decoding with any cache, batch and shape equals a full forward pass."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from conftest import ModelFactory, checkpoint_activations
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_alibi import (
    AlibiGPTConfig,
    AlibiGPTForCausalLM,
    AlibiGPTForQuestionAnswering,
    AlibiGPTForSequenceClassification,
    AlibiGPTForTokenClassification,
)

LENGTH = 63
SHAPES = {
    "6-heads": {},
    "8-heads": {"num_attention_heads": 8},
    "12-heads-grouped": {"num_attention_heads": 12, "num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "no-qk-norm": {"qk_norm": False},
    "channel-gains": {"qk_norm_gain": "channel"},
    "no-gains": {"qk_norm_gain": "none"},
    "bloom-like": {
        "qk_norm": False,
        "norm_type": "layernorm",
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_norm": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "mpt-like": {"qk_norm": False, "norm_type": "layernorm", "hidden_act": "gelu", "alibi_max_bias": 16},
    "swiglu": {"mlp_gated": True, "hidden_act": "silu", "mlp_bias": True},
    "clipped": {"clip_qkv": 0.5},
    "clipped-no-qk-norm": {"clip_qkv": 0.5, "qk_norm": False},
    "parallel": {"use_parallel_residual": True},
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
each_backend = pytest.mark.parametrize("backend", ["eager", "sdpa"])


def tokens(batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def left_padding(batch: int = 3, length: int = LENGTH) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, : 9 * row] = 0
    return mask


def assert_logits_close(actual: Tensor, expected: Tensor) -> None:
    """Asserts equality up to 1e-5 of the largest logit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def in_steps(
    model: AlibiGPTForCausalLM,
    input_ids: Tensor,
    steps: list[int],
    cache: DynamicCache | StaticCache,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Passes the tokens in pieces of the given sizes, as generation does, and returns all logits."""
    logits, done = [], 0
    for step in steps:
        end = done + step
        output = model(
            input_ids[:, done:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if position_ids is None else position_ids[:, done:end],
            past_key_values=cache,
        )
        logits.append(output.logits)
        done = end
    assert done == input_ids.shape[1]
    return torch.cat(logits, 1)


STEPS = {"token-by-token": [1] * LENGTH, "prefill-then-tokens": [50] + [1] * 13, "chunks": [20, 1, 7, 35]}
each_steps = pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())


@each_shape
@each_steps
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_cached_logits_equal_the_full_forward_with_left_padding(
    make_model: ModelFactory, shape: dict, steps: list[int], static: bool
) -> None:
    model = make_model(**shape)
    input_ids, mask = tokens(), left_padding()
    expected = model(input_ids, attention_mask=mask).logits
    cache = StaticCache(config=model.config, max_cache_len=80) if static else DynamicCache(config=model.config)
    actual = in_steps(model, input_ids, steps, cache, mask)
    assert_logits_close(actual[mask.bool()], expected[mask.bool()])


@each_backend
@each_steps
def test_cached_logits_equal_the_full_forward_without_a_mask(
    make_model: ModelFactory, backend: str, steps: list[int]
) -> None:
    model = make_model()
    model.set_attn_implementation(backend)
    expected = model(tokens()).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=80)):
        assert_logits_close(in_steps(model, tokens(), steps, cache), expected)


@each_backend
@each_steps
def test_packed_documents_stay_apart_in_the_cache(make_model: ModelFactory, backend: str, steps: list[int]) -> None:
    model = make_model()
    model.set_attn_implementation(backend)
    input_ids, sizes = tokens(1), [20, 1, 42]
    expected = torch.cat([model(piece).logits for piece in input_ids.split(sizes, dim=1)], 1)
    position_ids = torch.cat([torch.arange(n) for n in sizes])[None]
    assert_logits_close(model(input_ids, position_ids=position_ids).logits, expected)
    cache = DynamicCache(config=model.config)
    assert_logits_close(in_steps(model, input_ids, steps, cache, position_ids=position_ids), expected)


@each_backend
def test_a_batch_padded_on_the_right_continues_after_its_holes(make_model: ModelFactory, backend: str) -> None:
    model = make_model()
    model.set_attn_implementation(backend)
    input_ids = tokens(1)
    expected = model(input_ids).logits[:, 30:]
    mask = torch.ones(1, LENGTH + 5, dtype=torch.long)
    mask[:, 30:35] = 0
    padded = torch.cat([input_ids[:, :30], tokens(1, 5), input_ids[:, 30:]], 1)
    assert_logits_close(model(padded, attention_mask=mask).logits[:, 35:], expected)
    cache = DynamicCache(config=model.config)
    assert_logits_close(in_steps(model, padded, [35] + [1] * 10 + [23], cache, mask)[:, 35:], expected)


@each_backend
@pytest.mark.parametrize(
    "hidden", [range(9), range(50, LENGTH), [0, 1, 20, 21, 62]], ids=["left", "right", "anywhere"]
)
def test_what_padding_gives_does_not_depend_on_the_other_texts(
    make_model: ModelFactory, backend: str, hidden: Sequence[int]
) -> None:
    """The layout depends on all padding in a batch, but the output of a row must depend on its own padding only."""
    model = make_model()
    model.set_attn_implementation(backend)
    batch, mask = tokens(4), torch.ones(4, LENGTH, dtype=torch.long)
    mask[0, hidden] = mask[1, :9] = mask[2, 30:] = mask[3, 5:40:5] = 0
    alone = model(batch[:1], attention_mask=mask[:1]).logits
    for others in ([], [1], [2], [3], [1, 2, 3]):
        rows = [0, *others]
        assert_logits_close(model(batch[rows], attention_mask=mask[rows]).logits[:1], alone)


@each_backend
def test_branches_of_a_tree_share_their_prefix(make_model: ModelFactory, backend: str) -> None:
    """A boolean 4D mask with position_ids scores several continuations at once, with and without a cache."""
    model = make_model()
    model.set_attn_implementation(backend)
    prefix, branches = tokens(1, 20), tokens(3, 4)
    expected = torch.cat([model(torch.cat([prefix, b[None]], 1)).logits[:, 20:] for b in branches], 1)
    visible = torch.ones(32, 32, dtype=torch.bool).tril()
    for branch in range(3):
        start = 20 + 4 * branch
        visible[start : start + 4, 20:start] = False
    position_ids = torch.cat([torch.arange(20)] + [torch.arange(20, 24)] * 3)[None]
    input_ids = torch.cat([prefix, branches.reshape(1, -1)], 1)
    mask = visible[None, None]
    assert_logits_close(model(input_ids, attention_mask=mask, position_ids=position_ids).logits[:, 20:], expected)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        model(prefix, past_key_values=cache)
        keys = torch.nn.functional.pad(mask[:, :, 20:], (0, 8 if isinstance(cache, StaticCache) else 0))
        rest = {"attention_mask": keys, "position_ids": position_ids[:, 20:], "past_key_values": cache}
        output = model(input_ids[:, 20:], **rest)
        assert_logits_close(output.logits, expected)


def test_inverting_a_boolean_mask_is_noticed(make_model: ModelFactory) -> None:
    model = make_model()
    causal = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    assert_logits_close(model(tokens(1), attention_mask=causal).logits, model(tokens(1)).logits)


@pytest.mark.parametrize("num_beams", [1, 3], ids=["greedy", "beams"])
def test_generation_with_a_cache_equals_generation_without(make_model: ModelFactory, num_beams: int) -> None:
    model = make_model()
    settings = {"attention_mask": left_padding(), "max_new_tokens": 20, "num_beams": num_beams, "pad_token_id": 0}
    cached = model.generate(tokens(), **settings)
    assert torch.equal(cached, model.generate(tokens(), use_cache=False, **settings))
    assert torch.equal(cached, model.generate(tokens(), cache_implementation="static", **settings))


def test_generation_in_a_padded_batch_equals_generation_alone(make_model: ModelFactory) -> None:
    model = make_model()
    mask = left_padding()
    together = model.generate(tokens(), attention_mask=mask, max_new_tokens=15, pad_token_id=0)
    for row in range(3):
        alone = model.generate(tokens()[row : row + 1, mask[row].bool()], max_new_tokens=15, pad_token_id=0)
        assert torch.equal(together[row, -15:], alone[0, -15:])


def test_nothing_happens_at_the_training_length(make_model: ModelFactory) -> None:
    short, unlimited = make_model(training_length=16), make_model(training_length=4096)
    assert torch.equal(short(tokens(1, 600)).logits, unlimited(tokens(1, 600)).logits)


def test_generation_goes_on_past_the_training_length(
    make_model: ModelFactory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(training_length=16)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    # Transformers gives this warning for every model.
    with pytest.warns(UserWarning, match="model-agnostic default"):
        assert model.generate(tokens(1)).shape == (1, LENGTH + 20)
    assert "exceeded" not in caplog.text


@each_backend
def test_logits_depend_on_distance(make_model: ModelFactory, backend: str) -> None:
    """A model without any bias would pass all tests that compare two paths."""
    model, flat = make_model(), make_model(alibi_slopes=[1e-9] * 6)
    model.set_attn_implementation(backend)
    flat.set_attn_implementation(backend)
    difference = (model(tokens()).logits - flat(tokens()).logits).abs().max()
    assert difference > 0.1 * model(tokens()).logits.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_slopes_survive_casting_saving_and_the_meta_device(
    make_model: ModelFactory, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = make_model(num_attention_heads=12, hidden_size=96)
    exact = {name: weight.to(dtype).float() for name, weight in model.state_dict().items()}
    model.load_state_dict(exact)
    expected = model(tokens()).logits
    model.to(dtype).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).float()
    assert torch.equal(loaded(tokens()).logits, expected)
    with torch.device("meta"):
        empty = AlibiGPTForCausalLM(model.config)
    empty.to_empty(device="cpu").load_state_dict(exact)
    empty.tie_weights()
    assert torch.equal(empty.eval()(tokens()).logits, expected)


def test_autocast_keeps_the_bias_exact(make_model: ModelFactory) -> None:
    """bfloat16 rounds distances beyond 256, but the bias must be exact."""
    model = make_model(alibi_max_bias=1.0)
    input_ids = tokens(1, 1500)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(input_ids).logits
    expected = model(input_ids).logits
    model.set_attn_implementation("eager")
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(input_ids).logits
    scale = expected.abs().max()
    assert (mixed - expected).abs().max() < 0.1 * scale
    assert (mixed - expected).pow(2).mean() < 1.2 * (eager - expected).pow(2).mean()


def test_gradient_checkpointing_changes_no_gradient(make_model: ModelFactory) -> None:
    model = make_model().train()
    other = copy.deepcopy(model)
    newer_name = getattr(other, "activation_checkpointing_enable", None)
    (newer_name or other.gradient_checkpointing_enable)()
    for m in (model, other):
        m(tokens(), labels=tokens(), attention_mask=left_padding(), use_cache=False).loss.backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


# Transformers 5.19 treats the meta device of offloaded weights as the device of the model.
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", [{}, {"alibi_slopes_trainable": True}, {"qk_norm": False}], ids=str)
def test_offloaded_weights_change_nothing(make_model: ModelFactory, shape: dict[str, Any], backend: str) -> None:
    """Accelerate leaves weights on the meta device except during the forward pass of their own module."""
    model = make_model(num_attention_heads=4, alibi_slopes=[2.0, 1.0, 0.5, 0.25], **shape)
    model.set_attn_implementation(backend)
    input_ids = tokens(1, 1300)
    expected, text = model(input_ids).logits, model.generate(input_ids, max_new_tokens=3, do_sample=False)
    cpu_offload(model, torch.device("cpu"))
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    torch.testing.assert_close(model(input_ids).logits, expected)
    assert torch.equal(model.generate(input_ids, max_new_tokens=3, do_sample=False), text)


def test_trainable_slopes_learn_and_are_saved(make_model: ModelFactory, tmp_path: Path) -> None:
    fixed, model = make_model(), make_model(alibi_slopes_trainable=True)
    model.load_state_dict(fixed.state_dict(), strict=False)
    assert_logits_close(model(tokens()).logits, fixed(tokens()).logits)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    learned = model.model.bias_log_slopes.exp()
    assert not torch.allclose(learned, torch.tensor(fixed.config.slopes), rtol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.model.bias_log_slopes.exp(), learned)


@pytest.mark.parametrize("logits_to_keep", [1, 5, torch.tensor([3, 60])], ids=["last", "last-five", "chosen"])
def test_logits_to_keep(make_model: ModelFactory, logits_to_keep: int | Tensor) -> None:
    model = make_model()
    every = model(tokens()).logits
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    assert_logits_close(model(tokens(), logits_to_keep=logits_to_keep).logits, every[:, kept])


def test_recorded_outputs(make_model: ModelFactory) -> None:
    model = make_model()
    model.set_attn_implementation("eager")
    output = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(3, LENGTH, 96)] * 3
    assert [tuple(a.shape) for a in output.attentions] == [(3, 6, LENGTH, LENGTH)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 6, LENGTH))


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        (AlibiGPTForSequenceClassification, {"labels": torch.tensor([0, 1, 1])}),
        (AlibiGPTForTokenClassification, {"labels": torch.ones(3, LENGTH, dtype=torch.long)}),
        (
            AlibiGPTForQuestionAnswering,
            {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 5, 6])},
        ),
    ],
    ids=["sequence", "token", "question"],
)
def test_heads_train(make_model: ModelFactory, head: type, labels: dict[str, Tensor]) -> None:
    config = make_model(pad_token_id=0).config
    model = head(config)
    loss = model(tokens(), attention_mask=left_padding(), **labels).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("inputs", [{}, {"input_ids": tokens(), "inputs_embeds": torch.zeros(3, LENGTH, 96)}])
def test_exactly_one_input_is_needed(make_model: ModelFactory, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        make_model()(**inputs)


@pytest.mark.parametrize("input_ids", [tokens()[0], tokens()[:0], tokens()[:, :0]])
def test_tokens_of_another_shape_are_refused(make_model: ModelFactory, input_ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"at least one text and one token; embeddings have the shape \["):
        make_model()(input_ids)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 7}, "hidden_size 100 does not divide into 7 heads"),
        ({"num_key_value_heads": 3}, "8 query heads cannot share 3"),
        ({"alibi_slopes": [0.5, 0.25]}, "2 values for 8 heads"),
        ({"alibi_slopes": [0.5] * 7 + [-0.5]}, "from -0.5 to 0.5; slopes must be positive and finite"),
        ({"alibi_slopes": [0.5] * 7 + [float("nan")]}, "positive and finite"),
        ({"alibi_max_bias": 0.0}, "alibi_max_bias must be positive and finite, got 0.0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be positive and finite, got 0"),
        ({"clip_qkv": 0}, "clip_qkv must be positive and finite, or None for no clipping; got 0"),
        ({"clip_qkv": float("inf")}, "clip_qkv must be positive and finite"),
        ({"norm_bias": True}, "norm_bias=True needs norm_type='layernorm'"),
        ({"norm_type": "batchnorm"}, "norm_type"),
        ({"hidden_act": "step"}, "hidden_act 'step' is not one of"),
        ({"attention_dropout": 1.0}, "attention_dropout must be at least 0 and below 1"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_impossible_configs_are_refused_with_their_values(values: dict, message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        AlibiGPTConfig(**values)


def test_config_round_trip(tmp_path: Path) -> None:
    config = AlibiGPTConfig(num_attention_heads=4, alibi_slopes=[0.5, 0.25, 0.1, 0.01], num_key_value_heads=2)
    config.save_pretrained(tmp_path)
    assert AlibiGPTConfig.from_pretrained(tmp_path).slopes == [0.5, 0.25, 0.1, 0.01]


def test_what_adds_to_the_residual_stream_begins_smaller() -> None:
    model = AlibiGPTForCausalLM(
        AlibiGPTConfig(vocab_size=97, hidden_size=96, num_hidden_layers=8, num_attention_heads=6)
    )
    for layer in model.model.layers:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
        assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_gradient_checkpointing_and_a_cache(make_model: ModelFactory) -> None:
    """Without gradients the cache works. With gradients it would be written twice, so it is refused or left out."""
    model = make_model().train()
    input_ids = torch.randint(3, 97, (2, 30))
    expected = model(input_ids, labels=input_ids)
    weights = list(model.parameters())
    gradients = torch.autograd.grad(expected.loss, weights)
    checkpoint_activations(model)

    past = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="Leave the cache out"):
        model(input_ids, past_key_values=past)
    assert past.get_seq_length() == 0
    with torch.no_grad():
        parts = [model(part, past_key_values=past).logits for part in input_ids.split([20, 9, 1], 1)]
    scale = expected.logits.abs().max().item()
    torch.testing.assert_close(torch.cat(parts, 1), expected.logits, rtol=0, atol=1e-5 * scale)

    output = model(input_ids, labels=input_ids, use_cache=True)
    assert output.past_key_values is None
    assert torch.equal(output.logits, expected.logits)
    for found, exact in zip(torch.autograd.grad(output.loss, weights), gradients, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-5 * exact.abs().max().item())
