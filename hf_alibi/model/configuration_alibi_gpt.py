"""The configuration of an AlibiGPT model: its shape, and all options that change what it computes."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub.dataclasses import strict, validated_field
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .alibi import alibi_slopes
from .saved_code import UploadsCode, save_code
from .unknown_fields import nearest_field, warn_of_unknown_fields
from .windows import WindowGuarantee, qk_norm_guarantee

if TYPE_CHECKING:
    # `__post_init__` replaces `None` by a number.
    Size = int | Any
else:
    Size = int | None

DEFAULT_TRAINING_LENGTH = 512

LONGEST_TEXT = 2**24
"""Maximum number of tokens in a text. Up to this length, float32 represents every distance exactly."""

SLOPE_RANGE = (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / LONGEST_TEXT)
"""Smallest and largest slope in nats per token.

Smaller slopes lose precision in float32, and become zero on devices that flush subnormal numbers. With larger slopes,
the penalty of the longest distance overflows.
"""
POSITIVE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "training_length",
    "alibi_max_bias",
    "norm_eps",
)


def _check_scaling(scaling: dict[str, Any] | None) -> None:
    """Checks `alibi_scaling`.

    Raises:
        ValueError: If it is neither `None` nor a valid linear or dynamic scaling.
    """
    if scaling is None or scaling == {"type": "dynamic"}:
        return
    factor = scaling.get("factor")
    is_flag = isinstance(factor, bool)
    is_factor = isinstance(factor, int | float) and not is_flag and 1 <= factor < math.inf
    if scaling != {"type": "linear", "factor": factor} or not is_factor:
        raise ValueError(
            "alibi_scaling must be None, {'type': 'linear', 'factor': a finite number of at least 1} or "
            f"{{'type': 'dynamic'}}, which takes no factor; got {scaling}."
        )


def _one_training_length(training_length: int | None, first_name: int | None) -> int | None:
    """Returns the training length, given under its name or under its former name, `max_position_embeddings`.

    Raises:
        ValueError: If both are given and differ.
    """
    if first_name is None:
        return training_length
    if training_length not in (None, first_name):
        raise ValueError(
            f"training_length is {training_length}, but max_position_embeddings, its former name, is {first_name}; "
            "give training_length alone."
        )
    return first_name


@strict
class AlibiGPTConfig(UploadsCode, PreTrainedConfig):
    """Configuration of a decoder-only language model with ALiBi in place of position embeddings.

    The defaults give the shape of the WikiText-103 models of Press et al. (arXiv 2108.12409, section 4), with RMSNorm,
    QK-norm, squared ReLU, a tied output layer and no biases. With LayerNorm, biases, GELU and a norm after the
    embedding, the config describes BLOOM and MPT. `conversion/` has the settings for other models with ALiBi.

    Args:
        vocab_size: Number of token embeddings.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Number of query heads. Each has its own slope.
        num_key_value_heads: Number of key-value heads, a divisor of `num_attention_heads`: `None` for one per query
            head, 1 for multi-query attention.
        head_dim: Width of a head; `None` for `hidden_size / num_attention_heads`.
        intermediate_size: Width of the feed-forward layer; `None` for four times `hidden_size`.
        hidden_act: Activation of the feed-forward layer, a name known to Transformers.
        mlp_gated: Whether the activation acts on a gate that multiplies the up projection: SwiGLU with
            `hidden_act="silu"`, GEGLU with `"gelu"` (arXiv 2002.05202). Adds a third projection of the same size.
        training_length: Number of tokens in a training sequence; `None` for 512. It does not limit the length of a
            text. A dynamic `alibi_scaling` takes effect beyond it. The former name `max_position_embeddings` is
            accepted when a config is created or loaded.
        alibi_max_bias: Exponent of the slopes, see `max_bias` of `alibi.alibi_slopes`.
        alibi_slopes: One positive slope per query head; `None` for the slopes of the paper.
        alibi_slopes_trainable: Whether the slopes are learned. All layers share them, and `alibi_slopes` are their
            initial values.
        alibi_scaling: Position interpolation (arXiv 2310.13017); `None` for no scaling.
            `{"type": "linear", "factor": f}` divides every slope by f, which is at least 1.
            `{"type": "dynamic"}` divides the slopes by n / `training_length` if this exceeds 1, where n is the number
            of tokens in the longest text of the forward pass, cached tokens included. Each pass applies its own slopes
            to all cached keys. But the cached keys and values of all layers except the first were computed with the
            slopes of earlier passes. So beyond the training length, reading a text in pieces differs from reading it
            at once.
        window_tolerance: Fraction of the attention that a head may lose because distant keys are left out, see
            `windows.py`. The default is the rounding of float32. With 0, no key is left out.
        qk_norm: Whether queries and keys get an RMSNorm over `head_dim`, which bounds every score.
        qk_norm_gain: Which gains QK-norm has. `"head"`: one for each query head, none for keys. `"channel"`: one for
            each channel of queries and of keys, the same for all heads. `"none"`: no gains. `None` is `"head"` for a
            new config, and `"channel"` for one that was saved before this field existed.
        clip_qkv: Queries, keys and values are clipped to [-`clip_qkv`, `clip_qkv`] after their projections and before
            QK-norm (MPT); `None` for no clipping.
        attention_bias: Whether the projections of the attention have biases.
        mlp_bias: Whether the projections of the feed-forward layer have biases.
        norm_type: `"rmsnorm"` or `"layernorm"`.
        norm_bias: Whether LayerNorm has a bias; RMSNorm has none.
        norm_eps: Added to the variance in every norm.
        embedding_norm: Whether there is a norm between the embeddings and the first layer (BLOOM).
        use_parallel_residual: Whether attention and feed-forward layer both get the input of their decoder layer
            (Falcon). Otherwise the feed-forward layer gets the sum of this input and the output of the attention.
        hidden_dropout: Dropout probability of the embeddings and of each layer's additions to the residual stream.
        attention_dropout: Dropout probability of the attention weights.
        initializer_range: Standard deviation of the initial weights.
        use_cache: Whether forward returns keys and values for generation.
        tie_word_embeddings: Whether the output layer shares the embedding's weights.
        pad_token_id: Padding token; its embedding starts at zero and is not trained.
        bos_token_id: First token of a text.
        eos_token_id: Token, or tokens, that end a text.

    Raises:
        ValueError, StrictDataclassError: If a value is invalid; the message names it.

    Warns:
        UserWarning: For fields that this model does not have. They have no effect; the message suggests others.
    """

    model_type = "alibi_gpt"
    _auto_map = {"AutoConfig": "configuration_alibi_gpt.AlibiGPTConfig"}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        # Each rank computes the gradient of its own heads only, so gradients are summed over ranks.
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    # Everything outside the layers is one group, because tied weights must be in the same group.
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    hidden_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 8
    num_key_value_heads: Size = None
    head_dim: Size = None
    intermediate_size: Size = None
    hidden_act: str = "relu2"
    mlp_gated: bool = False
    training_length: Size = None
    alibi_max_bias: int | float = 8.0
    alibi_slopes: list[int | float] | tuple[int | float, ...] | None = None
    alibi_slopes_trainable: bool = False
    # Validated on assignment too.
    alibi_scaling: dict[str, Any] | None = validated_field(_check_scaling, default=None)
    window_tolerance: int | float = 2.0**-24
    qk_norm: bool = True
    qk_norm_gain: Literal["head", "channel", "none"] | None = None
    clip_qkv: int | float | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_bias: bool = False
    norm_eps: float = 1e-6
    embedding_norm: bool = False
    use_parallel_residual: bool = False
    hidden_dropout: int | float = 0.0
    attention_dropout: int | float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        length = _one_training_length(self.training_length, kwargs.pop("max_position_embeddings", None))
        self.training_length = DEFAULT_TRAINING_LENGTH if length is None else length
        warn_of_unknown_fields(type(self), kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads; "
                    "choose a multiple, or give head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.qk_norm_gain is None:
            # Every saved config has the version of Transformers that saved it.
            self.qk_norm_gain = "head" if self.transformers_version is None else "channel"
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Creates a config from a dictionary, for `from_pretrained`. `kwargs` override its fields.

        Raises:
            ValueError: If `kwargs` have two different training lengths, one under the former name.
        """
        first_name = kwargs.pop("max_position_embeddings", None)
        if first_name is not None:
            kwargs["training_length"] = _one_training_length(kwargs.get("training_length"), first_name)
        # Transformers drops names that are no fields. Many are meant for the model, so there is a warning only for
        # those that are similar to a field.
        if not kwargs.get("return_unused_kwargs"):
            others = [name for name in kwargs if not hasattr(cls, name)]
            warn_of_unknown_fields(cls, [name for name in others if nearest_field(cls, name, similarity=0.8)])
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves the config with its code, so that it also loads where this package is not installed.

        With this package, a config that names a model's code is saved with that code too. Tools that merge models save
        the config and write the weights themselves.
        """
        self.auto_map = (getattr(self, "auto_map", None) or {}) | self._auto_map
        save_code(self._saved_auto_map(), save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _saved_auto_map(self) -> dict[str, str]:
        found = getattr(self, "auto_map", None) or {}
        # Transformers keeps the config's file of a checkpoint apart, so the other one is there in the package only.
        if Path(__file__).with_name("modeling_alibi_gpt.py").is_file():
            models = {name: target for name, target in found.items() if str(target).startswith("modeling_alibi_gpt.")}
            return models | self._auto_map
        return self._auto_map

    @property
    def max_position_embeddings(self) -> int:
        """Maximum number of tokens in a text, `LONGEST_TEXT`, independent of the training length.

        Evaluation harnesses, embedding libraries and servers truncate texts to this length. A model without position
        embeddings has no natural limit, so this is the limit of the arithmetic: up to 2^24 tokens, float32 represents
        every distance exactly. A finite number works in all tools; some fail on infinity, on -1 or on `None`.
        `training_length` is the length that the model was trained with.
        """
        return LONGEST_TEXT

    @max_position_embeddings.setter
    def max_position_embeddings(self, training_length: int) -> None:
        """Sets `training_length`, which had this name in the first releases."""
        self.training_length = training_length

    @property
    def slopes(self) -> list[float]:
        """Slope of every query head, in nats per token of distance, before `alibi_scaling`."""
        if self.alibi_slopes is None:
            return alibi_slopes(self.num_attention_heads, self.alibi_max_bias)
        return [float(slope) for slope in self.alibi_slopes]

    @property
    def slope_divisor(self) -> float:
        """The factor of a linear `alibi_scaling`, by which every slope is divided at any length; otherwise 1."""
        return (self.alibi_scaling or {}).get("factor", 1.0)

    @property
    def slopes_depend_on_length(self) -> bool:
        """Whether `alibi_scaling` is dynamic."""
        return self.alibi_scaling == {"type": "dynamic"}

    @property
    def windows_follow_from_weights(self) -> bool:
        """Whether the windows of a layer follow from the gains of its QK-norm alone."""
        return self.qk_norm and self.window_tolerance > 0 and not self.slopes_depend_on_length

    def window_guarantee(self) -> WindowGuarantee | None:
        """Returns the head windows of every layer of a new model, in which all gains of QK-norm are 1.

        `AlibiGPTModel.window_guarantees` returns the windows of each layer of a trained model. Both return `None` if
        windows do not follow from the weights alone: without QK-norm, windows depend on the queries and keys; with a
        dynamic `alibi_scaling`, they grow with the text; with `window_tolerance=0`, there are none.
        """
        if not self.windows_follow_from_weights:
            return None
        gain = torch.ones(1)
        slopes = [slope / self.slope_divisor for slope in self.slopes]
        return qk_norm_guarantee(slopes, gain, gain, self.head_dim, self.window_tolerance)

    def validate_architecture(self) -> None:
        """Checks the values of all fields.

        Raises:
            ValueError: If a value is invalid or does not fit another one.
        """
        for name in POSITIVE_FIELDS:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACT2FN)}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key-value heads "
                "evenly; num_key_value_heads must divide num_attention_heads."
            )
        if self.alibi_slopes is not None and len(self.alibi_slopes) != self.num_attention_heads:
            raise ValueError(
                f"alibi_slopes has {len(self.alibi_slopes)} values for {self.num_attention_heads} heads; "
                "give one for each query head."
            )
        self._check_slopes()
        if self.clip_qkv is not None and not 0 < self.clip_qkv < math.inf:
            raise ValueError(f"clip_qkv must be positive and finite, or None for no clipping; got {self.clip_qkv}.")
        if self.norm_bias and self.norm_type == "rmsnorm":
            raise ValueError("norm_bias=True needs norm_type='layernorm': RMSNorm has no bias.")
        for name in ("hidden_dropout", "attention_dropout", "window_tolerance"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}.")

    def _check_slopes(self) -> None:
        """Checks that all slopes are in `SLOPE_RANGE`, before and after `alibi_scaling`.

        Raises:
            ValueError: If not.
        """
        if self.alibi_slopes is None:
            origin = f"alibi_max_bias={self.alibi_max_bias} and {self.num_attention_heads} heads give slopes"
            slopes = alibi_slopes(self.num_attention_heads, self.alibi_max_bias)
        else:
            origin, slopes = "alibi_slopes are", [float(slope) for slope in self.alibi_slopes]
        least, largest = SLOPE_RANGE
        if not all(least * self.slope_divisor <= slope <= largest for slope in slopes):
            divided = f", which are divided by {self.slope_divisor}" if self.slope_divisor != 1 else ""
            raise ValueError(
                f"{origin} from {min(slopes)} to {max(slopes)}{divided}; slopes must be positive and finite, from "
                f"{least:.2g} to {largest:.2g}, so that float32 can represent them and their biases."
            )


__all__ = ["AlibiGPTConfig"]
