"""The forgetting gate (FoX): a bias like that of ALiBi whose slope depends on the tokens in between.

Identical to AlibiGPT except:

- Every slope is zero. At each token, each head computes a gate f = sigmoid(w . x + b) from the input x of the
  attention. The bias of query i and key j is the sum of log f over the tokens j + 1 to i, which is never positive.
- There are no windows, and the backends are `sdpa` and `eager`.

With T_i, the sum of -log f over the tokens up to i, the bias is T_j - T_i. So it enters the scores through additional
columns of queries and keys. T grows with the text, to 11,000 nats after 16,000 tokens with gates of 1/2, where float32
is exact to 0.001. Four choices keep the bias exact nevertheless:

- T is summed in float64.
- T is counted from the last query of a pass. A single query, for which kernels may sum in any order, then adds nothing
  large to keys nearby.
- Each T is split into three parts: a multiple of 1,024, an integer below that, and the rest. Products of the first two
  with 1 are exact, also in TF32.
- The columns of T_j and T_i are neighbours, before all others. Kernels for many queries sum from the first column on,
  so the large parts cancel exactly before anything is added to them.

The attention is computed in float32 at least. The cache holds keys with the arguments of their gates, w . x + b, in
additional columns: of few bits, sums would lose what single gates do not.

Source: Lin et al., "Forgetting Transformer: Softmax Attention with a Forget Gate" (arXiv 2503.02130), section 3. This
is the gate alone, without the further changes of the paper's "Pro" layer. Importing this module registers the model
with the Auto classes as `fox_gpt`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..model.configuration_alibi_gpt import AlibiGPTConfig
from ..model.inputs import without_autocast
from ..model.layers import AlibiGPTAttention
from ..model.layout import TokenLayout
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM, AlibiGPTModel
from .base import UnbiasedConfig

# Integers below this number have at most 10 bits, so TF32 represents them.
COARSE = 1024


@strict
class FoxGPTConfig(UnbiasedConfig):
    """Configuration of the model with forgetting gates."""

    model_type = "fox_gpt"
    _auto_map = {"AutoConfig": "fox.FoxGPTConfig"}
    base_model_tp_plan = AlibiGPTConfig.base_model_tp_plan | {"layers.*.self_attn.forget_proj": "colwise"}


def split_exactly(sums: Tensor) -> list[Tensor]:
    """Splits `sums` into multiples of `COARSE`, integers below it, and the rest, which has gradients."""
    # Towards zero, so that small numbers have no large parts.
    coarse = (sums / COARSE).trunc() * COARSE
    middle = (sums - coarse).trunc()
    return [coarse, middle, sums - coarse - middle]


class FoxGPTAttention(AlibiGPTAttention):
    """Attention with forgetting gates."""

    def __init__(self, config: AlibiGPTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.forget_proj = nn.Linear(config.hidden_size, config.num_attention_heads)

    def with_positions(
        self, query: Tensor, key: Tensor, hidden_states: Tensor, layout: TokenLayout
    ) -> tuple[Tensor, Tensor]:
        """Adds the arguments of the gates to the keys, one column for each query head that shares the key."""
        gates = self.forget_proj(hidden_states).unflatten(2, (key.shape[1], -1)).transpose(1, 2)
        return query, torch.cat([key, gates.to(key.dtype)], dim=-1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Computes attention with the bias of the gates. `key` has the columns that `with_positions` adds."""
        groups = query.shape[1] // key.shape[1]
        key, gates = key.split([self.head_dim, groups], dim=-1)
        forgotten = -F.logsigmoid(gates.double()).transpose(2, 3).flatten(1, 2)  # [batch, heads, keys]
        if layout.key_mask is not None:
            # Padding, and unused slots of a static cache, forget nothing.
            forgotten = forgotten.masked_fill(~layout.key_mask[:, None], 0)
        sums = forgotten.cumsum(-1)
        own = self._own(sums, layout)
        last = own[..., -1:].detach()
        columns_of_queries, columns_of_keys = [], []
        for of_query, of_key in zip(split_exactly(own - last), split_exactly(sums - last), strict=True):
            columns_of_queries += [-of_query, torch.ones_like(of_query)]
            columns_of_keys += [torch.ones_like(of_key), of_key]

        query_dtype = query.dtype
        dtype = torch.promote_types(query_dtype, torch.float32)
        room = len(columns_of_keys)
        key, value = (states.to(dtype).repeat_interleave(groups, 1) for states in (key, value))
        query = torch.cat([torch.stack(columns_of_queries, -1).to(dtype), query.to(dtype) * scaling], dim=-1)
        key = torch.cat([torch.stack(columns_of_keys, -1).to(dtype), key], dim=-1)
        # Autocast would round sums to 16 bits. Kernels need values of the width of keys.
        with without_autocast(query.device.type):
            output, weights = super().attend(query, key, F.pad(value, (0, room)), layout, scaling=1.0, **kwargs)
        return output[..., : self.head_dim].to(query_dtype), weights

    @staticmethod
    def _own(sums: Tensor, layout: TokenLayout) -> Tensor:
        """Returns the sum up to each query, `[batch, heads, queries]`, from those up to each key.

        With positions of the caller it may be another one. That costs precision only: it is the same for all keys.
        """
        slots = torch.searchsorted(layout.keys, layout.queries).clamp(max=layout.keys.shape[1] - 1)
        return sums.gather(2, slots[:, None].expand(*sums.shape[:2], -1))


class FoxGPTModel(AlibiGPTModel):
    """The decoder with forgetting gates."""

    config: FoxGPTConfig
    _auto_map = FoxGPTConfig._auto_map | {
        "AutoModel": "fox.FoxGPTModel",
        "AutoModelForCausalLM": "fox.FoxGPTForCausalLM",
    }
    attention_class = FoxGPTAttention
    has_linear_bias = False


class FoxGPTForCausalLM(AlibiGPTForCausalLM):
    """The language model with forgetting gates."""

    config: FoxGPTConfig
    _auto_map = FoxGPTModel._auto_map
    decoder_class = FoxGPTModel

    def _get_static_cache_init_shape(self) -> None:
        """Leaves the shape of a static cache to the first keys, which have columns for gates."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses continuous batching, whose cache has no room for gates.

        Raises:
            ValueError: Always.
        """
        raise ValueError("fox_gpt has no continuous batching, whose cache has no room for gates; use generate.")


AutoConfig.register(FoxGPTConfig.model_type, FoxGPTConfig)
AutoModelForCausalLM.register(FoxGPTConfig, FoxGPTForCausalLM)
