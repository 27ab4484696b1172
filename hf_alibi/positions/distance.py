"""The base classes of methods whose bias is any function of the distance, with trained parameters.

Identical to AlibiGPT except:

- The bias of every head at every distance comes from `DistanceBias`, once for all layers.
- There are no windows: only a linear bias bounds what distant keys can weigh.
- The backends are `sdpa` and `eager`.

The bias goes through the same line and tiles as that of ALiBi, so it is never stored for queries times keys.
"""

from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..model.configuration_alibi_gpt import AlibiGPTConfig
from ..model.layout import TokenLayout
from ..model.modeling_alibi_gpt import AlibiGPTModel
from .base import UnbiasedConfig


@strict
class DistanceConfig(UnbiasedConfig):
    """Configuration of a model with a `DistanceBias`."""

    def validate_architecture(self) -> None:
        """Checks what `UnbiasedConfig` checks, and that no windows are asked for.

        Raises:
            ValueError: If fields contradict each other, or `window_tolerance` is not 0. The config raises it as a
                `StrictDataclassError`.
        """
        super().validate_architecture()
        if self.window_tolerance:
            raise ValueError(
                f"{self.model_type} has no windows, which follow from linear biases only: window_tolerance must be 0, "
                f"got {self.window_tolerance}."
            )


class DistanceBias(nn.Module):
    """A bias by distance. Subclasses create their parameters with `parameter`, and compute the bias in `bias`."""

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__()
        self.config = config

    def parameter(self, *shape: int) -> nn.Parameter:
        """Returns a new parameter of this shape, in float32 even while a model with 16-bit weights is created."""
        return nn.Parameter(torch.empty(shape, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32)))

    def first_values(self) -> dict[str, Tensor]:
        """Returns the first values of the parameters, by name."""
        raise NotImplementedError

    def bias(self, distances: Tensor) -> Tensor:
        """Returns the bias `[heads, distances]` in nats at `distances`, integers `[distances]`."""
        raise NotImplementedError

    def forward(self, distances: Tensor) -> Tensor:
        """Returns the bias `[heads, distances]` in nats at `distances`, integers `[distances]`.

        Raises:
            ValueError: If the parameters have been cast to 16 bits.
        """
        for name, parameter in self.named_parameters():
            if parameter.dtype.itemsize < 4:
                raise ValueError(
                    f"{name} has been cast to {parameter.dtype}. Mixed precision of FSDP and DeepSpeed casts "
                    "parameters. Keep them in float32 (no param_dtype) and compute in 16 bits under torch.autocast."
                )
        return self.bias(distances)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and casts the parameters, but keeps them in float32 if weights are cast to 16 bits."""

        def keeping_float32(states: Tensor) -> Tensor:
            changed = fn(states)
            return states.to(changed.device) if changed.dtype.itemsize < 4 else changed

        return super()._apply(keeping_float32, recurse)


class DistanceGPTModel(AlibiGPTModel):
    """A decoder whose bias is of the class `bias_class`."""

    bias_class: type[DistanceBias]
    has_linear_bias = False
    _keep_in_fp32_modules_strict = ["distance_bias"]

    def __init__(self, config: AlibiGPTConfig) -> None:
        super().__init__(config)
        self.distance_bias = self.bias_class(config)

    def with_bias(self, layout: TokenLayout) -> TokenLayout:
        """Returns the layout with the bias at all distances of this pass."""
        distances = torch.arange(layout.num_distances(), device=layout.slopes.device)
        return layout._replace(slopes=self.distance_bias(distances).to(layout.slopes))

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, DistanceBias):
            # Does not change loaded weights.
            from transformers.initialization import copy_

            for name, values in module.first_values().items():
                copy_(module.get_parameter(name), values)
