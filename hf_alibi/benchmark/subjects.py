"""What the benchmark measures: attention calls, training steps, prefills and decoding, of our models and of peers.

Each function makes inputs or a model, and returns the call to measure. It finds its implementation by name, so that
another process can do the same. All models of a comparison have the same `Shape` and random weights:

- Their feed-forward layers have the same number of parameters. Those of Llama have three matrices, so they are
  narrower.
- GPT-2 has an embedding for each position, which the others lack.
- Every head is tied to the embedding, and there is no dropout.

What is measured of a model takes a `Build`, so that it also measures models from elsewhere: see `converted.py`.
"""

import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cache,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    PreTrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..model.alibi import alibi_slopes
from ..model.attention import BACKENDS as ALL_BACKENDS
from ..model.cache_names import CACHE_NAME
from ..model.configuration_alibi_gpt import AlibiGPTConfig
from ..model.layers import AlibiGPTAttention
from ..model.layout import token_layout

# Returns a model, the same one in each call. It must be picklable.
Build = Callable[[], Any]

CAUSAL = "causal SDPA, no bias"
# A mask that all layers share; a mask that each layer makes; and Transformers' way, where each makes it from a shared
# bias.
WITH_MASK = DENSE, MADE, POSITION_BIAS = (
    "SDPA, stored ALiBi mask",
    "SDPA, ALiBi mask per call",
    "Transformers' sdpa, position_bias",
)
PEERS = LLAMA, GPT2, BLOOM, MPT = "Llama", "GPT-2", "BLOOM", "MPT"
EAGER, WINDOWED = "ALiBi, eager", "ALiBi, sdpa, windows"
# Scores are bounded only by the norms at hand.
NO_QK_NORM = "ALiBi, sdpa, no QK-norm"
OWN_CACHE, DYNAMIC_CACHE = "ALiBi, WindowedCache", "ALiBi, DynamicCache"
# Ways to decode, and the model of each.
DECODERS = {OWN_CACHE: WINDOWED, DYNAMIC_CACHE: WINDOWED, "ALiBi, no QK-norm, GrowingCache": NO_QK_NORM}
DECODERS |= {peer: peer for peer in PEERS}
# Names with a slash are repositories of kernels. Names with a bar are for continuous batching.
BACKENDS = [backend for backend in ALL_BACKENDS if not {"/", "|"} & set(backend)]
# Rows of a float64 mask that are computed together. It bounds the memory.
ROWS_AT_A_TIME = 64


def our_implementations(backends: Iterable[str] = BACKENDS) -> dict[str, tuple[str, float]]:
    """Returns our implementations: attention backend and tolerance of the head windows, by name."""
    named = {}
    for backend in backends:
        named[f"ALiBi, {backend}"] = (backend, 0.0)
        # The other backends attend to every key.
        if backend in ("sdpa", "flex_attention"):
            named[f"ALiBi, {backend}, windows"] = (backend, float(AlibiGPTConfig().window_tolerance))
    return named


