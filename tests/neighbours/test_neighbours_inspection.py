"""Attribution, attention weights and inner states: captum, inseq, bertviz, nnsight."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipes import difference, model_of, recipe
from tiny import tiny_tokenizer


@torch.no_grad()
def test_captum(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("captum")
    model, tokenizer = model_of(books), tiny_tokenizer()
    prompt, target = tokenizer("the quick").input_ids, tokenizer(" fox").input_ids

    def score(ids: list[int]) -> float:
        scores = model(torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        return scores[range(len(target)), target].sum().item()

    code, _ = recipe("Attribution")
    result = cook(code, model=model, tokenizer=tokenizer)["result"]
    for index, value in enumerate(result.seq_attr.tolist()):
        without = [*prompt[:index], 0, *prompt[index + 1 :]]
        assert value == pytest.approx(score(prompt) - score(without), abs=1e-4)
    shown("captum", "feature ablation: each number is the difference that leaving the token out makes")


def test_inseq(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("inseq")
    _, code = recipe("Attribution")
    (found,) = cook(code)["result"].sequence_attributions
    model, ids = model_of(books), tiny_tokenizer()("the quick brown fox", return_tensors="pt").input_ids
    start, errors = found.attr_pos_start, []
    assert start == 2
    for column, position in enumerate(range(start, ids.shape[1])):
        embeddings = model.get_input_embeddings()(ids[:, :position]).detach().requires_grad_()
        probability = model(inputs_embeds=embeddings).logits[0, -1].softmax(-1)[ids[0, position]]
        (gradient,) = torch.autograd.grad(probability, embeddings)
        errors.append(difference(found.target_attributions[:position, column], gradient[0].abs()))
    assert max(errors) < 1e-4
    shown("inseq", f"saliency: each number is the gradient of the token's probability, to {max(errors):.0e}")


@torch.no_grad()
def test_bertviz(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("bertviz")
    code = "from transformers import AutoModelForCausalLM\n" + recipe("Attention in pictures")[0]
    names = cook(code, tokenizer=tiny_tokenizer())
    (parameters,) = re.findall(r"const params = (.*?);.*\n", names["page"].data)
    drawn = torch.tensor(json.loads(parameters)["attention"][0]["attn"])  # [layers, heads, queries, keys]
    # The first layer's weights, from the formula.
    model = model_of(books)
    layer = model.model.layers[0]
    states = layer.input_layernorm(model.model.embed_tokens(names["inputs"].input_ids))
    own = layer.self_attn
    query, key = (
        norm(projection(states).unflatten(-1, (4, 16))).transpose(1, 2)
        for norm, projection in ((own.q_norm, own.q_proj), (own.k_norm, own.k_proj))
    )
    places = torch.arange(states.shape[1])
    distances = places[:, None] - places
    slopes = torch.tensor(model.config.slopes)[:, None, None]
    scores = query @ key.transpose(-1, -2) / 16**0.5 - slopes * distances
    expected = scores.masked_fill(distances < 0, -torch.inf).softmax(-1)[0]
    error = difference(drawn[0], expected)
    assert error < 1e-5
    with pytest.raises(ValueError, match="set_attn_implementation"):
        model(**names["inputs"], output_attentions=True)
    shown("bertviz", f"the weights in the picture are those of ALiBi's formula to {error:.0e}")


@torch.no_grad()
def test_nnsight(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("nnsight")
    names = cook(*recipe("Looking inside"))
    model, inputs = model_of(books), tiny_tokenizer()("the quick brown", return_tensors="pt")
    plain = model(**inputs, output_hidden_states=True)
    error = difference(names["states"], plain.hidden_states[1])
    model.model.layers[1].register_forward_hook(lambda module, arguments, output: torch.zeros_like(output))
    changed = model(**inputs).logits
    assert difference(changed, plain.logits) > 0.1
    error = max(error, difference(names["logits"], changed))
    assert error < 1e-5
    shown("nnsight", f"states of a layer, and logits after a change of the next, to {error:.0e}")
