"""Tiles: output and gradients equal those of the formula, however a text is cut."""

import oracle
import pytest
import torch

from hf_alibi.model import tiles
from hf_alibi.model.alibi import alibi_slopes
from hf_alibi.model.causal import causal_attention
from hf_alibi.model.inputs import AttentionInputs
from hf_alibi.model.windows import head_windows, norm_bounds

HEAD_DIM, SCALING = 8, 8**-0.5


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a text of a few hundred tokens has all kinds of them."""
    for name, size in {
        "NEAR_BLOCK": 8,
        "FAR": 128,
        "KEY_BLOCK": 16,
        "FULL_SPEED": 24,
        "FEW_KEYS": 0,
        "GRAIN": 4,
    }.items():
        monkeypatch.setattr(tiles, name, size)


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
    # The windows have 10 to 2,000 tokens.
    slopes = 8 * torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    windows = head_windows(slopes, norm_bounds(query, key, SCALING), 2.0**-52) if windowed else None
    inputs = (query, key, value)

    output = causal_attention(AttentionInputs(*inputs, slopes, SCALING, 0.0, windows))
    expected = oracle.attention(*inputs, slopes.tolist(), SCALING)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)
    direction = torch.randn_like(expected)
    for actual, exact in zip(*(torch.autograd.grad(x, inputs, direction) for x in (output, expected)), strict=True):
        torch.testing.assert_close(actual, exact, rtol=0, atol=1e-12)


WINDOWS = torch.tensor([10, 10, 20, 40, 80, 160, 320, 640])


def plans(length: int) -> tuple[list[tiles.Tile], list[tiles.Tile]]:
    """Returns the tiles of the forward and of the backward pass."""
    states = torch.empty(1, len(WINDOWS), length, HEAD_DIM)
    forward = tiles.joined(tiles.query_tiles(states, states, WINDOWS))
    return forward, list(map(tiles.in_pieces, tiles.joined(tiles.key_tiles(states, states, WINDOWS))))


def seen_pairs(plan: list[tiles.Tile], length: int) -> torch.Tensor:
    """Returns in how many tiles each pair of query and key is, `[heads, queries, keys]`."""
    seen = torch.zeros(len(WINDOWS), length, length, dtype=torch.int8)
    for tile in plan:
        for block in range(tile.blocks):
            query, key = tile.queries.start + block * tile.query_step, tile.keys.start + block * tile.key_step
            seen[tile.heads, query : query + tile.num_queries, key : key + tile.num_keys] += 1
    return seen


@pytest.mark.parametrize("length", [63, 700])
def test_tiles_have_every_pair_in_the_window_once(length: int) -> None:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    for plan in plans(length):
        seen = seen_pairs(plan, length)
        assert seen.max() == 1, "a key is counted twice"
        for head, window in enumerate(WINDOWS):
            assert seen[head][(distance >= 0) & (distance <= window)].all(), "a key in the window is left out"


def test_a_long_text_has_tiles_of_every_kind() -> None:
    forward, backward = plans(700)
    assert {tile.num_queries for tile in forward} >= {tiles.NEAR_BLOCK, tiles.FULL_SPEED}
    for plan in (forward, backward):
        assert any(tile.blocks == tiles.MAX_BLOCKS for tile in plan)
        assert any(not tile.is_of_one_head for tile in plan)
    assert any(tile.blocks > 1 and not tile.key_step for tile in backward), "no tile is cut into pieces"
