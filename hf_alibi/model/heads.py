"""Heads that classify a text or its tokens, choose among texts, or find the answer to a question in a text.

They are identical to Transformers' generic heads, with the same parameters, arguments and outputs, except:

- A text is classified from its last token by the attention mask. Without a mask, all tokens but padding tokens count.
- A choice among texts, for which there is no generic head, has the arguments and outputs of `BertForMultipleChoice`.
- Losses use Trainer's `num_items_in_batch`, for every `problem_type`. So accumulating gradients over small batches,
  or over processes, gives the loss and the gradients of one large batch.
- A row with several documents raises an error if the row has one label.

Each class is a mixin for a model with its decoder in the attribute `model`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from .cache_names import CACHE_NAME, only_cache
from .outputs import as_asked

IGNORED_LABEL = -100


class SequenceClassificationHead:
    """A linear layer that classifies a text from its last token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        # Transformers would derive it from the class name, which a subclass may change.
        self.loss_type = "ForSequenceClassification"
        self.loss_function = sequence_classification_loss
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Computes a score for each class of every text. The other arguments are those of the decoder.

        Args:
            attention_mask: `[batch, tokens]`, 0 for padding on any side. Without a mask, tokens that equal
                `pad_token_id` count as padding; with `inputs_embeds`, no token does.
            labels: Depending on `problem_type` of the config: `[batch]` classes, `[batch, num_labels]` zeros and ones,
                or `[batch]` or `[batch, num_labels]` numbers.

        Returns:
            The logits `[batch, num_labels]` and, with `labels`, the mean loss.

        Raises:
            ValueError: If the last token of a row is ambiguous: with several documents in a row, with a
                four-dimensional mask, or in a batch with neither a mask nor a `pad_token_id`.
        """
        outputs, logits = scores_of_texts(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=only_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        loss = None
        if labels is not None:
            config = self.config  # type: ignore[attr-defined]
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=config, **kwargs)
        outputs = SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
        return as_asked(outputs, return_dict, self.config)  # type: ignore[attr-defined]


class MultipleChoiceHead:
    """A linear layer that scores each of several texts from its last token, to choose one."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.loss_function = class_loss
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Computes a score for each choice. The other arguments are those of the decoder.

        Args:
            input_ids: `[batch, choices, tokens]`. The other arguments have these dimensions, too.
            attention_mask: 0 for padding on any side. Without a mask as in `SequenceClassificationHead.forward`.
            labels: `[batch]`, the right choice, counted from 0. -100 is not scored.

        Returns:
            The logits `[batch, choices]` and, with `labels`, the mean loss. Hidden states and attention weights have
            one row for each choice.

        Raises:
            ValueError: If there is no dimension of choices, or as in `SequenceClassificationHead.forward`.
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or given.dim() != (4 if input_ids is None else 3):
            shape = None if given is None else tuple(given.shape)
            raise ValueError(
                f"The texts have the shape {shape}; give input_ids of [batch, choices, tokens], or inputs_embeds of "
                "[batch, choices, tokens, hidden_size]."
            )
        texts = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        rows = {name: _one_row_each(value) for name, value in (texts | {"use_cache": False} | kwargs).items()}
        outputs, logits = scores_of_texts(self, **rows)
        logits = logits.view(given.shape[:2])
        loss = None if labels is None else self.loss_function(logits, labels, **kwargs)
        outputs = MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return as_asked(outputs, return_dict, self.config)  # type: ignore[attr-defined]


class TokenClassificationHead:
    """A linear layer that classifies every token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.loss_type = "ForTokenClassification"
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Computes a score for each class of every token. The other arguments are those of the decoder.

        Args:
            labels: `[batch, queries]`, classes. -100 is not scored.

        Returns:
            The logits `[batch, queries, num_labels]` and, with `labels`, the mean loss per scored token.
        """
        _refuse_divided_rows(kwargs)
        outputs = self.model(  # type: ignore[attr-defined]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=only_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            config = self.config  # type: ignore[attr-defined]
            loss = self.loss_function(logits=logits, labels=labels, config=config, **kwargs)  # type: ignore[attr-defined]
        outputs = TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return as_asked(outputs, return_dict, self.config)  # type: ignore[attr-defined]


class QuestionAnsweringHead:
    """A linear layer that scores every token as start and end of the answer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.loss_type = "ForQuestionAnswering"
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Computes for every token scores for start and end of the answer. The other arguments are the decoder's.

        Args:
            start_positions: `[batch]`, the first token of the answer. A position outside the text is not scored.
            end_positions: `[batch]`, the last token of the answer. A position outside the text is not scored.

        Returns:
            The logits of start and end, each `[batch, queries]`. With both positions also the mean of their losses.
        """
        _refuse_divided_rows(kwargs)
        outputs = self.model(  # type: ignore[attr-defined]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=only_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).float().unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(  # type: ignore[attr-defined]
                start_logits, end_logits, start_positions, end_positions, **kwargs
            )
        outputs = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return as_asked(outputs, return_dict, self.config)  # type: ignore[attr-defined]


def scores_of_texts(
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    **kwargs: Any,
) -> tuple[Any, Tensor]:
    """Runs the decoder of a model, and its layer `score` on the last token of each text.

    Returns:
        The decoder's outputs, and the scores `[batch, num_labels]`.
    """
    _refuse_divided_rows(kwargs)
    past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    outputs = model.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        return_dict=True,
        one_document=True,
        **kwargs,
    )
    hidden_states = outputs.last_hidden_state
    if attention_mask is None:
        is_text = _not_padding(input_ids, hidden_states, model.config.pad_token_id)
    else:
        is_text = _shown(attention_mask, past, hidden_states)
    rows = torch.arange(is_text.shape[0], device=hidden_states.device)
    return outputs, model.score(hidden_states[rows, last_positions(is_text)])


