"""Learned position embeddings, the absolute method of GPT-2.

Identical to AlibiGPT except:

- Every slope is zero, and a trained vector for each position is added to the token embeddings.
- There are `training_length` such vectors. A token at a later position raises an error, and
  `config.max_position_embeddings` is `training_length`. So evaluation beyond it is refused, not estimated.

Source: Gehring et al., "Convolutional Sequence to Sequence Learning" (arXiv 1705.03122), section 3.1. Importing this
module registers the model with the Auto classes as `learned_gpt`.
"""

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..model.configuration_alibi_gpt import AlibiGPTConfig
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM, AlibiGPTModel
from ..model.recording import has_values
from .base import UnbiasedConfig


@strict
class LearnedGPTConfig(UnbiasedConfig):
    """Configuration of the model with learned positions. `training_length` is the number of positions."""

    model_type = "learned_gpt"
    _auto_map = {"AutoConfig": "learned.LearnedGPTConfig"}

    @property
    def max_position_embeddings(self) -> int:
        """Maximum number of tokens in a text: `training_length`."""
        return self.training_length

    @max_position_embeddings.setter
    def max_position_embeddings(self, training_length: int) -> None:
        """Sets `training_length`."""
        self.training_length = training_length


class LearnedGPTModel(AlibiGPTModel):
    """The decoder with learned positions."""

    config: LearnedGPTConfig
    _auto_map = LearnedGPTConfig._auto_map | {
        "AutoModel": "learned.LearnedGPTModel",
        "AutoModelForCausalLM": "learned.LearnedGPTForCausalLM",
    }

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        self.position_embeddings = nn.Embedding(config.training_length, config.hidden_size)

    def with_positions(self, inputs_embeds: Tensor, positions: Tensor) -> Tensor:
        """Adds the vectors of the positions to the embeddings.

        Raises:
            ValueError: If there is no vector for a position.
        """
        # While code is recorded, positions are unknown. The lookup then raises an error of its own.
        if has_values(positions):
            lowest, highest = (int(position) for position in positions.aminmax())
            limit = self.position_embeddings.num_embeddings
            # Padding before the first token has the position -1.
            if lowest < -1 or highest >= limit:
                raise ValueError(
                    f"learned_gpt has vectors for the positions 0 to {limit - 1}, its training length, but the tokens "
                    f"have positions from {lowest} to {highest}. Shorten the text, or train with a larger "
                    "training_length."
                )
        return inputs_embeds + self.position_embeddings(positions.clamp(min=0)).to(inputs_embeds.dtype)


class LearnedGPTForCausalLM(AlibiGPTForCausalLM):
    """The language model with learned positions."""

    config: LearnedGPTConfig
    _auto_map = LearnedGPTModel._auto_map
    decoder_class = LearnedGPTModel


AutoConfig.register(LearnedGPTConfig.model_type, LearnedGPTConfig)
AutoModelForCausalLM.register(LearnedGPTConfig, LearnedGPTForCausalLM)
