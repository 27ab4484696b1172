"""AlibiGPT: a decoder-only language model with ALiBi, in Transformers' conventions.

This file contains the decoder, then the language model, then models with other heads. `AlibiGPTModel.forward` computes
once which keys each query sees and at which distances (`layout.py`). Its layers (`layers.py`) add the bias.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .alibi import interpolated_slopes
from .arguments import check_arguments, check_shape
from .attention import backend, check_any_bias
from .cache import WindowedCache
from .cache_names import CACHE_NAME, only_cache
from .configuration_alibi_gpt import AlibiGPTConfig
from .decoder_windows import check_own_cache, new_cache, window_guarantees, windowed_cache
from .documents import Packing
from .generation import AlibiGenerationMixin
from .growing import GrowingCache
from .heads import MultipleChoiceHead, QuestionAnsweringHead, SequenceClassificationHead, TokenClassificationHead
from .layers import AlibiGPTAttention, AlibiGPTDecoderLayer, SealedLayout
from .layout import TokenLayout, token_layout
from .liger import register_with_liger
from .norms import make_norm
from .outputs import as_asked, is_asked, selected_states
from .paged import PagedCache, is_paged, paged_layout
from .pretrained import AlibiGPTPreTrainedModel
from .ranks import first_layer, refuse_torch_context_parallel, whole_kwargs
from .versions import warn_if_newer_than_tried
from .windows import WindowGuarantee


class AlibiGPTModel(AlibiGPTPreTrainedModel):
    """The decoder without a head, from tokens to hidden states.

    Other position methods override `with_positions`, which may add to embeddings, `with_bias`, which may put another
    bias in place of the slopes, `attention_class`, whose methods may change queries and keys, or the config's
    `slopes`. They set `has_linear_bias` to False if their bias is not linear in the distance.
    """

    attention_class = AlibiGPTAttention
    has_linear_bias = True

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
            # Logarithms keep slopes positive. Trainer applies no weight decay to parameters with "bias" in their name.
            # The default dtype has 16 bits while a model with 16-bit weights is created.
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
            input_ids: `[batch, queries]`, tokens. Give exactly one of `input_ids` and `inputs_embeds`.
            attention_mask: `[batch, tokens]`, cached tokens included: 0 for padding, and 1 or document numbers for
                tokens. Or `[batch, 1 or heads, queries, keys]`, boolean (True: visible) or added to the scores.
            position_ids: `[batch, queries]`. A position that does not exceed the previous one begins a new document,
                which does not see earlier ones. Positions are optional; a four-dimensional mask takes distances from
                them.
            past_key_values: The cache of keys and values.
            inputs_embeds: `[batch, queries, hidden_size]`, instead of `input_ids`.
            use_cache: Whether to return the cache.
            cache: Another name of `past_key_values`. Continuous batching passes its cache under this name, see
                `paged_layout`.
            return_dict: Whether to return an output object, not a tuple; `None` for the config's value.
            kwargs: `context_shard`, this rank's part of the rows (`hf_alibi.training.ContextParallel` makes it);
                `one_document`, whether a row with several documents raises an error; `seq_idx`, `cu_seq_lens_q`,
                `cu_seq_lens_k`, `max_length_q` and `max_length_k`, which describe documents (`documents.py`); and
                `output_hidden_states` and `output_attentions`, which override the config.

        Returns:
            The hidden states `[batch, queries, hidden_size]` after the last norm, and the cache.

        Raises:
            ValueError: If both or none of `input_ids` and `inputs_embeds` are given, if arguments do not fit or
                contradict each other, if the model does not know an argument (`arguments.py`), or if a cache is given
                although gradient checkpointing would write to it twice.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        refuse_torch_context_parallel()
        kwargs = whole_kwargs(kwargs)
        past_key_values = self._cache_of_pass(only_cache(past_key_values, cache), use_cache, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        check_shape(inputs_embeds)
        wanted_states = is_asked("output_hidden_states", kwargs, self.config)
        kwargs["output_attentions"] = self._computes_weights(kwargs)
        layout, past_key_values = self._layout_of_pass(
            inputs_embeds, attention_mask, position_ids, past_key_values, kwargs
        )
        states, weights = [], []
        if isinstance(self.layers[0], nn.Identity):
            # A later pipeline stage: these are hidden states, in a dtype that Transformers takes from some parameter.
            hidden_states = inputs_embeds.to(self.dtype)
        else:
            positions = layout.positions() if position_ids is None else position_ids.to(inputs_embeds.device)
            hidden_states = self.dropout(self.embedding_norm(self.with_positions(inputs_embeds, positions)))
        sealed = SealedLayout(layout)
        # A draft model with early exit lowers num_hidden_layers.
        for layer in self.layers[: self.config.num_hidden_layers]:
            if wanted_states:
                states.append(hidden_states)
            # The cache is a positional argument: with gradient checkpointing, Transformers removes a cache that is a
            # keyword argument, in some versions even if no gradient is computed.
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

    def _cache_of_pass(self, cache: Cache | None, use_cache: bool | None, kwargs: dict[str, Any]) -> Cache | None:
        """Returns the caller's cache, after checks, or a new one if the pass makes one."""
        # Layers that run again in the backward pass would write to a cache twice.
        runs_again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if cache is None:
            wanted = self.config.use_cache if use_cache is None else use_cache
            makes_cache = wanted and not runs_again and kwargs.get("context_shard") is None
            return DynamicCache(config=self.config) if makes_cache else None
        if runs_again:
            raise ValueError(
                "Gradient checkpointing runs each layer again in the backward pass, which would add the tokens to the "
                "cache twice. Leave the cache out, turn checkpointing off, call model.eval(), or run the model under "
                "torch.no_grad()."
            )
        if isinstance(cache, GrowingCache):
            check_own_cache(self, cache)
        return cache

    def _computes_weights(self, kwargs: dict[str, Any]) -> bool:
        """Whether attention weights are asked for, which not every backend computes."""
        asked = is_asked("output_attentions", kwargs, self.config)
        if asked and not backend(self.config._attn_implementation).weights:
            raise ValueError(
                f"{self.config._attn_implementation} computes no attention weights for output_attentions; call "
                "model.set_attn_implementation('eager') first."
            )
        return asked

    def _layout_of_pass(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        kwargs: dict[str, Any],
    ) -> tuple[TokenLayout, Cache | PagedCache | None]:
        """Returns the layout with its bias, and the cache as layers read it. Takes what it uses from `kwargs`."""
        shard, one_document = kwargs.pop("context_shard", None), kwargs.pop("one_document", False)
        slopes = self.slopes(inputs_embeds)
        layer_index = first_layer(self.layers)
        paged = is_paged(cache, kwargs)
        if paged:
            # Continuous batching always passes positions.
            assert position_ids is not None
            layout = paged_layout(slopes, attention_mask, position_ids, **kwargs)
        else:
            packing = Packing.taken_from(kwargs)
            check_arguments(kwargs, inputs_embeds.shape[1], cache, layer_index)
            if shard is None:
                layout = token_layout(slopes, inputs_embeds, attention_mask, position_ids, cache, packing, layer_index)
            elif cache is None and attention_mask is None:
                layout = shard.whole_layout(slopes)
            else:
                raise ValueError(
                    "With context parallelism, leave out past_key_values and attention_mask: there is no cache, and "
                    "ContextParallel.split has taken the mask into account."
                )
        if one_document:
            layout.check_one_document()
        layout = self.with_bias(layout)
        if not self.has_linear_bias:
            check_any_bias(self.config._attn_implementation)
        if shard is not None:
            layout = shard.own_layout(layout)
        return layout, PagedCache(cache, kwargs) if paged else cache

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and casts the model, but keeps trained slopes in float32 if weights are cast to 16 bits.

        `to`, `half`, `bfloat16` and similar methods all call this one.
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
        """Applies positions to embeddings. ALiBi returns them unchanged; other position methods override this.

        Args:
            inputs_embeds: `[batch, queries, hidden_size]`.
            positions: `[batch or 1, queries]`, the caller's `position_ids`, or positions in each document from 0.
        """
        return inputs_embeds

    def with_bias(self, layout: TokenLayout) -> TokenLayout:
        """Returns the layout with the bias of this pass.

        ALiBi changes the slopes if they depend on the length. Other position methods override this.
        """
        if not self.config.slopes_depend_on_length:
            return layout
        slopes = interpolated_slopes(layout.slopes, self.config.training_length, layout.text_length())
        return layout._replace(slopes=slopes)

    def slopes(self, like: Tensor) -> Tensor:
        """Returns the slopes `[heads]`, learned or fixed, after a linear `alibi_scaling`.

        They are on the device of `like` and in its dtype, but at least in float32, so that no cast of the weights
        rounds them.

        Raises:
            ValueError: If trained slopes have been cast to 16 bits.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.config.alibi_slopes_trainable:
            if self.bias_log_slopes.dtype.itemsize < 4:
                raise ValueError(
                    f"The trained slopes have been cast to {self.bias_log_slopes.dtype}, which rounds them by up to "
                    "2%. Mixed precision of FSDP and DeepSpeed casts parameters. Keep parameters in float32 (no "
                    "param_dtype) and compute in 16 bits under torch.autocast."
                )
            slopes = self.bias_log_slopes.to(dtype).exp()
        else:
            slopes = torch.tensor(self.config.slopes, dtype=dtype, device=like.device)
        return slopes / self.config.slope_divisor

    def window_guarantees(self) -> list[WindowGuarantee] | None:
        """Returns the windows of each layer, computed from the current gains of its QK-norm.

        Returns:
            One guarantee per layer, or `None` if windows do not follow from the gains: see
            `AlibiGPTConfig.window_guarantee`. Adapters, hooks, parametrizations, and sharded or offloaded weights also
            give `None`, because more than the gains may then decide how large queries and keys are.
        """
        return window_guarantees(self)

    def windowed_cache(self, offloading: bool = False) -> WindowedCache | None:
        """Returns an empty cache in which each head keeps only the keys inside its window, see `cache.py`.

        Args:
            offloading: Whether keys and values are kept on the CPU while other layers compute.

        Returns:
            The cache, or `None` if it would not be lossless or cannot be read: without `window_guarantees`, with a
            backend other than `sdpa`, with pipeline parallelism, or with weights that FSDP has sharded or that are on
            the meta device. With tensor parallelism, the cache has the windows of this rank's heads.
        """
        return windowed_cache(self, offloading)

    def new_cache(self, offloading: bool = False, windowed: bool = True) -> GrowingCache:
        """Returns an empty cache: the windowed one if there is one, otherwise one that keeps every key.

        Args:
            offloading: Whether keys and values are kept on the CPU while other layers compute.
            windowed: False for a cache that keeps every key in any case.
        """
        return new_cache(self, offloading, windowed)


class AlibiGPTForCausalLM(AlibiGPTPreTrainedModel, AlibiGenerationMixin):
    """The language model: the decoder and an output layer over the vocabulary."""

    decoder_class = AlibiGPTModel
    _table_of_names = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # annotated too narrowly
    # A loss from hidden states, see `liger.py`.
    fused_loss: Callable[..., Tensor] | None = None

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        register_with_liger(config.model_type)
        # Transformers would derive it from the class name, which a subclass may change.
        self.loss_type = "ForCausalLM"
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
        """Predicts the next token at every position. The other arguments are those of `AlibiGPTModel.forward`.

        Args:
            labels: `[batch, queries]`, the same tokens as `input_ids`; the loss shifts them. -100 is not scored.
            logits_to_keep: Number of last positions for which logits are computed, 0 for all, or a one-dimensional
                tensor of positions.

        Returns:
            The logits `[batch, kept, vocab_size]`, the cache, and with `labels` the mean loss in nats per scored
            token. A fused loss makes no logits: by default in training only, otherwise as `skip_logits` says.
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
        hidden_states = outputs.last_hidden_state[:, kept]
        logits, loss = None, None
        if self.fused_loss is not None and labels is not None and kwargs.get("skip_logits", self.training):
            loss = self.fused_loss(self.lm_head, hidden_states, labels, **kwargs)
        else:
            logits = self.lm_head(hidden_states)
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
    """A model with its decoder in the attribute `model`, as the classes in `heads.py` expect."""

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        self.model = AlibiGPTModel(config)


class AlibiGPTForSequenceClassification(SequenceClassificationHead, AlibiGPTWithHead):
    """The decoder and a linear layer that classifies a text from its last token."""

    _table_of_names = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"


class AlibiGPTForMultipleChoice(MultipleChoiceHead, AlibiGPTWithHead):
    """The decoder and a linear layer that scores each of several texts from its last token, to choose one."""

    _table_of_names = "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES"


class AlibiGPTForTokenClassification(TokenClassificationHead, AlibiGPTWithHead):
    """The decoder and a linear layer that classifies every token."""

    _table_of_names = "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"


class AlibiGPTForQuestionAnswering(QuestionAnsweringHead, AlibiGPTWithHead):
    """The decoder and a linear layer that scores every token as start and end of the answer."""

    _table_of_names = "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"


__all__ = [
    "AlibiGPTForCausalLM",
    "AlibiGPTForMultipleChoice",
    "AlibiGPTForQuestionAnswering",
    "AlibiGPTForSequenceClassification",
    "AlibiGPTForTokenClassification",
    "AlibiGPTModel",
    "AlibiGPTPreTrainedModel",
]
