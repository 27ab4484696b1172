"""KERPLE with the logarithmic kernel: the bias falls with the logarithm of the distance.

Identical to AlibiGPT except:

- The bias of head h at distance d is -r1 log(1 + r2 d), with r1, r2 > 0 learned for each head and shared by all
  layers.

r1 and r2 start at random, evenly from (0, 2) and (0, 1), as in the authors' code. The logarithms are the parameters,
which keeps r1 and r2 positive.

Source: Chi et al., "KERPLE: Kernelized Relative Positional Embedding for Length Extrapolation" (arXiv 2205.09921),
section 4. Importing this module registers the model with the Auto classes as `kerple_gpt`.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ..model.configuration_alibi_gpt import AlibiGPTConfig
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM
from .distance import DistanceBias, DistanceConfig, DistanceGPTModel

# Smallest first value of r1 and r2, as in the authors' code.
SMALLEST = 0.01


@strict
class KerpleGPTConfig(DistanceConfig):
    """Configuration of the model with KERPLE's logarithmic bias."""

    model_type = "kerple_gpt"
    _auto_map = {"AutoConfig": "kerple.KerpleGPTConfig"}


class KerpleBias(DistanceBias):
    """The bias -r1 log(1 + r2 d)."""

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        self.log_r1 = self.parameter(config.num_attention_heads)
        self.log_r2 = self.parameter(config.num_attention_heads)

    def first_values(self) -> dict[str, Tensor]:
        """Returns logarithms of random numbers."""
        even = torch.rand_like(self.log_r1), torch.rand_like(self.log_r2)
        return {"log_r1": (2 * even[0]).clamp(min=SMALLEST).log(), "log_r2": even[1].clamp(min=SMALLEST).log()}

    def bias(self, distances: Tensor) -> Tensor:
        """Returns the bias `[heads, distances]` at `distances`."""
        r1, r2 = self.log_r1.exp()[:, None], self.log_r2.exp()[:, None]
        return -r1 * torch.log1p(r2 * distances)


class KerpleGPTModel(DistanceGPTModel):
    """The decoder with KERPLE's logarithmic bias."""

    config: KerpleGPTConfig
    _auto_map = KerpleGPTConfig._auto_map | {
        "AutoModel": "kerple.KerpleGPTModel",
        "AutoModelForCausalLM": "kerple.KerpleGPTForCausalLM",
    }
    bias_class = KerpleBias


class KerpleGPTForCausalLM(AlibiGPTForCausalLM):
    """The language model with KERPLE's logarithmic bias."""

    config: KerpleGPTConfig
    _auto_map = KerpleGPTModel._auto_map
    decoder_class = KerpleGPTModel


AutoConfig.register(KerpleGPTConfig.model_type, KerpleGPTConfig)
AutoModelForCausalLM.register(KerpleGPTConfig, KerpleGPTForCausalLM)
