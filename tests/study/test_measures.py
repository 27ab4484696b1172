"""What the study measures: text in the same order at every length, copies, pairs, kept pairs, and protocols."""

import math
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM
from hf_alibi.evaluation.perplexity import token_nats
from hf_alibi.study.associative import with_pairs
from hf_alibi.study.plan import PLANS, load_plan
from hf_alibi.study.records import cell, over_seeds, unconverged
from hf_alibi.study.testing import by_length, copies, sliding_starts, unreadable
from hf_alibi.study.training import Rows, new_model, parameters
from hf_alibi.training.watching import kept_fraction, window_record

TEXT = np.arange(1000, dtype=np.int32)


def read(length: int, seed: int | None, total: int = 960) -> list[int]:
    rows = Rows(TEXT, length, 32, total, seed)
    return torch.cat([rows[index]["input_ids"] for index in range(len(rows))]).tolist()


def test_rows_of_every_length_have_the_same_text_in_the_same_order() -> None:
    assert read(8, seed=3) == read(16, seed=3) == read(32, seed=3)
    assert read(8, seed=3) != read(8, seed=4)
    # No token twice: 30 of the 31 chunks of the text.
    assert len(set(read(8, seed=3))) == 960


def test_text_that_ends_is_read_again_in_another_order() -> None:
    twice = read(16, seed=0, total=2 * 31 * 32)
    first, second = twice[: 31 * 32], twice[31 * 32 :]
    assert sorted(first) == sorted(second) == list(range(31 * 32))
    assert first != second
    assert read(16, seed=None, total=64) == list(range(64))


@pytest.mark.parametrize("distance", [None, 8, 30])
def test_pairs_are_asked_for_again(distance: int | None) -> None:
    row = torch.arange(1000, 1040)
    made = with_pairs(row, 3, np.random.default_rng(0), distance)
    ids, labels = made["input_ids"].tolist(), made["labels"].tolist()
    written = [place for place in range(40) if ids[place] != row[place]]
    assert len(written) == 12
    first, second = written[0], written[6]
    assert second - first == distance if distance else second - first >= 6
    pairs = {ids[place]: ids[place + 1] for place in range(first, first + 6, 2)}
    assert len(pairs) == 3
    for place in range(second, second + 6, 2):
        assert pairs[ids[place]] == ids[place + 1] == labels[place + 1]
        assert labels[place] == -100
    assert labels[first : first + 6] == [-100] * 6
    assert [label for place, label in enumerate(labels) if place not in written] == [
        token for place, token in enumerate(row.tolist()) if place not in written
    ]


def test_kept_fraction_counts_the_pairs() -> None:
    windows, length = [[0, 3], [5, 10**9]], 12
    pairs = [(q, k) for q in range(length) for k in range(q + 1)]
    kept = sum(q - k <= window for layer in windows for window in layer for q, k in pairs)
    assert kept_fraction(windows, length) == pytest.approx(kept / (4 * len(pairs)))


