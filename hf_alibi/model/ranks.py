"""One model in several processes: which part of it is here, and which ways of sharing it are refused.

With tensor parallelism, each rank has some of the heads, with their slopes and windows. With pipeline parallelism,
each rank has some of the layers. Torch's context parallelism gives each rank some of the tokens of a text.
"""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import TokenLayout


def sizes_of(distributed_config: Any, *names: str) -> list[int]:
    """Returns these fields of a `DistributedConfig`; 1 for those that are missing or `None`, and for one process."""
    return [getattr(distributed_config, name, None) or 1 for name in names]


def check_shares(config: Any, distributed_config: Any) -> None:
    """Checks that a model can be divided as Transformers' `DistributedConfig` asks.

    Args:
        config: The model's config.
        distributed_config: Numbers of ranks, or `None` for one process.

    Raises:
        ValueError: If heads, layers or tied embeddings cannot be divided.
    """
    ranks, stages, groups = sizes_of(distributed_config, "tp_size", "pp_size", "fsdp_size")
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    if heads % ranks or shared % ranks:
        raise ValueError(
            f"{heads} query heads and {shared} key-value heads cannot be divided among {ranks} ranks: tp_size must "
            "divide both numbers."
        )
    if stages > config.num_hidden_layers:
        raise ValueError(
            f"{config.num_hidden_layers} layers cannot be divided into {stages} stages: pp_size must not exceed "
            "num_hidden_layers."
        )
    if config.tie_word_embeddings and ranks > 1 and groups > 1 and config.vocab_size % (ranks * groups):
        # Transformers ties the weights again after FSDP has divided them. The embedding would then stay as it was
        # before the first step.
        raise ValueError(
            f"The embeddings of {config.vocab_size} tokens, tied to the output layer, cannot be divided evenly by "
            f"tensor parallelism and FSDP together: vocab_size must be a multiple of {ranks * groups} (tp_size times "
            "fsdp_size), or tie_word_embeddings False."
        )


def _mesh_of_heads(projection: Tensor) -> Any:
    """Returns the mesh of the ranks that share the heads, or `None` for a weight that is whole."""
    mesh = getattr(projection, "device_mesh", None)
    return mesh["tp"] if mesh is not None and mesh.ndim > 1 else mesh


def is_divided(weight: Tensor) -> bool:
    """Whether a weight is divided among ranks in another way than tensor parallelism, as FSDP does."""
    mesh = getattr(weight, "device_mesh", None)
    return mesh is not None and tuple(mesh.mesh_dim_names or ()) != ("tp",)


def heads_of_this_rank(projection: Tensor, heads: int) -> slice:
    """Returns which query heads this rank has.

    Args:
        projection: The weight of the projection of queries. With tensor parallelism it has the mesh.
        heads: Number of query heads on all ranks.
    """
    mesh = _mesh_of_heads(projection)
    if mesh is None:
        return slice(0, heads)
    rank, share = mesh.get_local_rank(), heads // mesh.size()
    return slice(rank * share, (rank + 1) * share)


def of_this_rank(layout: TokenLayout, projection: Tensor, heads: int) -> TokenLayout:
    """Returns a layout with the slopes, and the mask, of this rank's query heads.

    Args:
        layout: The layout for all heads.
        projection: The weight of the projection of queries. With tensor parallelism it has the mesh.
        heads: Number of query heads on this rank.
    """
    slopes, mask = layout.slopes, layout.mask
    if heads == len(slopes):
        return layout
    mine = heads_of_this_rank(projection, len(slopes))
    if slopes.requires_grad:
        # The view is a tensor of this layer only. Its gradient covers the rank's heads, so the hook sums over ranks.
        group = _mesh_of_heads(projection).get_group()
        slopes = slopes.view_as(slopes)
        slopes.register_hook(lambda grad: _sum_of_ranks(grad, group))
    return layout._replace(slopes=slopes[mine], mask=mask if mask is None or mask.shape[1] == 1 else mask[:, mine])


def _sum_of_ranks(states: Tensor, group: Any) -> Tensor:
    total = states.clone()
    dist.all_reduce(total, group=group)
    return total


def first_layer(layers: Iterable[nn.Module]) -> int:
    """Returns the index of the first layer on this pipeline stage, 0 without pipeline parallelism.

    Transformers replaces the layers of other stages by identity modules. Their part of a cache stays empty.
    """
    return next((i for i, layer in enumerate(layers) if not isinstance(layer, nn.Identity)), 0)


def is_part(model: nn.Module) -> bool:
    """Whether other pipeline stages have some of the model's layers."""
    layers = getattr(getattr(model, "model", model), "layers", [])
    return any(isinstance(layer, nn.Identity) for layer in layers)


def weights_of_all_stages(model: Any) -> dict[str, Tensor]:
    """Returns the weights of all pipeline stages, on the CPU. Transformers would save those of the first stage only.

    Raises:
        ValueError: If Transformers no longer tells which ranks are the stages.
    """
    group = getattr(getattr(model, "_pp_stage", None), "pp_group", None)
    if group is None:
        raise ValueError("Cannot find the other pipeline stages, so only a part of the model could be saved.")
    own = {name: weight.full_tensor() if hasattr(weight, "full_tensor") else weight
           for name, weight in model.state_dict().items()}  # fmt: skip
    if model.config.tie_word_embeddings:
        own = {name: weight for name, weight in own.items() if name not in (type(model)._tied_weights_keys or {})}
    stages: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(stages, {name: weight.cpu() for name, weight in own.items()}, group)
    return {name: weight for stage in stages for name, weight in stage.items()}


def whole_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments of a call. Pipeline parallelism passes them as one argument named `kwargs`."""
    return {**kwargs.pop("kwargs", {}), **kwargs}


def refuse_torch_context_parallel() -> None:
    """Raises `ValueError` inside torch's `context_parallel`, which accelerate uses too.

    It divides the tokens among ranks and replaces PyTorch's attention by one that exchanges keys, but has no bias. All
    attention backends of this model would look only at the tokens of their own rank.
    """
    if str(getattr(F.scaled_dot_product_attention, "__module__", "")).startswith("torch.distributed"):
        raise ValueError(
            "torch's context_parallel has no attention with ALiBi, so each rank would attend to its own tokens only. "
            "Use hf_alibi.training.ContextParallel, or SafeTrainer of the same module instead of Trainer."
        )
