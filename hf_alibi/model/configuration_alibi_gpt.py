"""The configuration of an AlibiGPT model: its shape, and the choices that change what it computes."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict, validated_field
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .alibi import alibi_slopes

POSITIVE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "alibi_max_bias",
    "norm_eps",
)


def _check_scaling(scaling: dict[str, Any] | None) -> None:
    """Raises `ValueError` for an `alibi_scaling` without a meaning."""
    if scaling is None or scaling == {"type": "dynamic"}:
        return
    factor = scaling.get("factor")
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if scaling != {"type": "linear", "factor": factor} or not is_number or not 1 <= factor < math.inf:
        raise ValueError(
            "alibi_scaling must be None, {'type': 'linear', 'factor': a finite number of at least 1} or "
            f"{{'type': 'dynamic'}}, which takes no factor; got {scaling}."
        )


@strict
class AlibiGPTConfig(PreTrainedConfig):
    """Configuration of a decoder-only language model with ALiBi in place of position embeddings.

    The defaults are the shape of the WikiText-103 models of Press et al. (arXiv 2108.12409, section 4),
    with RMSNorm, QK-norm, squared ReLU, a tied head and no biases. LayerNorm, biases, GELU and a norm
    after the embedding give the shapes of BLOOM and MPT; `conversion/` has those of other models with ALiBi.

    Args:
        vocab_size: Number of token embeddings.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Number of query heads; each has a slope of its own.
        num_key_value_heads: Number of key and value heads, a divisor of `num_attention_heads`; `None`
            for one for each query head, 1 for multi-query attention.
        head_dim: Width of a head; `None` for `hidden_size / num_attention_heads`.
        intermediate_size: Width of the feed-forward layer; `None` for four times `hidden_size`.
        hidden_act: Activation of the feed-forward layer, a name known to Transformers.
        mlp_gated: Whether the activation acts on a gate that multiplies the up projection: SwiGLU with
            `hidden_act="silu"`, GEGLU with `"gelu"` (arXiv 2002.05202). Adds a third projection of the same size.
        max_position_embeddings: Number of tokens in a training sequence. A record, never a limit; beyond it a
            dynamic `alibi_scaling` sets in.
        alibi_max_bias: Steepness of the slopes; see `alibi_slopes`.
        alibi_slopes: One positive slope for each query head; `None` for the paper's.
        alibi_slopes_trainable: Whether the slopes are learned, starting from these, by all layers together.
        alibi_scaling: Position interpolation (arXiv 2310.13017); `None` for none. `{"type": "linear", "factor": f}`
            divides every slope by f, at least 1. `{"type": "dynamic"}` divides them by n / `max_position_embeddings`
            in a forward pass whose longest text has n tokens, cached ones included, if that is above 1. Cached keys
            and values hold no slopes and stay valid: each pass applies its own slopes to all of them. But what a
            token became in an earlier pass, it became with the slopes of that pass; so with dynamic scaling,
            beyond the training length, reading a text in pieces differs from reading it at once.
        window_tolerance: Fraction of the attention that a head may lose by leaving out keys too far away to
            matter, see `windows.py`; the default is the rounding of float32. 0 looks at every key.
        qk_norm: Whether queries and keys get an RMSNorm over `head_dim`, which bounds every score.
        clip_qkv: Queries, keys and values are clipped to [-`clip_qkv`, `clip_qkv`] as they leave their projections,
            before QK-norm (MPT); `None` for no clipping.
        attention_bias: Whether the projections of the attention have biases.
        mlp_bias: Whether the projections of the feed-forward layer have biases.
        norm_type: `"rmsnorm"` or `"layernorm"`.
        norm_bias: Whether LayerNorm has a bias; RMSNorm has none.
        norm_eps: Added to the variance in every norm.
        embedding_norm: Whether the embeddings pass a norm before the first layer (BLOOM).
        use_parallel_residual: Whether attention and feed-forward layer both read the input of their decoder layer
            (Falcon); otherwise the feed-forward layer reads what the attention has added to.
        hidden_dropout: Dropout of the embeddings and of what each layer adds to the residual stream.
        attention_dropout: Dropout of the attention weights.
        initializer_range: Standard deviation of the initial weights.
        use_cache: Whether forward returns keys and values for generation.
        tie_word_embeddings: Whether the output layer shares the embedding's weights.
        pad_token_id: Padding token; its embedding starts at zero and is not trained.
        bos_token_id: First token of a text.
        eos_token_id: Token, or tokens, that end a text.

    Raises:
        ValueError, StrictDataclassError: For values that no model can have; the message states them.
    """

    model_type = "alibi_gpt"
    _auto_class = "AutoConfig"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",  # a rank sees the gradient of its own heads
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    hidden_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "relu2"
    mlp_gated: bool = False
    max_position_embeddings: int = 512
    alibi_max_bias: int | float = 8.0
    alibi_slopes: list[int | float] | tuple[int | float, ...] | None = None
    alibi_slopes_trainable: bool = False
    alibi_scaling: dict[str, Any] | None = validated_field(_check_scaling, default=None)  # on assignment too
    window_tolerance: int | float = 2.0**-24
    qk_norm: bool = True
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

    def __post_init__(self, **kwargs: object) -> None:
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
        super().__post_init__(**kwargs)

    @property
    def slopes(self) -> list[float]:
        """The slope of every query head, in nats per token of distance, before `alibi_scaling`."""
        if self.alibi_slopes is None:
            return alibi_slopes(self.num_attention_heads, self.alibi_max_bias)
        return [float(slope) for slope in self.alibi_slopes]

    @property
    def slope_divisor(self) -> float:
        """What `alibi_scaling` divides every slope by at any length: the factor of a linear one, otherwise 1."""
        return (self.alibi_scaling or {}).get("factor", 1.0)

    @property
    def slopes_depend_on_length(self) -> bool:
        """Whether `alibi_scaling` is dynamic."""
        return self.alibi_scaling == {"type": "dynamic"}

    def validate_architecture(self) -> None:
        """Checks that some model can have this shape.

        Raises:
            ValueError: If not; it states the values.
        """
        for name in POSITIVE_FIELDS:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
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
        if not all(0 < slope < float("inf") for slope in self.alibi_slopes or []):
            raise ValueError(f"alibi_slopes must be positive and finite, got {self.alibi_slopes}.")
        if self.clip_qkv is not None and not 0 < self.clip_qkv < math.inf:
            raise ValueError(f"clip_qkv must be positive and finite, or None for no clipping; got {self.clip_qkv}.")
        if self.norm_bias and self.norm_type == "rmsnorm":
            raise ValueError("norm_bias=True needs norm_type='layernorm': RMSNorm has no bias.")
        for name in ("hidden_dropout", "attention_dropout", "window_tolerance"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}.")


__all__ = ["AlibiGPTConfig"]
