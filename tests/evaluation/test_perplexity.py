"""Perplexity against length, compared with a loop that runs the model once for each target."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import VOCAB_SIZE, tiny_tokenizer
from torch import Tensor
from transformers import (
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    OpenAIGPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto import AutoModelForCausalLM

from hf_alibi import AlibiGPTConfig
from hf_alibi.errors import UserError
from hf_alibi.evaluation.perplexity import (
    bits_per_byte,
    encode_stream,
    mean_by_doubling,
    nats_by_position,
    perplexity_by_length,
    token_nats,
    trainer_metrics,
    windows,
)
from hf_alibi.training.packing import collate_blocks

SHAPE: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "alibi": lambda: AlibiGPTConfig(**SHAPE, training_length=16),
    "llama": lambda: LlamaConfig(**SHAPE, intermediate_size=48),
    "gpt2": lambda: GPT2Config(**SHAPE, n_positions=64, bos_token_id=0, eos_token_id=0),
    "bloom": lambda: BloomConfig(**SHAPE),
}


def random_model(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Returns a model with weights that are large enough for the context to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def random_stream(num_tokens: int) -> Tensor:
    return torch.randint(VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model("alibi")


def window_start(target: int, num_targets: int, length: int, stride: int) -> int:
    """Returns the start of the window that scores the token at index `target`, the first window that reaches it."""
    end = length
    while end < target:
        end += stride
    return min(end, num_targets) - length


@torch.no_grad()
def expected_nats(model: PreTrainedModel, input_ids: Tensor, length: int, stride: int) -> Tensor:
    """Computes losses by definition: each target is predicted separately, from its window up to the token before."""
    nats = []
    for target in range(1, len(input_ids)):
        start = window_start(target, len(input_ids) - 1, length, stride)
        logits = model(input_ids=input_ids[None, start:target]).logits[0, -1].double()
        nats.append(-logits.log_softmax(-1)[input_ids[target]])
    return torch.stack(nats)


@pytest.mark.parametrize(
    ("num_targets", "length", "stride"),
    [(48, 16, 16), (53, 16, 16), (48, 16, 4), (53, 16, 7), (40, 16, 1), (16, 16, 3), (17, 16, 16), (5, 1, 1)],
)
def test_windows_score_each_target_once(num_targets: int, length: int, stride: int) -> None:
    scored: list[int] = []
    for start, num_scored in windows(num_targets, length, stride):
        assert 0 <= start <= num_targets - length
        assert 1 <= num_scored <= (stride if start else length)
        scored += range(start + length - num_scored + 1, start + length + 1)
    assert scored == list(range(1, num_targets + 1))


@pytest.mark.parametrize("stride", [None, 1, 7, 16], ids=["no overlap", "stride 1", "stride 7", "stride 16"])
@pytest.mark.parametrize("num_tokens", [49, 54, 17], ids=["even", "remainder", "one window"])
def test_losses_equal_the_definition(model: PreTrainedModel, num_tokens: int, stride: int | None) -> None:
    input_ids = random_stream(num_tokens)
    nats = token_nats(model, input_ids, 16, stride, tokens_per_forward=48)
    torch.testing.assert_close(nats, expected_nats(model, input_ids, 16, stride or 16), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stride", [None, 5], ids=["no overlap", "stride 5"])
@pytest.mark.parametrize("tokens_per_forward", [3, 16, 33, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_and_batches_change_nothing(name: str, tokens_per_forward: int, stride: int | None) -> None:
    model, input_ids = random_model(name), random_stream(70)
    whole = token_nats(model, input_ids, 32, stride, tokens_per_forward=32)
    parts = token_nats(model, input_ids, 32, stride, tokens_per_forward=tokens_per_forward)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_a_window_knows_nothing_of_the_one_before(model: PreTrainedModel) -> None:
    input_ids = random_stream(33)
    changed = input_ids.clone()
    changed[:16] = (changed[:16] + 1) % VOCAB_SIZE
    before, after = (token_nats(model, ids, 16, tokens_per_forward=8) for ids in (input_ids, changed))
    assert torch.equal(before[16:], after[16:])
    assert not torch.allclose(before[:16], after[:16])


def test_bfloat16_losses_are_summed_in_full_precision() -> None:
    model, input_ids = random_model("alibi", torch.bfloat16), random_stream(33)
    logits = model(input_ids=input_ids[None, :-1]).logits[0].double()
    expected = -logits.log_softmax(-1).gather(1, input_ids[1:, None])[:, 0]
    torch.testing.assert_close(token_nats(model, input_ids, 32), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [None, 3], ids=["no overlap", "stride 3"])
def test_results_are_over_the_same_targets_at_every_length(model: PreTrainedModel, stride: int | None) -> None:
    input_ids = random_stream(75)
    results = perplexity_by_length(model, input_ids, [8, 5, 24], stride, tokenizer=tiny_tokenizer())
    assert [result.length for result in results] == [8, 5, 24]
    # There are 74 targets, which are cut to three times 24.
    targets = input_ids[1:73]
    for result in results:
        nats = expected_nats(model, input_ids[:73], result.length, stride or result.length)
        blocks = [nats[start : start + 24].mean().item() for start in (0, 24, 48)]
        spread = sum((block - nats.mean().item()) ** 2 for block in blocks) / 2
        assert result.num_targets == 72
        assert result.stride == (stride or result.length)
        assert result.nats == pytest.approx(nats.mean().item(), abs=1e-6)
        assert result.perplexity == pytest.approx(math.exp(nats.mean().item()), rel=1e-6)
        assert result.nats_stderr == pytest.approx(math.sqrt(spread / 3), rel=1e-4)
        assert result.bits_per_byte == pytest.approx(bits_per_byte(nats, targets, tiny_tokenizer()), rel=1e-6)


def test_what_cannot_be_known_is_none(model: PreTrainedModel) -> None:
    (result,) = perplexity_by_length(model, random_stream(20), [16])
    assert result.bits_per_byte is None  # no tokenizer
    assert result.nats_stderr is None  # one block has no spread


@pytest.mark.parametrize("stride", [None, 3], ids=["no overlap", "stride 3"])
def test_loss_by_position_sorts_targets_by_context(model: PreTrainedModel, stride: int | None) -> None:
    input_ids = random_stream(41)
    nats = expected_nats(model, input_ids, 8, stride or 8)
    by_context: dict[int, list[float]] = {}
    for target in range(1, 41):
        by_context.setdefault(target - window_start(target, 40, 8, stride or 8), []).append(nats[target - 1].item())
    expected = [sum(by_context[context]) / len(by_context[context]) for context in range(1, 9)]
    assert nats_by_position(nats, 8, stride).tolist() == pytest.approx(expected)


def test_doubling_ranges() -> None:
    assert mean_by_doubling([1, 2, 3, 4, 5, 6, 7, 8]) == {1: 1, 2: 2, 4: 3.5, 8: 6.5}
    assert mean_by_doubling([1, 2, 3, 4, 5, 9]) == {1: 1, 2: 2, 4: 3.5, 6: 7}


def test_bits_per_byte_counts_text_and_not_special_tokens() -> None:
    # Texts of 3 + 3 bytes, and two separators.
    targets = encode_stream(tiny_tokenizer(), ["né", "→"])
    assert targets.tolist().count(tiny_tokenizer().eos_token_id) == 2
    one_bit_each = torch.full((len(targets),), math.log(2), dtype=torch.float64)
    assert bits_per_byte(one_bit_each, targets, tiny_tokenizer()) == pytest.approx(len(targets) / 6)


def test_stream_joins_documents_and_reads_no_further_than_needed() -> None:
    separator = tiny_tokenizer().eos_token
    documents = ["the fox", f"the {separator} dog", "jumps"]
    whole = encode_stream(tiny_tokenizer(), documents)
    assert tiny_tokenizer().decode(whole) == "".join(document + separator for document in documents)
    assert whole.tolist().count(tiny_tokenizer().eos_token_id) == 3

    def two_documents() -> Iterator[str]:
        yield from documents[:2]
        raise AssertionError("read too far")

    assert torch.equal(encode_stream(tiny_tokenizer(), two_documents(), max_tokens=10), whole[:10])


@pytest.mark.parametrize(
    ("num_tokens", "length", "stride", "message"),
    [
        (16, 16, None, "length 16 needs at least 17 tokens of text, but there are 16"),
        (33, 16, 17, "the stride must be from 1 to the length, but stride is 17 and length 16"),
        (33, 16, 0, "stride is 0"),
        (33, 0, None, "length 0"),
    ],
)
def test_impossible_windows_are_refused(
    model: PreTrainedModel, num_tokens: int, length: int, stride: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        token_nats(model, random_stream(num_tokens), length, stride)
    with pytest.raises(UserError, match=message):
        perplexity_by_length(model, random_stream(num_tokens), [length], stride)


def test_tokens_beyond_the_vocabulary_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="token id 290 is beyond the model's vocabulary of 290"):
        token_nats(model, torch.tensor([0, 1, VOCAB_SIZE]), 2)


def test_position_embeddings_limit_the_length() -> None:
    model, input_ids = random_model("gpt2"), random_stream(129)
    assert token_nats(model, input_ids, 64).isfinite().all()
    with pytest.raises(UserError, match="gpt2 has 64 position embeddings: it cannot read 65 tokens"):
        token_nats(model, input_ids, 65)


@pytest.mark.parametrize(
    "config",
    [
        OpenAIGPTConfig(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=1, n_head=2),
        MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=1),
    ],
    ids=["no cache", "recurrent state"],
)
def test_a_model_that_no_chunk_can_continue_is_not_cut_into_chunks(config: PreTrainedConfig) -> None:
    """Since Transformers 5.24 Mamba has a cache, which gives wrong results for several tokens at a time."""
    model = AutoModelForCausalLM.from_config(config)
    assert token_nats(model, random_stream(17), 16).isfinite().all()
    with pytest.raises(UserError, match="cannot continue from a KV cache: set tokens_per_forward to at least 16"):
        token_nats(model, random_stream(17), 16, tokens_per_forward=8)


@pytest.mark.parametrize("tokens_per_forward", [0, -1])
def test_a_forward_pass_has_a_token(model: PreTrainedModel, tokens_per_forward: int) -> None:
    with pytest.raises(UserError, match=f"tokens_per_forward must be at least 1, got {tokens_per_forward}"):
        token_nats(model, random_stream(17), 16, tokens_per_forward=tokens_per_forward)


def test_losses_that_are_not_finite_are_refused() -> None:
    model = random_model("alibi")
    model.get_output_embeddings().weight.data[5] = math.nan
    with pytest.raises(UserError, match=r"alibi_gpt in torch\.float64 gives losses that are not finite"):
        token_nats(model, random_stream(33), 16)


def test_targets_without_text_have_no_bits_per_byte(model: PreTrainedModel) -> None:
    only_separators = torch.full((9,), tiny_tokenizer().eos_token_id)
    (result,) = perplexity_by_length(model, only_separators, [4], tokenizer=tiny_tokenizer())
    assert result.bits_per_byte is None


def test_training_mode_survives_and_dropout_is_off() -> None:
    model = AutoModelForCausalLM.from_config(AlibiGPTConfig(**SHAPE, hidden_dropout=0.5, attention_dropout=0.5))
    first, second = (token_nats(model.train(), random_stream(33), 16) for _ in range(2))
    assert model.training
    assert torch.equal(first, second)


def test_progress_is_shown_on_demand(model: PreTrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    token_nats(model, random_stream(33), 16)
    assert capsys.readouterr().err == ""
    token_nats(model, random_stream(33), 16, progress=True)
    assert "length 16: 100%" in capsys.readouterr().err


def test_trainer_reports_perplexity_of_every_label_that_counts(tmp_path: Path) -> None:
    model = random_model("alibi", torch.float32)
    rows = [random_stream(num_tokens).tolist() for num_tokens in (16, 16, 16, 9, 5)]  # ragged, in batches of two
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, disable_tqdm=True),
        data_collator=collate_blocks,
        eval_dataset=Dataset.from_dict({"input_ids": rows}),
        **trainer_metrics(tiny_tokenizer()),
    )
    metrics = trainer.evaluate()
    nats = torch.cat([expected_nats(model, torch.tensor(row), len(row) - 1, len(row) - 1) for row in rows])
    targets = torch.cat([torch.tensor(row[1:]) for row in rows])
    assert metrics["eval_perplexity"] == pytest.approx(nats.mean().exp().item(), rel=1e-5)
    assert metrics["eval_bits_per_byte"] == pytest.approx(bits_per_byte(nats, targets, tiny_tokenizer()), rel=1e-5)
