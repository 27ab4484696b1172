"""The base class of all AlibiGPT models: initial weights, saving, loading, and class attributes for Transformers."""

import math
import os
import re
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel

from .attention import backend
from .cache_names import only_cache
from .configuration_alibi_gpt import AlibiGPTConfig
from .flash import HOW_TO_GET_FLASH_ATTENTION
from .ranks import check_shares, is_part, sizes_of, weights_of_all_stages
from .saved_code import UploadsCode, save_code


class AlibiGPTPreTrainedModel(UploadsCode, PreTrainedModel):
    """The base class of all AlibiGPT models, which initializes, saves and loads weights."""

    config: AlibiGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AlibiGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _can_compile_fullgraph = True
    _auto_map = AlibiGPTConfig._auto_map | {
        "AutoModel": "modeling_alibi_gpt.AlibiGPTModel",
        "AutoModelForCausalLM": "modeling_alibi_gpt.AlibiGPTForCausalLM",
        "AutoModelForMultipleChoice": "modeling_alibi_gpt.AlibiGPTForMultipleChoice",
        "AutoModelForQuestionAnswering": "modeling_alibi_gpt.AlibiGPTForQuestionAnswering",
        "AutoModelForSequenceClassification": "modeling_alibi_gpt.AlibiGPTForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_alibi_gpt.AlibiGPTForTokenClassification",
    }

    _table_of_names: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Adds the name of a class to Transformers' table of models for its task.

        Transformers looks there to decide whether Trainer shifts labels for label smoothing, whether a pipeline
        accepts a model, and how the server treats it. Registration with an Auto class does not add the name.
        Subclasses are added too, such as those that FSDP makes.
        """
        super().__init_subclass__(**kwargs)
        if cls._table_of_names is not None:
            # Imported here, so that a checkpoint loads even if Transformers moves or removes these tables.
            try:
                from transformers.models.auto import modeling_auto
            except ImportError:
                return
            getattr(modeling_auto, cls._table_of_names, {})[cls.__name__] = cls.__name__

    def post_init(self) -> None:
        """Ends initialization. Drops rules of the tensor-parallel plan for weights that this model does not have.

        Such as those of the gate of a feed-forward layer without one. Transformers would warn that the rules match
        nothing.
        """
        super().post_init()
        weights = {re.sub(r"\.\d+", ".*", name) for name, _ in self.named_parameters(remove_duplicate=False)}
        present = weights | {name.rpartition(".")[0] for name in weights}
        fitting = {rule: style for rule, style in self.tp_plan.items() if rule in present}
        self.tp_plan = fitting  # type: ignore[misc]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights. Trained slopes are ignored: they come first, but may have a higher precision."""
        weights = (weight for name, weight in self.named_parameters() if not name.endswith("bias_log_slopes"))
        return next(weight.dtype for weight in weights if weight.is_floating_point())

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Saves the model with its code, so that it also loads where this package is not installed.

        With `trust_remote_code=True`, the Auto classes then load the code from the folder. With pipeline parallelism,
        the first rank saves the weights of all stages, so all ranks must call this method.
        """
        self.config.auto_map = dict(self._auto_map)
        if is_main_process and not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
            save_code(self._auto_map, save_directory)
        if is_part(self) and kwargs.get("state_dict") is None:
            kwargs["state_dict"] = weights_of_all_stages(self)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Checks, before weights are loaded, that the backend supports ALiBi and is installed.

        Raises:
            ValueError: If the backend does not support ALiBi.
            ImportError: If a package is missing; the message says how to install it.
        """
        if attn_implementation is not None:
            backend(attn_implementation)
        try:
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        except ImportError as error:
            raise ImportError(f"{error} {HOW_TO_GET_FLASH_ATTENTION}") from error

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Divides the model among ranks, before weights are loaded.

        Raises:
            ValueError: If its heads or layers cannot be divided.
        """
        check_shares(model.config, distributed_config)
        ranks, groups, copies = sizes_of(distributed_config, "tp_size", "fsdp_size", "dp_replicate_size")
        # With tensor parallelism too, Transformers needs them apart, and `check_shares` allows what then works.
        if max(groups, copies) > 1 and ranks == 1:
            # Otherwise FSDP takes tied weights for two. If the vocabulary does not divide evenly among ranks, it then
            # goes on computing with one of them as it was before the first step of the optimizer.
            model.tie_weights()
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None, past_key_values: Cache | None = None, cache: Cache | None = None, **kwargs: Any
    ) -> Tensor | None:
        """Returns the mask that `generate` uses with a static cache: the padding mask, at the length of the cache.

        Transformers' own mask of queries times keys would not contain the padding, from which distances follow. A mask
        of constant size allows one compiled step for the whole generation.
        """
        if attention_mask is None:
            return None
        length = only_cache(past_key_values, cache).get_max_length()
        # A boolean mask has no document numbers, so a compiled step does not look for them.
        return F.pad(attention_mask != 0, (0, length - attention_mask.shape[-1]))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "adds_to_residual", False):
            # Each layer adds to the residual stream twice. The smaller weights keep the variance of the sum constant.
            additions = 2 * self.config.num_hidden_layers
            weight: Any = module.weight
            nn.init.normal_(weight, std=self.config.initializer_range / math.sqrt(additions))
        elif hasattr(module, "bias_log_slopes"):
            # Unlike a plain copy, this function leaves loaded slopes unchanged, as the functions in `nn.init` do while
            # Transformers calls this method.
            from transformers.initialization import copy_

            slopes: Any = module.bias_log_slopes
            copy_(slopes, torch.tensor(self.config.slopes, dtype=torch.float64).log())
