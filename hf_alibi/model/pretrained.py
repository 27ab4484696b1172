"""What all AlibiGPT models share: initial weights, saving and loading, and what Transformers asks a class."""

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel

from .attention import backend
from .cache_names import only_cache
from .configuration_alibi_gpt import AlibiGPTConfig
from .flash import HOW_TO_GET_FLASH_ATTENTION


class AlibiGPTPreTrainedModel(PreTrainedModel):
    """Weights, saving and loading: what all AlibiGPT models share."""

    config: AlibiGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AlibiGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _can_compile_fullgraph = True
    _auto_map = {
        "AutoConfig": "configuration_alibi_gpt.AlibiGPTConfig",
        "AutoModel": "modeling_alibi_gpt.AlibiGPTModel",
        "AutoModelForCausalLM": "modeling_alibi_gpt.AlibiGPTForCausalLM",
        "AutoModelForQuestionAnswering": "modeling_alibi_gpt.AlibiGPTForQuestionAnswering",
        "AutoModelForSequenceClassification": "modeling_alibi_gpt.AlibiGPTForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_alibi_gpt.AlibiGPTForTokenClassification",
    }

    _table_of_names: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes the name of a class known where Transformers asks by name what a model does.

        Tables of names decide whether Trainer shifts labels for label smoothing, whether a pipeline accepts a model,
        and what the server takes it for. Registering with an Auto class does not enter a name there. Subclasses are
        entered too, also those that FSDP makes.
        """
        super().__init_subclass__(**kwargs)
        if cls._table_of_names is not None:
            # Only here, as a checkpoint must load where Transformers has moved or dropped these tables.
            try:
                from transformers.models.auto import modeling_auto
            except ImportError:
                return
            getattr(modeling_auto, cls._table_of_names, {})[cls.__name__] = cls.__name__

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights. Trained slopes, the first of all parameters, may have a higher one."""
        weights = (weight for name, weight in self.named_parameters() if not name.endswith("bias_log_slopes"))
        return next(weight.dtype for weight in weights if weight.is_floating_point())

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves the model with its code, so that it also loads where this package is not installed.

        There, `trust_remote_code=True` has the Auto classes read the code from the folder.
        """
        self.config.auto_map = dict(self._auto_map)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Refuses an implementation that does not know ALiBi, or is not installed, before any weight is loaded."""
        if attn_implementation is not None:
            backend(attn_implementation)
        try:
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        except ImportError as error:
            raise ImportError(f"{error} {HOW_TO_GET_FLASH_ATTENTION}") from error

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None, past_key_values: Cache | None = None, cache: Cache | None = None, **kwargs: Any
    ) -> Tensor | None:
        """Returns the mask that `generate` passes on with a static cache: the padding, at the cache's full length.

        Distances follow from the padding, so a mask of queries times keys would lose them; and a mask of
        constant size lets a compiled step serve the whole generation.
        """
        if attention_mask is None:
            return None
        length = only_cache(past_key_values, cache).get_max_length()
        # Boolean, so that a compiled step need not look for document numbers.
        return F.pad(attention_mask != 0, (0, length - attention_mask.shape[-1]))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "adds_to_residual", False):
            # Each layer adds to the residual stream twice; the sum of all keeps the variance of one.
            additions = 2 * self.config.num_hidden_layers
            weight: Any = module.weight
            nn.init.normal_(weight, std=self.config.initializer_range / math.sqrt(additions))
        elif hasattr(module, "bias_log_slopes"):
            # Leaves slopes alone that were loaded, as the functions in `nn.init` do while Transformers calls this.
            from transformers.initialization import copy_

            slopes: Any = module.bias_log_slopes
            copy_(slopes, torch.tensor(self.config.slopes, dtype=torch.float64).log())