def test_the_window_record_is_the_models() -> None:
    model = AlibiGPTForCausalLM(
        AlibiGPTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )
    with torch.no_grad():
        model.model.layers[1].self_attn.q_norm.weight[2] = -3
    record: Any = window_record(model)
    guarantees: Any = model.model.window_guarantees()
    assert record["score_bound"] == [round(guarantee.score_bound, 4) for guarantee in guarantees]
    assert record["score_bound"][1] == pytest.approx(3 * record["score_bound"][0], rel=1e-4)
    assert record["query_gain"][1] == [3, 1.5]
    assert record["windows"] == [guarantee.windows for guarantee in guarantees]
    assert (
        window_record(
            new_model({"model_type": "nope_gpt", "vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4})
        )
        is None
    )


class Copier(torch.nn.Module):
    """Predicts that the token after the last occurrence of a token follows it again, with probability 1/2."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.device = torch.device("cpu")
        self.config = AlibiGPTConfig(vocab_size=vocab_size)

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int, **_: Any) -> Any:  # noqa: D102
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        sure = math.log(self.vocab_size - 1)
        for row in range(input_ids.shape[0]):
            follows: dict[int, int] = {}
            for place, token in enumerate(input_ids[row].tolist()):
                if token in follows:
                    logits[row, place, follows[token]] = sure
                if place + 1 < input_ids.shape[1]:
                    follows[token] = int(input_ids[row, place + 1])
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})()


def test_copies_save_what_a_perfect_copier_saves() -> None:
    # Every token occurs once in the text, so only the copy can be predicted.
    settings = {"test": {"copy_distances": [32, 48], "copy_tokens": 400, "tokens_per_forward": 200}}
    settings |= {"training_length": 16, "method": "alibi"}
    found = copies(Copier(500), torch.arange(500), settings)
    assert found.keys() == {"32", "48"}
    for result in found.values():
        assert result["copy"] == pytest.approx(math.log(2), abs=1e-5)
        # In the control, none of the segment's tokens has occurred before.
        assert result["control"] == pytest.approx(math.log(500), abs=1e-4)


def test_protocols_score_the_same_targets() -> None:
    torch.manual_seed(0)
    fields = {"model_type": "alibi_gpt", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
    model = new_model(fields | {"num_attention_heads": 2, "initializer_range": 0.3}).eval()
    ids = torch.randint(3, 300, (257,))
    # Two pieces of 128 tokens, whose second halves have two windows with 8 targets each.
    targets = [*range(64, 72), *range(104, 112), *range(208, 216), *range(248, 256)]
    how = {"lengths": [16, 64], "tokens": 256, "stride": 8, "sliding_targets": 32, "tokens_per_forward": 512}
    settings = {"test": how, "test_lengths": [16, 64], "training_length": 16, "method": "alibi"}
    from tiny import tiny_tokenizer

    found = by_length(model, ids, settings, tiny_tokenizer())
    with torch.no_grad():
        for length in (16, 64):
            assert found[str(length)]["nats"] == pytest.approx(token_nats(model, ids, length).mean().item())
            losses = []
            # Each target by itself: its window ends at the next multiple of the stride.
            for target in targets:
                end = (target // 8 + 1) * 8
                window = ids[end - length : end]
                logits = model(window[None]).logits[0].log_softmax(-1)
                losses.append(-logits[target - (end - length), ids[target + 1]].item())
            same = token_nats(model, ids, length)[targets].mean().item()
            assert found[str(length)]["same_targets"] == pytest.approx(same)
            assert found[str(length)]["sliding"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("name", ["minutes", "reported", "gpu"])
def test_sliding_targets_are_in_all_parts_of_the_other_windows(name: str) -> None:
    how = asdict(load_plan(PLANS / f"{name}.toml").test)
    starts, stride = sliding_starts(how), how["stride"]
    longest = max(how["lengths"])
    assert len(starts) * stride == how["sliding_targets"]
    assert all(end - start >= stride for start, end in pairwise([*starts, how["tokens"]]))
    # All of them have a whole window before them in their piece.
    assert all(start % (2 * longest) >= longest for start in starts)
    for length in how["lengths"]:
        # The mean place in a window of this length, from 0 to 1.
        mean = np.mean([(start % length + stride / 2) / length for start in starts])
        assert mean == pytest.approx(0.5, abs=0.05)


def test_parameters_count_a_tied_embedding_once() -> None:
    for tied in (True, False):
        fields = {"model_type": "alibi_gpt", "vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4}
        model = new_model(fields | {"tie_word_embeddings": tied, "num_hidden_layers": 1})
        found = parameters(model)
        assert found["all"] - found["without_embeddings"] == (1 if tied else 2) * 97 * 32
        assert found["all"] == sum(weight.numel() for weight in model.parameters())


def test_means_over_seeds() -> None:
    assert over_seeds([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert over_seeds([1.5], "+.1f") == "+1.5"
    assert over_seeds([1.0, 3.0], "+.1f") == "+2.0 ± 1.4"
    assert over_seeds([None]) == "–"


def test_a_table_says_what_cannot_be_read() -> None:
    model = AlibiGPTForCausalLM(
        AlibiGPTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    assert unreadable(model, 10**6) is None
    reason = unreadable(model, 2**24 + 1)
    assert reason == {"unreadable": "the model has no positions beyond 16777216 tokens"}
    records = [{"tests": {"books": {"8": {"nats": 0.0}, "16": reason}}}]
    assert [cell(records, "books", length) for length in (8, 16, 32)] == ["1.00", "cannot read it", "–"]


def test_a_method_far_from_the_others_has_not_converged() -> None:
    losses = {"alibi": [3.0, 3.1], "rotary": [3.05, 3.05], "none": [3.4, 3.3]}
    records = [
        {
            "settings": {"question": "main", "variant": name, "training_length": 64},
            "training": {"evaluations": [[1, 9.0], [2, loss]]},
        }
        for name, group in losses.items()
        for loss in group
    ]
    assert unconverged(records) == {("none", 64): pytest.approx(0.3)}
