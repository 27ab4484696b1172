"""Random models read random batches in random ways, and agree with a plain float64 model in everything.

A tolerance is the error that the plain model itself makes in the case's dtype, with windows as narrow as the case's
`window_tolerance` allows. To look at one case again, call `check` with the line that a failure prints.
"""

import math
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from fuzz_batches import VOCAB_SIZE, Batch
from fuzz_cases import Case, cases
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM, WindowedCache
from hf_alibi.model import cache, causal, flex, growing, inputs, layout, sdpa, tiles

# Each module that imports a constant has its own copy, which must be changed too.
SMALL_TILES = {
    tiles: {
        "NEAR_BLOCK": 8,
        "FULL_SPEED": 24,
        "FAR": 40,
        "KEY_BLOCK": 16,
        "FEW_KEYS": 20,
        "GRAIN": 4,
        "SHARED_KEYS": 12,
    },
    causal: {"NEAR_BLOCK": 8, "FULL_SPEED": 24, "SLOPE_GRAIN": 4},
    inputs: {"FEW_KEYS": 20, "QUERY_BLOCK": 16},
    sdpa: {"QUERY_BLOCK": 16},
    flex: {"QUERY_BLOCK": 16},
    layout: {"QUERY_BLOCK": 16},
    cache: {"SPARE": 5},
    growing: {"MIN_GROWTH": 3},
}
# Fused kernels round elsewhere than plain operations, and the largest of a few errors varies by chance.
FACTOR = 6

Weights = dict[str, Tensor]


def dtype_of(case: Case) -> torch.dtype:
    """The dtype of the model's weights."""
    return torch.float32 if case.dtype == "autocast" else getattr(torch, case.dtype)


