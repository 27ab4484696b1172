"""ALiBi language models for Hugging Face Transformers; importing it registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .hub.one_file import files_of
from .model import saved_code
from .model.alibi import alibi_bias, alibi_slopes
from .model.cache import WindowedCache
from .model.configuration_alibi_gpt import AlibiGPTConfig
from .model.growing import GrowingCache
from .model.modeling_alibi_gpt import (
    AlibiGPTForCausalLM,
    AlibiGPTForMultipleChoice,
    AlibiGPTForQuestionAnswering,
    AlibiGPTForSequenceClassification,
    AlibiGPTForTokenClassification,
    AlibiGPTModel,
    AlibiGPTPreTrainedModel,
)
from .version import __version__ as __version__

# Saved models get two files of code, which are made of the many files of the package.
saved_code.files_of = files_of

AutoConfig.register(AlibiGPTConfig.model_type, AlibiGPTConfig)
AutoModel.register(AlibiGPTConfig, AlibiGPTModel)
AutoModelForCausalLM.register(AlibiGPTConfig, AlibiGPTForCausalLM)
AutoModelForSequenceClassification.register(AlibiGPTConfig, AlibiGPTForSequenceClassification)
AutoModelForTokenClassification.register(AlibiGPTConfig, AlibiGPTForTokenClassification)
AutoModelForMultipleChoice.register(AlibiGPTConfig, AlibiGPTForMultipleChoice)
AutoModelForQuestionAnswering.register(AlibiGPTConfig, AlibiGPTForQuestionAnswering)

__all__ = [
    "AlibiGPTConfig",
    "AlibiGPTForCausalLM",
    "AlibiGPTForMultipleChoice",
    "AlibiGPTForQuestionAnswering",
    "AlibiGPTForSequenceClassification",
    "AlibiGPTForTokenClassification",
    "AlibiGPTModel",
    "AlibiGPTPreTrainedModel",
    "GrowingCache",
    "WindowedCache",
    "alibi_bias",
    "alibi_slopes",
]
