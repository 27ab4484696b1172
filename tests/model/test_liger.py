"""A fused loss in place of logits, and what Liger may not do with this model.

Liger's own kernel runs in `tests/neighbours/test_neighbours_kernels.py`.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ModelFactory
from torch import Tensor, nn

from hf_alibi import AlibiGPTForCausalLM, AlibiGPTForSequenceClassification
from hf_alibi.model.liger import apply_liger_kernel, fused_loss

IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(3))


def row_by_row(lm_head: nn.Module, hidden_states: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    """A loss that needs the logits of one row at a time."""
    rows = zip(hidden_states[:, :-1], labels[:, 1:], strict=True)
    total = torch.stack([F.cross_entropy(lm_head(states), row, reduction="sum") for states, row in rows]).sum()
    return total / kwargs.get("num_items_in_batch", labels[:, 1:].numel())


def test_a_fused_loss_replaces_logits_in_training(make_model: ModelFactory) -> None:
    model = make_model()
    assert isinstance(model, AlibiGPTForCausalLM)
    expected = model(IDS, labels=IDS)
    model.fused_loss = row_by_row
    for given in ({}, {"skip_logits": None}, {"skip_logits": False}):
        output = model.eval()(IDS, labels=IDS, **given)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)
    for output in (
        model.train()(IDS, labels=IDS),
        model.eval()(IDS, labels=IDS, skip_logits=True),
    ):
        assert output.logits is None
        torch.testing.assert_close(output.loss, expected.loss)
    assert torch.equal(model.train()(IDS).logits, expected.logits)
    share = model(IDS, labels=IDS, num_items_in_batch=64).loss
    torch.testing.assert_close(share, expected.loss * (16 / 64))


def test_trainer_may_ask_for_no_logits_where_nothing_is_fused(make_model: ModelFactory) -> None:
    model = make_model()
    output = model(IDS, labels=IDS, skip_logits=True)
    assert torch.equal(output.loss, model(IDS, labels=IDS).loss)
    assert output.logits.shape == (2, 9, 97)


def test_liger_is_refused_where_it_would_do_nothing_or_harm(make_model: ModelFactory) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="asks for rope, rms_norm; of Liger's kernels, this model only uses fused_"):
        apply_liger_kernel(rope=True, rms_norm=True, model=model)
    classifier = AlibiGPTForSequenceClassification(model.config)
    with pytest.raises(ValueError, match="loss of a language model, which AlibiGPTForSequenceClassification does not"):
        apply_liger_kernel(model=classifier)
    with pytest.raises(ValueError, match="pass use_liger_kernel=True to TrainingArguments"):
        apply_liger_kernel()
    with pytest.warns(UserWarning, match="Liger changes nothing"):
        apply_liger_kernel(fused_linear_cross_entropy=False, model=model)
    assert model.fused_loss is None
    apply_liger_kernel(model=model)
    assert model.fused_loss is fused_loss
    with pytest.raises(ValueError, match="need a GPU, but the model is on the CPU: leave use_liger_kernel out"):
        model.train()(IDS, labels=IDS)


def test_the_kernel_reads_only_a_weight_that_is_the_whole_layer(
    make_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = make_model().train()
    apply_liger_kernel(model=model)
    with pytest.raises(ValueError, match=r"shape \(2, 9\).*that of the tokens, \(2, 4\): leave logits_to_keep out"):
        model(IDS, labels=IDS, logits_to_keep=4)
    hook = model.lm_head.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="an adapter, quantization, a hook or tensor parallelism has changed"):
        model(IDS, labels=IDS)
    hook.remove()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="an adapter, quantization, a hook or tensor parallelism has changed"):
        model(IDS, labels=IDS)
