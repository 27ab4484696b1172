"""Documents in a row: every description of where they begin is converted into one tensor, `first`.

`first`, `[batch, queries]`, is the position at which the document of each query begins. A position is the number of
tokens before a token in its row, without padding. A query sees the keys from `first` up to itself.

The following arguments describe documents. If several are given, they must agree.

- `position_ids`, `[batch or 1, queries]`: positions increase by one within a document. A position that does not exceed
  the previous one begins a document, at 0 or at any other number. Positions may count padding or skip it, but they
  must not jump.
- `attention_mask`, `[batch or 1, tokens]`: 0 for padding. If any number exceeds 1, numbers are document numbers.
- `seq_idx`, `[batch or 1, tokens]`: document numbers, from 0.
- `cu_seq_lens_q` and `cu_seq_lens_k`: the bounds of documents in the flattened batch, as FlashAttention takes them.

With a cache, `tokens` are the cached and the new ones together. The last three therefore show how far back a document
reaches. With `position_ids` this is the difference from the first position of the document. Later passes do not
contain that position, so it is stored on the cache.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

# The attribute of a cache in which its `CachedDocuments` are stored.
NOTE = "alibi_documents"


class Packing(NamedTuple):
    """The arguments besides positions and mask that describe documents. Transformers gives them their names."""

    seq_idx: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None
    max_length_q: int | None = None
    max_length_k: int | None = None

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> "Packing":
        """Removes these arguments from `arguments` and returns them."""
        return cls(**{name: arguments.pop(name) for name in cls._fields if name in arguments})

    def names(self) -> list[str]:
        """Returns the names of the arguments that are given."""
        return [name for name, value in self._asdict().items() if value is not None]


class CachedDocuments(NamedTuple):
    """Facts about the documents in a cache that its keys do not show.

    Attributes:
        start: The first of the `position_ids` in the last document of every row; `None` if rows differ.
        several: Whether any row contains more than one document.
    """

    start: int | None = 0
    several: bool = False


class Pass(NamedTuple):
    """The tokens of a forward pass.

    Attributes:
        slots: `[batch, queries]`, indices of the queries among the keys.
        queries: `[batch, queries]`, positions.
        real: `[batch, queries]`, False at padding.
        keys: `[batch, keys]`, positions.
        key_mask: `[batch, keys]`, False at padding and in unused slots of a static cache.
        past: Number of cached tokens. It may be a tensor while tracing.
        tracing: Whether values of tensors are unknown: the pass is compiled, exported or traced, or its tensors have
            no data (`recording.has_values`).
    """

    slots: Tensor
    queries: Tensor
    real: Tensor
    keys: Tensor
    key_mask: Tensor
    past: int | Tensor
    tracing: bool


def document_starts(
    tokens: Pass, position_ids: Tensor | None, numbers: Tensor | None, packing: Packing, cache: Cache | None
) -> Tensor | None:
    """Returns where the documents of the queries begin, and stores on the cache what later passes need.

    Args:
        tokens: The tokens of the pass.
        position_ids: `[batch or 1, queries]`.
        numbers: `[batch, keys]`, the attention mask if it may contain document numbers.
        packing: The other arguments that describe documents.
        cache: The cache before this pass.

    Returns:
        Positions `[batch, queries]`, or `None` if every row is one document.

    Raises:
        ValueError: If an argument has the wrong shape or values, or contradicts another. Also if the cache contains
            several documents and no argument tells to which one the new tokens belong.
    """
    note = _read(cache, tokens.past)
    found: dict[str, Tensor] = {}
    if numbers is not None:
        found["attention_mask"] = _starts_by_number(tokens, numbers, "attention_mask")
    if packing.seq_idx is not None:
        found["seq_idx"] = _starts_by_number(tokens, _of_all_keys(tokens, packing.seq_idx), "seq_idx")
    if packing.cu_seq_lens_q is not None or packing.cu_seq_lens_k is not None:
        found["cu_seq_lens"] = _starts_by_number(tokens, _numbers_from_bounds(tokens, packing), "cu_seq_lens_k")
    elif packing.max_length_q is not None or packing.max_length_k is not None:
        raise ValueError(
            "max_length_q and max_length_k need cu_seq_lens_q and cu_seq_lens_k; give these too, or leave both out."
        )
    begins = None
    if position_ids is not None:
        known = next(iter(found.values()), None)
        found["position_ids"], begins = _starts_by_position(tokens, position_ids, note.start, known)
    if not found:
        check_one_document(cache, tokens.past)
        return None
    if tokens.tracing:
        return torch.stack(list(found.values())).amax(0)
    first = _agreed(found, tokens.real)
    if cache is not None:
        _write(cache, tokens, first, begins, note)
    return first


def check_one_document(cache: Cache | None, past: int | Tensor) -> None:
    """Checks that a pass without a description of documents is unambiguous.

    Raises:
        ValueError: If the cache contains several documents.
    """
    if _read(cache, past).several:
        raise ValueError(
            "The cache holds several documents, and nothing says which of them the new tokens continue: give "
            "position_ids that continue the last document, or an attention_mask of document numbers."
        )
    # A cache that was reset still has the note of its earlier use.
    if isinstance(past, int) and past == 0 and hasattr(cache, NOTE):
        delattr(cache, NOTE)


def latest(flags: Tensor, values: Tensor) -> Tensor:
    """Returns for every token the value at the last flagged token up to and including it, `[batch, tokens]`.

    Tokens before the first flagged one get 0.

    Args:
        flags: `[batch, tokens]`, boolean.
        values: `[batch, tokens]`.
    """
    number = flags.long().cumsum(1)
    table = F.pad(torch.zeros_like(values), (1, 0)).scatter(1, number * flags, values * flags)
    return table.gather(1, number)


def _before(flags: Tensor, values: Tensor) -> Tensor:
    """Returns for every token the value at the last flagged token before it, `[batch, tokens]`."""
    # Pads before slicing: a size of tokens - 1 would restrict an exported graph to fewer lengths.
    return F.pad(latest(flags, values), (1, 0))[:, :-1]


def _check_integers(name: str, values: Any, batch: int) -> None:
    is_tensor = isinstance(values, Tensor)
    if not is_tensor or values.dim() != 2 or values.shape[0] not in (1, batch) or values.is_floating_point():
        given = f"{values.dtype} {list(values.shape)}" if is_tensor else type(values).__name__
        raise ValueError(f"{name} must be a tensor of integers [{batch} or 1, tokens], got {given}.")


def _starts_by_number(tokens: Pass, numbers: Tensor, name: str) -> Tensor:
    """Returns where the documents of the queries begin, `[batch, queries]`, from the document number of every key."""
    real = tokens.key_mask
    begins = real & ((numbers != _before(real, numbers)) | (tokens.keys == 0))
    if not tokens.tracing:
        ordered = torch.where(real, numbers, -1).sort(1).values
        distinct = (F.pad(ordered, (1, 0), value=-1).diff(dim=1) > 0).sum(1)
        if bool((begins.sum(1) > distinct).any()):
            raise ValueError(
                f"{name} has a document with another document between its tokens; the tokens of a document must be "
                "contiguous."
            )
    return latest(begins, tokens.keys).gather(1, tokens.slots)


def _of_all_keys(tokens: Pass, seq_idx: Tensor) -> Tensor:
    """Returns the document numbers of all keys, `[batch, keys]`."""
    batch, num_keys = tokens.keys.shape
    _check_integers("seq_idx", seq_idx, batch)
    if not tokens.tracing:
        expected = tokens.past + tokens.slots.shape[1]
        if seq_idx.shape[1] != expected:
            raise ValueError(
                f"seq_idx covers {seq_idx.shape[1]} tokens; it must cover the {tokens.past} cached and the "
                f"{tokens.slots.shape[1]} new ones."
            )
        if bool((seq_idx < 0).any()):
            raise ValueError(
                "seq_idx must not be negative, because it numbers documents from 0; use attention_mask for padding."
            )
    seq_idx = seq_idx.to(tokens.keys).expand(batch, -1)
    return F.pad(seq_idx, (0, max(0, num_keys - seq_idx.shape[1])))[:, :num_keys]


def _numbers_from_bounds(tokens: Pass, packing: Packing) -> Tensor:
    """Returns the document numbers of all keys, `[batch, keys]`, from cumulative lengths."""
    bounds_q, bounds_k = packing.cu_seq_lens_q, packing.cu_seq_lens_k
    if bounds_q is None or bounds_k is None:
        raise ValueError("Only one of cu_seq_lens_q and cu_seq_lens_k is given; give both.")
    past = tokens.past
    if isinstance(past, Tensor):
        raise ValueError("A graph with a static cache cannot take cu_seq_lens; give position_ids.")
    (batch, num_queries), num_keys = tokens.slots.shape, tokens.keys.shape[1]
    length = past + num_queries
    of_queries = _numbers("cu_seq_lens_q", bounds_q, packing.max_length_q, batch, num_queries, tokens)
    of_keys = _numbers("cu_seq_lens_k", bounds_k, packing.max_length_k, batch, length, tokens)
    if not tokens.tracing and not (
        len(bounds_q) == len(bounds_k) and torch.equal(of_queries, of_keys[:, length - num_queries :])
    ):
        raise ValueError(
            f"cu_seq_lens_q={bounds_q.tolist()} and cu_seq_lens_k={bounds_k.tolist()} contradict each other: the "
            f"queries of a document must be the last of its keys, and each row has {past} cached keys."
        )
    return F.pad(of_keys, (0, num_keys - length))


def _numbers(name: str, bounds: Tensor, longest: int | None, batch: int, length: int, tokens: Pass) -> Tensor:
    """Returns the document number of every token, `[batch, length]`, from the bounds of all documents."""
    if not isinstance(bounds, Tensor) or bounds.dim() != 1 or bounds.is_floating_point():
        raise ValueError(f"{name} must be a tensor of integers [documents + 1].")
    bounds = bounds.to(tokens.keys)
    if not tokens.tracing:
        sizes = bounds.diff()
        if len(bounds) < 2 or int(bounds[0]) != 0 or int(bounds[-1]) != batch * length or bool((sizes < 0).any()):
            raise ValueError(
                f"{name}={bounds.tolist()} must rise from 0 to {batch * length}, the number of tokens in the batch"
                f"{', cached ones included' if name.endswith('k') else ''}."
            )
        if longest is not None and int(longest) < int(sizes.max()):
            raise ValueError(
                f"max_length_{name[-1]}={int(longest)} contradicts {name}: a document has {int(sizes.max())} tokens."
            )
    slots = torch.arange(batch * length, device=bounds.device)
    numbers = (torch.searchsorted(bounds, slots, right=True) - 1).view(batch, length)
    if not tokens.tracing and bool((numbers[1:, 0] == numbers[:-1, -1]).any()):
        raise ValueError(f"{name}={bounds.tolist()} has a document in two rows; each row has {length} tokens.")
    return numbers


def _starts_by_position(
    tokens: Pass, position_ids: Tensor, start: int | None, known: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns where the documents of the queries begin, and the first of their `position_ids`.

    The first token of a pass continues a cached document if its position exceeds `start`. The difference is the number
    of tokens by which the document reaches back.

    Args:
        tokens: The tokens of the pass.
        position_ids: `[batch or 1, queries]`.
        start: The first of the `position_ids` in the last cached document; `None` if rows differ.
        known: `[batch, queries]`, where documents begin by another argument. Only there may positions jump.

    Returns:
        Two tensors `[batch, queries]`.
    """
    batch, num_queries = tokens.slots.shape
    _check_integers("position_ids", position_ids, batch)
    if position_ids.shape[1] != num_queries:
        raise ValueError(
            f"position_ids has {position_ids.shape[1]} columns; it must have {num_queries}, one for each new token."
        )
    if start is None:
        raise ValueError(
            "The cached documents begin with different position_ids in different rows, so the new position_ids do not "
            "show how far back a document reaches. Begin all documents with the same number, pass an attention_mask "
            "of document numbers instead, or pass use_cache=False."
        )
    positions = position_ids.to(tokens.queries).expand(batch, -1)
    queries, real = tokens.queries, tokens.real
    order = real.long().cumsum(1)
    leads = real & (order == 1)
    reach = (positions - start).clamp(min=0)
    gap = tokens.slots - _before(real, tokens.slots)
    step = positions - _before(real, positions)
    # Some engines for exported models cannot choose between booleans.
    too_far = (leads & (queries > 0) & (reach > tokens.slots)) | (real & ~leads & (step > gap))
    explained = too_far & False if known is None else too_far & (known == queries)
    goes_on = leads & (reach > 0) & (queries > 0) & ~explained
    begins = real & (leads | explained | (step < 1))
    reached = (queries - reach).clamp(min=0)
    first = latest(begins, torch.where(goes_on, reached, queries))
    # Padding before the first token of the pass.
    first = torch.where(order > 0, first, reached)
    number = latest(begins, torch.where(goes_on, start, positions))
    too_far = too_far & ~explained
    if not tokens.tracing and bool(too_far.any()):
        row, column = too_far.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids jump to {int(positions[row, column])} at token {column} of row {row}, by more than the "
            "number of tokens. ALiBi's distances count the tokens in between. Increase positions by one, or pass an "
            "attention_mask with four dimensions, with which position_ids decide the distances."
        )
    return first, number


