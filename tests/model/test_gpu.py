"""All attention implementations on a CUDA device, against the float64 oracle on the CPU: `pytest -m gpu`.

FlashAttention 2 is tested if the package `flash-attn` or `kernels` is installed. A tolerance is a small multiple
of the error that a stored relative bias and PyTorch's plain operations make in the same dtype on the same device.
"""

from types import SimpleNamespace

import oracle
import pytest
import torch
from conftest import ModelFactory
from layouts import documents, end_of_cache, layout_of, same_document
from test_attention import padding
from torch import Tensor
from transformers.utils import is_flash_attn_2_available, is_kernels_available

from hf_alibi import AlibiGPTConfig
from hf_alibi.model import flex, sdpa
from hf_alibi.model.attention import backend as backend_of
from hf_alibi.model.layout import TokenLayout

DEVICE = "cuda"
HEAD_DIM = 64
SCALING = HEAD_DIM**-0.5
FLASH = "flash_attention_2" if is_flash_attn_2_available() else "kernels-community/flash-attn2"
with_flash = pytest.mark.skipif(
    not is_flash_attn_2_available() and not is_kernels_available(), reason="FlashAttention 2 is not installed"
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # PyTorch's compiler imports a module that uses deprecated functions of PyTorch.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]
each_backend = pytest.mark.parametrize(
    "backend", ["sdpa", "flex_attention", pytest.param(FLASH, marks=with_flash, id="flash_attention_2")]
)


def states(heads: int, kv_heads: int, queries: int, keys: int, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """Returns queries, keys and values that need gradients."""
    torch.manual_seed(queries + keys)
    query = 2 * torch.randn(batch, heads, queries, HEAD_DIM)
    key, value = (torch.randn(batch, kv_heads, keys, HEAD_DIM) for _ in range(2))
    return [x.to(DEVICE, dtype).requires_grad_() for x in (query, key, value)]


def attend(backend: str, inputs: list[Tensor], layout: TokenLayout, tolerance: float = 0.0) -> Tensor:
    config = AlibiGPTConfig(window_tolerance=tolerance, qk_norm=False)
    config._attn_implementation = backend
    module = SimpleNamespace(config=config)
    attention = backend_of(backend).forward
    return attention(module, *inputs, layout, scaling=SCALING)[0].transpose(1, 2)


def textbook(inputs: list[Tensor], visible: Tensor | None) -> Tensor:
    """Computes attention with a stored relative bias and plain operations, all in the dtype of the queries."""
    query, key, value = inputs
    groups = query.shape[1] // key.shape[1]
    keys = torch.arange(key.shape[2], device=DEVICE)
    distance = keys[-query.shape[2] :, None] - keys
    slopes = torch.tensor(oracle.paper_slopes(query.shape[1]), device=DEVICE)
    hidden = (distance < 0)[None, None]
    if visible is not None:
        hidden = hidden | ~visible[:, None].to(DEVICE)
    bias = (-slopes[:, None, None] * distance).to(query.dtype).masked_fill(hidden, torch.finfo(query.dtype).min)
    scores = query @ key.repeat_interleave(groups, 1).mT * SCALING + bias
    # Weights are also 0 for queries that see nothing.
    weights = scores.softmax(-1).masked_fill(hidden, 0)
    return weights @ value.repeat_interleave(groups, 1)


def assert_as_accurate_as_textbook(
    output: Tensor, inputs: list[Tensor], visible: Tensor | None = None, rows: Tensor | None = None
) -> None:
    """Compares outputs and gradients for the queries `rows`, `[batch, queries]`, or for all."""
    dtype = inputs[0].dtype
    exact_inputs = [x.detach().cpu().double().requires_grad_() for x in inputs]
    exact = oracle.attention(*exact_inputs, oracle.paper_slopes(inputs[0].shape[1]), SCALING, visible)
    direction = torch.randn_like(exact).to(dtype).double()
    if rows is not None:
        direction *= rows[:, None, :, None]

    def with_gradients(result: Tensor, sources: list[Tensor]) -> list[Tensor]:
        on_device = direction.to(result.device, result.dtype)
        gradients = torch.autograd.grad(result, sources, on_device)
        return [(result * (on_device != 0)).detach().cpu().double(), *(x.cpu().double() for x in gradients)]

    expected = with_gradients(exact, exact_inputs)
    actual, plain = with_gradients(output, inputs), with_gradients(textbook(inputs, visible), inputs)
    factor = 2.0 if dtype == torch.float32 else 1.2
    assert (actual[0] - expected[0]).abs().max() <= factor * (plain[0] - expected[0]).abs().max()
    # In float32, fused kernels compute the scores again in the backward pass: 2.1 and 2.5 times the error on an H200.
    factor = 4.0 if dtype == torch.float32 else 1.2
    for gradient, allowed, true in zip(actual[1:], plain[1:], expected[1:], strict=True):
        assert (gradient - true).norm() <= factor * (allowed - true).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length"), [(6, 6, 33), (6, 2, 63), (8, 8, 128), (20, 4, 300), (12, 12, 1100)]
)
@each_backend
def test_forward_and_gradients(backend: str, heads: int, kv_heads: int, length: int, dtype: torch.dtype) -> None:
    if backend == FLASH and dtype == torch.float32:
        pytest.skip("FlashAttention 2 has no float32")
    inputs = states(heads, kv_heads, length, length, dtype)
    assert_as_accurate_as_textbook(attend(backend, inputs, layout_of(heads, 2, length, device=DEVICE)), inputs)


@pytest.mark.parametrize(("queries", "keys"), [(1, 700), (5, 300), (100, 700), (300, 1000)])
@each_backend
def test_queries_at_the_end_of_a_cache(backend: str, queries: int, keys: int) -> None:
    inputs = states(8, 2, queries, keys, torch.bfloat16)
    assert_as_accurate_as_textbook(attend(backend, inputs, end_of_cache(8, queries, keys, DEVICE)), inputs)


@pytest.mark.parametrize("queries", [1, 300, 1000])
def test_a_bias_that_is_too_large_to_store(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "STORED_BIAS", 0)
    inputs = states(8, 2, queries, 1000, torch.bfloat16)
    assert_as_accurate_as_textbook(attend("sdpa", inputs, end_of_cache(8, queries, 1000, DEVICE)), inputs)


@pytest.mark.parametrize("side", ["left", "right"])
@each_backend
def test_padding_changes_nothing(backend: str, side: str) -> None:
    length = 700
    mask = padding(side, length)
    inputs = states(6, 2, length, length, torch.bfloat16, batch=3)
    output = attend(backend, inputs, layout_of(6, 3, length, mask, device=DEVICE))
    visible = mask[:, None, :].bool().expand(-1, length, -1)
    assert_as_accurate_as_textbook(output, inputs, visible, rows=mask)


@each_backend
def test_packed_documents_do_not_see_each_other(backend: str) -> None:
    position_ids = documents([[1, 300, 399], [128, 128, 444], [700]])
    inputs = states(6, 2, 700, 700, torch.bfloat16, batch=3)
    output = attend(backend, inputs, layout_of(6, 3, 700, None, position_ids, DEVICE))
    assert_as_accurate_as_textbook(output, inputs, same_document(position_ids))


@pytest.mark.parametrize("layout", ["whole-texts", "documents", "padding"])
def test_windows_of_flex_attention_are_lossless(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "MANY_PAIRS", 0)
    length = 2300
    position_ids = documents([[300, 2000], [2300]]) if layout == "documents" else None
    mask = padding("left", length)[:2] if layout == "padding" else None
    visible, rows = None, None
    if position_ids is not None:
        visible = same_document(position_ids)
    if mask is not None:
        visible, rows = mask[:, None, :].bool().expand(-1, length, -1), mask
    query, key, value = states(6, 2, length, length, torch.bfloat16)
    inputs = [(query / 8).detach().requires_grad_(), key, value]
    tokens = layout_of(6, 2, length, mask, position_ids, DEVICE)
    output = attend("flex_attention", inputs, tokens, tolerance=2.0**-24)
    assert len(tokens.shared.near_blocks) == 1, "no mask with windows was made"
    assert_as_accurate_as_textbook(output, inputs, visible, rows)


def test_flex_attention_has_gradients_for_slopes() -> None:
    inputs = states(6, 2, 300, 300, torch.float32)
    gradients = []
    for backend in ("eager", "flex_attention"):
        layout = layout_of(6, 2, 300, device=DEVICE)
        slopes = layout.slopes.requires_grad_()
        attend(backend, inputs, layout).square().sum().backward()
        gradients.append(slopes.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4 * gradients[0].abs().max().item())


@each_backend
def test_a_model_in_bfloat16_is_as_accurate_as_with_eager(make_model: ModelFactory, backend: str) -> None:
    """A training step, a prefill and a decoding step of a padded batch, against eager in float32."""
    model = make_model(hidden_size=384, num_key_value_heads=2).to(DEVICE)
    input_ids = torch.randint(3, 97, (2, 300), device=DEVICE)
    mask = torch.ones_like(input_ids)
    mask[0, :50] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    # The token before it is padding, whose logits are undefined.
    labels[0, 50] = -100

    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        model(input_ids, attention_mask=mask, labels=labels).loss.backward()
        with torch.no_grad():
            prefill = model(input_ids[:, :299], attention_mask=mask[:, :299], use_cache=True)
            step = model(input_ids[:, 299:], attention_mask=mask, past_key_values=prefill.past_key_values)
        logits = torch.cat([prefill.logits, step.logits], 1)[mask.bool()].float()
        return logits, model.model.layers[0].self_attn.q_proj.weight.grad.float().flatten()

    model.set_attn_implementation("eager")
    exact, exact_gradient = run()
    model.bfloat16()
    allowed, _ = run()
    model.set_attn_implementation(backend)
    logits, gradient = run()
    assert (logits - exact).norm() <= 1.2 * (allowed - exact).norm()
    assert torch.cosine_similarity(gradient, exact_gradient, dim=0) > 0.99


@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_a_compiled_training_step_has_no_graph_break(make_model: ModelFactory, backend: str) -> None:
    model = make_model(hidden_size=384).to(DEVICE)
    input_ids = torch.randint(3, 97, (2, 300), device=DEVICE)
    expected = model(input_ids, labels=input_ids).loss
    model.set_attn_implementation(backend)
    loss = torch.compile(model, fullgraph=True)(input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_a_static_cache_generates_what_a_dynamic_one_does(make_model: ModelFactory, backend: str) -> None:
    model = make_model(hidden_size=384).to(DEVICE)
    model.set_attn_implementation(backend)
    input_ids = torch.randint(3, 97, (2, 100), device=DEVICE)
    expected = model.generate(input_ids, max_new_tokens=10, do_sample=False)
    static = model.generate(input_ids, max_new_tokens=10, do_sample=False, cache_implementation="static")
    assert torch.equal(static, expected)


@pytest.mark.parametrize("length", [20, 700])
def test_an_offloaded_cache_generates_what_others_do(make_model: ModelFactory, length: int) -> None:
    # Slopes are so steep that most keys are outside the windows.
    slopes = [4.0, 2.0, 1.0, 0.5, 3.0, 0.7]
    model = make_model(num_attention_heads=6, alibi_slopes=slopes).to(DEVICE)
    input_ids = torch.randint(3, 97, (2, length), device=DEVICE)
    expected = model.generate(input_ids, max_new_tokens=40, do_sample=False, cache_implementation="dynamic")
    offloaded = model.generate(input_ids, max_new_tokens=40, do_sample=False, cache_implementation="offloaded")
    assert torch.equal(offloaded, expected)
