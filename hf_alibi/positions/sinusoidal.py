"""The baseline: the same model with sinusoidal position embeddings instead of ALiBi.

Both models share everything but the positions, so a difference in perplexity comes from the position method.
Source: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), section 3.5.
Importing this module registers the model with the Auto classes as `sinusoidal_gpt`.
"""

import inspect
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_import_files

from ..model.configuration_alibi_gpt import AlibiGPTConfig
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM, AlibiGPTModel

# Root mean squares of token embeddings and sinusoids.
TOKEN_SIZE = 0.3
SINUSOID_SIZE = TOKEN_SIZE / 8
QUERY_GAIN = 2.0


@strict
class SinusoidalGPTConfig(AlibiGPTConfig):
    """Configuration of the baseline: an AlibiGPT whose slopes are zero, so that it has neither bias nor windows."""

    model_type = "sinusoidal_gpt"
    # `SinusoidalGPTForCausalLM.save_pretrained` saves the code, and Transformers must not.
    _auto_class = None  # type: ignore[assignment]
    window_tolerance: int | float = 0.0

    @property
    def slopes(self) -> list[float]:
        """Zero for every head: distance costs nothing."""
        return [0.0] * self.num_attention_heads


def code_that_travels(file: Path) -> list[Path]:
    """Returns `file`, which defines a position method, and the files that the decoder needs."""
    decoder = Path(inspect.getfile(AlibiGPTModel))
    return [file, decoder, *map(Path, get_relative_import_files(decoder))]


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
    """The decoder with positions added to the token embeddings.

    It differs from the ALiBi decoder in more than the positions, so that it learns as fast as possible:

    - Token embeddings are normed, and the sinusoids added have an eighth of their size. Otherwise token embeddings
      grow many times over in the first hundred steps, and the positions become too small for attention to use.
    - Queries and keys start with the same projection. The product of two sinusoids is largest at close positions, so
      attention prefers near tokens from the first step, as ALiBi does. Compare Trockman and Kolter, "Mimetic
      Initialization of Self-Attention Layers" (arXiv 2305.09828).
    - The gains of the query norm start at 2, which makes this preference sharp enough.
    - The output projections of the layers start with the same standard deviation as all other weights, not a smaller
      one.

    Each of these helped this model in short runs, more than other sizes, gains and learning rates did. Gains of 2 and
    larger outputs made the ALiBi model worse.
    """

    config: SinusoidalGPTConfig

    def with_positions(self, inputs_embeds: Tensor, positions: Tensor) -> Tensor:
        """Adds the sinusoids of the positions to the normed embeddings."""
        sinusoids = sinusoidal_embeddings(positions, self.config.hidden_size)
        tokens = TOKEN_SIZE * F.rms_norm(inputs_embeds, [self.config.hidden_size])
        return tokens + SINUSOID_SIZE * math.sqrt(2) * sinusoids.to(tokens.dtype)


class SinusoidalGPTForCausalLM(AlibiGPTForCausalLM):
    """The baseline's language model."""

    config: SinusoidalGPTConfig
    # `save_pretrained` below saves the code, and Transformers must not.
    _auto_class = None  # type: ignore[assignment]
    _auto_map = {
        "AutoConfig": "sinusoidal.SinusoidalGPTConfig",
        "AutoModelForCausalLM": "sinusoidal.SinusoidalGPTForCausalLM",
    }

    def __init__(self, config: SinusoidalGPTConfig) -> None:
        super().__init__(config)
        self.model = SinusoidalGPTModel(config)
        self.post_init()
        for layer in self.model.layers:
            _begin_near_by(layer, config)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves the model with its code: this file, and the files of `model/` that it imports."""
        super().save_pretrained(save_directory, *args, **kwargs)
        for file in code_that_travels(Path(__file__)):
            # A saved model is one flat folder.
            code = file.read_text(encoding="utf-8").replace("from ..model.", "from .")
            (Path(save_directory) / file.name).write_text(code, encoding="utf-8")


@torch.no_grad()
def _begin_near_by(layer: Any, config: SinusoidalGPTConfig) -> None:
    """Sets the initial weights that `SinusoidalGPTModel` lists. A key head copies its first query head."""
    attention = layer.self_attn
    projection = attention.q_proj.weight.unflatten(0, (config.num_key_value_heads, -1, attention.head_dim))
    attention.k_proj.weight.copy_(projection[:, 0].flatten(0, 1))
    for output in (attention.o_proj, layer.mlp.down_proj):
        output.weight.normal_(std=config.initializer_range)
    if config.qk_norm:
        attention.q_norm.weight.fill_(QUERY_GAIN)


AutoConfig.register(SinusoidalGPTConfig.model_type, SinusoidalGPTConfig)
AutoModelForCausalLM.register(SinusoidalGPTConfig, SinusoidalGPTForCausalLM)
