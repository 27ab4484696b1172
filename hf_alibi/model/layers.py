"""The layers of the decoder: attention, feed-forward layer, and the decoder layer of both.

What is particular to ALiBi is one call in `AlibiGPTAttention.forward`: the backend that adds the bias.
"""

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import backend
from .configuration_alibi_gpt import AlibiGPTConfig
from .layout import TokenLayout
from .norms import AlibiGPTRMSNorm, known_gain, make_norm


class SealedLayout:
    """The layout on its way to the layers, in a form that no wrapper of a layer looks into.

    FSDP with mixed precision casts every tensor that a layer is given, in tuples, dataclasses and dictionaries too.
    Slopes and masks would be rounded to 16 bits.
    """

    def __init__(self, layout: TokenLayout) -> None:
        self.layout = layout

    def to(self, device: Any, **kwargs: Any) -> "SealedLayout":
        """Returns a copy on another device; accelerate asks for it where layers are on several."""
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
        self.o_proj.adds_to_residual = True  # type: ignore[assignment]  # see `_init_weights`
        self.q_norm = AlibiGPTRMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = AlibiGPTRMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: SealedLayout,
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
        query, key = self.with_positions(query, key, attention_mask.layout)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention = backend(self.config._attn_implementation).forward
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask.layout,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1)), weights

    def with_positions(self, query: Tensor, key: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Returns queries and keys as they meet: with ALiBi, positions have no part in them.

        Args:
            query: `[batch, heads, queries, head_dim]`.
            key: `[batch, key_value_heads, queries, head_dim]`, the new ones, before they are cached.
            layout: Positions of the tokens.
        """
        return query, key

    def known_gains(self) -> tuple[Tensor, Tensor] | None:
        """Returns the gains `[head_dim]` of queries and keys if they alone bound every score, otherwise `None`."""
        if type(self) is not AlibiGPTAttention or "forward" in vars(self):
            return None
        query_gain, key_gain = (known_gain(norm, self.head_dim) for norm in (self.q_norm, self.k_norm))
        return None if query_gain is None or key_gain is None else (query_gain, key_gain)


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
        """Maps `[batch, queries, hidden_size]` to the same shape; returns the attention weights too if asked to."""
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
