"""Documents in a row compute what each computes alone: in every backend, with and without a cache, in use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from document_cases import (
    LENGTH,
    ROWS,
    SIZES,
    WAYS,
    alone,
    assert_close,
    cached,
    each_backend,
    each_way,
    models_by_backend,
    no_grad,
    padded,
    part,
    positions,
    tokens,
)
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache, Trainer, TrainingArguments

from hf_alibi import AlibiGPTForCausalLM
from hf_alibi.model.documents import NOTE
from hf_alibi.positions.sinusoidal import SinusoidalGPTConfig, SinusoidalGPTForCausalLM


@pytest.fixture
def model_of(make_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], AlibiGPTForCausalLM]:
    return models_by_backend(make_model, monkeypatch)


@each_backend
@each_way
@no_grad
def test_documents_in_one_pass(model_of: Any, backend: str, way: Callable) -> None:
    model, input_ids = model_of(backend), tokens()
    expected = alone(model, input_ids, SIZES)
    assert (model(input_ids, use_cache=False).logits - expected).abs().max() > 0.1 * expected.abs().max()
    assert_close(model(input_ids, use_cache=False, **way(SIZES)).logits, expected)
    assert_close(model(input_ids, use_cache=True, **way(SIZES)).logits, expected)


PIECES = {"within-a-document": [3, 5, 1, 8], "at-borders": [5, 1, 4, 7], "token-by-token": [1] * LENGTH}


@each_backend
@each_way
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES.keys())
@no_grad
def test_documents_with_a_cache(model_of: Any, backend: str, way: Callable, static: bool, pieces: list[int]) -> None:
    model, input_ids = model_of(backend), tokens()
    expected, arguments = alone(model, input_ids, SIZES), way(SIZES)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 3) if static else DynamicCache(config=model.config)
    found, start = [], 0
    for size in pieces:
        given = part(arguments, SIZES, start, start + size)
        found.append(model(input_ids[:, start : start + size], past_key_values=cache, **given).logits)
        start += size
    assert_close(torch.cat(found, 1), expected)


@each_backend
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", list(padded("left")[2]))
@no_grad
def test_documents_and_padding(model_of: Any, backend: str, side: str, name: str) -> None:
    model, (input_ids, real, ways) = model_of(backend), padded(side)
    whole = model(input_ids, use_cache=False, **ways[name]).logits
    cache, pieces, start = DynamicCache(config=model.config), [], 0
    for end in (4, 9, 10, LENGTH):
        given = part(ways[name], [], start, end)
        pieces.append(model(input_ids[:, start:end], past_key_values=cache, **given).logits)
        start = end
    for row, sizes in enumerate(ROWS):
        expected = alone(model, input_ids[row : row + 1, real[row]], sizes)
        assert_close(whole[row : row + 1, real[row]], expected)
        assert_close(torch.cat(pieces, 1)[row : row + 1, real[row]], expected)


@no_grad
def test_a_cache_remembers_with_which_position_its_last_document_begins(make_model: ModelFactory) -> None:
    """A position alone does not show how far back a document reaches that did not begin at 0."""
    model, more = make_model(), tokens(1, 3)
    expected = model(torch.cat([tokens()[:, -7:], more], 1)).logits[:, -3:]
    for start in (0, 2, 30):
        cache = cached(model, position_ids=positions(SIZES, start))
        going_on = start + 7 + torch.arange(3)[None]
        assert_close(model(more, position_ids=going_on, past_key_values=cache).logits, expected)
        cache.crop(-3)
        assert_close(model(more, position_ids=going_on, past_key_values=cache).logits, expected)
        fresh = model(more, position_ids=positions([3], start), past_key_values=cache).logits
        assert_close(fresh, model(more).logits)


@no_grad
def test_a_cache_in_use_again_has_forgotten(make_model: ModelFactory) -> None:
    model = make_model()
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 3)
    model(tokens(), position_ids=positions(SIZES, 2), past_key_values=cache)
    assert getattr(cache, NOTE) == (2, True)
    cache.reset()
    expected = model(torch.cat([tokens(), tokens(1, 3)], 1)).logits
    assert_close(model(tokens(), past_key_values=cache).logits, expected[:, :LENGTH])
    assert_close(model(tokens(1, 3), past_key_values=cache).logits, expected[:, LENGTH:])


@pytest.mark.parametrize(
    "settings",
    [
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
        {"return_seq_idx": True, "return_position_ids": False},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
        {},
    ],
    ids=["lengths", "seq-idx", "all", "positions"],
)
@no_grad
def test_what_transformers_flattens(make_model: ModelFactory, settings: dict[str, bool]) -> None:
    model, input_ids = make_model(), tokens()
    rows = [{"input_ids": piece[0].tolist()} for piece in input_ids.split(SIZES, 1)]
    batch = DataCollatorWithFlattening(**settings)(rows)
    assert_close(model(**batch).logits, alone(model, input_ids, SIZES))


def test_trainer_gets_the_same_loss_from_every_way(make_model: ModelFactory, tmp_path: Path) -> None:
    rows = [{"input_ids": tokens(1, 5 + i)[0].tolist()} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    losses = []
    for settings in (
        {},
        {"return_seq_idx": True, "return_position_ids": False},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
    ):
        collator = DataCollatorWithFlattening(**settings)
        trainer = Trainer(make_model(), arguments, collator, train_dataset=rows, eval_dataset=rows)
        losses.append([trainer.train().training_loss, trainer.evaluate()["eval_loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    fresh = Trainer(make_model(), arguments, DataCollatorWithFlattening(return_seq_idx=True), eval_dataset=rows[:4])
    total = sum(
        fresh.model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        for ids in (torch.tensor([row["input_ids"]]) for row in rows[:4])
    )
    alone = total / sum(len(row["input_ids"]) - 1 for row in rows[:4])
    assert fresh.evaluate()["eval_loss"] == pytest.approx(alone, rel=1e-5)


@each_way
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}])
def test_generation_goes_on_in_the_last_document(make_model: ModelFactory, way: Callable, settings: dict) -> None:
    model = make_model()
    if way is WAYS["seq-idx-and-positions-that-jump"]:
        # `generate` passes only positions on.
        with pytest.raises(ValueError, match="position_ids jump to 50"):
            model.generate(tokens(), max_new_tokens=1, **way(SIZES))
        return
    settings = {"max_new_tokens": 12, "do_sample": False, **settings}
    expected = model.generate(tokens()[:, -7:], **settings)[0, 7:]
    for cache_implementation in (None, "dynamic", "static"):
        if cache_implementation == "static" and "prompt_lookup_num_tokens" in settings:
            # Transformers refuses this combination.
            continue
        chosen = {} if settings.get("use_cache") is False else {"cache_implementation": cache_implementation}
        found = model.generate(tokens(), **settings, **chosen, **way(SIZES))
        assert torch.equal(found[0, LENGTH:], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_with_documents_and_padding(make_model: ModelFactory, side: str) -> None:
    model, (input_ids, real, ways) = make_model(), padded(side)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    found = model.generate(input_ids, **ways["mask-of-numbers"], **options)[:, LENGTH:]
    for row, sizes in enumerate(ROWS):
        start = real[row].stop - sizes[-1]
        mask = torch.ones(1, LENGTH - start, dtype=torch.long)
        # The text ends in padding, and continues from there.
        mask[:, sizes[-1] :] = 0
        alone = model.generate(input_ids[row : row + 1, start:], attention_mask=mask, **options)
        assert torch.equal(found[row], alone[0, LENGTH - start :])


@pytest.fixture
def sinusoidal() -> SinusoidalGPTForCausalLM:
    torch.manual_seed(0)
    config = SinusoidalGPTConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
    )
    return SinusoidalGPTForCausalLM(config).eval()


@pytest.mark.parametrize("name", ["mask-of-numbers", "seq-idx", "cumulative-lengths", "all-at-once"])
@no_grad
def test_sinusoids_begin_again_with_each_document(sinusoidal: SinusoidalGPTForCausalLM, name: str) -> None:
    expected = alone(sinusoidal, tokens(), SIZES)
    assert_close(sinusoidal(tokens(), **WAYS[name](SIZES)).logits, expected)


@no_grad
def test_position_ids_choose_the_sinusoids(sinusoidal: SinusoidalGPTForCausalLM) -> None:
    given = sinusoidal(tokens(), position_ids=positions(SIZES, 2)).logits
    pieces = tokens().split(SIZES, 1)
    expected = [sinusoidal(piece, position_ids=positions([piece.shape[1]], 2)).logits for piece in pieces]
    assert_close(given, torch.cat(expected, 1))
    assert (given - alone(sinusoidal, tokens(), SIZES)).abs().max() > 1e-3 * given.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
@no_grad
def test_sinusoids_do_not_count_padding(sinusoidal: SinusoidalGPTForCausalLM, side: str) -> None:
    input_ids, real, ways = padded(side)
    logits = sinusoidal(input_ids, **ways["mask-of-numbers"]).logits
    for row, sizes in enumerate(ROWS):
        expected = alone(sinusoidal, input_ids[row : row + 1, real[row]], sizes)
        assert_close(logits[row : row + 1, real[row]], expected)


@pytest.mark.parametrize("name", ["positions-from-0", "positions-from-2", "mask-of-numbers", "seq-idx"])
# Dynamo fails if a warning is an error.
@pytest.mark.filterwarnings("default")
@no_grad
def test_documents_in_a_compiled_model(make_model: ModelFactory, name: str) -> None:
    torch._dynamo.reset()
    model = make_model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in (SIZES, [3, 9]):
        input_ids = tokens(1, sum(sizes))
        logits = compiled(input_ids, use_cache=False, **WAYS[name](sizes)).logits
        assert_close(logits, alone(model, input_ids, sizes))
