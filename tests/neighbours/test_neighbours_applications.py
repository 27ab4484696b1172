"""Frameworks around `generate`: LangChain, Gradio, Outlines, XGrammar. Greedy answers are those of `generate`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipes import model_of, recipe
from tiny import tiny_tokenizer

PROMPT = "the quick brown"


def answer_of(books: str, count: int = 16) -> str:
    """Returns the greedy answer of `generate`."""
    inputs = tiny_tokenizer()(PROMPT, return_tensors="pt")
    ids = model_of(books).generate(**inputs, max_new_tokens=count, do_sample=False)[0, inputs.input_ids.shape[1] :]
    return tiny_tokenizer().decode(ids, skip_special_tokens=True)


def test_langchain(books: str, cook: Callable[..., Any], shown: Callable[[str, str], None]) -> None:
    pytest.importorskip("langchain_huggingface")
    assert cook(*recipe("LangChain"))["answer"] == answer_of(books)
    shown("langchain-huggingface", "a greedy answer is that of `generate`")


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
