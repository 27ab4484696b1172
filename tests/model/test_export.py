"""Compiled and exported models: one graph for all lengths, with the results of the model."""

from typing import Any

import pytest
import torch
from conftest import ModelFactory
from torch import Tensor, nn
from torch.export import Dim
from transformers import Cache, StaticCache

from hf_alibi import AlibiGPTForCausalLM
from hf_alibi.model import tiles
from hf_alibi.model.alibi import alibi_slopes
from hf_alibi.model.causal import attention_in_tiles

pytestmark = [
    # Dynamo fails if a warning is an error.
    pytest.mark.filterwarnings("default"),
    # Transformers has these side effects.
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects"),
    # Constants in a trace are intended.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    # Tracing and the functions of Transformers that it calls are deprecated.
    pytest.mark.filterwarnings("ignore:.*is deprecated:"),
]

SHAPES: dict[str, dict[str, Any]] = {
    "6-heads": {},
    "grouped": {"num_key_value_heads": 2},
    "trainable": {"alibi_slopes_trainable": True},
    "no-qk-norm": {"qk_norm": False},
    "dynamic-scaling": {"alibi_scaling": {"type": "dynamic"}, "training_length": 32},
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Graphs of other models count towards Dynamo's limit, so each test begins without any."""
    torch._dynamo.reset()


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def padding(batch: int, length: int) -> Tensor:
    """The first sequence has padding on the left, the second on the right."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 3] = mask[1, -(length // 4) :] = 0
    return mask


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def gradients(model: Any, input_ids: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(model(input_ids, labels=input_ids, use_cache=False).loss, weights)


def test_forward_and_training_step_compile_as_one_graph(make_model: ModelFactory) -> None:
    model = make_model()
    input_ids = tokens(2, 700)
    weights = list(model.parameters())
    expected = gradients(model, input_ids, weights)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(input_ids, use_cache=False).logits, model(input_ids, use_cache=False).logits)
    for gradient, exact in zip(gradients(compiled, input_ids, weights), expected, strict=True):
        assert_close(gradient, exact)


@each_shape
def test_one_graph_serves_all_lengths(make_model: ModelFactory, shape: dict[str, Any]) -> None:
    model = make_model(**shape)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    weights = list(model.parameters())
    with torch.no_grad():
        compiled(tokens(2, 40), use_cache=False)
    gradients(compiled, tokens(2, 40), weights)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (7, 63, 300, 1100):
            input_ids = tokens(2, length)
            with torch.no_grad():
                expected = model(input_ids, use_cache=False).logits
                assert_close(compiled(input_ids, use_cache=False).logits, expected)
            pairs = zip(gradients(compiled, input_ids, weights), gradients(model, input_ids, weights), strict=True)
            for actual, exact in pairs:
                assert_close(actual, exact, tolerance=1e-4)


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk-norm", "no-qk-norm"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["one-length", "all-lengths"])
def test_a_compiled_model_has_windows(make_model: ModelFactory, qk_norm: bool, dynamic: bool) -> None:
    """They are so narrow that they change the output. They follow the weights without a new graph."""
    model = make_model(qk_norm=qk_norm, window_tolerance=0.5, hidden_size=48)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    input_ids, weights = tokens(2, 1800), list(model.parameters())
    gradients(compiled, input_ids, weights)
    with torch.no_grad():
        for layer in model.model.layers:
            (layer.self_attn.q_norm if qk_norm else layer.self_attn.q_proj).weight *= 0.01
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = gradients(compiled, input_ids, weights)
    expected = gradients(model, input_ids, weights)
    for gradient, exact in zip(actual, expected, strict=True):
        assert_close(gradient, exact)
    model.config.window_tolerance = 0
    whole = gradients(model, input_ids, weights)
    with pytest.raises(AssertionError):
        assert_close(whole[0], expected[0], tolerance=1e-3)


def test_a_static_cache_of_any_size(make_model: ModelFactory) -> None:
    model = make_model(num_key_value_heads=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    input_ids = tokens(2, 80)
    with torch.no_grad():
        expected = model(input_ids, use_cache=False).logits
        for size in (90, 100):
            past = StaticCache(model.config, max_cache_len=size)
            logits = [compiled(part, past_key_values=past).logits for part in input_ids.split([40, 30, 1, 9], dim=1)]
            assert_close(torch.cat(logits, 1), expected)


def exported(model: AlibiGPTForCausalLM, strict: bool = False) -> Any:
    """The model, exported from a short text as a program for any batch and length."""
    inputs = {"input_ids": tokens(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long), "use_cache": False}
    sizes = {0: Dim("batch", min=2), 1: Dim("tokens", min=2)}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "use_cache": None}
    with torch.no_grad():
        return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=strict).module()


@each_shape
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_a_program_for_all_lengths(make_model: ModelFactory, shape: dict[str, Any], strict: bool) -> None:
    model = make_model(**shape)
    program = exported(model, strict)
    for batch, length in [(3, 5), (2, 40), (4, 700)]:
        inputs = {"input_ids": tokens(batch, length), "attention_mask": padding(batch, length), "use_cache": False}
        with torch.no_grad():
            assert_close(program(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_program_in_16_bits(make_model: ModelFactory, dtype: torch.dtype) -> None:
    """Its attention has a single dtype, as most engines need, and one that does not round the bias."""
    model = make_model(num_key_value_heads=2).to(dtype)
    program = exported(model)
    graphs = [module.graph for module in program.modules() if isinstance(module, torch.fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    attention = [node for node in nodes if "scaled_dot_product_attention" in str(node.target)]
    assert attention
    for node in attention:
        operands = [operand.meta["val"] for operand in node.args if isinstance(operand, torch.fx.Node)]
        assert {operand.dtype for operand in operands} == {torch.float32}
        assert len({operand.shape[1] for operand in operands}) == 1
    inputs = {"input_ids": tokens(2, 300), "attention_mask": padding(2, 300), "use_cache": False}
    with torch.no_grad():
        assert_close(program(**inputs).logits, model(**inputs).logits, tolerance=0.1)


class Logits(nn.Module):
    """A model from tensors to a tensor."""

    def __init__(self, model: AlibiGPTForCausalLM, past: Cache | None = None) -> None:
        super().__init__()
        self.model, self.past = model, past

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Maps `[batch, tokens]` to `[batch, tokens, vocab_size]`."""
        return self.model(
            input_ids, attention_mask=attention_mask, past_key_values=self.past, use_cache=self.past is not None
        ).logits


@torch.no_grad()
def test_a_trace_has_no_blocks(make_model: ModelFactory) -> None:
    program = Logits(make_model())
    traced = torch.jit.trace(program, (tokens(2, 600), padding(2, 600)))
    for length in (30, 1300):
        inputs = tokens(2, length), padding(2, length)
        assert_close(traced(*inputs), program(*inputs))


@pytest.mark.parametrize(("qk_norm", "name"), [(True, "WindowedCache"), (False, "GrowingCache")])
@torch.no_grad()
def test_a_cache_of_our_own_is_not_exported(make_model: ModelFactory, qk_norm: bool, name: str) -> None:
    model = make_model(qk_norm=qk_norm)
    program = Logits(model, model.model.new_cache())
    with pytest.raises(ValueError, match=f"would fix the {name} at its current length; pass a DynamicCache"):
        torch.export.export(program, (tokens(1, 5), torch.ones(1, 5)), strict=False)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("windows", [None, [20, 30, 70, 500, 20, 30]], ids=["everything", "windows"])
def test_the_operator_keeps_to_the_rules_for_operators(
    windows: list[int] | None, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its results have the declared shapes and strides, it changes no input, and it has a gradient."""
    monkeypatch.setattr(tiles, "FEW_KEYS", 0)
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for heads, length in [(6, 40), (3, 50), (3, 50)]:
        sizes = (2, heads, 8, length) if transposed else (2, heads, length, 8)
        states = torch.randn(sizes, generator=generator)
        inputs.append((states.mT if transposed else states).requires_grad_())
    reach = None if windows is None else torch.tensor(windows)
    torch.library.opcheck(attention_in_tiles, (*inputs, torch.tensor(alibi_slopes(6)), reach, 0.3))
