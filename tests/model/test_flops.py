"""PyTorch's FLOP counter counts the products of matrices that attention really computes."""

from typing import Any

import pytest
import torch
from conftest import ModelFactory
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hf_alibi import AlibiGPTForCausalLM
from hf_alibi.model import causal


def tokens(length: int) -> torch.Tensor:
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(length))


def flops(model: AlibiGPTForCausalLM, input_ids: torch.Tensor, training: bool = False) -> tuple[int, int]:
    """Returns the operations of attention, and of everything else."""
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        outputs = model(input_ids, labels=input_ids, use_cache=False)
        if training:
            outputs.loss.backward()
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for name, count in counts.items() if "attention" in name or name == "aten.bmm")
    return attention, counter.get_total_flops() - attention


class Calls:
    """Counts the operations of the CPU's kernels from the tensors that they are called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flops = 0
        for name, products, position in (("CPU_FLASH", 2, 0), ("CPU_FLASH_BACKWARD", 5, 1)):
            monkeypatch.setattr(causal, name, self._counted(getattr(causal, name), products, position))

    def _counted(self, kernel: Any, products: int, position: int) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            query, key = args[position : position + 2]
            self.flops += products * 2 * query.numel() * key.shape[2]
            return kernel(*args, **kwargs)

        return counted


def test_a_short_forward_pass_counts_as_with_eager(make_model: ModelFactory) -> None:
    model = make_model(num_key_value_heads=2)
    found = flops(model, tokens(200))
    model.set_attn_implementation("eager")
    assert found == flops(model, tokens(200))
    assert found[0] == 2 * 2 * 2 * (2 * 6 * 200 * 200 * 16)  # layers, products, operations, scores times head_dim


def test_a_long_forward_pass_counts_little_more_than_the_causal_half(make_model: ModelFactory) -> None:
    model = make_model(window_tolerance=0)
    found, others = flops(model, tokens(2048))
    model.set_attn_implementation("eager")
    whole, same = flops(model, tokens(2048))
    assert others == same
    # On average half a tile of 256 queries is in the future.
    assert found == pytest.approx(whole * (0.5 + 128 / 2048), rel=1e-6)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("windows", [False, True], ids=["everything", "windows"])
@pytest.mark.parametrize("slopes", [False, True], ids=["", "slopes"])
def test_what_the_kernels_compute_is_counted(
    make_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, training: bool, windows: bool, slopes: bool
) -> None:
    shape = {"num_key_value_heads": 2, "alibi_slopes_trainable": slopes}
    model = make_model(window_tolerance=0.5 if windows else 0, hidden_size=48, **shape)
    calls = Calls(monkeypatch)
    found, _ = flops(model, tokens(1300), training)
    assert found == calls.flops > 0


def test_windows_without_data_are_unknown_so_everything_is_counted(make_model: ModelFactory) -> None:
    narrow, wide = (make_model(window_tolerance=tolerance, hidden_size=48) for tolerance in (0.5, 0))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert flops(narrow, mode.from_tensor(tokens(1300))) == flops(wide, mode.from_tensor(tokens(1300)))
    assert flops(narrow, tokens(1300))[0] < flops(wide, tokens(1300))[0]


def test_the_meta_device_counts_tiles(make_model: ModelFactory) -> None:
    model = make_model(window_tolerance=0).to("meta")
    found, _ = flops(model, tokens(2048).to("meta"))
    model.set_attn_implementation("eager")
    whole, _ = flops(model, tokens(2048).to("meta"))
    assert 0.5 * whole < found < 0.7 * whole
