"""AlibiGPT: a decoder-only language model without position embeddings, in Transformers' conventions.

Read downwards: the decoder, the language model, and models with other heads. `AlibiGPTModel.forward` lays the tokens
out once (`layout.py`: which keys each query sees, how far away), and its layers (`layers.py`) add the bias.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .alibi import interpolated_slopes
from .arguments import check_arguments
from .attention import backend
from .cache import WindowedCache
from .cache_names import CACHE_NAME, only_cache
from .configuration_alibi_gpt import AlibiGPTConfig
from .decoder_windows import check_windowed_cache, window_guarantees, windowed_cache
from .documents import Packing
from .generation import AlibiGenerationMixin
from .heads import QuestionAnsweringHead, SequenceClassificationHead, TokenClassificationHead
from .layers import AlibiGPTAttention, AlibiGPTDecoderLayer, SealedLayout
from .layout import token_layout
from .norms import make_norm
from .outputs import as_asked, is_asked, selected_states
from .paged import PagedCache, is_paged, paged_layout
from .pretrained import AlibiGPTPreTrainedModel
from .versions import warn_if_newer_than_tried
from .windows import WindowGuarantee


class AlibiGPTModel(AlibiGPTPreTrainedModel):
    """The decoder without a head: tokens in, hidden states out.

    Other position methods override three things: `with_positions`, what is added to embeddings; `attention_class`,
    whose `with_positions` changes queries and keys; and the config's `slopes`.
    """

    _auto_class = "AutoModel"
    attention_class = AlibiGPTAttention

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        warn_if_newer_than_tried()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embedding_norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(
            AlibiGPTDecoderLayer(config, i, self.attention_class) for i in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config)
        if config.alibi_slopes_trainable:
            # Logarithms keep slopes positive; "bias" in the name keeps weight decay away.
            # The default dtype is of 16 bits while such a model is made.
            dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
            self.bias_log_slopes = nn.Parameter(torch.empty(config.num_attention_heads, dtype=dtype))
            self._keep_in_fp32_modules_strict = {"bias_log_slopes"}
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the decoder.

        Args:
            input_ids: `[batch, queries]`, tokens. Exactly one of `input_ids` and `inputs_embeds`.
            attention_mask: `[batch, tokens]` with 0 for padding and 1 or document numbers for tokens, cached tokens
                included, or `[batch, 1 or heads, queries, keys]`, boolean (True: visible) or added to the scores.
            position_ids: `[batch, queries]`. Positions that do not go on begin a document, which does not see the
                one before. Otherwise only a four-dimensional mask needs them.
            past_key_values: The cache of keys and values.
            inputs_embeds: `[batch, queries, hidden_size]`, in place of `input_ids`.
            use_cache: Whether to return the cache.
            cache: Another name of `past_key_values`, and the one under which continuous batching passes its cache;
                see `paged_layout`.
            return_dict: False returns a tuple; `None` does what the config says.
            kwargs: `seq_idx`, `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`, other ways to say
                where documents end (`documents.py`), and `output_hidden_states` and `output_attentions`, which the
                config has too.

        Returns:
            The hidden states `[batch, queries, hidden_size]` after the last norm, and the cache.

        Raises:
            ValueError: If both or none of `input_ids` and `inputs_embeds` are given, if arguments do not fit or
                contradict each other, for arguments that the model does not know (`arguments.py`), or if a cache is
                given where gradient checkpointing would write to it twice.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        past_key_values = only_cache(past_key_values, cache)
        if past_key_values is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                "Gradient checkpointing runs each layer again in the backward pass, and would add its tokens to the "
                "cache twice. Leave the cache out, switch checkpointing off, call model.eval(), or run the model "
                "under torch.no_grad()."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if past_key_values is None and self._makes_cache(use_cache):
            past_key_values = DynamicCache(config=self.config)

        if isinstance(past_key_values, WindowedCache):
            check_windowed_cache(self, past_key_values)
        slopes = self.slopes(inputs_embeds)
        if is_paged(past_key_values, kwargs):
            assert position_ids is not None  # continuous batching always gives them
            layout = paged_layout(slopes, attention_mask, position_ids, **kwargs)
            past_key_values = PagedCache(past_key_values, kwargs)
        else:
            packing = Packing.taken_from(kwargs)
            check_arguments(kwargs, inputs_embeds.shape[1], past_key_values)
            layout = token_layout(slopes, inputs_embeds, attention_mask, position_ids, past_key_values, packing)
        if self.config.slopes_depend_on_length:
            slopes = interpolated_slopes(layout.slopes, self.config.training_length, layout.text_length())
            layout = layout._replace(slopes=slopes)
        wanted_states = is_asked("output_hidden_states", kwargs, self.config)
        kwargs["output_attentions"] = is_asked("output_attentions", kwargs, self.config)
        if kwargs["output_attentions"] and not backend(self.config._attn_implementation).weights:
            raise ValueError(
                f"{self.config._attn_implementation} computes no attention weights to output; call "
                "model.set_attn_implementation('eager') first."
            )
        states, weights = [], []
        positions = layout.positions() if position_ids is None else position_ids.to(inputs_embeds.device)
        hidden_states = self.dropout(self.embedding_norm(self.with_positions(inputs_embeds, positions)))
        sealed = SealedLayout(layout)
        for layer in self.layers[: self.config.num_hidden_layers]:  # a draft model that exits early has lowered it
            if wanted_states:
                states.append(hidden_states)
            # By position: Transformers takes away a cache with a name from layers with gradient checkpointing, some
            # versions even where no gradient is computed.
            output = layer(hidden_states, sealed, past_key_values, **kwargs)
            hidden_states, *layer_weights = output if isinstance(output, tuple) else (output,)
            weights += [part for part in layer_weights if part is not None]
        hidden_states = self.norm(hidden_states)
        outputs = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=selected_states([*states, hidden_states], wanted_states) if wanted_states else None,
            attentions=tuple(weights) if kwargs["output_attentions"] else None,
            **{CACHE_NAME: past_key_values},
        )
        return as_asked(outputs, return_dict, self.config)

    def _makes_cache(self, use_cache: bool | None) -> bool:
        """Whether forward returns a cache when it has got none; layers that run again in backward can have none."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return False
        return bool(self.config.use_cache if use_cache is None else use_cache)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and casts the model, but leaves trained slopes in float32 where the weights get 16 bits.

        `to`, `half`, `bfloat16` and their like all come here.
        """
        slopes = getattr(self, "bias_log_slopes", None)
        if slopes is None:
            return super()._apply(fn, recurse)
        exact = [slopes] if slopes.grad is None else [slopes, slopes.grad]

        def keeping_slopes(states: Tensor) -> Tensor:
            changed = fn(states)
            is_exact = any(states is other for other in exact)
            return states.to(changed.device) if is_exact and changed.dtype.itemsize < 4 else changed

        return super()._apply(keeping_slopes, recurse)

    def with_positions(self, inputs_embeds: Tensor, positions: Tensor) -> Tensor:
        """Returns the embeddings as the first layer gets them: with ALiBi, positions have no part in them.

        Args:
            inputs_embeds: `[batch, queries, hidden_size]`.
            positions: `[batch or 1, queries]`, the caller's `position_ids`, or else those in each document from 0.
        """
        return inputs_embeds

    def slopes(self, like: Tensor) -> Tensor:
        """Returns the slopes `[heads]`, learned or not, linearly scaled: on the device of `like`, in its precision.

        That is float32 at least, so that no cast of the weights rounds them.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.config.alibi_slopes_trainable:
            if self.bias_log_slopes.dtype.itemsize < 4:
                raise ValueError(
                    f"The trained slopes have arrived in {self.bias_log_slopes.dtype}, which rounds them by up to 2%. "
                    "Mixed precision that casts parameters (of FSDP and DeepSpeed) does so: keep parameters in "
                    "float32 (no param_dtype) and compute in 16 bits under torch.autocast."
                )
            slopes = self.bias_log_slopes.to(dtype).exp()
        else:
            slopes = torch.tensor(self.config.slopes, dtype=dtype, device=like.device)
        return slopes / self.config.slope_divisor

    def window_guarantees(self) -> list[WindowGuarantee] | None:
        """Returns the windows of each layer, from the gains of its QK-norm as they are now.

        `None` where there is no guarantee before any data, see `AlibiGPTConfig.window_guarantee`, and where other
        things than these gains may decide how large queries and keys are: an adapter, a hook, a parametrization, or
        a weight that is sharded or offloaded.
        """
        return window_guarantees(self)

    def windowed_cache(self, offloading: bool = False) -> WindowedCache | None:
        """Returns an empty cache in which no head holds more than its window, see `cache.py`.

        Args:
            offloading: Whether keys and values wait on the CPU while other layers are at work.

        Returns:
            The cache, or `None` where it would not be lossless or cannot be read: without `window_guarantees`, with
            another attention than `sdpa`, and with weights that are not all here.
        """
        return windowed_cache(self, offloading)


