"""Heads: the token from which a text is classified, inputs that are refused, and losses."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ModelFactory
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForMultipleChoice, AutoModelForSequenceClassification, DynamicCache
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from hf_alibi import (
    AlibiGPTConfig,
    AlibiGPTForMultipleChoice,
    AlibiGPTForQuestionAnswering,
    AlibiGPTForSequenceClassification,
    AlibiGPTForTokenClassification,
)

# One token serves as padding and as the end of texts.
END = 0
LENGTHS = [12, 7, 1, 9]
each_backend = pytest.mark.parametrize("backend", ["eager", "sdpa"])


def classifier(make_model: ModelFactory, **values: Any) -> AlibiGPTForSequenceClassification:
    config = make_model(**({"num_labels": 3, "pad_token_id": END, "eos_token_id": END} | values)).config
    torch.manual_seed(1)
    return AlibiGPTForSequenceClassification(config).eval()


def chooser(make_model: ModelFactory, **values: Any) -> AlibiGPTForMultipleChoice:
    config = make_model(**({"pad_token_id": END, "eos_token_id": END} | values)).config
    torch.manual_seed(1)
    return AlibiGPTForMultipleChoice(config).eval()


def texts() -> list[Tensor]:
    """Texts that end with `END`, which the tokenizer appends."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(1, 97, (length,), generator=generator) for length in LENGTHS]
    for row in rows:
        row[-1] = END
    return rows


def batch(padding: str) -> tuple[Tensor, Tensor]:
    """Returns the texts as one tensor and their mask, padded on the left, on the right, or alternately."""
    ids, mask = torch.full((4, 12), END), torch.zeros(4, 12, dtype=torch.long)
    for i, text in enumerate(texts()):
        start = {"left": 12 - len(text), "right": 0, "mixed": (12 - len(text)) // 2}[padding]
        ids[i, start : start + len(text)] = text
        mask[i, start : start + len(text)] = 1
    return ids, mask


@torch.no_grad()
@each_backend
@pytest.mark.parametrize("padding", ["left", "right", "mixed"])
@pytest.mark.parametrize("embeds", [False, True], ids=["tokens", "embeddings"])
@pytest.mark.parametrize("pad", [END, None], ids=["pad is end", "no pad"])
def test_the_last_token_that_the_mask_shows_stands_for_a_text(
    make_model: ModelFactory, backend: str, padding: str, embeds: bool, pad: int | None
) -> None:
    model = classifier(make_model, pad_token_id=pad)
    model.set_attn_implementation(backend)
    expected = torch.cat([model.score(model.model(text[None]).last_hidden_state[:, -1]) for text in texts()])
    ids, mask = batch(padding)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids)} if embeds else {"input_ids": ids}
    for kind in (mask, mask.bool(), mask.float()):
        logits = model(**inputs, attention_mask=kind).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
@each_backend
@pytest.mark.parametrize("padding", ["left", "right", "mixed"])
def test_a_choice_has_the_scores_of_its_texts_alone(make_model: ModelFactory, backend: str, padding: str) -> None:
    model = chooser(make_model)
    model.set_attn_implementation(backend)
    scores = [model.score(model.model(text[None]).last_hidden_state[0, -1]) for text in texts()]
    expected = torch.cat(scores).view(2, 2)
    tolerance = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}
    ids, mask = (states.view(2, 2, -1) for states in batch(padding))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    labels = torch.tensor([1, 0])
    for inputs in (
        {"input_ids": ids},
        {"input_ids": ids, "position_ids": positions, "token_type_ids": torch.zeros_like(ids)},
        {"inputs_embeds": model.get_input_embeddings()(ids)},
    ):
        output = model(**inputs, attention_mask=mask, labels=labels)
        torch.testing.assert_close(output.logits, expected, **tolerance)
        torch.testing.assert_close(output.loss, F.cross_entropy(expected, labels), **tolerance)
    half = model(ids[:1], attention_mask=mask[:1], labels=labels[:1], num_items_in_batch=2).loss
    torch.testing.assert_close(half, F.cross_entropy(expected[:1], labels[:1]) / 2, **tolerance)
    ignored = model(ids, attention_mask=mask, labels=torch.tensor([1, -100])).loss
    torch.testing.assert_close(ignored, F.cross_entropy(expected[:1], labels[:1]), **tolerance)
    if padding == "right":
        model.config.pad_token_id = 96
        padded = ids.masked_fill(mask == 0, 96)
        torch.testing.assert_close(model(padded).logits, expected, **tolerance)


