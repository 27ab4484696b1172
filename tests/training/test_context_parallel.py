"""Context parallelism: ranks that divide rows compute what one process does, and exchange no more than they need."""

import re
from pathlib import Path

import pytest
import torch
from several_processes import in_processes

from hf_alibi.training.context_parallel import make_plan

# The parts of each rank in a row of 40 tokens, and the first key that each part sees.
CONTIGUOUS = [[range(13)], [range(13, 26)], [range(26, 40)]]
BALANCED = [[range(6), range(33, 40)], [range(6, 13), range(26, 33)], [range(13, 26)]]


@pytest.mark.parametrize("parts", [CONTIGUOUS, BALANCED], ids=["contiguous", "balanced"])
@pytest.mark.parametrize("reach", [[5, 2**62, 0], [2**62] * 3, [17, 14, 1]], ids=["near and far", "far", "near"])
@pytest.mark.parametrize("document", [0, 20], ids=["one document", "two documents"])
def test_each_rank_gets_the_keys_that_it_needs(parts: list[list[range]], reach: list[int], document: int) -> None:
    starts = [part.start for own in parts for part in own]
    lows = {start: document if start >= document else 0 for start in starts}
    plans = [make_plan(parts, rank, lows, reach, torch.device("cpu")) for rank in range(3)]
    rows = [torch.tensor([[100 * head + i for part in own for i in part] for head in range(3)]) for own in parts]
    for rank, plan in enumerate(plans):
        counts = [0, 0, 0]
        end = parts[rank][-1].stop
        held = torch.full((3 * end,), -1)
        held[plan.own] = rows[rank].flatten()
        messages = [rows[other].flatten()[p.sent].split(p.sent_sizes)[rank] for other, p in enumerate(plans)]
        assert [len(message) for message in messages] == plan.received_sizes
        held[plan.received] = torch.cat(messages)
        mine = {i for part in parts[rank] for i in part}
        for head, row in enumerate(held.view(3, end).tolist()):
            needed = {
                key
                for part in parts[rank]
                for key in range(max(lows[part.start], part.start - reach[head]), part.start)
            }
            assert row == [100 * head + i if i in mine | needed else -1 for i in range(end)]
            counts[head] += len(needed - mine)
        assert plan.tokens_by_head == counts


@pytest.mark.slow
def test_two_ranks_compute_what_one_process_does() -> None:
    output = in_processes(Path(__file__).with_name("ranks_context.py"))
    lines = re.findall(r"8,192 tokens, sdpa, (\w+): bytes by head ([\d, ]+); ring attention ([\d,]+) for each", output)
    assert [kind for kind, _, _ in lines] == ["contiguous", "balanced"]
    for _, exchanged, ring in lines:
        by_head = [int(number.replace(",", "")) for number in exchanged.split(" ")]
        assert max(by_head) < int(ring.replace(",", "")) / 2
        assert by_head[0] < int(ring.replace(",", "")) / 90
