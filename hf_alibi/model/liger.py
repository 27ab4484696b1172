"""Liger's fused loss of a language model, for `use_liger_kernel=True` in `TrainingArguments`.

Liger looks up in a table what it does with a model type, and skips an unknown type without a message. So every
language model adds its own type when it is created. The loss then comes from hidden states, in chunks, without logits
of `[batch, tokens, vocab_size]`. Its value is the same. The kernel is written in Triton and needs a GPU.

Liger's other kernels replace layers of models that it knows. They are refused by name.
"""

import os
import warnings
from importlib import import_module
from typing import Any

from torch import Tensor, nn


def register_with_liger(model_type: str) -> None:
    """Adds a model type to Liger's table if Liger is installed."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        return
    MODEL_TYPE_TO_APPLY_LIGER_FN.setdefault(model_type, apply_liger_kernel)


def apply_liger_kernel(
    fused_linear_cross_entropy: bool = True,
    cross_entropy: bool = False,
    rope: bool = False,
    rms_norm: bool = False,
    layer_norm: bool = False,
    swiglu: bool = False,
    geglu: bool = False,
    model: Any = None,
) -> None:
    """Lets a model compute its training loss by Liger's kernel. Liger calls this function.

    Args:
        fused_linear_cross_entropy: Whether the loss is fused. Without it, nothing changes, and a warning says so.
        cross_entropy, rope, rms_norm, layer_norm, swiglu, geglu: Liger's other kernels, which this model does not use.
        model: The model.

    Raises:
        ValueError: If another kernel is requested, or if the model has no loss that can be fused.
    """
    others = {
        "cross_entropy": cross_entropy,
        "rope": rope,
        "rms_norm": rms_norm,
        "layer_norm": layer_norm,
        "swiglu": swiglu,
        "geglu": geglu,
    }
    wanted = [name for name, is_wanted in others.items() if is_wanted]
    if wanted:
        raise ValueError(
            f"liger_kernel_config asks for {', '.join(wanted)}; of Liger's kernels, this model only uses "
            "fused_linear_cross_entropy."
        )
    if not fused_linear_cross_entropy:
        warnings.warn(
            "Liger changes nothing: this model only uses fused_linear_cross_entropy, which is off.", stacklevel=2
        )
        return
    if model is None:
        raise ValueError(
            "Liger's loss is set for one model: load it with AutoModelForCausalLM and pass use_liger_kernel=True to "
            "TrainingArguments."
        )
    if not hasattr(model, "fused_loss"):
        raise ValueError(
            f"Liger's kernel is for the loss of a language model, which {type(model).__name__} does not have: leave "
            "use_liger_kernel out."
        )
    model.fused_loss = fused_loss


def fused_loss(lm_head: nn.Module, hidden_states: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    """Returns what the usual loss of the logits is, without making them.

    Args:
        lm_head: The output layer.
        hidden_states: `[batch, tokens, hidden_size]`.
        labels: `[batch, tokens]`.
        kwargs: Arguments of the usual loss, such as `num_items_in_batch` and `shift_labels`.

    Raises:
        ValueError: Without a GPU, if the output layer is not an ordinary linear layer, or if the shapes do not fit.
    """
    # The interpreter runs Triton's kernels on the CPU, slowly, for tests.
    if hidden_states.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("Liger's kernels need a GPU, but the model is on the CPU: leave use_liger_kernel out.")
    weight: Any = getattr(lm_head, "weight", None)
    is_ordinary = type(lm_head) is nn.Linear and type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
    if not is_ordinary or lm_head._forward_hooks or lm_head._forward_pre_hooks:
        raise ValueError(
            "Liger's kernel multiplies by the weight of lm_head itself, which an adapter, quantization, a hook or "
            "tensor parallelism has changed: leave use_liger_kernel out."
        )
    if hidden_states.shape[:2] != labels.shape:
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)}; with use_liger_kernel they must have that of the tokens, "
            f"{tuple(hidden_states.shape[:2])}: leave logits_to_keep out."
        )
    # With an `import` statement, the code of a checkpoint would only load where Liger is installed.
    loss = import_module("liger_kernel.transformers.model.loss_utils").LigerForCausalLMLoss
    return loss(hidden_states.contiguous(), weight, labels, hidden_states.shape[-1], **kwargs)
