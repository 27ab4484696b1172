"""AlibiGPT: a decoder-only language model without position embeddings, in Transformers' conventions.

Read downwards: attention, feed-forward layer, decoder layer, model, heads. What is particular to ALiBi
is one call each in `AlibiGPTModel.forward` (`token_layout`: which keys each query sees, how far away)
and in `AlibiGPTAttention.forward` (the attention implementation that adds the bias).
"""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .alibi import interpolated_slopes
from .arguments import check_arguments
from .attention import ALL_ATTENTION_FUNCTIONS, eager_attention_forward
from .cache import WindowedCache
from .cache_names import CACHE_NAME, only_cache
from .configuration_alibi_gpt import AlibiGPTConfig
from .documents import Packing
from .flash import HOW_TO_GET_FLASH_ATTENTION
from .generation import AlibiGenerationMixin
from .heads import QuestionAnsweringHead, SequenceClassificationHead, TokenClassificationHead
from .layout import TokenLayout, token_layout
from .outputs import as_asked, is_asked, selected_states
from .paged import PagedCache, is_paged, paged_layout
from .versions import warn_if_newer_than_tried
from .windows import WindowGuarantee, qk_norm_guarantee


class AlibiGPTRMSNorm(nn.RMSNorm):
    """RMSNorm with a gain that follows its input's dtype, which autocast may have lowered."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps `[..., size]` to the same shape, with root mean square 1 before the gain."""
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight.to(hidden_states.dtype), self.eps)


def _known_gain(norm: nn.Module, size: int) -> Tensor | None:
    """Returns the gain `[size]` of a norm if it alone decides how large the output is, otherwise `None`.

    Hooks, a wrapper, a forward method that was replaced, and a subclass (which parametrizations and sharding make too)
    may do anything. A weight that is sharded, empty or offloaded is not the one that runs.
    """
    if type(norm) is not AlibiGPTRMSNorm or "forward" in vars(norm) or norm._forward_hooks or norm._forward_pre_hooks:
        return None
    gain: Any = getattr(norm, "weight", None)
    is_whole = type(gain) in (nn.Parameter, Tensor) and not gain.is_meta and gain.shape == (size,)
    return gain if is_whole and gain.untyped_storage().nbytes() > 0 else None


def _norm(config: AlibiGPTConfig) -> nn.Module:
    if config.norm_type == "rmsnorm":
        return AlibiGPTRMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class SealedLayout:
    """The layout on its way to the layers, in a form that no wrapper of a layer looks into.

    FSDP with mixed precision casts every tensor that a layer is given, in tuples, dataclasses and dictionaries too.
    Slopes and masks would be rounded to 16 bits.
    """

    def __init__(self, layout: TokenLayout) -> None:
        self.layout = layout

    def to(self, device: Any, **kwargs: Any) -> "SealedLayout":
        """Returns a copy on another device; accelerate asks for it where layers are on several."""
        return SealedLayout(self.layout.to(device, **kwargs))


class AlibiGPTAttention(nn.Module):
    """Causal self-attention with ALiBi, grouped key-value heads and optional QK-norm."""

    def __init__(self, config: AlibiGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.o_proj.adds_to_residual = True  # type: ignore[assignment]  # see `_init_weights`
        self.q_norm = AlibiGPTRMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = AlibiGPTRMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: SealedLayout,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the output `[batch, queries, hidden_size]` and, from `eager`, the attention weights."""
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if (limit := self.config.clip_qkv) is not None:
            query, key, value = (states.clamp(-limit, limit) for states in (query, key, value))
        query = self.q_norm(query.view(head_shape)).transpose(1, 2)
        key = self.k_norm(key.view(head_shape)).transpose(1, 2)
        value = value.view(head_shape).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask.layout,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1)), weights

    def known_gains(self) -> tuple[Tensor, Tensor] | None:
        """Returns the gains `[head_dim]` of queries and keys if they alone bound every score, otherwise `None`."""
        if type(self) is not AlibiGPTAttention or "forward" in vars(self):
            return None
        query_gain, key_gain = (_known_gain(norm, self.head_dim) for norm in (self.q_norm, self.k_norm))
        return None if query_gain is None or key_gain is None else (query_gain, key_gain)


class AlibiGPTMLP(nn.Module):
    """The feed-forward layer: up, activation, down; or, gated, up times the activation of a gate, and down."""

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__()
        self.is_gated = config.mlp_gated
        if self.is_gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.adds_to_residual = True  # type: ignore[assignment]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps `[..., hidden_size]` to the same shape."""
        up = self.up_proj(hidden_states)
        inner = self.act_fn(self.gate_proj(hidden_states)) * up if self.is_gated else self.act_fn(up)
        return self.down_proj(inner)


class AlibiGPTDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward layer, each normed before and added to the residual stream after."""

    def __init__(self, config: AlibiGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = AlibiGPTAttention(config, layer_idx)
        self.post_attention_layernorm = _norm(config)
        self.mlp = AlibiGPTMLP(config)
        self.is_parallel = config.use_parallel_residual
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: SealedLayout,
        past_key_values: Cache | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Maps `[batch, queries, hidden_size]` to the same shape; returns the attention weights too if asked to."""
        attended, weights = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask,
            past_key_values,
            output_attentions=output_attentions,
            **kwargs,
        )
        sum_so_far = hidden_states + self.dropout(attended)
        mlp_input = hidden_states if self.is_parallel else sum_so_far
        hidden_states = sum_so_far + self.dropout(self.mlp(self.post_attention_layernorm(mlp_input)))
        return (hidden_states, weights) if output_attentions else hidden_states


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
            ALL_ATTENTION_FUNCTIONS.get_interface(attn_implementation, eager_attention_forward)
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
        elif isinstance(module, AlibiGPTModel) and self.config.alibi_slopes_trainable:
            # Leaves slopes alone that were loaded, as the functions in `nn.init` do while Transformers calls this.
            from transformers.initialization import copy_

            copy_(module.bias_log_slopes, torch.tensor(self.config.slopes, dtype=torch.float64).log())


