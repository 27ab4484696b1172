"""Plans agree with what PyTorch counts, and with what Trainer takes."""

import pytest
import torch
from conftest import ModelFactory
from torch.utils.flop_counter import FlopCounterMode
from trained_memory import SMALL_RUNS, measured_mib, predicted_mib
from transformers import AutoConfig

from hf_alibi import AlibiGPTConfig
from hf_alibi.model.cache import WindowedCache
from hf_alibi.planning.memory import Setup, at_batch, cache_bytes, memory_of, trace_of
from hf_alibi.planning.tracing import checkpoint_layers, count_operations, parameters
from hf_alibi.study.methods import METHODS

QUICK = {"float32", "bfloat16"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in SMALL_RUNS]
)
def test_memory_is_what_trainer_takes(name: str) -> None:
    assert predicted_mib(SMALL_RUNS[name]) == pytest.approx(measured_mib(SMALL_RUNS[name]), rel=0.1)


def counted(model: torch.nn.Module, batch: int, length: int) -> tuple[int, int]:
    """Returns the operations of a real step: forward, and both passes."""
    ids = torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("length", [64, 700])
def test_operations_are_those_of_the_counter(make_model: ModelFactory, length: int, checkpointing: bool) -> None:
    model = make_model(window_tolerance=0, num_key_value_heads=2, mlp_gated=True).train()
    found = count_operations(model.config, 2, length, gradient_checkpointing=checkpointing)
    if checkpointing:
        checkpoint_layers(model)
    assert (found.forward, found.both) == counted(model, 2, length)
    assert found.both_in_windows == found.both


@pytest.mark.parametrize("trainable", [False, True], ids=["fixed slopes", "trained slopes"])
def test_head_windows_are_counted_as_a_real_step_uses_them(make_model: ModelFactory, trainable: bool) -> None:
    # Steep slopes, so that windows are shorter than the text. The gains of a new model are 1.
    model = make_model(alibi_slopes=[4.0] * 6, alibi_slopes_trainable=trainable, hidden_size=48).train()
    found = count_operations(model.config, 2, 1300)
    assert found.both_in_windows < found.both
    assert (found.forward_in_windows, found.both_in_windows) == counted(model, 2, 1300)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_plan(method: str) -> None:
    fields = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(model_type=METHODS[method].model_type, **fields, **METHODS[method].config)
    setup = Setup(2, 32)
    plain, again = (memory_of(trace_of(config, Setup(2, 32, checkpointing=on)), setup) for on in (False, True))
    assert again.activations < plain.activations
    assert again.total < plain.total
    assert count_operations(config, 2, 32).both > 0


SHAPE = AlibiGPTConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)


def test_the_parts_follow_from_the_number_of_parameters() -> None:
    setup = Setup(2, 64)
    trace = trace_of(SHAPE, setup)
    memory = memory_of(trace, setup)
    assert memory.weights == memory.gradients == memory.optimizer / 2 == 4 * trace.parameters
    assert trace.parameters - trace.without_embeddings == 256 * 64
    # Logits, their softmax, and the gradient of either.
    assert memory.logits >= 3 * 2 * 64 * 256 * 4
    assert memory.total > memory.weights + memory.optimizer + memory.activations + memory.logits


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(0, 1, 1, 1), (1, 1, 1, 4), (2, 1, 4, 4), (3, 4, 4, 4)]
)
def test_each_stage_shares_one_part_more(stage: int, weights: int, gradients: int, optimizer: int) -> None:
    alone, setup = Setup(2, 64), Setup(2, 64, ranks=4, stage=stage)
    one, shared = memory_of(trace_of(SHAPE, alone), alone), memory_of(trace_of(SHAPE, setup), setup)
    assert shared.weights == one.weights / weights
    assert shared.gradients == one.gradients / gradients
    assert shared.optimizer == one.optimizer / optimizer
    assert (shared.communication > 0) == (stage in (0, 3))


def test_accumulation_keeps_the_gradients() -> None:
    setup = Setup(2, 64)
    once, more = (memory_of(trace_of(SHAPE, setup), Setup(2, 64, accumulation=steps)) for steps in (1, 2))
    assert once.total < more.total <= once.total + once.gradients
    assert more.total >= more.weights + more.optimizer + more.gradients + more.activations + more.logits


@pytest.mark.parametrize("factor", [0.5, 1.5, 3])
def test_a_trace_is_linear_in_the_batch(factor: float) -> None:
    small, large, asked = (Setup(batch, 64) for batch in (4, 8, round(4 * factor)))
    found = at_batch(trace_of(SHAPE, small), trace_of(SHAPE, large), factor)
    assert found.peak() == pytest.approx(trace_of(SHAPE, asked).peak(), rel=1e-3)


@pytest.mark.parametrize("length", [16, 3000])
def test_the_cache_is_as_large_as_a_real_one(make_model: ModelFactory, length: int) -> None:
    model = make_model(alibi_slopes=[2.0] * 3 + [0.01] * 3)
    whole, windowed = cache_bytes(model.config, length, torch.float32)
    guarantee = model.config.window_guarantee()
    cache = WindowedCache([guarantee.windows] * 2, torch.tensor(guarantee.slopes))
    states = torch.zeros(1, model.config.num_key_value_heads, length, model.config.head_dim)
    for index, layer in enumerate(cache.layers):
        layer.update(states, states, index)
    assert whole == 2 * 2 * states.nbytes
    buffers = [buffer for layer in cache.layers for buffer in layer.buffers]
    assert windowed == sum(buffer.keys.nbytes + buffer.values.nbytes for buffer in buffers)
    assert (windowed < whole / 2) == (length == 3000)


def test_parameters_are_counted_once_if_tied(make_model: ModelFactory) -> None:
    counts = parameters(make_model(tie_word_embeddings=True))
    apart = parameters(make_model(tie_word_embeddings=False))
    assert counts["without_embeddings"] == apart["without_embeddings"]
    assert apart["all"] > counts["all"]
