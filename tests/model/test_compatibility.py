"""What the model's code needs from Transformers and PyTorch. A failing test names the changed behaviour."""

import ast
import inspect
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ModelFactory
from tiny import tiny_tokenizer
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, Trainer, TrainingArguments, pipeline
from transformers.generation import GenerationMixin
from transformers.generation import utils as generation_utils
from transformers.modeling_outputs import BaseModelOutputWithPast

import hf_alibi
from hf_alibi import AlibiGPTForQuestionAnswering, AlibiGPTForSequenceClassification, AlibiGPTForTokenClassification
from hf_alibi.model import causal, private_torch, versions
from hf_alibi.model.cache_names import CACHE_NAME
from hf_alibi.model.generation import AlibiGenerationMixin

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
MODEL_FILES = sorted((ROOT / "hf_alibi" / "model").glob("*.py"))
BOTH_NAMES = pytest.mark.parametrize("name", ["past_key_values", "cache"])


def tokens(batch: int = 1, length: int = 40) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(4))


# The cache and its two names.


@BOTH_NAMES
@torch.no_grad()
def test_forward_takes_the_cache_under_both_names(make_model: ModelFactory, name: str) -> None:
    model, cache = make_model(), DynamicCache()
    pieces = [model(piece, **{name: cache}).logits for piece in tokens().split([30, 9, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens()).logits, rtol=0, atol=2e-4)
    assert cache.get_seq_length() == 40


@BOTH_NAMES
def test_generate_takes_the_cache_under_both_names(make_model: ModelFactory, name: str) -> None:
    model = make_model()
    expected = model.generate(tokens(), max_new_tokens=8, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = DynamicCache()
        found = model.generate(tokens(), max_new_tokens=8, do_sample=False, **{name: cache})
    assert torch.equal(found, expected)
    assert cache.get_seq_length() == 40 + 8 - 1


def test_both_names_at_once_are_refused(make_model: ModelFactory) -> None:
    model, caches = make_model(), {"past_key_values": DynamicCache(), "cache": DynamicCache()}
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(tokens(), **caches)


OTHER_CACHES = [((torch.zeros(1, 6, 3, 16),) * 2,) * 2, EncoderDecoderCache(DynamicCache(), DynamicCache())]


@BOTH_NAMES
@pytest.mark.parametrize("other", OTHER_CACHES, ids=lambda other: type(other).__name__)
def test_a_cache_of_no_known_kind_is_refused_by_name(make_model: ModelFactory, name: str, other: Any) -> None:
    message = f"The cache is a {type(other).__name__}, which no attention backend can read; pass a DynamicCache"
    with pytest.raises(ValueError, match=message):
        make_model()(tokens(), **{name: other})


def test_outputs_hold_the_cache_under_the_name_in_use(make_model: ModelFactory) -> None:
    for model in (make_model(), make_model().model):
        outputs = model(tokens())
        assert isinstance(outputs[CACHE_NAME], DynamicCache)
        # Transformers still accepts the old name.
        assert outputs.past_key_values is outputs[CACHE_NAME]
    assert CACHE_NAME in inspect.signature(BaseModelOutputWithPast).parameters


def test_nothing_deprecated_is_called(
    make_model: ModelFactory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers logs the old cache name once per process, and warns about arguments with a `FutureWarning`."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # Transformers has added it
    model = make_model(vocab_size=290)
    model.generation_config.pad_token_id = 0
    for how in ({}, {"cache_implementation": "static"}, {"assistant_model": model}, {"num_beams": 2}):
        model.generate(tokens(), attention_mask=torch.ones(1, 40), max_new_tokens=5, do_sample=False, **how)
    model(tokens(), output_hidden_states=True)
    text = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())("the quick", max_new_tokens=3)
    assert text[0]["generated_text"].startswith("the quick")
    assert "`past_key_values`/`cache_params` are deprecated" not in caplog.text


def test_evaluation_by_trainer_leaves_the_cache_out(make_model: ModelFactory, tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in tokens(batch=3)]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    model = make_model()
    prediction = Trainer(model, arguments, eval_dataset=data).predict(data)
    assert prediction.predictions.shape == (3, 40, 97)
    expected = model(tokens(batch=3), labels=tokens(batch=3)).loss.item()
    assert prediction.metrics is not None
    assert prediction.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


# Optional outputs, without the decorators of Transformers.


def test_hidden_states_of_some_layers(make_model: ModelFactory) -> None:
    model = make_model(num_hidden_layers=3)
    every = model(tokens(), output_hidden_states=True).hidden_states
    assert len(every) == 4
    assert torch.equal(every[0], model.model.embed_tokens(tokens()))
    assert torch.equal(every[-1], model.model(tokens()).last_hidden_state)
    for wanted, indices in (([1, -1], {1, 3}), (-2, {2}), ([7], set())):
        some = model(tokens(), output_hidden_states=wanted).hidden_states
        assert [state is not None for state in some] == [index in indices for index in range(4)]
        assert all(torch.equal(some[index], every[index]) for index in indices)
    model.config.output_hidden_states = True
    assert len(model(tokens()).hidden_states) == 4
    assert model(tokens(), output_hidden_states=False).hidden_states is None


def test_attention_weights_by_argument_and_by_config(make_model: ModelFactory) -> None:
    model = make_model()
    model.set_attn_implementation("eager")
    weights = model(tokens(), output_attentions=True).attentions
    assert len(weights) == 2
    model.config.output_attentions = True
    assert all(torch.equal(*pair) for pair in zip(model(tokens()).attentions, weights, strict=True))
    assert model(tokens(), output_attentions=False).attentions is None


def test_a_tuple_is_returned_where_one_is_asked_for(make_model: ModelFactory) -> None:
    model = make_model()
    logits = model(tokens()).logits
    for outputs in (model(tokens(), return_dict=False), model(tokens(), use_cache=False, return_dict=False)):
        assert isinstance(outputs, tuple)
        assert torch.equal(outputs[0], logits)
    assert len(model(tokens(), use_cache=False, return_dict=False)) == 1
    model.config.return_dict = False
    assert torch.equal(model(tokens())[0], logits)
    assert isinstance(model.model(tokens()), tuple)
    assert torch.equal(model(tokens(), return_dict=True).logits, logits)


@pytest.mark.parametrize(
    "head",
    [AlibiGPTForSequenceClassification, AlibiGPTForTokenClassification, AlibiGPTForQuestionAnswering],
    ids=["sequence", "token", "question"],
)
def test_heads_return_a_tuple_where_one_is_asked_for(make_model: ModelFactory, head: type) -> None:
    model = head(make_model().config).eval()
    first = next(iter(model(tokens()).values()))
    assert torch.equal(model(tokens(), return_dict=False)[0], first)
    model.config.return_dict = False
    outputs = model(tokens())
    assert isinstance(outputs, tuple)
    assert torch.equal(outputs[0], first)


def test_layers_that_run_again_in_backward_get_no_cache(make_model: ModelFactory) -> None:
    model = make_model()
    expected = torch.autograd.grad(model(tokens(), labels=tokens()).loss, model.model.norm.weight)[0]
    # Transformers has this name since 5.24, and deprecates the old one.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    model.train()
    outputs = model(tokens(), labels=tokens(), use_cache=True)
    assert outputs.get(CACHE_NAME) is None
    found = torch.autograd.grad(outputs.loss, model.model.norm.weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


# Newer versions.


@pytest.fixture
def fresh_warning() -> Any:
    versions.warn_if_newer_than_tried.cache_clear()
    yield
    versions.warn_if_newer_than_tried.cache_clear()


@pytest.mark.parametrize(
    ("package", "version"), [(transformers, "5.99.0"), (transformers, "6.0.0.dev0"), (torch, "3.0.1+cu140")]
)
def test_a_version_newer_than_any_tried_is_warned_of_once(
    make_model: ModelFactory,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fresh_warning: Any,
    package: Any,
    version: str,
) -> None:
    monkeypatch.setattr(package, "__version__", version)
    make_model(), make_model()
    (record,) = [record for record in caplog.records if record.name == versions.__name__]
    newest = versions.TRIED_VERSIONS[package.__name__][-1]
    assert f"tested with {package.__name__} up to {newest}, but {version} is installed" in record.getMessage()
    assert "hf_alibi refresh" in record.getMessage()


@pytest.mark.parametrize("version", ["5.19.0", versions.TRIED_VERSIONS["transformers"][-1] + ".7"])
def test_tried_versions_are_silent(
    make_model: ModelFactory,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fresh_warning: Any,
    version: str,
) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    make_model()
    assert not [record for record in caplog.records if record.name == versions.__name__]


def test_the_pinned_versions_and_the_floors_are_tried_ones() -> None:
    pinned = (ROOT / "constraints.txt").read_text()
    floors = (ROOT / "pyproject.toml").read_text()
    for name, tried in versions.TRIED_VERSIONS.items():
        assert re.search(rf"^{name}=={re.escape(tried[-1])}\.", pinned, re.MULTILINE), name
        assert f'"{name}>={tried[0]}"' in floors, name
        for version in tried:
            assert version in PAGE.read_text(), f"docs/compatibility.md does not say how {name} {version} was tried"


def test_the_version_of_the_package_is_cited() -> None:
    assert f"\nversion: {hf_alibi.__version__}\n" in (ROOT / "CITATION.cff").read_text()


# Names of Transformers.


def imported_on_loading(file: Path) -> set[str]:
    """Returns the names that the file imports from other packages when it is loaded."""
    nodes = ast.parse(file.read_text()).body
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {f"{node.module}.{alias.name}" for node in imports for alias in node.names}


def test_what_loading_stands_on_is_documented() -> None:
    names = set().union(*map(imported_on_loading, MODEL_FILES))
    names = {name for name in names if name.startswith(("transformers.", "huggingface_hub."))}
    assert names
    missing = {name for name in names if f"`{name}`" not in PAGE.read_text()}
    assert not missing, f"docs/compatibility.md lists what every load stands on; it lacks {sorted(missing)}"


def test_optional_parts_are_imported_where_they_are_used() -> None:
    text = " ".join(name for file in MODEL_FILES for name in imported_on_loading(file))
    for part in (
        "continuous_batching",
        "ContinuousBatching",
        "flash_attention",
        "flex_attention",
        "s.utils.",
        "integrations",
    ):
        assert part not in text, part


HOOKS = {
    "_prepare_model_inputs": "prompts of several documents that lengths or numbers tell apart become one text",
    "_prepare_cache_for_generation": "the windowed cache is not made, and generation uses a dynamic one",
    "_prepare_position_ids_for_generation": "prompts that are padded on the right get wrong positions",
    "create_masks_for_generate": "a static cache gets a mask that loses the distances of padded prompts",
    "init_continuous_batching": "continuous batching changes to an attention without ALiBi",
}


def test_every_private_method_that_is_overridden_is_known() -> None:
    private = {name for name in vars(AlibiGenerationMixin) if name.startswith("_") and hasattr(GenerationMixin, name)}
    assert {name for name in private if not name.startswith("__")} <= HOOKS.keys()


@pytest.mark.parametrize("name", HOOKS)
def test_generate_still_calls_what_is_overridden(name: str) -> None:
    sources = [Path(inspect.getfile(generation_utils)).read_text()]
    sources.append(
        (Path(inspect.getfile(generation_utils)).parent / "continuous_batching/continuous_api.py").read_text()
    )
    calls = sum(len(re.findall(rf"(?:self\.|self, \")_?{name.removeprefix('_')}[\"(]", source)) for source in sources)
    assert calls, f"Transformers no longer calls {name}: {HOOKS[name]}"


# Private operators of PyTorch.


def test_the_flash_kernel_of_the_cpu_keeps_its_promises() -> None:
    """It accepts a bias with overlapping strides and another dtype. Its second result is the softmax's logsumexp."""
    assert private_torch.has_own_operator(), "this PyTorch lacks a name in private_torch.py, or has renamed it"
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 16, generator=generator) for n in (5, 9, 9))
    line = torch.randn(3, 13, generator=generator)
    bias = line.as_strided((1, 3, 5, 9), (0, 13, 1, 1))
    scores = query.double() @ key.double().mT * 0.25 + bias.double()
    output, logsumexp = private_torch.CPU_FLASH(query, key, value, attn_mask=bias.expand(2, -1, -1, -1), scale=0.25)
    torch.testing.assert_close(output.double(), scores.softmax(-1) @ value.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(logsumexp.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)

    half = private_torch.CPU_FLASH(*(x.bfloat16() for x in (query, key, value)), attn_mask=bias, scale=0.25)[0]
    assert half.dtype == torch.bfloat16, "16-bit queries with a float32 bias"
    torch.testing.assert_close(half.float(), output, rtol=0, atol=0.05)

    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    exact = (leaves[0] @ leaves[1].mT * 0.25 + bias.double()).softmax(-1) @ leaves[2]
    grad = torch.randn(output.shape, generator=generator)
    expected = torch.autograd.grad(exact, leaves, grad.double())
    options = {"attn_mask": bias.expand(2, -1, -1, -1), "scale": 0.25}
    found = private_torch.CPU_FLASH_BACKWARD(grad, query, key, value, output, logsumexp, 0.0, False, **options)
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=0, atol=1e-5)


def test_a_masked_index_takes_one_element_by_its_offset() -> None:
    assert private_torch.MASKED_INDEX is not None, "this PyTorch has no _unsafe_masked_index"
    table, index = torch.arange(12.0), torch.tensor([3, 7])
    found = private_torch.MASKED_INDEX(table, torch.tensor([True, False]), [index], 0)
    assert torch.equal(found, torch.tensor([3.0, 0.0]))


@pytest.mark.parametrize("name", ["CPU_FLASH", "CPU_FLASH_BACKWARD", "TRANSFORMS_ARE_ACTIVE"])
def test_without_the_flash_kernel_results_are_the_same(
    make_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = make_model(num_key_value_heads=2)
    expected = model(tokens(2, 300), labels=tokens(2, 300))
    expected.loss.backward()
    gradient = model.model.embed_tokens.weight.grad.clone()
    monkeypatch.setattr(private_torch, name, None)
    monkeypatch.setattr(causal, name, None)
    model.zero_grad()
    found = model(tokens(2, 300), labels=tokens(2, 300))
    found.loss.backward()
    scale = expected.logits.abs().max().item()
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5 * scale)
    scale = gradient.abs().max().item()
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, gradient, rtol=0, atol=1e-4 * scale)


def test_transforms_are_noticed_while_they_run() -> None:
    assert not private_torch.TRANSFORMS_ARE_ACTIVE()
    seen = []
    torch.func.vmap(lambda x: (seen.append(private_torch.TRANSFORMS_ARE_ACTIVE()), x)[1])(torch.ones(2))
    assert seen == [True]


def test_private_names_of_pytorch_are_in_one_file() -> None:
    for file in MODEL_FILES:
        private = re.findall(
            r"torch\.ops\.aten\.\w+|torch\._(?!_)[\w.]+|torch\.fx\.experimental[\w.]*", file.read_text()
        )
        assert not private or file.name == "private_torch.py", f"{file.name} uses {private}"