def test_texts_without_choices_are_refused(make_model: ModelFactory) -> None:
    model, ids = chooser(make_model), torch.arange(3, 9)[None]
    for inputs in ({"input_ids": ids}, {"inputs_embeds": torch.zeros(1, 6, 96)}, {}):
        with pytest.raises(ValueError, match=r"have the shape .*; give input_ids of \[batch, choices, tokens\], or"):
            model(**inputs)


@torch.no_grad()
def test_without_a_mask_the_padding_token_decides(make_model: ModelFactory) -> None:
    model = classifier(make_model, pad_token_id=96)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 96, 96]])
    states = model.model(ids).last_hidden_state
    torch.testing.assert_close(model(ids).logits, model.score(states[[0, 1], [3, 1]]))
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model.score(states[:, 3]))


def test_a_batch_in_which_nothing_tells_the_padding_is_refused(make_model: ModelFactory) -> None:
    model = classifier(make_model, pad_token_id=None)
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="where the 2 texts of this batch end: pass an attention_mask"):
        model(torch.tensor([[5, 6], [7, 8]]))


@torch.no_grad()
def test_a_text_that_is_read_in_pieces(make_model: ModelFactory) -> None:
    model, (ids, mask) = classifier(make_model), batch("left")
    expected, cache = model(ids, attention_mask=mask).logits, DynamicCache(config=model.config)
    model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
    logits = model(ids[:, 5:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


PACKED: dict[str, dict[str, Any]] = {
    "position_ids": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
    "position_ids of short documents": {"position_ids": torch.zeros(1, 6, dtype=torch.long)},
    "attention_mask": {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 0]])},
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 2, 6]), "cu_seq_lens_k": torch.tensor([0, 2, 6])},
    "seq_idx": {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])},
}
ONE_EACH: dict[str, dict[str, Any]] = {
    "position_ids": {"position_ids": torch.arange(6).repeat(2, 1)},
    "attention_mask": {"attention_mask": torch.tensor([[7], [3]]).repeat(1, 6)},
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 6, 12]), "cu_seq_lens_k": torch.tensor([0, 6, 12])},
    "seq_idx": {"seq_idx": torch.tensor([[4], [5]]).repeat(1, 6)},
}


@pytest.mark.parametrize("name", PACKED)
def test_several_documents_in_a_row_are_refused(make_model: ModelFactory, name: str) -> None:
    ids, packed = torch.arange(3, 9)[None], PACKED[name]
    with pytest.raises(ValueError, match=r"contains several documents: give each .* a row of its own"):
        classifier(make_model)(ids, **packed)
    packed = {name: value[None] if value.dim() == 2 else value for name, value in packed.items()}
    with pytest.raises(ValueError, match=r"contains several documents: give each .* a row of its own"):
        chooser(make_model)(ids[None], **packed)


@torch.no_grad()
def test_a_document_that_follows_a_cached_one_is_refused(make_model: ModelFactory) -> None:
    model, cache = classifier(make_model), DynamicCache()
    ids = torch.arange(3, 9)[None]
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="contains several documents"):
        model(ids, past_key_values=cache, position_ids=torch.arange(6)[None])


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_EACH)
def test_one_document_in_each_row_may_be_described(make_model: ModelFactory, name: str) -> None:
    model, ids = classifier(make_model), torch.arange(3, 15).view(2, 6)
    mask = torch.ones_like(ids)
    described = {"attention_mask": mask} | ONE_EACH[name]
    expected = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(
        model(ids, **described).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def test_a_mask_of_four_dimensions_tells_no_last_token(make_model: ModelFactory) -> None:
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"shape \(1, 1, 6, 6\).*must be \[batch, tokens\]"):
        classifier(make_model)(torch.arange(3, 9)[None], attention_mask=mask)


@torch.no_grad()
def test_positions_of_padding_are_no_documents(make_model: ModelFactory) -> None:
    model = classifier(make_model)
    for padding in ("left", "right"):
        ids, mask = batch(padding)
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        torch.testing.assert_close(
            model(ids, attention_mask=mask, position_ids=positions).logits, model(ids, attention_mask=mask).logits
        )


LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0], [-1.0, 0.5, 0.25], [2.0, 2.0, -2.0]])
KINDS: dict[str, tuple[str | None, int, Tensor, Any]] = {
    "classes": ("single_label_classification", 3, torch.tensor([0, 2, 1, 1]), F.cross_entropy),
    "several": ("multi_label_classification", 3, (LOGITS > 0.4).float(), F.binary_cross_entropy_with_logits),
    "numbers": ("regression", 1, torch.tensor([0.5, -1.0, 3.0, 2.0]), F.mse_loss),
    "vectors": ("regression", 3, LOGITS.flip(0), F.mse_loss),
}