class AlibiGPTForCausalLM(AlibiGPTPreTrainedModel, AlibiGenerationMixin):
    """The language model: the decoder and an output layer over the vocabulary."""

    _auto_class = "AutoModelForCausalLM"
    decoder_class = AlibiGPTModel
    _table_of_names = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # annotated too narrowly
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # whatever a subclass is called
        self.model = self.decoder_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predicts the next token at every position; further arguments as in `AlibiGPTModel.forward`.

        Args:
            labels: `[batch, queries]`, the same tokens as `input_ids`, shifted here; -100 is not scored.
            logits_to_keep: Number of last positions to compute logits for, 0 for all, or a 1D tensor of
                positions.

        Returns:
            The logits `[batch, kept, vocab_size]`, the cache, and with `labels` the mean loss in nats
            per scored token.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        outputs = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
        return as_asked(outputs, return_dict, self.config)


class AlibiGPTWithHead(AlibiGPTPreTrainedModel):
    """A model that has its decoder in `model`, as those of `heads.py` expect."""

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        self.model = AlibiGPTModel(config)


class AlibiGPTForSequenceClassification(SequenceClassificationHead, AlibiGPTWithHead):
    """The decoder and a linear layer that classifies a text from its last token."""

    _auto_class = "AutoModelForSequenceClassification"
    _table_of_names = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"


class AlibiGPTForTokenClassification(TokenClassificationHead, AlibiGPTWithHead):
    """The decoder and a linear layer that classifies every token."""

    _auto_class = "AutoModelForTokenClassification"
    _table_of_names = "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"


class AlibiGPTForQuestionAnswering(QuestionAnsweringHead, AlibiGPTWithHead):
    """The decoder and a linear layer that scores every token as start and end of the answer."""

    _auto_class = "AutoModelForQuestionAnswering"
    _table_of_names = "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"


__all__ = [
    "AlibiGPTForCausalLM",
    "AlibiGPTForQuestionAnswering",
    "AlibiGPTForSequenceClassification",
    "AlibiGPTForTokenClassification",
    "AlibiGPTModel",
    "AlibiGPTPreTrainedModel",
]