class AlibiGPTModel(AlibiGPTPreTrainedModel):
    """The decoder without a head: tokens in, hidden states out."""

    _auto_class = "AutoModel"

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        warn_if_newer_than_tried()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embedding_norm = _norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(AlibiGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = _norm(config)
        if config.alibi_slopes_trainable:
            # Logarithms keep slopes positive; "bias" in the name keeps weight decay away.
            # The default dtype is of 16 bits while such a model is made.
            dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
            self.bias_log_slopes = nn.Parameter(torch.empty(config.num_attention_heads, dtype=dtype))
            self._keep_in_fp32_modules_strict = {"bias_log_slopes"}
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the decoder.

        Args:
            input_ids: `[batch, queries]`, tokens. Exactly one of `input_ids` and `inputs_embeds`.
            attention_mask: `[batch, tokens]` with 0 for padding and 1 or document numbers for tokens, cached tokens
                included, or `[batch, 1 or heads, queries, keys]`, boolean (True: visible) or added to the scores.
            position_ids: `[batch, queries]`. Positions that do not go on begin a document, which does not see the
                one before. Otherwise only a four-dimensional mask needs them.
            past_key_values: The cache of keys and values.
            inputs_embeds: `[batch, queries, hidden_size]`, in place of `input_ids`.
            use_cache: Whether to return the cache.
            cache: Another name of `past_key_values`, and the one under which continuous batching passes its cache;
                see `paged_layout`.
            return_dict: False returns a tuple; `None` does what the config says.
            kwargs: `seq_idx`, `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`, other ways to say
                where documents end (`documents.py`), and `output_hidden_states` and `output_attentions`, which the
                config has too.

        Returns:
            The hidden states `[batch, queries, hidden_size]` after the last norm, and the cache.

        Raises:
            ValueError: If both or none of `input_ids` and `inputs_embeds` are given, if arguments do not fit or
                contradict each other, for arguments that the model does not know (`arguments.py`), or if a cache is
                given where gradient checkpointing would write to it twice.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        past_key_values = only_cache(past_key_values, cache)
        if past_key_values is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                "Gradient checkpointing runs each layer again in the backward pass, and would add its tokens to the "
                "cache twice. Leave the cache out, switch checkpointing off, call model.eval(), or run the model "
                "under torch.no_grad()."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if past_key_values is None and self._makes_cache(use_cache):
            past_key_values = DynamicCache(config=self.config)

        if isinstance(past_key_values, WindowedCache):
            self._check_windowed_cache(past_key_values)
        slopes = self.slopes(inputs_embeds)
        if is_paged(past_key_values, kwargs):
            assert position_ids is not None  # continuous batching always gives them
            layout = paged_layout(slopes, attention_mask, position_ids, **kwargs)
            past_key_values = PagedCache(past_key_values, kwargs)
        else:
            packing = Packing.taken_from(kwargs)
            check_arguments(kwargs, inputs_embeds.shape[1], past_key_values)
            layout = token_layout(slopes, inputs_embeds, attention_mask, position_ids, past_key_values, packing)
        if self.config.slopes_depend_on_length:
            slopes = interpolated_slopes(layout.slopes, self.config.training_length, layout.text_length())
            layout = layout._replace(slopes=slopes)
        wanted_states = is_asked("output_hidden_states", kwargs, self.config)
        kwargs["output_attentions"] = is_asked("output_attentions", kwargs, self.config)
        states, weights = [], []
        positions = layout.positions() if position_ids is None else position_ids.to(inputs_embeds.device)
        hidden_states = self.dropout(self.embedding_norm(self.with_positions(inputs_embeds, positions)))
        sealed = SealedLayout(layout)
        for layer in self.layers[: self.config.num_hidden_layers]:  # a draft model that exits early has lowered it
            if wanted_states:
                states.append(hidden_states)
            # By position: Transformers takes away a cache with a name from layers with gradient checkpointing, some
            # versions even where no gradient is computed.
            output = layer(hidden_states, sealed, past_key_values, **kwargs)
            hidden_states, *layer_weights = output if isinstance(output, tuple) else (output,)
            weights += [part for part in layer_weights if part is not None]
        hidden_states = self.norm(hidden_states)
        outputs = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=selected_states([*states, hidden_states], wanted_states) if wanted_states else None,
            attentions=tuple(weights) if kwargs["output_attentions"] else None,
            **{CACHE_NAME: past_key_values},
        )
        return as_asked(outputs, return_dict, self.config)

    def _makes_cache(self, use_cache: bool | None) -> bool:
        """Whether forward returns a cache when it has got none; layers that run again in backward can have none."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return False
        return bool(self.config.use_cache if use_cache is None else use_cache)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and casts the model, but leaves trained slopes in float32 where the weights get 16 bits.

        `to`, `half`, `bfloat16` and their like all come here.
        """
        slopes = getattr(self, "bias_log_slopes", None)
        if slopes is None:
            return super()._apply(fn, recurse)
        exact = [slopes] if slopes.grad is None else [slopes, slopes.grad]

        def keeping_slopes(states: Tensor) -> Tensor:
            changed = fn(states)
            is_exact = any(states is other for other in exact)
            return states.to(changed.device) if is_exact and changed.dtype.itemsize < 4 else changed

        return super()._apply(keeping_slopes, recurse)

    def with_positions(self, inputs_embeds: Tensor, positions: Tensor) -> Tensor:
        """Returns the embeddings as the first layer gets them: with ALiBi, positions have no part in them.

        Args:
            inputs_embeds: `[batch, queries, hidden_size]`.
            positions: `[batch or 1, queries]`, the caller's `position_ids`, or else those in each document from 0.
        """
        return inputs_embeds

    def slopes(self, like: Tensor) -> Tensor:
        """Returns the slopes `[heads]`, learned or not, linearly scaled: on the device of `like`, in its precision.

        That is float32 at least, so that no cast of the weights rounds them.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.config.alibi_slopes_trainable:
            if self.bias_log_slopes.dtype.itemsize < 4:
                raise ValueError(
                    f"The trained slopes have arrived in {self.bias_log_slopes.dtype}, which rounds them by up to 2%. "
                    "Mixed precision that casts parameters (of FSDP and DeepSpeed) does so: keep parameters in "
                    "float32 (no param_dtype) and compute in 16 bits under torch.autocast."
                )
            slopes = self.bias_log_slopes.to(dtype).exp()
        else:
            slopes = torch.tensor(self.config.slopes, dtype=dtype, device=like.device)
        return slopes / self.config.slope_divisor

    def _known_gains(self) -> list[tuple[Tensor, Tensor]] | None:
        """Returns the gains of queries and keys of each layer, or `None` if those of any layer are not known."""
        # Another pipeline stage has these layers without attention.
        attentions: list[Any] = [
            getattr(layer, "self_attn", None) for layer in self.layers[: self.config.num_hidden_layers]
        ]
        gains = [attention.known_gains() for attention in attentions if type(attention) is AlibiGPTAttention]
        known = [pair for pair in gains if pair is not None]
        return known if len(known) == len(attentions) else None

    def window_guarantees(self) -> list[WindowGuarantee] | None:
        """Returns the windows of each layer, from the gains of its QK-norm as they are now.

        `None` where there is no guarantee before any data, see `AlibiGPTConfig.window_guarantee`, and where other
        things than these gains may decide how large queries and keys are: an adapter, a hook, a parametrization, or
        a weight that is sharded or offloaded.
        """
        gains = self._known_gains() if self.config.windows_follow_from_weights else None
        if gains is None:
            return None
        slopes = self.slopes(self.embed_tokens.weight).tolist()
        return [qk_norm_guarantee(slopes, *pair, self.config.window_tolerance) for pair in gains]

    def windowed_cache(self, offloading: bool = False) -> WindowedCache | None:
        """Returns an empty cache in which no head holds more than its window, see `cache.py`.

        Args:
            offloading: Whether keys and values wait on the CPU while other layers are at work.

        Returns:
            The cache, or `None` where it would not be lossless or cannot be read: without `window_guarantees`, with
            another attention than `sdpa`, and with weights that are not all here.
        """
        is_here = not any(hasattr(weight, "device_mesh") or weight.is_meta for weight in self.parameters())
        can_be_read = is_here and self.config._attn_implementation == "sdpa"
        guarantees = self.window_guarantees() if can_be_read else None
        if guarantees is None:
            return None
        slopes = self.slopes(self.embed_tokens.weight).detach()
        windows = [guarantee.windows for guarantee in guarantees]
        return WindowedCache(windows, slopes, offloading, made_for=self._decides_windows())

    def _decides_windows(self) -> Tensor | None:
        """Returns what windows follow from, slopes and gains, in one row; `None` if not all are known."""
        gains = self._known_gains()
        if gains is None:
            return None
        slopes = self.slopes(self.embed_tokens.weight)
        return torch.cat([slopes, *(gain.to(slopes) for pair in gains for gain in pair)]).detach()

    def _check_windowed_cache(self, cache: WindowedCache) -> None:
        """Raises `ValueError` if attention cannot read this cache, or its windows are not those of the weights."""
        if self.config._attn_implementation != "sdpa":
            raise ValueError(
                f"Only sdpa reads a WindowedCache, not {self.config._attn_implementation}; pass a DynamicCache."
            )
        if torch.compiler.is_exporting():
            raise ValueError(
                "An exported program would hold the WindowedCache at the length that it has now; pass a DynamicCache, "
                "or cache_implementation='dynamic' in the generation config."
            )
        if cache.made_for is None:
            return
        now = self._decides_windows()
        # A draft model that exits early uses the first layers of the cache.
        if now is None or not torch.equal(now, cache.made_for[: len(now)].to(now)):
            raise ValueError(
                "This WindowedCache was made when the slopes or the norms of queries and keys were others: weights "
                "have changed since, or an adapter, a hook or sharding has been added. Its windows may be too narrow "
                "now; call model.windowed_cache() again, or pass a DynamicCache."
            )


class AlibiGPTForCausalLM(AlibiGPTPreTrainedModel, AlibiGenerationMixin):
    """The language model: the decoder and an output layer over the vocabulary."""

    _auto_class = "AutoModelForCausalLM"
    _table_of_names = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # annotated too narrowly
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # whatever a subclass is called
        self.model = AlibiGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predicts the next token at every position; further arguments as in `AlibiGPTModel.forward`.

        Args:
            labels: `[batch, queries]`, the same tokens as `input_ids`, shifted here; -100 is not scored.
            logits_to_keep: Number of last positions to compute logits for, 0 for all, or a 1D tensor of
                positions.

        Returns:
            The logits `[batch, kept, vocab_size]`, the cache, and with `labels` the mean loss in nats
            per scored token.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        outputs = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
        return as_asked(outputs, return_dict, self.config)


class AlibiGPTWithHead(AlibiGPTPreTrainedModel):
    """A model that has its decoder in `model`, as those of `heads.py` expect."""

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        self.model = AlibiGPTModel(config)


class AlibiGPTForSequenceClassification(SequenceClassificationHead, AlibiGPTWithHead):
    """The decoder and a linear layer that classifies a text from its last token."""

    _auto_class = "AutoModelForSequenceClassification"
    _table_of_names = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"


class AlibiGPTForTokenClassification(TokenClassificationHead, AlibiGPTWithHead):
    """The decoder and a linear layer that classifies every token."""

    _auto_class = "AutoModelForTokenClassification"
    _table_of_names = "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"


class AlibiGPTForQuestionAnswering(QuestionAnsweringHead, AlibiGPTWithHead):
    """The decoder and a linear layer that scores every token as start and end of the answer."""

    _auto_class = "AutoModelForQuestionAnswering"
    _table_of_names = "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"


__all__ = [
    "AlibiGPTForCausalLM",
    "AlibiGPTForQuestionAnswering",
    "AlibiGPTForSequenceClassification",
    "AlibiGPTForTokenClassification",
    "AlibiGPTModel",
    "AlibiGPTPreTrainedModel",
]
