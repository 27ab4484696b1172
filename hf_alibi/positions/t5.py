"""The relative position bias of T5: a number for each head and each bucket of distances.

Identical to AlibiGPT except:

- The bias of head h at distance d is a learned number, shared by all layers. Half of the buckets hold one distance
  each: 0, 1, 2 and so on. The others grow with the logarithm of the distance, up to `relative_attention_max_distance`.
  All greater distances share the last one.

Unlike T5, scores are divided by sqrt(head_dim), as in all models here. The first numbers are random with a standard
deviation of hidden_size^-0.5, as in T5 of Transformers.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
(arXiv 1910.10683), section 2.1. Importing this module registers the model with the Auto classes as `t5_gpt`.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM
from .distance import DistanceBias, DistanceConfig, DistanceGPTModel


@strict
class T5GPTConfig(DistanceConfig):
    """Configuration of the model with T5's bias.

    Args:
        relative_attention_num_buckets: Number of buckets, even.
        relative_attention_max_distance: The distance from which on all share the last bucket.
    """

    model_type = "t5_gpt"
    _auto_map = {"AutoConfig": "t5.T5GPTConfig"}
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128

    def validate_architecture(self) -> None:
        """Checks what `DistanceConfig` checks, and the buckets.

        Raises:
            ValueError: If fields contradict each other, or the buckets are impossible. The config raises it as a
                `StrictDataclassError`.
        """
        super().validate_architecture()
        buckets, furthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 2 or buckets % 2 or furthest <= buckets // 2:
            raise ValueError(
                "relative_attention_num_buckets must be even, and relative_attention_max_distance more than half of "
                f"it, got {buckets} and {furthest}."
            )


def buckets_of(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Returns the bucket of every distance, integers of the same shape.

    Args:
        distances: Integers, at least 0.
        num_buckets: Number of buckets, even.
        max_distance: The distance from which on all share the last bucket.
    """
    exact = num_buckets // 2
    # float32 as in T5, so that every distance is in the same bucket as there.
    ratio = torch.log(distances.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    larger = (exact + (ratio * exact).long()).clamp(max=num_buckets - 1)
    return torch.where(distances < exact, distances, larger)


class T5Bias(DistanceBias):
    """The bias of T5."""

    config: T5GPTConfig

    def __init__(self, config: T5GPTConfig) -> None:
        super().__init__(config)
        self.table = self.parameter(config.num_attention_heads, config.relative_attention_num_buckets)

    def first_values(self) -> dict[str, Tensor]:
        """Returns random numbers."""
        return {"table": torch.randn_like(self.table) * self.config.hidden_size**-0.5}

    def bias(self, distances: Tensor) -> Tensor:
        """Returns the bias `[heads, distances]` at `distances`."""
        config = self.config
        buckets = buckets_of(distances, config.relative_attention_num_buckets, config.relative_attention_max_distance)
        return self.table[:, buckets]


class T5GPTModel(DistanceGPTModel):
    """The decoder with T5's bias."""

    config: T5GPTConfig
    _auto_map = T5GPTConfig._auto_map | {
        "AutoModel": "t5.T5GPTModel",
        "AutoModelForCausalLM": "t5.T5GPTForCausalLM",
    }
    bias_class = T5Bias


class T5GPTForCausalLM(AlibiGPTForCausalLM):
    """The language model with T5's bias."""

    config: T5GPTConfig
    _auto_map = T5GPTModel._auto_map
    decoder_class = T5GPTModel


AutoConfig.register(T5GPTConfig.model_type, T5GPTConfig)
AutoModelForCausalLM.register(T5GPTConfig, T5GPTForCausalLM)
