"""Perplexity against length, for any causal language model of Transformers.

In short:

    input_ids = encode_stream(tokenizer, documents)
    results = perplexity_by_length(model, input_ids, lengths=[256, 512, 1024], tokenizer=tokenizer)
    for result in results:
        print(result.length, result.perplexity, result.bits_per_byte)

A text is one stream of token ids. At length L the model reads the stream in windows of L tokens, and remembers nothing
from one window to the next. There are two protocols, both from Press, Smith and Lewis (arXiv 2108.12409):

- **Non-overlapping** (`stride=None`): every target of every window is scored. Longer windows then score better for two
  reasons that this protocol cannot separate: more context, and fewer targets near the start of a window.
- **Sliding window** (`stride=S`): each window starts S tokens after the one before, and only its last S targets are
  scored (all of them in the first window). So nearly every target has at least L − S tokens of context.

Both score every target exactly once, and the same targets at every length.

Units:

- The loss of a target is −ln p, in nats.
- Perplexity is exp(mean nats per target). It depends on the tokenizer.
- Bits per byte is the sum of the losses in bits over the UTF-8 bytes of the targets' text. Special tokens count as no
  bytes. It can be compared across tokenizers.

Models compute in their own dtype, losses are computed in float32, and sums in float64.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..model.cache_names import CACHE_NAME
from ..text.encoding import Encoder


@dataclass(frozen=True)
class Result:
    """The loss of a model that reads windows of `length` tokens.

    Attributes:
        length: Tokens in a window.
        stride: Tokens between the starts of windows. Equal to `length` for non-overlapping windows.
        num_targets: Number of scored tokens.
        nats: Mean loss per target.
        nats_stderr: Standard error of `nats` over blocks of the longest length. None if there is only one block.
        perplexity: Per token.
        bits_per_byte: None without a tokenizer, or if the targets have no text.
        nats_by_position: `[length]`, the mean loss of the targets with 1, 2, … tokens of context.
    """

    length: int
    stride: int
    num_targets: int
    nats: float
    nats_stderr: float | None
    perplexity: float
    bits_per_byte: float | None
    nats_by_position: tuple[float, ...]


def encode_stream(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], max_tokens: int | None = None
) -> Tensor:
    """Returns the token ids of the documents, `[num_tokens]`, each ending with the end-of-sequence token if any.

    Special tokens that are spelled out in a document are plain text. Reading stops as soon as there are `max_tokens`.
    """
    encoder = Encoder(tokenizer)
    separator = [] if tokenizer.eos_token_id is None else [np.array([tokenizer.eos_token_id], dtype=np.int32)]
    parts, num_tokens = [np.zeros(0, dtype=np.int32)], 0
    encoded = (
        part for document in documents for part in chain(map(encoder.encode_one, encoder.pieces(document)), separator)
    )
    for part in encoded:
        parts.append(part)
        num_tokens += len(part)
        if max_tokens is not None and num_tokens >= max_tokens:
            break
    return torch.from_numpy(np.concatenate(parts)[:max_tokens]).long()


def windows(num_targets: int, length: int, stride: int) -> list[tuple[int, int]]:
    """Returns the windows of an evaluation as pairs `(start, num_scored)`.

    A window reads the tokens start … start + length − 1. The target of each is the next token, and the last
    `num_scored` targets are scored. If the stride leaves a remainder, the last window ends with the stream and scores
    only that.
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
    """Returns the loss of every token but the first.

    Args:
        model: Any causal language model.
        input_ids: `[num_tokens]`.
        length: Tokens in a window.
        stride: Tokens between the starts of windows; None for non-overlapping windows.
        tokens_per_forward: Most tokens in a forward pass: several short windows in a batch, or a chunk of a long
            window, which continues from the KV cache. Memory grows with it; the result does not depend on it.
        progress: Whether to show a progress bar.

    Returns:
        Losses in nats, `[num_tokens − 1]`, float64, on the CPU.

    Raises:
        UserError: If the text is shorter than a window, if the model cannot read `length` tokens, if a window needs
            chunks and the model has no KV cache, or if a loss is not finite.
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
            rows = torch.stack([input_ids[start : start + length + 1] for start, _ in batch])  # [batch, length + 1]
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
    """Returns the losses of the last `num_scored` targets of each row, `[batch, num_scored]`.

    Args:
        model: In evaluation mode.
        rows: Token ids, `[batch, length + 1]`.
        num_scored: Number of targets at the end of each row.
        chunk_size: Most tokens of a row in a forward pass.
    """
    rows = rows.to(model.device)
    length = rows.shape[1] - 1
    cache = None
    nats = []
    for begin in range(0, length, chunk_size):
        end = min(begin + chunk_size, length)
        # The number of scored targets in this chunk; not positive if there are none.
        keep = end - max(begin, length - num_scored)
        output = model(
            input_ids=rows[:, begin:end],
            **{CACHE_NAME: cache},
            use_cache=length > chunk_size,
            # 0 would keep the logits of all tokens.
            logits_to_keep=max(1, keep),
        )
        if keep > 0:
            logits = output.logits[:, -keep:].float().transpose(1, 2)  # [batch, vocab_size, keep]
            nats.append(F.cross_entropy(logits, rows[:, end - keep + 1 : end + 1], reduction="none"))
        cache = output.get(CACHE_NAME)
        if end < length and not _is_continued(cache):
            raise UserError(
                f"{model.config.model_type} cannot continue from a KV cache: "
                f"set tokens_per_forward to at least {length}"
            )
    return torch.cat(nats, dim=1).cpu()


def _is_continued(cache: Any) -> bool:
    """Returns whether a chunk that continues from `cache` gives the same result as reading everything at once.

    It does with cached keys and values. It does not with recurrent states: Mamba models ignore them for a chunk of
    more than one token.
    """
    layers = getattr(cache, "layers", None) or []
    return bool(layers) and all(hasattr(layer, "keys") and not hasattr(layer, "recurrent_states") for layer in layers)


def nats_by_position(nats: Tensor, length: int, stride: int | None = None) -> Tensor:
    """Returns the mean loss of the targets with 1, 2, … `length` tokens of context, `[length]`.

    Args:
        nats: The result of `token_nats` for this length and stride.
        length: Tokens in a window.
        stride: Tokens between the starts of windows. Only the first window scores targets with at most
            `length − stride` tokens of context.
    """
    plan = windows(len(nats), length, length if stride is None else stride)
    positions = torch.cat([torch.arange(length - num_scored, length) for _, num_scored in plan])
    return torch.bincount(positions, weights=nats, minlength=length) / torch.bincount(positions, minlength=length)


def mean_by_doubling(values: Sequence[float]) -> dict[int, float]:
    """Returns means of `nats_by_position` over 1, 2, 3–4, 5–8, 9–16, … tokens of context, by the end of each range."""
    ends = [2**exponent for exponent in range((len(values) - 1).bit_length())] + [len(values)]
    return {end: float(np.mean(values[begin:end])) for begin, end in zip([0, *ends], ends, strict=False)}


def bits_per_byte(nats: Tensor, targets: Tensor, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """Returns the losses in bits per UTF-8 byte of the targets' text, or None if they have no text.

    Args:
        nats: `[num_targets]`.
        targets: Token ids, `[num_targets]`.
        tokenizer: Decodes the targets.
    """
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
    """Returns a `Result` for each of `lengths`, all over the same targets.

    The stream is cut to a multiple of the longest length, plus one token because the first is no target. So
    non-overlapping windows fit at every length that divides the longest one.

    Args:
        model: Any causal language model.
        input_ids: `[num_tokens]`.
        lengths: Tokens in a window.
        stride: Tokens between the starts of windows; None for non-overlapping windows.
        tokenizer: For the bits per byte.
        tokens_per_forward: See `token_nats`.
        progress: Whether to show progress bars.

    Raises:
        UserError: See `token_nats`.
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
    """Raises `UserError` if `length` and `stride` are impossible for this text or this model."""
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
    """Returns the longest input of a model with a table of position embeddings, or None without such a table.

    The table is recognised by its shape: `hidden_size` columns, and `max_position_embeddings` rows or two more (OPT,
    BART).
    """
    rows = getattr(model.config, "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    shapes = {tuple(table.weight.shape) for table in tables}
    if rows is not None and shapes & {(rows, model.config.hidden_size), (rows + 2, model.config.hidden_size)}:
        return rows
    return None


def trainer_metrics(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns keyword arguments for `Trainer` that add `eval_perplexity` and `eval_bits_per_byte` to its evaluation.

    Use them as `Trainer(model, …, **trainer_metrics(tokenizer))`. Every row of the evaluation dataset is a window of
    its own. The logits of each batch are reduced at once to a loss per target, so memory grows only with the number of
    tokens. Labels of −100 are not scored.
    """

    # [batch, length, vocab_size], [batch, length] → [batch, length − 1]
    def target_nats(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")

    def compute(evaluated: EvalPrediction) -> dict[str, Any]:
        targets = torch.as_tensor(evaluated.label_ids)[:, 1:]
        scored = targets != -100
        nats = torch.as_tensor(evaluated.predictions)[scored].double()
        bits = bits_per_byte(nats, targets[scored], tokenizer)
        return {"perplexity": nats.mean().exp().item(), "bits_per_byte": bits}

    return {"preprocess_logits_for_metrics": target_nats, "compute_metrics": compute}
