"""The baseline of the comparison: the same model with sinusoidal position embeddings in place of ALiBi.

Everything but the positions is shared, so that a difference in perplexity is a difference of the
position method. Source: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), section 3.5.
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

TOKEN_SIZE = 0.3  # root mean square of a token embedding
SINUSOID_SIZE = TOKEN_SIZE / 8
QUERY_GAIN = 2.0


@strict
class SinusoidalGPTConfig(AlibiGPTConfig):
    """Configuration of the baseline: an AlibiGPT without bias, every slope being zero, hence without windows."""

    model_type = "sinusoidal_gpt"
    _auto_class = None  # type: ignore[assignment]  # the code is saved here, not by Transformers
    window_tolerance: int | float = 0.0

    @property
    def slopes(self) -> list[float]:
        """No penalty on distance."""
        return [0.0] * self.num_attention_heads


def code_that_travels(file: Path) -> list[Path]:
    """Returns this file of a position method, and those that the decoder needs."""
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
    """The decoder with positions added to the token embeddings, set up to learn as fast as we found a way to.

    Token embeddings grow many times over in the first hundred steps, while sinusoids stay as they are. Where
    the two begin on a par, positions have drowned before attention learns to use them; so token embeddings
    are normed, and sinusoids added at an eighth of their size.

    ALiBi attends to what is near from the first step. Here attention does so too if queries and keys begin with the
    same projection, the product of two sinusoids being largest where their positions are close (compare Trockman and
    Kolter, "Mimetic Initialization of Self-Attention Layers", arXiv 2305.09828), and if it is sharp enough: the gains
    of the queries' norm begin at 2. And what the layers add to the residual stream begins no smaller than any other
    output. In short runs each of these helped this model, more than other sizes, gains and learning rates did; gains
    of 2 and the larger outputs made the ALiBi model worse.
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
    _auto_class = None  # type: ignore[assignment]  # the code is saved here, not by Transformers
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
        """Saves the model with its code: this file, and those of `model/` that it stands on."""
        super().save_pretrained(save_directory, *args, **kwargs)
        for file in code_that_travels(Path(__file__)):
            # In the saved folder all files lie side by side.
            code = file.read_text(encoding="utf-8").replace("from ..model.", "from .")
            (Path(save_directory) / file.name).write_text(code, encoding="utf-8")


@torch.no_grad()
def _begin_near_by(layer: Any, config: SinusoidalGPTConfig) -> None:
    """Sets initial weights as `SinusoidalGPTModel` says; keys get the projection of their first query head."""
    attention = layer.self_attn
    projection = attention.q_proj.weight.unflatten(0, (config.num_key_value_heads, -1, attention.head_dim))
    attention.k_proj.weight.copy_(projection[:, 0].flatten(0, 1))
    for output in (attention.o_proj, layer.mlp.down_proj):
        output.weight.normal_(std=config.initializer_range)
    if config.qk_norm:
        attention.q_norm.weight.fill_(QUERY_GAIN)


AutoConfig.register(SinusoidalGPTConfig.model_type, SinusoidalGPTConfig)
AutoModelForCausalLM.register(SinusoidalGPTConfig, SinusoidalGPTForCausalLM)
