"""No position method ("NoPE"): only the causal mask tells the order of tokens.

Identical to AlibiGPT except:

- Every slope is zero.

Source: Kazemnejad et al., "The Impact of Positional Encoding on Length Generalization in Transformers"
(arXiv 2305.19466). Importing this module registers the model with the Auto classes as `nope_gpt`.
"""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM

from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM
from .base import UnbiasedConfig


@strict
class NopeGPTConfig(UnbiasedConfig):
    """Configuration of the model without positions."""

    model_type = "nope_gpt"
    _auto_map = {"AutoConfig": "none.NopeGPTConfig"}


class NopeGPTForCausalLM(AlibiGPTForCausalLM):
    """The language model without positions."""

    config: NopeGPTConfig
    _auto_map = NopeGPTConfig._auto_map | {
        "AutoModel": "modeling_alibi_gpt.AlibiGPTModel",
        "AutoModelForCausalLM": "none.NopeGPTForCausalLM",
    }


AutoConfig.register(NopeGPTConfig.model_type, NopeGPTConfig)
AutoModelForCausalLM.register(NopeGPTConfig, NopeGPTForCausalLM)
