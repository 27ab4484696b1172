"""Verifies that a converted model computes what its source does, by the logits of a whole, padded and cached text.

The source runs as Transformers' own class if that follows the config, otherwise as its formula in float64. Models
compute in float32, whatever the dtype of their weights, and one after the other, so that only one is in memory. A
layer's weights are cast during its call and restored afterwards.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..errors import UserError
from ..hub.checkpoints import LOADING_ERRORS
from ..model.cache_names import CACHE_NAME
from .checkpoint import Checkpoint
from .rules import Plan
from .table import plain_names

# As a fraction of the largest logit. Wrong conversions differ by at least a hundredth, float32 rounding by a few
# millionths.
TOLERANCE = 1e-4
MAX_TOKENS = 256
# Tokens of padding, and tokens that are decoded from a cache.
PADDING = 11
DECODED = 8
MIN_TOKENS = 2 * (PADDING + DECODED)

# The beginning of "Alice's Adventures in Wonderland" (Lewis Carroll, 1865), which is in the public domain.
TEXT = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice
she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and what is the
use of a book," thought Alice "without pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid),
whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when
suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the Rabbit say
to itself, "Oh dear! Oh dear! I shall be late!"
"""


@dataclass(frozen=True)
class Verification:
    """How far the logits of a converted model are from those of its source.

    Attributes:
        against: How the source was run.
        num_tokens: Length of the text.
        text: What the text was, and how it was tokenized.
        full: Largest difference in a pass over the whole text, over the largest logit.
        padded: The same for a batch with a shorter text, padded on the left.
        cached: The same for tokens decoded one by one from a cache.
        other: Differences from other runs of the source, which are stated but not checked, by the name of the run.
    """

    against: str
    num_tokens: int
    text: str
    full: float
    padded: float
    cached: float
    other: dict[str, float]

    @property
    def largest(self) -> float:
        """The largest of the differences that are checked."""
        return max(self.full, self.padded, self.cached)


def encode(tokenizer: PreTrainedTokenizerBase | None, text: str, vocab_size: int) -> tuple[Tensor, str]:
    """Returns up to `MAX_TOKENS` tokens of `text`, `[length]`, and what made them: the tokenizer, or the bytes."""
    if tokenizer is not None:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:MAX_TOKENS]
        if ids and max(ids) < vocab_size:
            return torch.tensor(ids), "its tokenizer"
    return torch.tensor(list(text.encode())[:MAX_TOKENS]) * 7919 % vocab_size, "its bytes, as there is no tokenizer"


@torch.no_grad()
def source_logits(plan: Plan, checkpoint: Checkpoint, tokens: Tensor) -> tuple[Tensor, str, dict[str, Tensor]]:
    """Returns the logits of the source.

    Returns:
        The logits `[length, vocab_size]`, how they were computed, and logits of Transformers' class where that is
        close to the source but not equal, by the class's name.
    """
    other = {}
    if plan.reference is None or plan.is_near_class:
        logits, name = class_logits(checkpoint, tokens)
        if plan.reference is None:
            return logits, name, {}
        other[name] = logits
    names = plain_names(checkpoint.files, plan.prefix)
    logits = plan.reference(checkpoint.config, lambda name: checkpoint[names[name]].double(), tokens)
    return logits, "its formula in float64", other


def class_logits(checkpoint: Checkpoint, tokens: Tensor) -> tuple[Tensor, str]:
    """Returns the logits of the checkpoint in Transformers' class of its architecture, and the name of that class."""
    try:
        model = load(checkpoint.folder, use_safetensors=not checkpoint.is_pickled)
    except LOADING_ERRORS as error:
        raise UserError(f"Transformers cannot load {checkpoint.folder}: {shorten(str(error), 300)}") from error
    with computing_in_float32(model):
        logits = model(tokens[None]).logits[0]
    name = type(model).__name__
    if type(model).__module__.startswith("transformers."):
        name = f"Transformers' {name}"
    del model
    gc.collect()
    return logits, name


@torch.no_grad()
def compare(model: PreTrainedModel, tokens: Tensor, logits: Tensor) -> tuple[float, float, float]:
    """Returns how far `model` is from `logits`: `full`, `padded` and `cached` of `Verification`."""
    scale = logits.abs().max().double()

    def error(found: Tensor, rows: slice) -> float:
        return ((found.double() - logits[rows].double()).abs().max() / scale).item()

    with computing_in_float32(model):
        shorter = len(tokens) - PADDING
        full = error(model(tokens[None]).logits[0], slice(None))
        batch = torch.stack([torch.cat([tokens[:1].expand(PADDING), tokens[:shorter]]), tokens])
        mask = torch.ones_like(batch)
        mask[0, :PADDING] = 0
        padded = model(batch, attention_mask=mask).logits
        padded_error = max(error(padded[0, PADDING:], slice(shorter)), error(padded[1], slice(None)))
        output = model(tokens[None, :-DECODED], use_cache=True)
        found = [output.logits[0]]
        for token in tokens[-DECODED:]:
            output = model(token.view(1, 1), **{CACHE_NAME: output[CACHE_NAME]}, use_cache=True)
            found.append(output.logits[0])
        return full, padded_error, error(torch.cat(found), slice(None))


def verify(
    plan: Plan, checkpoint: Checkpoint, target: Path, tokens: Tensor, text: str, is_exact: bool
) -> tuple[PreTrainedModel, Verification]:
    """Loads the model in `target` and compares it with its source.

    Args:
        plan: How the source was read.
        checkpoint: The source.
        target: Folder of the converted model.
        tokens: `[length]`.
        text: Describes them.
        is_exact: Whether the weights were written without rounding.

    Raises:
        UserError: If the weights were not rounded and the logits still differ.
    """
    logits, against, others = source_logits(plan, checkpoint, tokens)
    model = load(target)
    errors = compare(model, tokens, logits)
    scale = logits.abs().max()
    other = {name: ((near - logits).abs().max() / scale).item() for name, near in others.items()}
    result = Verification(against, len(tokens), text, *errors, other)
    if is_exact and not result.largest <= TOLERANCE:
        raise UserError(
            f"the converted model does not equal its source: logits differ from {against} by {result.full:.1g} of the "
            f"largest, {result.padded:.1g} with padding and {result.cached:.1g} from a cache"
        )
    return model, result


def load(folder: Path, **kwargs: Any) -> Any:
    """Returns the language model in `folder`, in the dtype of its weights. Only installed code is run."""
    options = {"use_safetensors": True} | kwargs
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences Transformers' progress bars and all reports but errors."""
    verbosity, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Casts the weights of each module to float32 during its call, and restores the original tensors afterwards."""
    saved: dict[nn.Module, list[Tensor]] = {}

    def cast(module: nn.Module, args: Any) -> None:
        saved[module] = [weight.data for weight in module.parameters(recurse=False)]
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        for weight, data in zip(module.parameters(recurse=False), saved.pop(module), strict=True):
            weight.data = data

    handles = []
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(cast))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
