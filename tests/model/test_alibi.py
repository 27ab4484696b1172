"""The slopes and the bias, against the paper and against each other."""

import oracle
import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from hf_alibi.model.alibi import alibi_bias, alibi_slopes, bias_view, causal_line


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20, 71, 112])
def test_slopes_are_the_papers(heads: int) -> None:
    assert alibi_slopes(heads) == pytest.approx(oracle.paper_slopes(heads), rel=1e-12)


def test_slopes_of_eight_heads_are_the_powers_of_one_half() -> None:
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


def test_slopes_of_other_head_counts_stay_unsorted() -> None:
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


@pytest.mark.parametrize("heads", [6, 8, 12, 20])
def test_slopes_are_those_of_bloom(heads: int) -> None:
    column = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # m j, for j = 0, 1
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), column[:, 0, 1])


def test_max_bias_replaces_the_eight() -> None:
    assert alibi_slopes(4, max_bias=16.0) == [2**-4, 2**-8, 2**-12, 2**-16]


@pytest.mark.parametrize(("heads", "max_bias"), [(0, 8.0), (-1, 8.0), (8, 0.0), (8, -1.0)])
def test_impossible_slopes_are_refused(heads: int, max_bias: float) -> None:
    with pytest.raises(ValueError, match=f"got {heads} and {max_bias}"):
        alibi_slopes(heads, max_bias)


def test_bias_is_the_distance_times_the_slope() -> None:
    slopes = torch.tensor([0.5, 0.25])
    bias = alibi_bias(slopes, torch.tensor([[3, 7]]), torch.tensor([[0, 3, 9]]))
    assert bias.tolist() == [[[[-1.5, 0.0, -3.0], [-3.5, -2.0, -1.0]], [[-0.75, 0.0, -1.5], [-1.75, -1.0, -0.5]]]]


def test_any_slice_of_the_bias_is_rows_and_columns_of_the_whole() -> None:
    slopes, positions = torch.tensor(alibi_slopes(6)), torch.arange(63)[None]
    whole = alibi_bias(slopes, positions, positions)
    assert torch.equal(alibi_bias(slopes, positions[:, 40:47], positions[:, 5:60]), whole[:, :, 40:47, 5:60])


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 111), (63, 63), (63, 111)])
def test_view_of_the_line_is_the_causal_bias_of_reversed_queries(queries: int, keys: int) -> None:
    slopes = torch.tensor(alibi_slopes(12))
    query_positions, key_positions = torch.arange(keys - queries, keys), torch.arange(keys)
    expected = alibi_bias(slopes, query_positions[None], key_positions[None])
    expected = expected.masked_fill(key_positions > query_positions[:, None], -torch.inf)
    line = causal_line(slopes, behind=keys - 1, ahead=queries - 1)
    view = bias_view(line, slice(2, 11), queries, keys, corner=0)
    assert torch.equal(view.flip(2), expected[:, 2:11])
    assert view.untyped_storage().data_ptr() == line.untyped_storage().data_ptr()
