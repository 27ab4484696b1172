"""AlibiGPT: a decoder-only language model without position embeddings, in Transformers' conventions.

Read downwards: attention, feed-forward layer, decoder layer, model, heads. What is particular to ALiBi
is one call each in `AlibiGPTModel.forward` (`token_layout`: which keys each query sees, how far away)
and in `AlibiGPTAttention.forward` (the attention implementation that adds the bias).
"""

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import AutoModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .alibi import interpolated_slopes
from .attention import ALL_ATTENTION_FUNCTIONS, eager_attention_forward
from .cache import WindowedCache
from .cache_names import CACHE_NAME, only_cache
from .configuration_alibi_gpt import AlibiGPTConfig
from .flash import HOW_TO_GET_FLASH_ATTENTION
from .generation import AlibiGenerationMixin
from .layout import TokenLayout, token_layout
from .paged import PagedCache, paged_layout
from .windows import WindowGuarantee, qk_norm_guarantee


class AlibiGPTRMSNorm(nn.RMSNorm):
    """RMSNorm with a gain that follows its input's dtype, which autocast may have lowered."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps `[..., size]` to the same shape, with root mean square 1 before the gain."""
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight.to(hidden_states.dtype), self.eps)


def _norm(config: AlibiGPTConfig) -> nn.Module:
    if config.norm_type == "rmsnorm":
        return AlibiGPTRMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class AlibiGPTAttention(nn.Module):
    """Causal self-attention with ALiBi, grouped key-value heads and optional QK-norm."""

    def __init__(self, config: AlibiGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.o_proj.adds_to_residual = True  # type: ignore[assignment]  # see `_init_weights`
        self.q_norm = AlibiGPTRMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = AlibiGPTRMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: TokenLayout,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the output `[batch, queries, hidden_size]` and, from `eager`, the attention weights."""
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if (limit := self.config.clip_qkv) is not None:
            query, key, value = (states.clamp(-limit, limit) for states in (query, key, value))
        query = self.q_norm(query.view(head_shape)).transpose(1, 2)
        key = self.k_norm(key.view(head_shape)).transpose(1, 2)
        value = value.view(head_shape).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1)), weights


class AlibiGPTMLP(nn.Module):
    """The feed-forward layer: up, activation, down; or, gated, up times the activation of a gate, and down."""

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__()
        self.is_gated = config.mlp_gated
        if self.is_gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.adds_to_residual = True  # type: ignore[assignment]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps `[..., hidden_size]` to the same shape."""
        up = self.up_proj(hidden_states)
        inner = self.act_fn(self.gate_proj(hidden_states)) * up if self.is_gated else self.act_fn(up)
        return self.down_proj(inner)


class AlibiGPTDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward layer, each normed before and added to the residual stream after."""

    def __init__(self, config: AlibiGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = AlibiGPTAttention(config, layer_idx)
        self.post_attention_layernorm = _norm(config)
        self.mlp = AlibiGPTMLP(config)
        self.is_parallel = config.use_parallel_residual
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: TokenLayout,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Maps `[batch, queries, hidden_size]` to the same shape."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), attention_mask, past_key_values, **kwargs)
        sum_so_far = hidden_states + self.dropout(attended)
        mlp_input = hidden_states if self.is_parallel else sum_so_far
        return sum_so_far + self.dropout(self.mlp(self.post_attention_layernorm(mlp_input)))


class AlibiGPTPreTrainedModel(PreTrainedModel):
    """Weights, saving and loading: what all AlibiGPT models share."""

    config: AlibiGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AlibiGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": AlibiGPTDecoderLayer, "attentions": AlibiGPTAttention}
    _auto_map = {
        "AutoConfig": "configuration_alibi_gpt.AlibiGPTConfig",
        "AutoModel": "modeling_alibi_gpt.AlibiGPTModel",
        "AutoModelForCausalLM": "modeling_alibi_gpt.AlibiGPTForCausalLM",
        "AutoModelForQuestionAnswering": "modeling_alibi_gpt.AlibiGPTForQuestionAnswering",
        "AutoModelForSequenceClassification": "modeling_alibi_gpt.AlibiGPTForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_alibi_gpt.AlibiGPTForTokenClassification",
    }

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves the model with its code, so that it also loads where this package is not installed.

        There, `trust_remote_code=True` has the Auto classes read the code from the folder.
        """
        self.config.auto_map = dict(self._auto_map)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Refuses an implementation that does not know ALiBi, or is not installed, before any weight is loaded."""
        if attn_implementation is not None:
            ALL_ATTENTION_FUNCTIONS.get_interface(attn_implementation, eager_attention_forward)
        try:
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        except ImportError as error:
            raise ImportError(f"{error} {HOW_TO_GET_FLASH_ATTENTION}") from error

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None, past_key_values: Cache | None = None, cache: Cache | None = None, **kwargs: Any
    ) -> Tensor | None:
        """Returns the mask that `generate` passes on with a static cache: the padding, at the cache's full length.

        Distances follow from the padding, so a mask of queries times keys would lose them; and a mask of
        constant size lets a compiled step serve the whole generation.
        """
        if attention_mask is None:
            return None
        length = only_cache(past_key_values, cache).get_max_length()
        return F.pad(attention_mask, (0, length - attention_mask.shape[-1]))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "adds_to_residual", False):
            # Each layer adds to the residual stream twice; the sum of all keeps the variance of one.
            additions = 2 * self.config.num_hidden_layers
            init.normal_(module.weight, std=self.config.initializer_range / math.sqrt(additions))
        elif isinstance(module, AlibiGPTModel) and self.config.alibi_slopes_trainable:
            init.copy_(module.bias_log_slopes, torch.tensor(self.config.slopes).log())


class AlibiGPTModel(AlibiGPTPreTrainedModel):
    """The decoder without a head: tokens in, hidden states out."""

    _auto_class = "AutoModel"

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embedding_norm = _norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(AlibiGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = _norm(config)
        if config.alibi_slopes_trainable:
            # Logarithms keep slopes positive; "bias" in the name keeps weight decay away.
            self.bias_log_slopes = nn.Parameter(torch.empty(config.num_attention_heads))
            self._keep_in_fp32_modules_strict = {"bias_log_slopes"}
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | PagedAttentionCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the decoder.

        Args:
            input_ids: `[batch, queries]`, tokens. Exactly one of `input_ids` and `inputs_embeds`.
            attention_mask: `[batch, tokens]` with 0 for padding, cached tokens included, or
                `[batch, 1 or heads, queries, keys]`, boolean (True: visible) or added to the scores.
            position_ids: `[batch, queries]`. Positions that restart at 0 start a new document, which
                does not see the one before; otherwise only a four-dimensional mask needs them.
            past_key_values: The cache of keys and values.
            inputs_embeds: `[batch, queries, hidden_size]`, in place of `input_ids`.
            use_cache: Whether to return the cache.
            cache: Another name of `past_key_values`, and the one under which continuous batching passes its cache;
                see `paged_layout`.

        Returns:
            The hidden states `[batch, queries, hidden_size]` after the last norm, and the cache.

        Raises:
            ValueError: If both or none of `input_ids` and `inputs_embeds` are given, or the mask does
                not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        past_key_values = only_cache(past_key_values, cache)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        if isinstance(past_key_values, WindowedCache) and self.config._attn_implementation != "sdpa":
            raise ValueError(
                f"Only sdpa reads a WindowedCache, not {self.config._attn_implementation}; pass a DynamicCache."
            )
        if isinstance(past_key_values, WindowedCache) and torch.compiler.is_exporting():
            raise ValueError(
                "An exported program would hold the WindowedCache at the length that it has now; pass a DynamicCache, "
                "or cache_implementation='dynamic' in the generation config."
            )
        slopes = self.slopes(inputs_embeds)
        if isinstance(past_key_values, PagedAttentionCache):
            layout = paged_layout(slopes, attention_mask, position_ids, **kwargs)
            past_key_values = PagedCache(past_key_values, kwargs)
        else:
            layout = token_layout(slopes, inputs_embeds, attention_mask, position_ids, past_key_values)
        if self.config.slopes_depend_on_length:
            slopes = interpolated_slopes(layout.slopes, self.config.max_position_embeddings, layout.text_length())
            layout = layout._replace(slopes=slopes)
        hidden_states = self.dropout(self.embedding_norm(inputs_embeds))
        for layer in self.layers[: self.config.num_hidden_layers]:  # a draft model that exits early has lowered it
            hidden_states = layer(hidden_states, attention_mask=layout, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: past_key_values})

    def slopes(self, like: Tensor) -> Tensor:
        """Returns the slopes `[heads]`, learned or not, linearly scaled: on the device of `like`, in its precision.

        That is float32 at least, so that no cast of the weights rounds them.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.config.alibi_slopes_trainable:
            slopes = self.bias_log_slopes.to(dtype).exp()
        else:
            slopes = torch.tensor(self.config.slopes, dtype=dtype, device=like.device)
        return slopes / self.config.slope_divisor

    def window_guarantees(self) -> list[WindowGuarantee] | None:
        """Returns the windows of each layer, from the gains of its QK-norm as they are now.

        `None` stands for windows that depend on the data (without QK-norm) or on the length of the text (dynamic
        `alibi_scaling`), and for none (`window_tolerance=0`).
        """
        config = self.config
        if not config.qk_norm or not config.window_tolerance or config.slopes_depend_on_length:
            return None
        slopes = self.slopes(self.embed_tokens.weight).tolist()
        attentions: list[Any] = [layer.self_attn for layer in self.layers[: config.num_hidden_layers]]
        gains = [(attention.q_norm.weight, attention.k_norm.weight) for attention in attentions]
        return [qk_norm_guarantee(slopes, *pair, config.window_tolerance) for pair in gains]

    def windowed_cache(self, offloading: bool = False) -> WindowedCache | None:
        """Returns an empty cache in which no head holds more than its window, see `cache.py`.

        Args:
            offloading: Whether keys and values wait on the CPU while other layers are at work.

        Returns:
            The cache, or `None` where it would not be lossless or cannot be read: without QK-norm or with
            `window_tolerance=0`, with slopes that depend on the length, with another attention than `sdpa`, and
            with weights that are not all here.
        """
        is_here = not any(hasattr(weight, "device_mesh") or weight.is_meta for weight in self.parameters())
        can_be_read = is_here and self.config._attn_implementation == "sdpa"
        guarantees = self.window_guarantees() if can_be_read else None
        if guarantees is None:
            return None
        slopes = self.slopes(self.embed_tokens.weight).detach()
        return WindowedCache([guarantee.windows for guarantee in guarantees], slopes, offloading)


class AlibiGPTForCausalLM(AlibiGPTPreTrainedModel, AlibiGenerationMixin):
    """The language model: the decoder and an output layer over the vocabulary."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # annotated too narrowly
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        self.model = AlibiGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
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
        cache: Cache | PagedAttentionCache | None = None,
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
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )


class AlibiGPTHead(AlibiGPTPreTrainedModel):
    """A model with one of Transformers' generic heads, which build their decoder through `AutoModel`."""

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        # A config loaded with the code of a folder has a class of its own, which AutoModel does not know yet.
        AutoModel.register(type(config), AlibiGPTModel, exist_ok=True)


class AlibiGPTForSequenceClassification(GenericForSequenceClassification, AlibiGPTHead):
    """The decoder and a linear layer that classifies a text from its last token."""

    _auto_class = "AutoModelForSequenceClassification"


class AlibiGPTForTokenClassification(GenericForTokenClassification, AlibiGPTHead):
    """The decoder and a linear layer that classifies every token."""

    _auto_class = "AutoModelForTokenClassification"


class AlibiGPTForQuestionAnswering(GenericForQuestionAnswering, AlibiGPTHead):
    """The decoder and a linear layer that scores every token as start and end of the answer."""

    _auto_class = "AutoModelForQuestionAnswering"


__all__ = [
    "AlibiGPTForCausalLM",
    "AlibiGPTForQuestionAnswering",
    "AlibiGPTForSequenceClassification",
    "AlibiGPTForTokenClassification",
    "AlibiGPTModel",
    "AlibiGPTPreTrainedModel",
]