def _agreed(found: dict[str, Tensor], real: Tensor) -> Tensor:
    (name, first), *others = found.items()
    for other, starts in others:
        differs = real & (starts != first)
        if bool(differs.any()):
            row, column = differs.nonzero()[0].tolist()
            raise ValueError(
                f"{name} and {other} contradict each other: the document of token {column} in row {row} begins at "
                f"token {int(first[row, column])} by {name}, but at token {int(starts[row, column])} by {other}."
            )
    return first


def _read(cache: Cache | None, past: int | Tensor) -> CachedDocuments:
    is_empty = cache is None or (isinstance(past, int) and past == 0)
    return CachedDocuments() if is_empty else CachedDocuments(*getattr(cache, NOTE, ()))


def _write(cache: Cache, tokens: Pass, first: Tensor, begins_with: Tensor | None, note: CachedDocuments) -> None:
    several = note.several or bool((tokens.real & (first > 0)).any())
    start = note.start
    if begins_with is not None:
        last = latest(tokens.real, begins_with)[:, -1]
        numbers = set(last[tokens.real.any(1)].tolist()) or {start}
        start = numbers.pop() if len(numbers) == 1 else None
    facts = CachedDocuments(start, several)
    if facts != CachedDocuments() or hasattr(cache, NOTE):
        # Transformers' exporters copy the attributes of a cache, but no named tuples. The usual facts are not stored,
        # so that an exported step takes the cache of an exported prompt, which has no such attribute.
        setattr(cache, NOTE, tuple(facts))
