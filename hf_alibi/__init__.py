"""ALiBi language models for Hugging Face Transformers; importing it registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .model.alibi import alibi_bias, alibi_slopes
from .model.cache import WindowedCache
from .model.configuration_alibi_gpt import AlibiGPTConfig
from .model.modeling_alibi_gpt import (
    AlibiGPTForCausalLM,
    AlibiGPTForQuestionAnswering,
    AlibiGPTForSequenceClassification,
    AlibiGPTForTokenClassification,
    AlibiGPTModel,
    AlibiGPTPreTrainedModel,
)
from .version import __version__ as __version__

AutoConfig.register(AlibiGPTConfig.model_type, AlibiGPTConfig)
AutoModel.register(AlibiGPTConfig, AlibiGPTModel)
AutoModelForCausalLM.register(AlibiGPTConfig, AlibiGPTForCausalLM)
AutoModelForSequenceClassification.register(AlibiGPTConfig, AlibiGPTForSequenceClassification)
AutoModelForTokenClassification.register(AlibiGPTConfig, AlibiGPTForTokenClassification)
AutoModelForQuestionAnswering.register(AlibiGPTConfig, AlibiGPTForQuestionAnswering)

__all__ = [
    "AlibiGPTConfig",
    "AlibiGPTForCausalLM",
    "AlibiGPTForQuestionAnswering",
    "AlibiGPTForSequenceClassification",
    "AlibiGPTForTokenClassification",
    "AlibiGPTModel",
    "AlibiGPTPreTrainedModel",
    "WindowedCache",
    "alibi_bias",
    "alibi_slopes",
]
