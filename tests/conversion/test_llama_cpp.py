"""llama.cpp reads our GGUF files and computes what our models compute. Needs the package xllamacpp."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import MODELS, SWIGLU, save_model
from llama_cpp_library import F16, LlamaCpp
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from hf_alibi import AlibiGPTForCausalLM
from hf_alibi.__main__ import main
from hf_alibi.conversion import to_gguf
from hf_alibi.conversion.llama_cpp_tokenizer import BLOOM
from hf_alibi.hub.checkpoints import load_causal_lm
from hf_alibi.training.data import standard_library_corpus, train_tokenizer

pytestmark = pytest.mark.llama_cpp

LENGTH = 2000
PROMPT = "def read_table(path):\n    "


@cache
def documents() -> list[str]:
    return list(standard_library_corpus()["train"]["text"])


@cache
def code_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(documents()[:100], 600)


@cache
def long_text() -> str:
    return "".join(documents()[200:210])


def log_probabilities(model: AlibiGPTForCausalLM, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def of_llama_cpp(path: Path, tokens: list[int], **options: Any) -> torch.Tensor:
    with LlamaCpp(path, len(tokens), **options) as program:
        return program.logits(tokens).double().log_softmax(-1)


def continuation(model: AlibiGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, count: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("heads", [6, 8])
@pytest.mark.parametrize("name", MODELS)
def test_a_long_text_and_a_continuation(tmp_path: Path, name: str, heads: int) -> None:
    model = save_model(tmp_path / "ours", MODELS[name][1], heads, tokenizer=code_tokenizer())
    path = to_gguf(tmp_path / "ours", tmp_path / "theirs")
    tokens = code_tokenizer()(long_text()).input_ids[:LENGTH]
    error = (of_llama_cpp(path, tokens) - log_probabilities(model, tokens)).abs().max()
    print(f"{name}, {heads} heads: {error:.1e}")
    assert error < (5e-4 if model.config.hidden_act == "silu" else 5e-3)  # its GELU is a table in half precision
    with LlamaCpp(path) as program:
        assert program.generate(PROMPT, 100) == continuation(model, code_tokenizer(), PROMPT, 100)


@pytest.mark.parametrize("name", ["jais", "refact", "mpt", "bloom"])
def test_smaller_files_are_close(tmp_path: Path, name: str) -> None:
    model = save_model(tmp_path / "ours", MODELS[name][1] | {"initializer_range": 0.05}, tokenizer=code_tokenizer())
    tokens = code_tokenizer()(long_text()).input_ids[:LENGTH]
    expected = log_probabilities(model, tokens)
    for outtype, most in {"f16": 5e-3, "bf16": 0.05, "q8_0": 0.1}.items():
        path = to_gguf(tmp_path / "ours", tmp_path / outtype, outtype=outtype)
        error = (of_llama_cpp(path, tokens) - expected).abs()
        print(f"{name}, {outtype}: {error.max():.1e}, mean {error.mean():.1e}")
        assert error.mean() < most / 5
        assert error.max() < most


def test_half_precision_in_the_program_is_close(tmp_path: Path) -> None:
    model = save_model(tmp_path / "ours", SWIGLU, tokenizer=code_tokenizer())
    path = to_gguf(tmp_path / "ours", tmp_path / "theirs")
    tokens = code_tokenizer()("".join(documents()[200:240])).input_ids[:6000]
    expected = log_probabilities(model, tokens)
    for options in ({}, {"cache": F16}, {"flash": True}, {"cache": F16, "flash": True}):
        error = (of_llama_cpp(path, tokens, **options) - expected).abs()
        parts = [f"{part.max():.1e}" for part in error.split(2000)]
        print(f"{options}: {', '.join(parts)} in each 2,000 tokens")
        assert error.max() < (0.05 if options else 5e-4)


def texts() -> Iterator[str]:
    """Texts that tokenizers have fallen over, then all characters of the planes in use, then real ones."""
    yield from [
        "",
        " ",
        "  a",
        "a  ",
        "\n\n \n",
        "\r\n\t",
        "I'll we've HE'S it''s",
        "x²½٣Ⅷ 12345",
        "e\u0301é",
        "\x00\x1f",
    ]
    yield from [
        "👍🏽\u200d👩",
        "a\u00a0b\u3000c\u2028d\x85e",
        "你好，世界。",
        "हिन्दी ক্ষ",
        "(a|b)…!?",
        "<|endoftext|>x",
    ]
    characters = [chr(code) for code in range(1, 0x20000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 64):
        part = characters[start : start + 64]
        yield "".join(part)
        yield " a".join(part)
    yield from documents()[100:200]


@pytest.mark.parametrize("name", ["gpt-2", "bloom", "starcoder"])
def test_every_text_has_the_same_tokens(tmp_path: Path, name: str) -> None:
    tokenizer = train_tokenizer([*documents()[:50], "Grüße 你好世界 हिन्दी العربية русский 123 " * 200], 900)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "bloom":
        split = pre_tokenizers.Split(Regex(BLOOM["pattern"]["Regex"]), "isolated")
        words = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if name == "starcoder":
        words = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    tokenizer.backend_tokenizer.pre_tokenizer = words
    tokenizer.add_tokens(["hello world", "    "])
    save_model(tmp_path / "ours", SWIGLU, tokenizer=tokenizer)
    with LlamaCpp(to_gguf(tmp_path / "ours", tmp_path / "theirs"), 64) as program:
        for text in texts():
            expected = tokenizer(text).input_ids
            assert program.tokens(text) == expected, repr(text)
            assert program.text(expected) == tokenizer.decode(expected, skip_special_tokens=True), repr(text)


def test_what_the_documented_command_trains(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    size = "hidden_size=96,num_hidden_layers=2,num_attention_heads=6"
    main([
        "train", "--output_dir", str(ours), "--max_steps", "60", "--learning_rate", "3e-3", "--vocab_size", "600",
        "--block_size", "128", "--max_eval_samples", "2", "--use_cpu", "--max_train_samples", "600",
        "--config_overrides", f"qk_norm=False,mlp_gated=True,hidden_act=silu,{size}",
    ])  # fmt: skip
    main(["convert", str(ours), str(theirs), "--to", "gguf"])
    (path,) = theirs.glob("*.gguf")
    model, tokenizer = load_causal_lm(ours, device="cpu")
    with LlamaCpp(path) as program:
        for prompt in (PROMPT, "import os", "class A:\n"):
            assert program.generate(prompt, 100) == continuation(model, tokenizer, prompt, 100)


def test_its_server_completes_and_chats_alike(tmp_path: Path) -> None:
    import xllamacpp

    model = save_model(tmp_path / "ours", SWIGLU, tokenizer=code_tokenizer())
    params = xllamacpp.CommonParams()
    params.model.path = str(to_gguf(tmp_path / "ours", tmp_path / "theirs"))
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 1024, 1, False, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    answer = server.handle_completions({"prompt": PROMPT, "max_tokens": 100, "temperature": 0})
    # The server waits for the rest of a character whose last bytes are missing.
    expected = continuation(model, code_tokenizer(), PROMPT, 100)
    assert answer["choices"][0]["text"].rstrip("\ufffd") == expected.rstrip("\ufffd")
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi there"},
        {"role": "user", "content": "more"},
    ]
    answer = server.handle_chat_completions({"messages": messages, "max_tokens": 30, "temperature": 0})
    prompt = code_tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = continuation(model, code_tokenizer(), prompt, 30)
    assert answer["choices"][0]["message"]["content"].rstrip("\ufffd") == expected.rstrip("\ufffd")
