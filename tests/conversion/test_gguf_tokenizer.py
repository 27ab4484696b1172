"""The tokenizer in a GGUF file, and what llama.cpp's tokenizer does not do."""

from typing import Any

import pytest
from tiny import VOCAB_SIZE, tiny_tokenizer
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from hf_alibi.conversion.llama_cpp_tokenizer import BLOOM, tokenizer_metadata
from hf_alibi.errors import UserError

SENTENCE = "the quick brown fox jumps over the lazy dog\n"


def make_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE, with attributes of `tokenizers.Tokenizer` set to other values."""
    tokenizer = Tokenizer(models.BPE())
    alphabet = changes.pop("initial_alphabet", pre_tokenizers.ByteLevel.alphabet())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<end>", "<start>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SENTENCE * 50], trainer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token="<pad>"
    )


def test_tokens_merges_and_types() -> None:
    tokenizer = tiny_tokenizer()
    metadata, differs = tokenizer_metadata(tokenizer, VOCAB_SIZE + 2, [0])
    assert not differs
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert tokens[:VOCAB_SIZE] == tokenizer.convert_ids_to_tokens(range(VOCAB_SIZE))
    assert tokens[VOCAB_SIZE:] == ["[PAD290]", "[PAD291]"]
    assert types == [3, 3] + [1] * (VOCAB_SIZE - 2) + [5, 5]  # control, normal, unused
    merges = metadata["tokenizer.ggml.merges"]
    # What a merge makes is a token: they come in this order.
    assert [merge.replace(" ", "") for merge in merges] == tokens[2 + 256 : VOCAB_SIZE]
    others = {key.removeprefix("tokenizer.ggml."): metadata[key] for key in metadata}
    for name in ("tokens", "token_type", "merges"):
        del others[name]
    assert others == {
        "model": "gpt2", "pre": "gpt-2", "bos_token_id": 0, "eos_token_id": 0, "padding_token_id": 1,
        "add_bos_token": False, "add_eos_token": False,
    }  # fmt: skip


def test_tokens_that_were_added() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["hello world"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<call>"]})
    metadata, _ = tokenizer_metadata(tokenizer, len(tokenizer), [0])
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert (tokens[-2:], types[-2:]) == (["hello world", "<call>"], [4, 3])  # user-defined, control


@pytest.mark.parametrize(("begins", "ends"), [(True, False), (False, True), (True, True)])
def test_tokens_around_a_text(begins: bool, ends: bool) -> None:
    template = f"{'<start> ' * begins}$A{' <end>' * ends}"
    special_tokens = [("<start>", 1), ("<end>", 0)]
    processor = processors.TemplateProcessing(single=template, special_tokens=special_tokens)
    metadata, _ = tokenizer_metadata(make_tokenizer(post_processor=processor), 300, [0])
    assert metadata["tokenizer.ggml.add_bos_token"] == begins
    assert metadata["tokenizer.ggml.add_eos_token"] == ends


def test_pre_tokenizers_that_llama_cpp_knows() -> None:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(BLOOM["pattern"]["Regex"]), "isolated")
    for expected, stages in {
        "gpt-2": words,
        "bloom": pre_tokenizers.Sequence([split, bytes_only]),
        "starcoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]),
    }.items():
        metadata, _ = tokenizer_metadata(make_tokenizer(pre_tokenizer=stages), 300, [0])
        assert metadata["tokenizer.ggml.pre"] == expected


def test_what_differs_is_said() -> None:
    _, differs = tokenizer_metadata(make_tokenizer(normalizer=normalizers.NFC()), 300, [0])
    assert differs == ["llama.cpp does not normalise texts: give it Unicode in normal form C."]
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["</s>", "<|im_end|>"], special_tokens=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    metadata, differs = tokenizer_metadata(tokenizer, len(tokenizer), [0, end])
    assert (metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.eot_token_id"]) == (0, end)
    assert differs == ["llama.cpp also ends texts at `</s>`."]


def test_without_a_first_token_the_last_one_stands_for_it() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    metadata, _ = tokenizer_metadata(tokenizer, 300, [0])
    assert metadata["tokenizer.ggml.bos_token_id"] == 0
    assert not metadata["tokenizer.ggml.add_bos_token"]


PREFIXED = pre_tokenizers.ByteLevel(add_prefix_space=True)
AROUND = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 2)])
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lower case": ({"normalizer": normalizers.Lowercase()}, "normalises texts with Lowercase"),
    "prefix": ({"pre_tokenizer": PREFIXED}, r'"add_prefix_space": true.*for which llama.cpp has no name'),
    "no pre-tokenizer": ({"pre_tokenizer": None}, "for which llama.cpp has no name"),
    "padding before": ({"post_processor": AROUND}, "can add only bos_token before and eos_token after"),
    "words": ({"model": models.WordLevel({"a": 0}, "a")}, "the tokenizer is a WordLevel"),
    "bytes": ({"initial_alphabet": ["a"]}, r"has no tokens for \d+ of the 256 bytes"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_llama_cpp_would_read_otherwise_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokenizer_metadata(make_tokenizer(**dict(changes)), 300, [0])


def test_further_refusals() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(UserError, match="needs a tokenizer"):
        tokenizer_metadata(None, 300, [0])
    with pytest.raises(UserError, match="has tokens up to 290, but the model has only 200"):
        tokenizer_metadata(tokenizer, 200, [0])
    for ends in ([], [0, 1, 2, 3]):
        with pytest.raises(UserError, match="needs one to 3 tokens that end a text"):
            tokenizer_metadata(tokenizer, 300, ends)
    with pytest.raises(UserError, match=r"eos_token_id is \[300\], but the model has only 300"):
        tokenizer_metadata(tokenizer, 300, [300])
    state = make_tokenizer().backend_tokenizer
    state.model.dropout = 0.1
    with pytest.raises(UserError, match=r"has dropout=0.1"):
        tokenizer_metadata(PreTrainedTokenizerFast(tokenizer_object=state, eos_token="<end>"), 300, [0])


@pytest.mark.parametrize("name", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_take_spaces_with_them_are_refused(name: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("hello", **{name: True})])
    with pytest.raises(UserError, match=f"the token 'hello' has {name}=True"):
        tokenizer_metadata(tokenizer, len(tokenizer), [0])
