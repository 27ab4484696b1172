"""Rotary position embeddings: queries and keys are rotated by angles that grow with the position.

Identical to AlibiGPT except:

- Every slope is zero.
- Pairs of elements of each query and key are rotated, after QK-norm, by position times frequency. The frequencies go
  from 1 to almost 1 / 10,000. A score then depends on the distance of its query and key.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864), section 3.2.
Importing this module registers the model with the Auto classes as `rotary_gpt`.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ..model.layers import AlibiGPTAttention
from ..model.layout import TokenLayout
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM, AlibiGPTModel
from .base import UnbiasedConfig

BASE = 10_000.0


@strict
class RotaryGPTConfig(UnbiasedConfig):
    """Configuration of the model with rotary positions. `head_dim` must be even."""

    model_type = "rotary_gpt"
    _auto_map = {"AutoConfig": "rotary.RotaryGPTConfig"}

    def validate_architecture(self) -> None:
        """Checks what `AlibiGPTConfig` checks, and `head_dim`.

        Raises:
            ValueError: If fields contradict each other, or `head_dim` is odd. The config raises it as a
                `StrictDataclassError`.
        """
        super().validate_architecture()
        if self.head_dim % 2:
            raise ValueError(
                f"Rotary positions rotate pairs of elements, so head_dim must be even, got {self.head_dim}."
            )


def rotated(states: Tensor, positions: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i + d/2}) by position times BASE^(-2i / d).

    Args:
        states: `[batch, heads, tokens, head_dim]`.
        positions: `[batch or 1, tokens]`, integers.

    Returns:
        The rotated states. Angles are computed in float32 or better, because 16 bits cannot hold positions.
    """
    half = states.shape[3] // 2
    dtype = torch.promote_types(states.dtype, torch.float32)
    frequencies = BASE ** (-torch.arange(half, device=states.device, dtype=dtype) / half)
    angles = positions[:, None, :, None] * frequencies  # [batch or 1, 1, tokens, half]
    first, second = states.to(dtype).chunk(2, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(states.dtype)


class RotaryGPTAttention(AlibiGPTAttention):
    """Attention with rotated queries and keys."""

    def with_positions(
        self, query: Tensor, key: Tensor, hidden_states: Tensor, layout: TokenLayout
    ) -> tuple[Tensor, Tensor]:
        """Rotates queries and keys by their positions in their documents."""
        positions = layout.positions()
        return rotated(query, positions), rotated(key, positions)


class RotaryGPTModel(AlibiGPTModel):
    """The decoder with rotary positions."""

    config: RotaryGPTConfig
    _auto_map = RotaryGPTConfig._auto_map | {
        "AutoModel": "rotary.RotaryGPTModel",
        "AutoModelForCausalLM": "rotary.RotaryGPTForCausalLM",
    }
    attention_class = RotaryGPTAttention


class RotaryGPTForCausalLM(AlibiGPTForCausalLM):
    """The language model with rotary positions."""

    config: RotaryGPTConfig
    _auto_map = RotaryGPTModel._auto_map
    decoder_class = RotaryGPTModel


AutoConfig.register(RotaryGPTConfig.model_type, RotaryGPTConfig)
AutoModelForCausalLM.register(RotaryGPTConfig, RotaryGPTForCausalLM)
