"""The floating-point operations of the model's own operators, for `torch.utils.flop_counter.FlopCounterMode`.

PyTorch counts matrix products: two operations for each multiplication and addition, and none for the softmax. The
formulas count the same for every score that is computed. Keys in the future and keys beyond a window are left out tile
by tile (`tiles.py`), so they are not counted, except those inside a tile. Up to `NEAR_BLOCK` queries, one tile is the
whole matrix, and the forward pass counts as with `eager`. For longer texts the number approaches one half of that, and
less with windows. The backward pass computes the scores again: five products, where `eager` has four.

Windows count if their values are known. Without data, on the meta device or under `FakeTensorMode`, every query sees
all earlier keys.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .distance_gradient import computed_scores
from .recording import has_values
from .tiles import Tile, key_tiles, query_tiles

# Products of matrices in the forward pass: scores, and output. In the backward pass: scores again, and the gradients
# of weights, values, queries and keys.
FORWARD_PRODUCTS = 2
BACKWARD_PRODUCTS = 5


def register_flops(forward: Any, backward: Any, slope_columns: Callable[[int], int]) -> None:
    """Registers the formulas with PyTorch.

    Args:
        forward: The operator `causal.attention_in_tiles`, in `torch.ops`.
        backward: The operator `causal.attention_in_tiles_backward`, in `torch.ops`.
        slope_columns: Returns the number of columns that the gradient of the slopes adds in a tile with this number of
            keys.
    """

    @register_flop_formula(forward, get_raw=True)
    def _(
        query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, windows: Tensor | None, *_: Any, **__: Any
    ) -> int:
        return FORWARD_PRODUCTS * sum(
            _scores(tile, query) * 2 * query.shape[3] for tile in _tiles(query_tiles, query, key, windows)
        )

    @register_flop_formula(backward, get_raw=True)
    def _(
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slopes: Tensor,
        windows: Tensor | None,
        output: Tensor,
        logsumexp: Tensor,
        scaling: float,
        of_slopes: bool,
        **_: Any,
    ) -> int:
        if of_slopes and slopes.dim() == 2:
            scores = query.shape[0] * query.shape[1] * computed_scores(query.shape[2], key.shape[2])
            return BACKWARD_PRODUCTS * 2 * query.shape[3] * scores
        tiles = _tiles(key_tiles, query, key, windows)
        return BACKWARD_PRODUCTS * sum(
            _scores(tile, query) * 2 * (query.shape[3] + (slope_columns(tile.num_keys) if of_slopes else 0))
            for tile in tiles
        )


def _tiles(cut: Callable[..., Iterable[Tile]], query: Tensor, key: Tensor, windows: Tensor | None) -> Iterable[Tile]:
    return cut(query, key, windows if windows is not None and has_values(windows) else None)


def _scores(tile: Tile, query: Tensor) -> int:
    """Returns the number of scores in a tile, for all texts of the batch."""
    return len(query) * (tile.heads.stop - tile.heads.start) * tile.blocks * tile.num_queries * tile.num_keys
