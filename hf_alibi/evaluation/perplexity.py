"""Perplexity against length, for any causal language model of Transformers.

In short::

    input_ids = encode_stream(tokenizer, documents)
    results = perplexity_by_length(model, input_ids, lengths=[256, 512, 1024], tokenizer=tokenizer)
    for result in results:
        print(result.length, result.perplexity, result.bits_per_byte)

A text is one stream of token ids. At length L the model reads the stream in windows of L tokens, each from a fresh
start, under one of the two protocols of Press, Smith and Lewis (arXiv 2108.12409):

- **non-overlapping** (`stride=None`): every target of every window is scored. Longer windows are then better for two
  reasons that cannot be told apart: more context, and fewer targets near the start of a window.
- **sliding window** (`stride=S`): a window begins S tokens after the one before, and only its last S targets are
  scored (all of them in the first window), so that nearly every target has at least L − S tokens of context.

Under both, every target is scored exactly once, and the targets are the same at every length.

Units: a target's loss is −ln p in nats; perplexity is exp(mean nats per target) and depends on the tokenizer; bits per
byte is the sum of the nats in bits over the UTF-8 bytes of the targets' text, special tokens counted as no bytes, and
can be compared across tokenizers. Models compute in their own dtype, losses in float32, sums in float64.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..model.cache_names import CACHE_NAME


@dataclass(frozen=True)
class Result:
    """The loss of a model that reads windows of `length` tokens, over `num_targets` target tokens."""

    length: int
    stride: int  # equal to length: non-overlapping windows
    num_targets: int
    nats: float  # mean per target
    nats_stderr: float | None  # standard error of `nats`, from blocks as long as the longest length; None: one block
    perplexity: float
    bits_per_byte: float | None  # None: no tokenizer was given, or the targets have no text
    nats_by_position: tuple[float, ...]  # [length]: mean over the targets which had 1, 2, … tokens of context


def encode_stream(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], max_tokens: int | None = None
) -> Tensor:
    """Token ids of the documents, each followed by the end-of-sequence token if there is one: `[num_tokens]`.

    Special tokens that are spelled out in a document are read as plain text. Reads no more documents than the first
    `max_tokens` tokens need.
    """
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    input_ids: list[int] = []
    for document in documents:
        input_ids += tokenizer(document, **options)["input_ids"] + separator
        if max_tokens is not None and len(input_ids) >= max_tokens:
            break
    return torch.tensor(input_ids[:max_tokens], dtype=torch.long)


def windows(num_targets: int, length: int, stride: int) -> list[tuple[int, int]]:
    """The plan of an evaluation: `(start, num_scored)` of every window.

    A window reads the tokens start … start + length − 1. Its targets are each the next token; the last `num_scored` of
    them count. Where the stride leaves a remainder, the last window ends with the stream and counts only that.
    """
    ends = [*range(length, num_targets, stride), num_targets]
    return [(end - length, end - before) for before, end in zip([0, *ends], ends, strict=False)]


def token_nats(
    model: PreTrainedModel,
    input_ids: Tensor,
    length: int,
    stride: int | None = None,
    *,
    tokens_per_forward: int = 2048,
    progress: bool = False,
) -> Tensor:
    """The loss of every token but the first, given the window before it: float64 `[num_tokens − 1]`, on the CPU.

    A forward pass sees at most `tokens_per_forward` tokens: several short windows in a batch, or a chunk of a long one
    which continues from the KV cache. Memory grows with it, the result does not depend on it. `progress` shows a bar.
    Raises `UserError` if `input_ids`, `[num_tokens]`, has no such window, if the model cannot read `length` tokens, if
    they need chunks and it has no KV cache, or if a loss is not finite.
    """
    stride = length if stride is None else stride
    if tokens_per_forward < 1:
        raise UserError(f"tokens_per_forward must be at least 1, got {tokens_per_forward}")
    _check(model, input_ids, length, stride)
    nats = torch.empty(len(input_ids) - 1, dtype=torch.float64)
    plan = windows(len(nats), length, stride)
    batch_size = max(1, tokens_per_forward // length)
    was_training = model.training
    model.eval()
    with torch.no_grad(), tqdm(total=len(plan), desc=f"length {length}", unit="window", disable=not progress) as bar:
        for begin in range(0, len(plan), batch_size):
            batch = plan[begin : begin + batch_size]
            rows = torch.stack([input_ids[start : start + length + 1] for start, _ in batch])  # [B, length + 1]
            scored = _nats_at_end(model, rows, max(num_scored for _, num_scored in batch), tokens_per_forward)
            if not scored.isfinite().all():
                raise UserError(
                    f"{model.config.model_type} in {model.dtype} gives losses that are not finite: its weights are "
                    "damaged, or too large for this dtype"
                )
            for (start, num_scored), row in zip(batch, scored, strict=True):
                nats[start + length - num_scored : start + length] = row[-num_scored:]
            bar.update(len(batch))
    model.train(was_training)
    return nats


def _nats_at_end(model: PreTrainedModel, rows: Tensor, num_scored: int, chunk_size: int) -> Tensor:
    """Losses of the last `num_scored` targets of each row: `[B, length + 1]` → `[B, num_scored]`."""
    rows = rows.to(model.device)
    length = rows.shape[1] - 1
    cache = None
    nats = []
    for begin in range(0, length, chunk_size):
        end = min(begin + chunk_size, length)
        keep = end - max(begin, length - num_scored)  # targets of this chunk that are scored; negative: none
        output = model(
            input_ids=rows[:, begin:end],
            **{CACHE_NAME: cache},
            use_cache=length > chunk_size,
            logits_to_keep=max(1, keep),  # 0 would mean all of them
        )
        if keep > 0:
            logits = output.logits[:, -keep:].float().transpose(1, 2)  # [B, vocab_size, keep]
            nats.append(F.cross_entropy(logits, rows[:, end - keep + 1 : end + 1], reduction="none"))
        cache = output.get(CACHE_NAME)
        if end < length and not _is_continued(cache):
            raise UserError(
                f"{model.config.model_type} cannot continue from a KV cache: "
                f"set tokens_per_forward to at least {length}"
            )
    return torch.cat(nats, dim=1).cpu()


def _is_continued(cache: Any) -> bool:
    """Whether a chunk of several tokens continues from `cache` as if it had been read with those before.

    Keys and values do that. Recurrent states do not: Mamba's models start anew unless a chunk is a single token.
    """
    layers = getattr(cache, "layers", None) or []
    return bool(layers) and all(hasattr(layer, "keys") and not hasattr(layer, "recurrent_states") for layer in layers)


def nats_by_position(nats: Tensor, length: int, stride: int | None = None) -> Tensor:
    """Mean of `token_nats(…, length, stride)` over the targets with 1, 2, … length tokens of context: `[length]`.

    With a sliding window only the first one scores targets with less context than `length − stride`.
    """
    plan = windows(len(nats), length, length if stride is None else stride)
    positions = torch.cat([torch.arange(length - num_scored, length) for _, num_scored in plan])
    return torch.bincount(positions, weights=nats, minlength=length) / torch.bincount(positions, minlength=length)


def mean_by_doubling(values: Sequence[float]) -> dict[int, float]:
    """Means of `nats_by_position` over 1, 2, 3–4, 5–8, 9–16, … tokens of context, keyed by the last of each range."""
    ends = [2**exponent for exponent in range((len(values) - 1).bit_length())] + [len(values)]
    return {end: float(np.mean(values[begin:end])) for begin, end in zip([0, *ends], ends, strict=False)}


def bits_per_byte(nats: Tensor, targets: Tensor, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """Losses in bits per UTF-8 byte of the text of `targets`; both `[num_targets]`. None: they have no text."""
    text = str(tokenizer.decode(targets, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return nats.sum().item() / math.log(2) / len(text.encode()) if text else None


def perplexity_by_length(
    model: PreTrainedModel,
    input_ids: Tensor,
    lengths: Sequence[int],
    stride: int | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens_per_forward: int = 2048,
    progress: bool = False,
) -> list[Result]:
    """A `Result` for each of `lengths`, all over the same targets of `input_ids`, `[num_tokens]`.

    The stream is cut to a multiple of the longest length (plus one: the first token is no target), so that
    non-overlapping windows fit at every length that divides the longest one. See `token_nats` for the other arguments
    and the errors; the tokenizer serves the bits per byte.
    """
    longest = max(lengths)
    for length in sorted(lengths, reverse=True):
        _check(model, input_ids, length, length if stride is None else stride)
    num_targets = (len(input_ids) - 1) // longest * longest
    input_ids = input_ids[: num_targets + 1]
    results = []
    for length in lengths:
        nats = token_nats(model, input_ids, length, stride, tokens_per_forward=tokens_per_forward, progress=progress)
        blocks = nats.view(-1, longest).mean(dim=1)
        results.append(
            Result(
                length=length,
                stride=length if stride is None else stride,
                num_targets=num_targets,
                nats=nats.mean().item(),
                nats_stderr=blocks.std().item() / math.sqrt(len(blocks)) if len(blocks) > 1 else None,
                perplexity=nats.mean().exp().item(),
                bits_per_byte=None if tokenizer is None else bits_per_byte(nats, input_ids[1:], tokenizer),
                nats_by_position=tuple(nats_by_position(nats, length, stride).tolist()),
            )
        )
    return results


def _check(model: PreTrainedModel, input_ids: Tensor, length: int, stride: int) -> None:
    """Raise `UserError` if windows of `length` at every `stride` of `input_ids` do not exist or not fit the model."""
    if length < 1 or not 1 <= stride <= length:
        raise UserError(f"the stride must be from 1 to the length, but stride is {stride} and length {length}")
    if len(input_ids) <= length:
        raise UserError(f"length {length} needs at least {length + 1} tokens of text, but there are {len(input_ids)}")
    if input_ids.max() >= model.config.vocab_size:
        raise UserError(f"token id {input_ids.max()} is beyond the model's vocabulary of {model.config.vocab_size}")
    limit = position_limit(model)
    if limit is not None and length > limit:
        raise UserError(f"{model.config.model_type} has {limit} position embeddings: it cannot read {length} tokens")


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest input of a model with a table of position embeddings; None without such a table.

    Recognised by its shape: `hidden_size` columns and `max_position_embeddings` rows, or two more (OPT, BART).
    """
    rows = getattr(model.config, "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    shapes = {tuple(table.weight.shape) for table in tables}
    if rows is not None and shapes & {(rows, model.config.hidden_size), (rows + 2, model.config.hidden_size)}:
        return rows
    return None


def trainer_metrics(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Keyword arguments for `Trainer` that add `eval_perplexity` and `eval_bits_per_byte` to its evaluation.

    They are meant as `Trainer(model, …, **trainer_metrics(tokenizer))`. Every row of the evaluation dataset is a
    window of its own. The logits of each batch are reduced at once to a loss per target, so that memory grows with the
    number of tokens alone. Labels of −100 are not scored.
    """

    def target_nats(logits: Tensor, labels: Tensor) -> Tensor:  # [B, L, vocab_size], [B, L] → [B, L − 1]
        return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")

    def compute(evaluated: EvalPrediction) -> dict[str, Any]:
        targets = torch.as_tensor(evaluated.label_ids)[:, 1:]
        scored = targets != -100
        nats = torch.as_tensor(evaluated.predictions)[scored].double()
        bits = bits_per_byte(nats, targets[scored], tokenizer)
        return {"perplexity": nats.mean().exp().item(), "bits_per_byte": bits}

    return {"preprocess_logits_for_metrics": target_nats, "compute_metrics": compute}