class Problem(NamedTuple):
    """The size of an attention call: one sequence."""

    length: int
    num_heads: int
    head_dim: int
    dtype: str
    device: str

    def states(self, backward: bool) -> list[Tensor]:
        """Returns random QK-normed queries and keys, and random values, each `[1, heads, length, head_dim]`."""
        generator = torch.Generator(self.device).manual_seed(self.length)
        shape = (3, 1, self.num_heads, self.length, self.head_dim)
        query, key, value = torch.randn(shape, generator=generator, device=self.device)
        query, key = (F.rms_norm(states, [self.head_dim]) for states in (query, key))
        return [states.to(getattr(torch, self.dtype)).requires_grad_(backward) for states in (query, key, value)]

    def mask(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the causal mask with the relative bias for the queries at `rows`, `[1, heads, rows, length]`."""
        mask = torch.empty(1, self.num_heads, len(rows), self.length, dtype=dtype, device=self.device)
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            some = slice(start, start + ROWS_AT_A_TIME)
            mask[:, :, some] = self.mask_at_once(rows[some], torch.float64)
        return mask

    def mask_at_once(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the same mask, computed in `dtype` with as few operations as the formula has."""
        slopes = torch.tensor(alibi_slopes(self.num_heads), dtype=dtype, device=self.device)[:, None, None]
        offset = torch.arange(self.length, device=self.device) - rows[:, None]
        return (slopes * offset).masked_fill_(offset > 0, -torch.inf)[None]


def attention_call(name: str, problem: Problem, backward: bool) -> Callable[[], Any]:
    """Returns an attention call: forward with the output `[1, heads, length, head_dim]`, or forward and backward."""
    states = problem.states(backward)
    forward = _forward(name, problem, *states)
    if not backward:
        return forward
    direction = torch.randn_like(states[0])
    return lambda: torch.autograd.grad(forward(), states, direction)


def _forward(name: str, problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    if name == CAUSAL:
        return partial(F.scaled_dot_product_attention, query, key, value, is_causal=True)
    rows = torch.arange(problem.length, device=problem.device)
    if name == MADE:
        make = partial(problem.mask_at_once, rows, torch.float32)
        return lambda: F.scaled_dot_product_attention(query, key, value, make().to(query.dtype))
    if name in WITH_MASK:
        # The first call makes the bias, and later calls reuse it, so it counts as memory and not as time. The same
        # holds for what our backends share between the layers of a model.
        stored = cache(partial(problem.mask, rows, query.dtype))
        if name == DENSE:
            return lambda: F.scaled_dot_product_attention(query, key, value, stored())
        transformers_attend = partial(sdpa_attention_forward, nn.Module(), query, key, value, None, is_causal=True)
        return lambda: transformers_attend(position_bias=stored())[0].transpose(1, 2)
    backend, tolerance = our_implementations()[name]
    hidden_size = problem.num_heads * problem.head_dim
    config = AlibiGPTConfig(hidden_size=hidden_size, num_attention_heads=problem.num_heads, window_tolerance=tolerance)
    config._attn_implementation = backend
    module = AlibiGPTAttention(config, layer_idx=0).to(problem.device)
    layout = token_layout(torch.tensor(config.slopes, device=problem.device), query.transpose(1, 2), None, None, None)
    attend = partial(ALL_BACKENDS[backend].forward, module, query, key, value, layout, module.scaling)
    return lambda: attend()[0].transpose(1, 2)


@torch.no_grad()
def max_errors(names: list[str], problem: Problem, max_rows: int) -> dict[str, float]:
    """Returns the largest difference from attention in float64, by name.

    It is over all rows, or over `max_rows` evenly spaced ones from the first to the last. `DENSE` computes a few rows
    at a time, so that its error is also known at lengths where its mask could not be stored.
    """
    length = problem.length
    rows = torch.linspace(0, length - 1, min(length, max_rows), dtype=torch.float64, device=problem.device).long()
    query, key, value = problem.states(backward=False)
    exact_key, exact_value = key.double(), value.double()
    outputs = {name: attention_call(name, problem, backward=False)() for name in names if name != DENSE}
    errors = dict.fromkeys(names, 0.0)
    for some in rows.split(ROWS_AT_A_TIME):
        scores = query[:, :, some].double() @ exact_key.mT * problem.head_dim**-0.5
        exact = (scores + problem.mask(some, torch.float64)).softmax(-1) @ exact_value
        for name in names:
            if name == DENSE:
                mask = problem.mask(some, query.dtype)
                output = F.scaled_dot_product_attention(query[:, :, some], key, value, mask)
            else:
                output = outputs[name][:, :, some]
            errors[name] = max(errors[name], (output - exact).abs().max().item())
    return errors


class Shape(NamedTuple):
    """The size of a model."""

    hidden_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    max_positions: int
    dtype: str
    device: str


@cache
def build_model(name: str, shape: Shape) -> Any:
    """Returns the model of that name and shape: one of the `PEERS`, or one of ours with QK-norm."""
    torch.manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    if name in PEERS:
        model = AutoModelForCausalLM.from_config(_peer_config(name, shape), dtype=dtype)
        # Transformers cannot tell this from GPT-2's class name, and would warn.
        model.loss_type = "ForCausalLM"
    else:
        backend, tolerance = our_implementations()[WINDOWED if name == NO_QK_NORM else name]
        config = AlibiGPTConfig(
            qk_norm=name != NO_QK_NORM,
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            window_tolerance=tolerance,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=backend)
    return model.to(shape.device).eval()


def _peer_config(name: str, shape: Shape) -> PreTrainedConfig:
    size, layers, heads, positions = shape.hidden_size, shape.num_layers, shape.num_heads, shape.max_positions
    tokens: dict[str, Any] = {"vocab_size": shape.vocab_size, "bos_token_id": None, "eos_token_id": None}
    if name == LLAMA:
        return LlamaConfig(
            hidden_size=size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=8 * round(size / 3),
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            **tokens,
        )
    if name == GPT2:
        no_dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(n_embd=size, n_layer=layers, n_head=heads, n_positions=positions, **no_dropout, **tokens)
    if name == BLOOM:
        return BloomConfig(hidden_size=size, n_layer=layers, n_head=heads, **tokens)
    return MptConfig(d_model=size, n_layers=layers, n_heads=heads, max_seq_len=positions, **tokens)


def random_tokens(model: Any, length: int) -> Tensor:
    """Returns random token ids for `model`, `[1, length]`."""
    generator = torch.Generator(model.device).manual_seed(length)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator, device=model.device)


def training_step(build: Build, length: int) -> Callable[[], None]:
    """Returns a call that computes the loss of one sequence and all gradients, without an update."""
    model = build()
    input_ids = random_tokens(model, length)

    def step() -> None:
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        model.zero_grad()

    return step


def prefill(build: Build, length: int) -> Callable[[], Any]:
    """Returns a call that computes the last logits of one sequence and its cache, in one forward pass."""
    model = build()
    call = partial(model, input_ids=random_tokens(model, length), logits_to_keep=1, use_cache=True)
    return torch.no_grad()(call)


@torch.no_grad()
def logits(name: str, shape: Shape, length: int) -> Tensor:
    """Returns the logits of one of our models, `[1, length, vocab_size]`. All of them have the same weights."""
    model = build_model(name, shape)
    return model(input_ids=random_tokens(model, length), use_cache=False).logits


def dynamic_cache(model: Any) -> DynamicCache:
    """Returns the cache that `generate` uses for a model of Transformers."""
    return DynamicCache(config=model.config)


def own_cache(model: Any) -> Cache:
    """Returns the cache that `generate` uses for a model of ours."""
    return model.model.new_cache()


def way_to_decode(name: str, shape: Shape) -> tuple[Build, Callable[[Any], Cache]]:
    """Returns the model of one of the `DECODERS`, and what makes an empty cache for it."""
    is_dynamic = name == DYNAMIC_CACHE or name in PEERS
    return partial(build_model, DECODERS[name], shape), dynamic_cache if is_dynamic else own_cache


class Decoder:
    """Decodes one token per call, greedily. The constructor reads the prompt in chunks.

    Args:
        build: Returns the model.
        make_cache: Returns an empty cache for the model.
        context: Tokens in the prompt.
        chunk_size: Tokens in a chunk.

    Attributes:
        cache: Keys and values of the prompt and of the decoded tokens.
        prefill_seconds: Time to read the prompt.
    """

    @torch.no_grad()
    def __init__(self, build: Build, make_cache: Callable[[Any], Cache], context: int, chunk_size: int) -> None:
        self.model = build()
        self.cache = make_cache(self.model)
        start = time.perf_counter()
        for chunk in random_tokens(self.model, context).split(chunk_size, dim=1):
            self._read(chunk)
        # Waits for the device.
        self.token.cpu()
        self.prefill_seconds = time.perf_counter() - start

    @torch.no_grad()
    def __call__(self) -> None:
        """Decodes the next token."""
        self._read(self.token)

    def _read(self, input_ids: Tensor) -> None:
        outputs = self.model(input_ids=input_ids, **{CACHE_NAME: self.cache}, use_cache=True, logits_to_keep=1)
        self.token = outputs.logits.argmax(-1)


def cache_mib(cache: Cache) -> float:
    """Returns the size of a cache in MiB: that of all tensors in its layers, in full where it only has views."""
    holders = [holder for layer in cache.layers for holder in (layer, *getattr(layer, "buffers", []))]
    tensors = [x for holder in holders for x in vars(holder).values() if isinstance(x, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values()) / 2**20


def prompt_reading(
    build: Build, make_cache: Callable[[Any], Cache], context: int, chunk_size: int
) -> Callable[[], Decoder]:
    """Returns a call that reads the prompt in chunks, and so makes a decoder."""
    build()
    return partial(Decoder, build, make_cache, context, chunk_size)
