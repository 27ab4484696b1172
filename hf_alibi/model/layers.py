"""The layers of the decoder: attention, feed-forward layer, and the decoder layer that contains both.

Only one call is specific to ALiBi: `AlibiGPTAttention.forward` calls the backend, which adds the bias.
"""

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import backend
from .configuration_alibi_gpt import AlibiGPTConfig
from .growing import GrowingCache
from .layout import TokenLayout
from .norms import AlibiGPTHeadRMSNorm, known_gain, make_norm, make_qk_norms
from .ranks import heads_of_this_rank, of_this_rank


class SealedLayout:
    """A wrapper that passes the layout to the layers and hides its tensors from FSDP.

    With mixed precision, FSDP casts every tensor among a layer's arguments, also inside tuples, dataclasses and
    dictionaries. It would round slopes and masks to 16 bits.
    """

    def __init__(self, layout: TokenLayout) -> None:
        self.layout = layout

    def to(self, device: Any, **kwargs: Any) -> "SealedLayout":
        """Returns a copy on another device. Accelerate calls this if layers are on several devices."""
        return SealedLayout(self.layout.to(device, **kwargs))


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
        # `_init_weights` reads this attribute.
        self.o_proj.adds_to_residual = True  # type: ignore[assignment]
        self.q_norm, self.k_norm = make_qk_norms(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: SealedLayout,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes attention.

        Args:
            hidden_states: `[batch, queries, hidden_size]`.
            attention_mask: The layout. Transformers gives this argument its name.
            past_key_values: The cache, to which the new keys and values are added.
            kwargs: Passed on to the backend.

        Returns:
            The output `[batch, queries, hidden_size]`, and with `eager` the attention weights, otherwise `None`.
        """
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if (limit := self.config.clip_qkv) is not None:
            query, key, value = (states.clamp(-limit, limit) for states in (query, key, value))
        query = self._normed_query(query.view(head_shape)).transpose(1, 2)
        key = self.k_norm(key.view(head_shape)).transpose(1, 2)
        value = value.view(head_shape).transpose(1, 2)
        query, key = self.with_positions(query, key, hidden_states, attention_mask.layout)
        key_norms = None
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
            if isinstance(past_key_values, GrowingCache):
                key_norms = past_key_values.key_norms(self.layer_idx)
        layout = of_this_rank(attention_mask.layout, self.q_proj.weight, query.shape[1])
        if layout.exchange is not None:
            tolerance = self.config.window_tolerance
            key, value = layout.exchange(query, key, value, layout.slopes, self.scaling, tolerance)
            # Other ranks have other keys.
            key_norms = None
        output, weights = self.attend(query, key, value, layout, self.scaling, key_norms=key_norms, **kwargs)
        return self.o_proj(output.reshape(*input_shape, -1)), weights

    def with_positions(
        self, query: Tensor, key: Tensor, hidden_states: Tensor, layout: TokenLayout
    ) -> tuple[Tensor, Tensor]:
        """Applies positions to queries and keys. ALiBi returns them unchanged; other position methods override this.

        Args:
            query: `[batch, heads, queries, head_dim]`.
            key: `[batch, key_value_heads, queries, head_dim]`, the new keys, before they are cached.
            hidden_states: `[batch, queries, hidden_size]`, the input of the attention.
            layout: Positions of the tokens.
        """
        return query, key

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Calls the backend. Other position methods may override this.

        Args:
            query: `[batch, heads, queries, head_dim]`.
            key: `[batch, key_value_heads, keys, head_dim]`, cached keys included.
            value: `[batch, key_value_heads, keys, head_dim]`.
            layout: Positions and visibility of the tokens.
            scaling: Factor of the scores before the bias is added.
            kwargs: Passed on to the backend.

        Returns:
            The output `[batch, queries, heads, head_dim]`, and with `eager` the attention weights, otherwise `None`.
        """
        dropout = self.config.attention_dropout if self.training else 0.0
        attention = backend(self.config._attn_implementation).forward
        return attention(self, query, key, value, layout, scaling=scaling, dropout=dropout, **kwargs)

    def _normed_query(self, query: Tensor) -> Tensor:
        if isinstance(self.q_norm, AlibiGPTHeadRMSNorm):
            return self.q_norm(query, heads_of_this_rank(self.q_proj.weight, self.config.num_attention_heads))
        return self.q_norm(query)

    def known_gains(self) -> tuple[Tensor, Tensor] | None:
        """Returns the QK-norm gains of queries and keys, or `None` if they do not bound all scores.

        Their shapes are those of `norms.known_gain`.

        A subclass, or an instance with another `forward`, may compute scores in other ways.
        """
        if type(self) is not AlibiGPTAttention or "forward" in vars(self):
            return None
        heads = self.config.num_attention_heads
        query_gain, key_gain = (known_gain(norm, heads, self.head_dim) for norm in (self.q_norm, self.k_norm))
        return None if query_gain is None or key_gain is None else (query_gain, key_gain)


class AlibiGPTMLP(nn.Module):
    """The feed-forward layer: down(activation(up(x))), or with a gate down(activation(gate(x)) * up(x))."""

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
    """Attention and feed-forward layer. A norm precedes each, and their outputs are added to the residual stream."""

    def __init__(
        self, config: AlibiGPTConfig, layer_idx: int, attention_class: type[AlibiGPTAttention] = AlibiGPTAttention
    ) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = attention_class(config, layer_idx)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = AlibiGPTMLP(config)
        self.is_parallel = config.use_parallel_residual
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: SealedLayout,
        past_key_values: Cache | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Maps `[batch, queries, hidden_size]` to the same shape.

        With `output_attentions`, also returns the attention weights.
        """
        attended, weights = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask,
            past_key_values,
            output_attentions=output_attentions,
            **kwargs,
        )
        sum_so_far = hidden_states + self.dropout(attended)
        mlp_input = hidden_states if self.is_parallel else sum_so_far
        hidden_states = sum_so_far + self.dropout(self.mlp(self.post_attention_layernorm(mlp_input)))
        return (hidden_states, weights) if output_attentions else hidden_states
