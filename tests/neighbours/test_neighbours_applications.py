"""Frameworks around `generate`: their greedy answers are those of `generate`, or the best ones of a given form."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipes import TRAINING_LENGTH, model_of, recipe
from tiny import tiny_tokenizer
from transformers import DynamicCache

PROMPT = "the quick brown"


def answer_to(inputs: Any, books: str) -> str:
    """Returns the greedy answer of `generate` to tokens, of 16 tokens."""
    ids = model_of(books).generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tiny_tokenizer().decode(ids, skip_special_tokens=True)


def answer_of(books: str, prompt: str = PROMPT) -> str:
    """Returns the greedy answer of `generate` to a text."""
    return answer_to(tiny_tokenizer()(prompt, return_tensors="pt"), books)


def test_langchain(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("langchain_huggingface")
    assert cook(*recipe("LangChain"))["answer"] == answer_of(books)
    shown("langchain-huggingface", "a greedy answer is that of `generate`")


def test_llama_index(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("llama_index.llms.huggingface")
    names = cook(*recipe("LlamaIndex"))
    assert names["answer"] == answer_of(books)
    long = "the quick brown fox " * 60
    length = len(tiny_tokenizer()(long).input_ids)
    assert length > 2 * TRAINING_LENGTH
    assert names["llm"].complete(long).text == answer_of(books, long)
    shown("llama-index-llms-huggingface", f"greedy answers are those of `generate`, also to {length} tokens")


def test_agents(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("smolagents")
    from smolagents import ToolCallingAgent
    from smolagents.models import get_clean_message_list

    names = cook(*recipe("Agents"))
    (step,) = [step for step in names["agent"].memory.steps if getattr(step, "step_number", 0) == 1]
    messages = get_clean_message_list(step.model_input_messages)
    inputs = tiny_tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    length = step.token_usage.input_tokens
    assert inputs["input_ids"].shape[1] == length > 100 * TRAINING_LENGTH
    # smolagents adds the end of a code block where it is missing.
    assert step.model_output.removesuffix("</code>") == answer_to(inputs, books)
    with pytest.raises(Exception, match="this chat template has no form for tools"):
        ToolCallingAgent(tools=[], model=names["model"], max_steps=1).run(PROMPT)
    shown("smolagents", f"the first answer of a `CodeAgent`, to {length} tokens, is that of `generate`")


def test_gradio(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("gradio")
    from gradio_client import Client

    demo = cook(*recipe("Gradio"))["demo"]
    try:
        answer = Client(demo.local_url, verbose=False).predict(PROMPT, api_name="/answer")
    finally:
        demo.close()
    assert answer == PROMPT + answer_of(books)
    shown("gradio", "a served answer is that of `generate`")


@torch.no_grad()
def test_outlines(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("outlines")
    (code,) = recipe("Answers of a given form")
    answer = cook(code)["answer"]
    assert answer in ("brown", "quick")
    shown("outlines", f"a choice of two words gives one of them, {answer!r}")


def test_xgrammar(books: str, shown: Callable[[str, str], None]) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    model, tokenizer = model_of(books), tiny_tokenizer()
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    grammar = xgrammar.GrammarCompiler(info).compile_regex("[0-9]{4}-[0-9]{2}")
    processor = xgrammar.contrib.hf.LogitsProcessor(grammar)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False, logits_processor=[processor])
    answer = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    year, _, month = answer.partition("-")
    assert (len(year), len(month)) == (4, 2)
    assert (year + month).isdigit()
    shown("xgrammar", f"a pattern for a month gives {answer!r}")


@torch.no_grad()
def best_of_letters(books: str, prompt: str, length: int = 12) -> str:
    """Returns the greedy answer of this length from tokens of small letters and spaces, after the first token."""
    model, tokenizer, answer = model_of(books), tiny_tokenizer(), ""
    ids = [tokenizer.bos_token_id, *tokenizer(prompt).input_ids]
    while len(answer) < length:
        form = re.compile(f"[a-z ]{{1,{length - len(answer)}}}")
        best = model(torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()
        ids.append(next(token for token in best if form.fullmatch(tokenizer.decode([token]))))
        answer += tokenizer.decode([ids[-1]])
    return answer


def test_guidance(
    books: str, cook: Callable[..., Any], shown: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    guidance = pytest.importorskip("guidance")
    code, second = recipe("Guidance")
    names = cook(code)
    assert names["answer"] == best_of_letters(books, "the lazy dog,")
    with pytest.raises(ValueError, match="Calling `crop` with a positive value"):
        names["model"] + "the brown" + guidance.gen(regex="[a-z ]{12}")
    # The recipe replaces this method for good; the test only until it ends.
    monkeypatch.setattr(DynamicCache, "crop", DynamicCache.crop)
    cook(second)
    for prompt in ("the brown", "the lazy dog," * 30, PROMPT):
        answer = (cook(code)["model"] + prompt + guidance.gen("name", regex="[a-z ]{12}"))["name"]
        assert answer == best_of_letters(books, prompt)
    model = names["model"]
    for prompt in ("the lazy dog, the lazy dog", "the lazy fox"):
        answer = (model + prompt + guidance.gen("name", regex="[a-z ]{12}"))["name"]
        assert answer == best_of_letters(books, prompt)
    length = len(tiny_tokenizer()("the lazy dog," * 30).input_ids)
    assert length > 2 * TRAINING_LENGTH
    shown("guidance", f"a pattern of letters gives the best tokens of this form, also after {length} tokens")
