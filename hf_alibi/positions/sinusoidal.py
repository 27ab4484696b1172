"""Sinusoidal position embeddings, the method of the original transformer and the baseline of the paper.

Identical to AlibiGPT except:

- Every slope is zero, and sinusoids of the position are added to the token embeddings.
- Token embeddings are normed, and the sinusoids have `sinusoid_scale` of their size. Token embeddings grow many times
  over in the first hundred steps. Without the norm, attention could no longer see the positions by then.

With `mimetic_init`, which is the default, these weights start differently too:

- Queries and keys start with the same projection. The product of two sinusoids is largest at close positions, so
  attention prefers near tokens from the first step, as ALiBi does. Compare Trockman and Kolter, "Mimetic
  Initialization of Self-Attention Layers" (arXiv 2305.09828).
- The gains of the query norm start at 2, which makes this preference sharp enough.
- The output projections of the layers start with the same standard deviation as all other weights, not a smaller one.

These and the small sinusoids help this model to learn as fast as possible. Each of them helped it in short runs, more
than other sizes, gains and learning rates did. Gains of 2 and larger outputs made the ALiBi model worse.

Source: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), section 3.5. Importing this module registers
the model with the Auto classes as `sinusoidal_gpt`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM, AlibiGPTModel
from .base import UnbiasedConfig

# Root mean square of token embeddings.
TOKEN_SIZE = 0.3
QUERY_GAIN = 2.0


@strict
class SinusoidalGPTConfig(UnbiasedConfig):
    """Configuration of the model with sinusoidal positions.

    Args:
        sinusoid_scale: Root mean square of the sinusoids over that of the token embeddings, above 0.
        mimetic_init: Whether attention starts with a preference for near tokens, see the module.
    """

    model_type = "sinusoidal_gpt"
    _auto_map = {"AutoConfig": "sinusoidal.SinusoidalGPTConfig"}
    sinusoid_scale: int | float = 0.125
    mimetic_init: bool = True

    def validate_architecture(self) -> None:
        """Checks what `AlibiGPTConfig` checks, and `sinusoid_scale`.

        Raises:
            ValueError: If fields contradict each other, or `sinusoid_scale` is not positive and finite. The config
                raises it as a `StrictDataclassError`.
        """
        super().validate_architecture()
        if not 0 < self.sinusoid_scale < math.inf:
            raise ValueError(f"sinusoid_scale must be positive and finite, got {self.sinusoid_scale}.")


def sinusoidal_embeddings(position_ids: Tensor, hidden_size: int) -> Tensor:
    """Returns sines and cosines of the positions, at wavelengths from 2 pi to 10,000 x 2 pi.

    Args:
        position_ids: `[batch, tokens]`, integers.
        hidden_size: Width of an embedding, even.

    Returns:
        `[batch, tokens, hidden_size]`, float32, of root mean square sqrt(1/2).
    """
    half = torch.arange(hidden_size // 2, device=position_ids.device)
    angles = position_ids[..., None] * torch.exp(half * (-math.log(10_000.0) / (hidden_size // 2)))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class SinusoidalGPTModel(AlibiGPTModel):
    """The decoder with sinusoidal positions."""

    config: SinusoidalGPTConfig
    _auto_map = SinusoidalGPTConfig._auto_map | {
        "AutoModel": "sinusoidal.SinusoidalGPTModel",
        "AutoModelForCausalLM": "sinusoidal.SinusoidalGPTForCausalLM",
    }

    def with_positions(self, inputs_embeds: Tensor, positions: Tensor) -> Tensor:
        """Adds the sinusoids of the positions to the normed embeddings."""
        sinusoids = sinusoidal_embeddings(positions, self.config.hidden_size)
        tokens = TOKEN_SIZE * F.rms_norm(inputs_embeds, [self.config.hidden_size])
        return tokens + TOKEN_SIZE * self.config.sinusoid_scale * math.sqrt(2) * sinusoids.to(tokens.dtype)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if not self.config.mimetic_init:
            return
        for layer in self.layers:
            attention: Any = layer.self_attn
            mlp: Any = layer.mlp
            if module is attention.o_proj or module is mlp.down_proj:
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            elif module is attention.k_proj:
                # Does not change loaded weights. While Transformers calls this method, `nn.init` does not either.
                from transformers.initialization import copy_

                # Keys start with the projection of the first query head that looks at them.
                groups = (self.config.num_key_value_heads, -1, attention.head_dim)
                copy_(module.weight, attention.q_proj.weight.unflatten(0, groups)[:, 0].flatten(0, 1))
            elif module is attention.q_norm and getattr(module, "weight", None) is not None:
                nn.init.constant_(module.weight, QUERY_GAIN)


class SinusoidalGPTForCausalLM(AlibiGPTForCausalLM):
    """The language model with sinusoidal positions."""

    config: SinusoidalGPTConfig
    _auto_map = SinusoidalGPTModel._auto_map
    decoder_class = SinusoidalGPTModel


AutoConfig.register(SinusoidalGPTConfig.model_type, SinusoidalGPTConfig)
AutoModelForCausalLM.register(SinusoidalGPTConfig, SinusoidalGPTForCausalLM)
