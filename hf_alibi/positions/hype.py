"""HyPE: the bias is a hyperbolic sine of the distance, linear at first and exponential beyond.

Identical to AlibiGPT except:

- The bias of head h at distance d is -tau sinh(mu d), with tau, mu > 0 learned for each head and shared by all layers.

The paper leaves the first values open, and shows that the bias is close to ALiBi's slope tau mu while mu d is small.
So they start there: mu = 1 / `training_length`, and tau mu is the paper's slope of ALiBi. The logarithms are the
parameters, which keeps both positive.

Source: Angelotti, "HyPE: Attention with Hyperbolic Biases for Relative Positional Encoding" (arXiv 2310.19676).
Importing this module registers the model with the Auto classes as `hype_gpt`.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ..model.alibi import alibi_slopes
from ..model.configuration_alibi_gpt import AlibiGPTConfig
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM
from .distance import DistanceBias, DistanceConfig, DistanceGPTModel

# Greatest argument of sinh, whose value is then 3e34. float32 has no value at 90, and infinity has no gradient.
LARGEST = 80.0


@strict
class HypeGPTConfig(DistanceConfig):
    """Configuration of the model with hyperbolic biases."""

    model_type = "hype_gpt"
    _auto_map = {"AutoConfig": "hype.HypeGPTConfig"}


class HypeBias(DistanceBias):
    """The bias -tau sinh(mu d)."""

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        self.log_tau = self.parameter(config.num_attention_heads)
        self.log_mu = self.parameter(config.num_attention_heads)

    def first_values(self) -> dict[str, Tensor]:
        """Returns the values that are close to ALiBi within the training length."""
        slopes = alibi_slopes(self.config.num_attention_heads, self.config.alibi_max_bias)
        log_length = torch.tensor(self.config.training_length, dtype=torch.float64).log()
        return {
            "log_tau": torch.tensor(slopes, dtype=torch.float64).log() + log_length,
            "log_mu": (-log_length).expand(len(slopes)),
        }

    def bias(self, distances: Tensor) -> Tensor:
        """Returns the bias `[heads, distances]` at `distances`."""
        tau, mu = self.log_tau.exp()[:, None], self.log_mu.exp()[:, None]
        return -tau * (mu * distances).clamp(max=LARGEST).sinh()


class HypeGPTModel(DistanceGPTModel):
    """The decoder with hyperbolic biases."""

    config: HypeGPTConfig
    _auto_map = HypeGPTConfig._auto_map | {
        "AutoModel": "hype.HypeGPTModel",
        "AutoModelForCausalLM": "hype.HypeGPTForCausalLM",
    }
    bias_class = HypeBias


class HypeGPTForCausalLM(AlibiGPTForCausalLM):
    """The language model with hyperbolic biases."""

    config: HypeGPTConfig
    _auto_map = HypeGPTModel._auto_map
    decoder_class = HypeGPTModel


AutoConfig.register(HypeGPTConfig.model_type, HypeGPTConfig)
AutoModelForCausalLM.register(HypeGPTConfig, HypeGPTForCausalLM)
