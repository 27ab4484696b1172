"""ALiBi attention, and a language model with it, from the paper's formula, with loops where that is simplest.

Nothing here comes from the package, so a test against it is a test against the paper. `attention` computes in float64.
`language_model` computes in the dtype of its weights: float64 gives the exact result, and any other dtype shows the
error of a plain implementation in that dtype.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
}


def paper_slopes(num_heads: int, max_bias: float = 8.0) -> list[float]:
    """Returns the slopes of section 3, with the footnote's rule if the number of heads is no power of two."""
    if math.log2(num_heads).is_integer():
        ratio = 2.0 ** (-max_bias / num_heads)
        return [ratio ** (head + 1) for head in range(num_heads)]
    below = 2 ** math.floor(math.log2(num_heads))
    return paper_slopes(below, max_bias) + paper_slopes(2 * below, max_bias)[::2][: num_heads - below]


def attention(
    query: Tensor, key: Tensor, value: Tensor, slopes: list[float], scaling: float, visible: Tensor | None = None
) -> Tensor:
    """Computes softmax(q k^T scaling - m (i - j)) v over the keys j <= i, in float64.

    Args:
        query: `[batch, heads, queries, head_dim]`; the queries are the last of the keys.
        key: `[batch, key_value_heads, keys, head_dim]`.
        value: `[batch, key_value_heads, keys, head_dim]`.
        slopes: One for each query head.
        scaling: Factor of the dot products.
        visible: `[batch, queries, keys]`, further restriction; rows without a visible key give zeros.

    Returns:
        `[batch, heads, queries, head_dim]`, float64.
    """
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    key, value = (states.repeat_interleave(heads // states.shape[1], 1).double() for states in (key, value))
    outputs = []
    # Blocks of rows bound the memory.
    for start in range(0, num_queries, 512):
        rows = torch.arange(start, min(start + 512, num_queries))
        i, j = (rows + num_keys - num_queries)[:, None], torch.arange(num_keys)[None]
        bias = torch.stack([-slope * (i - j).double() for slope in slopes])
        scores = query[:, :, rows].double() @ key.transpose(2, 3) * scaling + bias
        allowed = (j <= i).expand(batch, -1, -1) if visible is None else (j <= i) & visible[:, rows]
        weights = scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1)
        outputs.append(weights.masked_fill(~allowed.any(-1)[:, None, :, None], 0.0) @ value)
    return torch.cat(outputs, 2)


class Text(NamedTuple):
    """Tokens that are read by themselves: one text, or whatever `visible` says.

    Attributes:
        tokens: `[tokens]`.
        slope_divisors: `[tokens]`; the slopes of each query are divided by its value (position interpolation).
        positions: `[tokens]`; `None`: 0, 1, 2 and so on.
        visible: `[heads or 1, tokens, tokens]`, which keys each query sees; `None`: those up to the query.
        added: `[heads or 1, tokens, tokens]`, added to the scores; `None`: nothing.
    """

    tokens: Tensor
    slope_divisors: Tensor
    positions: Tensor | None = None
    visible: Tensor | None = None
    added: Tensor | None = None


def language_model(weights: Mapping[str, Tensor], config: Any, text: Text, tolerance: float = 0.0) -> Tensor:
    """Computes the logits of an AlibiGPT for one text.

    Args:
        weights: By their names in the model; a tied output layer has none of its own.
        config: For its fields alone: sizes, slopes, and which norms there are.
        text: The tokens.
        tolerance: Fraction of the attention that a head may lose to its window, which is then as narrow as
            this allows; 0: no windows.

    Returns:
        `[tokens, vocab_size]`, in the dtype of the weights.
    """
    hidden = weights["model.embed_tokens.weight"][text.tokens]
    if config.embedding_norm:
        hidden = _norm(hidden, weights, "model.embedding_norm", config.norm_type, config.norm_eps)
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        normed = _norm(hidden, weights, f"{name}.input_layernorm", config.norm_type, config.norm_eps)
        hidden = hidden + _self_attention(normed, weights, f"{name}.self_attn", config, text, tolerance)
        normed = _norm(hidden, weights, f"{name}.post_attention_layernorm", config.norm_type, config.norm_eps)
        up = ACTIVATIONS[config.hidden_act](_linear(normed, weights, f"{name}.mlp.up_proj"))
        hidden = hidden + _linear(up, weights, f"{name}.mlp.down_proj")
    normed = _norm(hidden, weights, "model.norm", config.norm_type, config.norm_eps)
    return normed @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def _qk_norm(
    query: Tensor, key: Tensor, weights: Mapping[str, Tensor], name: str, config: Any
) -> tuple[Tensor, Tensor]:
    """Norms queries `[tokens, heads, head_dim]` and keys, and applies their gains."""
    query, key = (
        states / (states.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() for states in (query, key)
    )
    if config.qk_norm_gain == "channel":
        query, key = query * weights[f"{name}.q_norm.weight"], key * weights[f"{name}.k_norm.weight"]
    elif config.qk_norm_gain == "head":
        query = query * weights[f"{name}.q_norm.weight"][:, None]
    return query, key


def _self_attention(
    hidden: Tensor, weights: Mapping[str, Tensor], name: str, config: Any, text: Text, tolerance: float
) -> Tensor:
    length = len(hidden)
    query, key, value = (
        _linear(hidden, weights, f"{name}.{part}_proj").view(length, -1, config.head_dim) for part in "qkv"
    )  # [tokens, heads, head_dim]
    if config.qk_norm:
        query, key = _qk_norm(query, key, weights, name, config)
    # The softmax is in float32 at least, as in any model that works in 16 bits.
    query, key, value = (states.to(torch.promote_types(states.dtype, torch.float32)) for states in (query, key, value))
    groups = config.num_attention_heads // config.num_key_value_heads
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)

    positions = torch.arange(length) if text.positions is None else text.positions
    distance = (positions[:, None] - positions).abs()
    slopes = _slopes(weights, config).to(query.dtype)
    bias = -(slopes[:, None] / text.slope_divisors.to(query.dtype))[:, :, None] * distance  # [heads, queries, keys]
    scores = torch.einsum("qhd,khd->hqk", query, key) * config.head_dim**-0.5 + bias
    if text.added is not None:
        scores = scores + text.added.to(scores.dtype)
    visible = torch.ones(1, length, length, dtype=torch.bool).tril() if text.visible is None else text.visible
    if tolerance:
        longest = query.detach().norm(dim=-1).amax(0) * key.detach().norm(dim=-1).amax(0)
        # The largest possible score, [heads].
        bound = longest * config.head_dim**-0.5
        divided = slopes.detach()[:, None] / text.slope_divisors  # [heads, queries]
        window = torch.ceil((2 * bound[:, None] - math.log(tolerance)) / divided)
        visible = visible & (distance <= window[:, :, None])
    attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -math.inf).softmax(-1), value)
    return _linear(attended.reshape(length, -1).to(hidden.dtype), weights, f"{name}.o_proj")


def _slopes(weights: Mapping[str, Tensor], config: Any) -> Tensor:
    if config.alibi_slopes_trainable:
        slopes = weights["model.bias_log_slopes"].exp()
    elif config.alibi_slopes is not None:
        slopes = torch.tensor(config.alibi_slopes, dtype=torch.float64)
    else:
        slopes = torch.tensor(paper_slopes(config.num_attention_heads, config.alibi_max_bias), dtype=torch.float64)
    scaling = config.alibi_scaling or {}
    return slopes / scaling.get("factor", 1)


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _norm(x: Tensor, weights: Mapping[str, Tensor], name: str, norm_type: str, eps: float) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm_type == "layernorm":
        exact = exact - exact.mean(-1, keepdim=True)
    normed = (exact / (exact.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weights[f"{name}.weight"]
    return normed + weights[f"{name}.bias"] if f"{name}.bias" in weights else normed