@contextmanager
def circumstances(case: Case) -> Iterator[None]:
    """Sets the sizes of tiles, and autocast."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "autocast")
    with pytest.MonkeyPatch.context() as patch, autocast:
        for module, sizes in SMALL_TILES.items() if case.small_tiles else ():
            for name, size in sizes.items():
                patch.setattr(module, name, size)
        yield


def model_of(case: Case) -> tuple[AlibiGPTForCausalLM, Weights]:
    """Returns the model, and its weights in float64."""
    config = AlibiGPTConfig(vocab_size=VOCAB_SIZE, attn_implementation=case.backend, **case.config)
    model = AlibiGPTForCausalLM(config)
    random = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            if "bias_log_slopes" in name:
                weight += 0.1 * noise
            elif "norm.weight" in name or "layernorm.weight" in name:
                weight.copy_((1 + 0.3 * noise) * (case.gain if "q_norm" in name else 1))
            elif weight.dim() == 1:
                weight.copy_(0.3 * noise)
            # The weights are so large that attention changes the output visibly.
            else:
                weight.copy_(noise if "embed" in name else 1.5 * noise / weight.shape[1] ** 0.5)
    slopes = {name: weight.detach().double() for name, weight in model.named_parameters() if "slopes" in name}
    model = model.to(dtype_of(case)).eval()
    weights = {name: weight.detach().double() for name, weight in model.named_parameters()}
    # Slopes have the same values in every dtype.
    return model, weights | slopes


class Reader(NamedTuple):
    """A plain model. Its distance to the exact one is the tolerance for the tested model.

    Attributes:
        weights: In the dtype that it computes in.
        tolerance: How narrow its windows are, see `oracle.language_model`.
        scale: Factor of its errors.
    """

    weights: Weights
    tolerance: float = 0
    scale: float = 1


def readers_of(case: Case, weights: Weights) -> list[Reader]:
    """Returns the exact model, one in the dtype of the case, one with other last bits, and one with windows if any.

    Plain operations in float64 would be as exact as the first one, so there the errors of float32 are scaled down.
    Plain operations can also be right by chance, above all in a short text. The model whose weights differ from the
    exact ones in their last bits shows how much rounding matters in this case.
    """
    dtype = torch.bfloat16 if case.dtype == "autocast" else dtype_of(case)
    plain = torch.float32 if dtype == torch.float64 else dtype
    scale = torch.finfo(dtype).eps / torch.finfo(plain).eps
    random = torch.Generator().manual_seed(case.seed)
    last_bits = {
        name: weight
        * (1 + torch.finfo(dtype).eps * (2 * torch.rand(weight.shape, generator=random, dtype=torch.float64) - 1))
        for name, weight in weights.items()
    }
    readers = [
        Reader(cast(weights, torch.float64)),
        Reader(cast(weights, plain), scale=scale),
        Reader(cast(last_bits, torch.float64)),
    ]
    few_keys = SMALL_TILES[tiles]["FEW_KEYS"] if case.small_tiles else tiles.FEW_KEYS
    if case.backend != "eager" and (case.cache == "windowed" or case.length > few_keys):
        readers.append(Reader(cast(weights, torch.float64), tolerance=case.config["window_tolerance"]))
    return readers


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    # Slopes are never rounded to 16 bits.
    slopes_dtype = torch.promote_types(dtype, torch.float32)
    return {
        name: weight.detach().to(slopes_dtype if "slopes" in name else dtype).requires_grad_()
        for name, weight in weights.items()
    }


def compare(name: str, found: Tensor, readings: Sequence[Tensor], readers: list[Reader], least: float) -> None:
    """Asserts that the error of `found` is at most the sum of the other readings' errors. The first one is exact.

    Args:
        name: What is compared.
        found: The model's.
        readings: Each reader's.
        readers: Those.
        least: An error that is always allowed.
    """
    exact, *others = readings
    allowed = least + sum(
        reader.scale * (reading.double() - exact).abs().max().item()
        for reading, reader in zip(others, readers[1:], strict=True)
    )
    error = (found.double() - exact).abs().max().item()
    assert error <= FACTOR * allowed, f"{name}: off by {error:.3g}, where plain operations are off by {allowed:.3g}"


def check(case: Case) -> None:
    """Runs a case, and raises if anything in it differs from the oracle."""
    model, weights = model_of(case)
    batch = Batch(case, dtype_of(case))
    readers = readers_of(case, weights)

    def compare_logits(found: Tensor) -> None:
        """Compares the logits of the last slots."""
        with torch.set_grad_enabled(case.gradients != "none"), torch.autocast("cpu", enabled=False):
            readings = [batch.reference(reader.weights, model.config, reader.tolerance) for reader in readers]
        real = batch.real()
        real[:, : real.shape[1] - found.shape[1]] = False
        if not real.any():
            return
        readings = [reading[real] for reading in readings]
        found = found[real[:, -found.shape[1] :]]
        compare("logits", found, readings, readers, torch.finfo(batch.dtype).eps * readings[0].abs().max().item())
        if case.gradients != "none":
            compare_gradients(dict(model.named_parameters()), found, readings, readers, batch.random)

    with circumstances(case):
        if case.cache is None:
            compare_logits(read_at_once(case, model, batch))
        else:
            read_in_steps(case, model, batch, compare_logits)


def read_at_once(case: Case, model: AlibiGPTForCausalLM, batch: Batch) -> Tensor:
    tokens = batch.next_tokens(case.length)
    batch.add(tokens)
    if case.gradients == "checkpointing":
        # Before Transformers 5.24 its name was gradient_checkpointing_enable.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
    with torch.set_grad_enabled(case.gradients != "none"):
        return model(tokens, use_cache=False, **batch.arguments(0, case.length, case.length)).logits


def cache_of(case: Case, model: AlibiGPTForCausalLM) -> Any:
    if case.cache == "dynamic":
        return DynamicCache(config=model.config)
    if case.cache == "static":
        return StaticCache(config=model.config, max_cache_len=case.length + case.seed % 3)
    made = model.model.new_cache(windowed=case.cache == "windowed")
    assert isinstance(made, WindowedCache) == (case.cache == "windowed")
    return made


@torch.no_grad()
def read_in_steps(case: Case, model: AlibiGPTForCausalLM, batch: Batch, compare_logits: Any) -> None:
    past, done, logits = cache_of(case, model), 0, []

    def read(tokens: Tensor) -> Tensor:
        end = done + tokens.shape[1]
        num_keys = past.get_mask_sizes(tokens.shape[1], 0)[0]
        return model(tokens, past_key_values=past, **batch.arguments(done, end, num_keys)).logits

    for kind, what in case.steps:
        if kind == "read":
            tokens = batch.next_tokens(what)
            batch.add(tokens)
            try:
                logits.append(read(tokens))
            except ValueError as error:
                if not is_a_refusal(error, case, batch):
                    raise
                return
            done += what
        elif kind == "mistake":
            if case.cache == "static" and not hasattr(StaticLayer, "crop"):  # before Transformers 5.24
                continue
            size = min(what, case.length - done)
            read(batch.next_tokens(size))
            past.crop(-size)
        else:
            if logits:
                compare_logits(torch.cat(logits, 1))
            logits = []
            change_rows(kind, what, past, batch)
    compare_logits(torch.cat(logits, 1))


def is_a_refusal(error: ValueError, case: Case, batch: Batch) -> bool:
    """Whether the model says that it cannot know what this pass asks for, and that is so."""
    if "needs keys that the windowed cache no longer" in str(error):
        return case.needs_lost_keys
    # After a change of rows, or a mistake, all rows are their first document. Numbers are then a plain mask.
    is_plain = case.encoding == "document numbers" and int(batch.told().max()) <= 1
    return is_plain and "The cache holds several documents" in str(error)


def change_rows(kind: str, what: Any, past: Any, batch: Batch) -> None:
    """Reorders, repeats or selects the rows of the cache and of the batch."""
    if kind == "repeat":
        past.batch_repeat_interleave(what)
        batch.choose(torch.arange(len(batch.source)).repeat_interleave(what))
    elif kind == "select":
        past.batch_select_indices(torch.tensor(what))
        batch.choose(torch.tensor(what))
    else:
        past.reorder_cache(torch.tensor(what))
        batch.choose(torch.tensor(what))


def compare_gradients(
    weights: Weights, found: Tensor, readings: list[Tensor], readers: list[Reader], random: torch.Generator
) -> None:
    """Compares the gradients of all weights, given the logits that they made."""
    direction = torch.randn(found.shape, generator=random, dtype=torch.float64)
    gradients, *of_readers = (
        torch.autograd.grad((logits.double() * direction).sum(), list(of.values()))
        for logits, of in zip([found, *readings], [weights, *(reader.weights for reader in readers)], strict=True)
    )
    exact, plain = of_readers[:2]
    relative = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(plain, exact, strict=True)]
    typical = statistics.median(error for error in relative if not math.isnan(error)) * readers[1].scale
    # Weights of one module share a scale. With a text of one token, gradients of queries and keys are rounding errors.
    largest: dict[str, float] = {}
    for name, gradient in zip(weights, exact, strict=True):
        largest[group(name)] = max(largest.get(group(name), 0.0), gradient.abs().max().item())
    for name, gradient, *of_weight in zip(weights, gradients, *of_readers, strict=True):
        compare(f"gradient of {name}", gradient, of_weight, readers, typical * largest[group(name)])


def group(name: str) -> str:
    """Returns the part of the model that a weight belongs to, such as an attention."""
    return ".".join(name.split(".")[:-2])


FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)


@settings(FUZZ, max_examples=150)
@given(case=cases())
def test_cases(case: Case) -> None:
    check(case)


@pytest.mark.slow
@settings(FUZZ, max_examples=1000)
@given(case=cases())
def test_many_cases(case: Case) -> None:
    check(case)


# FlexAttention compiles a kernel for each kind of input, and the compiler imports deprecated modules.
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on the CPU needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@settings(FUZZ, max_examples=20)
@given(case=cases(backends=("flex_attention",)))
def test_flex_attention(case: Case) -> None:
    check(case)
