"""No position method ("NoPE"): only the causal mask tells the order of tokens.

Identical to AlibiGPT except:

- Every slope is zero.

Source: Kazemnejad et al., "The Impact of Positional Encoding on Length Generalization in Transformers"
(arXiv 2305.19466). Importing this module registers the model with the Auto classes as `nope_gpt`.
"""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM

from .base import PositionedCausalLM, UnbiasedConfig


@strict
class NopeGPTConfig(UnbiasedConfig):
    """Configuration of the model without positions."""

    model_type = "nope_gpt"


class NopeGPTForCausalLM(PositionedCausalLM):
    """The language model without positions."""

    config: NopeGPTConfig


AutoConfig.register(NopeGPTConfig.model_type, NopeGPTConfig)
AutoModelForCausalLM.register(NopeGPTConfig, NopeGPTForCausalLM)
