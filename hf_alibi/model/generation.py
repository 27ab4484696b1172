"""`generate` for AlibiGPT, which reads long prompts in chunks and uses a cache of its own by default."""

import copy
from functools import wraps
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from .cache_names import CACHE_NAME, only_cache
from .configuration_alibi_gpt import AlibiGPTConfig
from .documents import Packing
from .growing import GrowingCache
from .layout import token_layout
from .paged import paged_config

# Tokens of a prompt per forward pass. A larger chunk takes more memory, a smaller one needs more passes. It suits
# PyTorch 2.13 on 2 CPU cores (AMD EPYC), measured with `hf_alibi benchmark generation`.
PREFILL_CHUNK = 2048


class AlibiGenerationMixin(GenerationMixin):
    """Generation for a language model whose decoder is `model`, an `AlibiGPTModel`."""

    config: AlibiGPTConfig
    model: Any

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as in Transformers. The cache may be passed as `past_key_values` or `cache`."""
        cache = only_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        return super().generate(*args, **(kwargs if cache is None else kwargs | {CACHE_NAME: cache}))

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Converts every description of documents into `position_ids`, which `generate` extends for new tokens."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)  # type: ignore[misc]
        packing, mask = Packing.taken_from(model_kwargs), model_kwargs.get("attention_mask")
        numbered = mask is not None and mask.dim() == 2 and bool((mask > 1).any())
        if numbered or packing.names():
            layout = token_layout(inputs.new_empty(0), inputs, mask, model_kwargs.get("position_ids"), None, packing)
            if model_kwargs.get("position_ids") is None:
                model_kwargs["position_ids"] = layout.positions().clamp(min=0)
            if mask is not None:
                model_kwargs["attention_mask"] = (mask != 0).to(mask.dtype)
        return inputs, name, model_kwargs

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Creates a cache of our own, unless the caller wants another, and reads prompts into it in chunks.

        It is a windowed one if possible and if no keys beyond the windows are needed.

        Raises:
            ValueError: If an offloaded cache is requested for a model on the CPU.
        """
        implementation = generation_config.cache_implementation
        if self.model.device.type == "cpu" and implementation in ("offloaded", "offloaded_static"):
            raise ValueError(
                f"cache_implementation={implementation!r} moves keys from an accelerator to the CPU, but this model "
                "is on the CPU already; leave it out, or move the model to an accelerator."
            )
        is_given = model_kwargs.get(CACHE_NAME) is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        is_default = implementation in (None, "offloaded") and not is_given
        if is_default and generation_config.use_cache:
            needs_newest = _sees_newest_keys(model_kwargs.get("attention_mask"))
            cache = self.model.new_cache(offloading=implementation == "offloaded", windowed=needs_newest)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs[CACHE_NAME] = cache
        in_one_piece = (
            generation_config.output_hidden_states
            or model_kwargs.get("inputs_embeds") is not None
            # PEFT keeps one token of each later chunk.
            or self._has_learned_tokens()
        )
        cache, mask = model_kwargs.get(CACHE_NAME), model_kwargs.get("attention_mask")
        if isinstance(cache, GrowingCache) and not in_one_piece:
            # Older versions of Transformers read a prompt in chunks only into an empty cache.
            is_long = mask is None or mask.shape[-1] - cache.get_seq_length() > PREFILL_CHUNK
            if is_long and generation_config.prefill_chunk_size is None:
                generation_config.prefill_chunk_size = PREFILL_CHUNK

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns the inputs of a pass as in Transformers, for PEFT with the cache as `past_key_values`.

        PEFT would put learned tokens before every new token if it did not find the cache under this name.
        """
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if self._has_learned_tokens() and CACHE_NAME in inputs:
            inputs["past_key_values"] = inputs.pop(CACHE_NAME)
        return inputs

    def _has_learned_tokens(self) -> bool:
        """Whether PEFT prepares the inputs of a pass: it replaces this method of a model with learned tokens."""
        return "prepare_inputs_for_generation" in vars(self)

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Starts continuous batching, for `generate_batch` and the server.

        Raises:
            ValueError: As in `paged_config`.
        """
        # A copy, because Transformers writes an `eos_token_id` of -1 into it where there is none.
        generation_config = copy.deepcopy(generation_config or self.generation_config)
        given = continuous_batching_config or getattr(generation_config, "continuous_batching_config", None)
        return super().init_continuous_batching(generation_config, paged_config(self.config, given), *args, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Any, model_kwargs: dict[str, Any]) -> Any:
        """Returns positions that continue after padding, on the right too, where Transformers would restart at 0."""
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)


def _sees_newest_keys(attention_mask: Tensor | None) -> bool:
    """Whether padding is on the left only. With padding elsewhere, a head may see keys outside its window's slots."""
    if attention_mask is None:
        return True
    return attention_mask.dim() == 2 and bool((attention_mask.long().diff(dim=-1) >= 0).all())