@torch.no_grad()
@pytest.mark.parametrize("told", [True, False], ids=["problem_type", "inferred"])
@pytest.mark.parametrize("name", KINDS)
def test_losses_of_texts(make_model: ModelFactory, name: str, told: bool) -> None:
    kind, num_labels, labels, function = KINDS[name]
    model = classifier(make_model, num_labels=num_labels, problem_type=kind if told or name == "vectors" else None)
    ids, mask = batch("right")
    output = model(ids, attention_mask=mask, labels=labels)
    logits = output.logits.double()
    targets = labels if name == "classes" else labels.double()
    torch.testing.assert_close(output.loss.double(), function(logits.squeeze(-1), targets), rtol=1e-6, atol=1e-6)
    assert model.config.problem_type == kind
    halves = [model(ids[part], attention_mask=mask[part], labels=labels[part], num_items_in_batch=labels.numel()).loss
              for part in (slice(2), slice(2, 4))]  # fmt: skip
    torch.testing.assert_close(sum(halves), output.loss)


@torch.no_grad()
def test_the_loss_is_exact_in_half_precision(make_model: ModelFactory) -> None:
    model = classifier(make_model).to(torch.bfloat16)
    ids, mask = batch("right")
    labels = torch.tensor([0, 2, 1, 1])
    output = model(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.float(), labels))


@pytest.mark.parametrize(
    ("num_labels", "kind", "labels"),
    [
        (3, "regression", torch.zeros(4)),
        (3, "multi_label_classification", torch.zeros(4)),
        (3, "single_label_classification", torch.zeros(4, 3, dtype=torch.long)),
        (1, "regression", torch.zeros(4, 2)),
    ],
)
def test_labels_of_another_shape_are_refused(
    make_model: ModelFactory, num_labels: int, kind: str, labels: Tensor
) -> None:
    model = classifier(make_model, num_labels=num_labels, problem_type=kind)
    ids, mask = batch("right")
    with pytest.raises(ValueError, match=rf"labels have the shape .*{kind} of 4 texts with num_labels={num_labels}"):
        model(ids, attention_mask=mask, labels=labels)


def test_a_loss_of_ones_own_is_used(make_model: ModelFactory) -> None:
    model = classifier(make_model)
    model.loss_function = lambda logits, labels, pooled_logits, config, **kwargs: pooled_logits.sum() * 0 + 42
    ids, mask = batch("right")
    assert model(ids, attention_mask=mask, labels=torch.zeros(4, dtype=torch.long)).loss == 42


def test_parameters_are_those_of_the_generic_heads(make_model: ModelFactory, tmp_path: Path) -> None:
    """A checkpoint of a generic head therefore loads."""
    config = make_model(num_labels=3, pad_token_id=END).config
    decoder = {f"model.{name}" for name in make_model().model.state_dict()}
    for head, names in (
        (AlibiGPTForSequenceClassification, {"score.weight"}),
        (AlibiGPTForMultipleChoice, {"score.weight"}),
        (AlibiGPTForTokenClassification, {"score.weight", "score.bias"}),
        (AlibiGPTForQuestionAnswering, {"qa_outputs.weight", "qa_outputs.bias"}),
    ):
        assert set(head(config).state_dict()) == decoder | names
        assert not issubclass(head, GenericForSequenceClassification | GenericForTokenClassification)
    model = classifier(make_model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids, mask = batch("left")
    assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    choices = chooser(make_model)
    choices.save_pretrained(tmp_path)
    same = AutoModelForMultipleChoice.from_pretrained(tmp_path).eval()
    assert type(same) is AlibiGPTForMultipleChoice
    assert torch.equal(
        same(ids[None], attention_mask=mask[None]).logits, choices(ids[None], attention_mask=mask[None]).logits
    )


def test_a_classifier_trains_with_activation_checkpointing(make_model: ModelFactory) -> None:
    model, (ids, mask) = classifier(make_model), batch("left")
    labels = torch.tensor([0, 2, 1, 1])
    expected = model(ids, attention_mask=mask, labels=labels).loss
    model.train()
    # Transformers sets these attributes under a name that depends on the version.
    for layer in model.model.layers:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = (
            True,
            partial(checkpoint, use_reentrant=False),
        )
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_token_is_classified_by_an_own_class(make_model: ModelFactory) -> None:
    """The loss is right for a class whose name does not end like those of Transformers."""

    class Tagger(AlibiGPTForTokenClassification):
        config: AlibiGPTConfig

    model = Tagger(make_model(num_labels=3).config).eval()
    ids = torch.arange(3, 15)[None]
    labels = ids % 3
    output = model(ids, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits[0], labels[0]))