def class_loss(
    logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
) -> Tensor:
    """Returns the mean loss of the right classes, or the batch's share of the mean over several batches.

    Args:
        logits: `[batch, classes]`.
        labels: `[batch]` or `[batch, 1]`. A class of -100 is not scored.
        num_items_in_batch: As in `sequence_classification_loss`.
    """
    labels = labels.flatten().to(logits.device)
    total = (labels != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
    total = torch.as_tensor(total, device=logits.device)
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum") / total


def sequence_classification_loss(
    labels: Tensor, pooled_logits: Tensor, config: Any, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
) -> Tensor:
    """Returns the mean loss of the texts in this batch, or the batch's share of the mean over several batches.

    If the config has no `problem_type`, it is inferred from the labels and stored in the config, as in Transformers.

    Args:
        labels: As in `SequenceClassificationHead.forward`. A class of -100 is not scored.
        pooled_logits: `[batch, num_labels]`.
        config: The model's config, with `problem_type` and `num_labels`.
        num_items_in_batch: Number of labels other than -100 in all batches of an optimizer step, as Trainer counts
            them; `None` for the mean over this batch alone.

    Raises:
        ValueError: If the shape of `labels` does not fit the problem.
    """
    if config.problem_type is None:
        is_class = not labels.is_floating_point()
        many = "single_label_classification" if is_class else "multi_label_classification"
        config.problem_type = "regression" if config.num_labels == 1 else many
    logits, labels = pooled_logits.float(), labels.to(pooled_logits.device)
    _require_shape(labels, logits.shape[0], config)
    if config.problem_type == "single_label_classification":
        return class_loss(logits, labels, num_items_in_batch)
    targets = labels.float().view_as(logits)
    mean = F.mse_loss if config.problem_type == "regression" else F.binary_cross_entropy_with_logits
    # Trainer's count leaves out labels of -100, even if they are numbers to predict. The share of this batch must be
    # counted in the same way.
    counted = (labels != IGNORED_LABEL).sum()
    share = 1 if num_items_in_batch is None else counted / torch.as_tensor(num_items_in_batch, device=logits.device)
    return mean(logits, targets) * share


def _require_shape(labels: Tensor, batch: int, config: Any) -> None:
    one_each = config.problem_type == "single_label_classification" or config.num_labels == 1
    shapes = [(batch,), (batch, 1)] if one_each else [(batch, config.num_labels)]
    if tuple(labels.shape) not in shapes:
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)}; {config.problem_type} of {batch} texts with "
            f"num_labels={config.num_labels} needs {shapes[0]}."
        )


def last_positions(is_text: Tensor) -> Tensor:
    """Returns the index of the last true value in each row, `[batch]`, 0 in a row without one.

    Args:
        is_text: `[batch, tokens]`, boolean.
    """
    positions = torch.arange(is_text.shape[1], device=is_text.device)
    return (positions * is_text).argmax(-1)


def _shown(attention_mask: Tensor, past: int, hidden_states: Tensor) -> Tensor:
    """Returns which tokens of this pass, after `past` cached ones, the mask shows, `[batch, tokens]`."""
    if attention_mask.dim() != 2:
        raise ValueError(
            f"The attention mask has shape {tuple(attention_mask.shape)}; to find the last token of each text, it "
            "must be [batch, tokens]."
        )
    batch, length = hidden_states.shape[:2]
    shown = attention_mask.to(hidden_states.device)[:, past : past + length] != 0
    return shown.expand(batch, -1)


def _not_padding(input_ids: Tensor | None, hidden_states: Tensor, pad_token_id: int | None) -> Tensor:
    """Returns which tokens are no padding, without a mask, `[batch, tokens]`."""
    if input_ids is None or (pad_token_id is None and input_ids.shape[0] == 1):
        return torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    if pad_token_id is None:
        raise ValueError(
            f"Nothing says where the {input_ids.shape[0]} texts of this batch end: pass an attention_mask, or set "
            "pad_token_id in the config."
        )
    return input_ids.to(hidden_states.device) != pad_token_id


def _one_row_each(value: Any) -> Any:
    """Returns a tensor `[batch, choices, ...]` with a row for each choice. Other values stay as they are."""
    return value.flatten(0, 1) if isinstance(value, Tensor) and value.dim() > 2 else value


def _refuse_divided_rows(arguments: dict[str, Any]) -> None:
    """Raises `ValueError` for rows that are divided among ranks, in which labels have other places."""
    if arguments.get("context_shard") is not None:
        raise ValueError("Context parallelism is for language models; train this model without it.")
