"""The registry of backends: the lists of backends in the docs and in the benchmark agree with it."""

from pathlib import Path

import pytest
import torch
from conftest import ModelFactory

from hf_alibi.benchmark.subjects import BACKENDS as BENCHMARKED
from hf_alibi.model.attention import BACKENDS, Backend

DOCS = Path(__file__).parents[2] / "docs" / "attention.md"
# Other names that Transformers gives to two of them.
ALIASES = {"kernels-community/flash-attn2", "paged|eager"}


def row(name: str, backend: Backend) -> str:
    """Returns the line of a backend in the table of docs/attention.md."""
    flags = ["yes" if flag else "no" for flag in (backend.masks, backend.weights, backend.paged)]
    masks, weights, paged = flags
    cells = [f"`{name}`", backend.devices, backend.dtypes, backend.gradients, masks, weights, paged]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - ALIASES))
def test_the_docs_say_what_the_registry_says(name: str) -> None:
    assert row(name, BACKENDS[name]) in DOCS.read_text().splitlines()


def test_an_alias_is_the_backend_itself() -> None:
    for alias in ALIASES:
        assert any(BACKENDS[alias] is BACKENDS[name] for name in set(BACKENDS) - ALIASES)


def test_the_benchmark_knows_all() -> None:
    assert set(BENCHMARKED) == set(BACKENDS) - ALIASES


@pytest.mark.parametrize("asked", ["in the call", "in the config"])
@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_weights_that_cannot_be_output_are_refused(make_model: ModelFactory, name: str, asked: str) -> None:
    model = make_model()
    model.set_attn_implementation(name)
    input_ids = torch.arange(5, 15)[None]
    options = {"output_attentions": True} if asked == "in the call" else {}
    if asked == "in the config":
        # Transformers' setter refuses it for sdpa, but a loaded config can contain it.
        model.config._output_attentions = True
    if BACKENDS[name].weights:
        weights = model(input_ids, **options).attentions
        assert [part.shape for part in weights] == [(1, 6, 10, 10)] * 2
        return
    with pytest.raises(ValueError, match=rf"{name} computes no attention weights .*set_attn_implementation"):
        model(input_ids, **options)
    with pytest.raises(ValueError, match="computes no attention weights"):
        model.generate(input_ids, max_new_tokens=2, return_dict_in_generate=True, output_attentions=True)
