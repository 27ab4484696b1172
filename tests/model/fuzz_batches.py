"""The batch of a fuzzed case: its documents, the arguments that describe them, and the logits of a plain model."""

from typing import Any

import oracle
import torch
import torch.nn.functional as F
from fuzz_cases import FOUR_DIMENSIONS, Case
from torch import Tensor

VOCAB_SIZE = 23


class Batch:
    """The rows of a case as they are planned, and those that are being read, which a cache may have reordered.

    Attributes:
        source: The planned row that each row goes on with.
        tokens: `[rows, slots]`, read up to now.
        divisors: `[slots]`, what a dynamic scaling divides the slopes by, for each slot read up to now.
    """

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        self.random = torch.Generator().manual_seed(case.seed)
        self.documents = torch.tensor([[doc for doc, size in row for _ in range(size)] for row in case.rows])
        same = self.documents[:, :, None] == self.documents[:, None, :]
        counted = torch.ones_like(same).tril(-1) & same
        self.positions = counted.sum(-1)  # [rows, slots]: tokens of the same document before this one
        self.source = torch.arange(len(case.rows))
        self.tokens = torch.empty(len(case.rows), 0, dtype=torch.long)
        self.divisors = torch.empty(0, dtype=torch.float64)
        if case.encoding in FOUR_DIMENSIONS:
            self.visible, self.added = self._matrices()

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """Who sees whom, `[rows, heads or 1, slots, slots]`, and what is added to the scores."""
        encoding, length = self.case.encoding, self.case.length
        heads = self.case.config["num_attention_heads"] if encoding == "4D by head" else 1
        real = self.documents > 0
        same = (self.documents[:, :, None] == self.documents[:, None, :]) & real[:, :, None]
        visible = same[:, None].expand(-1, heads, -1, -1).clone()
        if encoding in ("4D by head", "4D numbers", "4D future"):
            everywhere = (real[:, :, None] & real[:, None, :])[:, None]
            chosen = torch.rand(len(real), heads, length, length, generator=self.random) < 0.7
            visible = (everywhere & chosen) | torch.eye(length, dtype=torch.bool) & everywhere
        if encoding != "4D future":
            visible = visible.tril()
        added = torch.zeros(visible.shape, dtype=self.dtype)
        if encoding == "4D numbers":
            added = 2 * torch.randn(visible.shape, generator=self.random).to(self.dtype)
        return visible, added

    def choose(self, rows: Tensor) -> None:
        """Goes on with these rows."""
        self.source, self.tokens = self.source[rows], self.tokens[rows]

    def next_tokens(self, number: int) -> Tensor:
        """Draws tokens, `[rows, number]`."""
        return torch.randint(VOCAB_SIZE, (len(self.source), number), generator=self.random)

    def add(self, tokens: Tensor) -> None:
        """Takes note of the tokens that a pass reads."""
        self.tokens = torch.cat([self.tokens, tokens], 1)
        divisor = torch.ones(tokens.shape[1], dtype=torch.float64)
        if self.case.config["alibi_scaling"] == {"type": "dynamic"}:
            divisor *= max(1.0, self._longest() / self.case.config["training_length"])
        self.divisors = torch.cat([self.divisors, divisor])

    def _longest(self) -> int:
        """The length of the longest text read up to now."""
        end = self.tokens.shape[1]
        lengths = self.positions[self.source, :end] + 1
        # A four-dimensional mask does not show which tokens are padding.
        if self.case.encoding in FOUR_DIMENSIONS:
            return int(lengths.max()) if self.case.encoding == "4D with positions" else end
        return int((lengths * self.real()).max())

    def arguments(self, start: int, end: int, num_keys: int) -> dict[str, Any]:
        """How the model is told who sees whom in a pass from slot `start` to `end`; a cache has `num_keys` slots."""
        encoding = self.case.encoding
        if encoding in FOUR_DIMENSIONS:
            return self._four_dimensions(start, end, num_keys)
        documents, positions = self.documents[self.source, :end], self.positions[self.source, start:end]
        mask = (documents > 0).long()
        is_real = mask[:, start:] > 0
        continued = torch.where(is_real, positions, torch.arange(start, end))
        sequences = (documents - 1).clamp(min=0).int()
        ways: dict[str, dict[str, Any]] = {
            "nothing": {},
            "mask": {"attention_mask": mask},
            "boolean mask": {"attention_mask": mask.bool()},
            "float mask": {"attention_mask": mask.to(self.dtype)},
            "positions": {"position_ids": positions},
            "positions from 1": {"position_ids": positions + 1},
            "positions from 2": {"position_ids": positions + 2},
            "positions and mask": {"position_ids": positions * is_real, "attention_mask": mask},
            "positions from 1 and mask": {"position_ids": positions * is_real + 1, "attention_mask": mask},
            "continued positions and mask": {"position_ids": continued, "attention_mask": mask},
            "document numbers": {"attention_mask": documents},
            "sequence numbers": {"seq_idx": sequences},
            "sequence numbers and mask": {"seq_idx": sequences, "attention_mask": mask},
            "cumulative lengths": self._cumulative_lengths(start, end),
            "cumulative lengths and positions": self._cumulative_lengths(start, end) | {"position_ids": positions},
        }
        return ways[encoding]

    def _cumulative_lengths(self, start: int, end: int) -> dict[str, Any]:
        """The arguments of FlashAttention, for documents that follow one another, row after row."""
        sizes = []
        for documents in self.documents[self.source, :end]:
            numbers = documents.unique_consecutive()
            sizes += [[int((part == number).sum()) for part in (documents[start:], documents)] for number in numbers]
        bounds = F.pad(torch.tensor(sizes).cumsum(0), (0, 0, 1, 0)).int()
        queries, keys = torch.tensor(sizes).amax(0).tolist()
        return {
            "cu_seq_lens_q": bounds[:, 0],
            "cu_seq_lens_k": bounds[:, 1],
            "max_length_q": queries,
            "max_length_k": keys,
        }

    def _four_dimensions(self, start: int, end: int, num_keys: int) -> dict[str, Any]:
        encoding = self.case.encoding
        room = (0, max(0, num_keys - end))
        visible = F.pad(self.visible[self.source, :, start:end, :end], room)
        added = F.pad(self.added[self.source, :, start:end, :end], room)
        if encoding in ("4D boolean", "4D by head", "4D future"):
            return {"attention_mask": visible}
        if encoding == "4D with positions":
            return {"attention_mask": visible, "position_ids": self.positions[self.source, start:end]}
        hidden = torch.finfo(self.dtype).min if encoding == "4D lowest" else -torch.inf
        return {"attention_mask": added.masked_fill(~visible, hidden)}

    def reference(self, weights: dict[str, Tensor], config: Any, tolerance: float) -> Tensor:
        """The logits of all slots read up to now, `[rows, slots, VOCAB_SIZE]`; those of padding are 0."""
        dtype = weights["model.embed_tokens.weight"].dtype
        logits = torch.zeros(*self.tokens.shape, VOCAB_SIZE, dtype=dtype)
        for row, slots, text in self._texts():
            of_text = oracle.language_model(weights, config, text, tolerance)
            logits = logits.index_put((torch.tensor(row), slots), of_text)
        return logits

    def _texts(self) -> list[tuple[int, Tensor, oracle.Text]]:
        """The texts that see nothing of each other: their row, slots and tokens."""
        texts = []
        end = self.tokens.shape[1]
        for row, source in enumerate(self.source.tolist()):
            documents = self.documents[source, :end]
            if self.case.encoding in FOUR_DIMENSIONS:
                positions = self.positions[source, :end] if self.case.encoding == "4D with positions" else None
                visible = self.visible[source, :, :end, :end] | torch.eye(end, dtype=torch.bool)
                matrices = positions, visible, self.added[source, :, :end, :end]
                texts.append((row, torch.arange(end), oracle.Text(self.tokens[row], self.divisors, *matrices)))
                continue
            for document in range(1, int(documents.max()) + 1):
                slots = (documents == document).nonzero()[:, 0]
                if len(slots):
                    texts.append((row, slots, oracle.Text(self.tokens[row, slots], self.divisors[slots])))
        return texts

    def told(self) -> Tensor:
        """The documents of the slots read up to now, `[rows, slots]`, 0 for padding."""
        return self.documents[self.source, : self.tokens.shape[1]]

    def real(self) -> Tensor:
        """Which slots read up to now are no padding, `[rows, slots]`."""
        return self.told() > 0
