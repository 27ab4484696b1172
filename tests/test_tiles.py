"""Tiles: however a text is cut, output and gradients are those of the formula."""

import oracle
import pytest
import torch

from hf_alibi import tiles
from hf_alibi.alibi import alibi_slopes
from hf_alibi.windows import head_windows, norm_bounds

HEAD_DIM, SCALING = 8, 8**-0.5


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a text of some hundred tokens has all kinds of them."""
    monkeypatch.setattr(tiles, "QUERY_BLOCK", 16)
    monkeypatch.setattr(tiles, "KEY_GRAIN", 4)


@pytest.mark.parametrize("windowed", [False, True], ids=["everything", "windows"])
@pytest.mark.parametrize("past", [0, 37])
@pytest.mark.parametrize("length", [1, 15, 16, 63, 111, 700])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (12, 4), (20, 20)])
def test_output_and_gradients(heads: int, kv_heads: int, length: int, past: int, windowed: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, heads, length, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(2, kv_heads, past + length, HEAD_DIM, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    slopes = [8 * slope for slope in alibi_slopes(heads)]  # windows of 10 to 2,000 tokens
    windows = head_windows(slopes, norm_bounds(query, key, SCALING), 2.0**-52) if windowed else None
    inputs = (query, key, value)

    output = tiles.causal_attention(*inputs, torch.tensor(slopes, dtype=torch.float64), SCALING, 0.0, windows)
    expected = oracle.attention(*inputs, slopes, SCALING)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)
    direction = torch.randn_like(expected)
    for actual, exact in zip(*(torch.autograd.grad(x, inputs, direction) for x in (output, expected)), strict=True):
        torch.testing.assert_close(actual, exact, rtol=0, atol=1e-12)


def test_a_long_text_has_tiles_of_every_kind() -> None:
    states = torch.empty(1, 8, 700, HEAD_DIM)
    windows = [10, 10, 20, 40, 80, 160, 320, 640]
    plan = tiles.merged(tiles.tiles(states, states, windows, share=1 / 2))
    parts = [part for tile in plan for part in tile.parts()]
    assert any(tile.blocks == tiles.MAX_BLOCKS for tile in plan)
    assert any(tile.blocks == 1 and tile.heads.stop - tile.heads.start > 1 for tile in plan)
    assert {tile.num_queries for tile in plan} >= {8, 32}
    assert {part.is_square for part in parts} == {True, False}
    seen = torch.zeros(8, 700, 700, dtype=torch.int8)
    for part in parts:
        for block in range(part.blocks):
            first_query = part.queries.start + block * part.num_queries
            first_key = part.keys.start + block * part.num_queries
            rows = slice(first_query, first_query + part.num_queries)
            seen[part.heads, rows, first_key : first_key + part.num_keys] += 1
    assert seen.max() == 1, "a key is counted twice"
    distance = torch.arange(700)[:, None] - torch.arange(700)
    for head, window in enumerate(windows):
        assert seen[head][(distance >= 0) & (distance <= window)].all(), "a key in the window is left out"
