"""Pieces of a text, and words that are looked up, have the tokens of the whole text."""

import pickle
from collections.abc import Callable
from itertools import chain

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import AddedToken, PreTokenizedString, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_alibi.evaluation.perplexity import encode_stream
from hf_alibi.text.cutting import GPT2_PATTERN, ascii_pattern, is_local
from hf_alibi.text.encoding import Encoder

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
]
# Words may extend over spaces.
SUPERWORDS = r"\p{N}{1,3}|[^\p{N}]+"

# The vocabulary has merges over every border in here.
SAMPLE = [
    "The quick brown fox's 12345 jumps.\n\nOver the HTTPServer's lazy dog!\n    return self.x[1:2]\n\t# don't, DON'T",
    "中文没有空格。\n下一段，也没有！ 🙂👩‍👩‍👧 e\u0301te\u0301 naïve Жизнь это 한국어 <tag> a  b   c\u00a0d\n",
    "e\u3000f ...\r\n/x //\n word word's 9",
] * 4


def byte_level(*patterns: str, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Returns an untrained byte-level BPE that splits with these patterns, or with that of GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns)]
    )
    if normalizer:
        tokenizer.normalizer = normalizer
    return tokenizer


def with_digits() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def metaspace(model: models.Model, scheme: str, split: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return tokenizer


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return tokenizer


def unknown(model: type[models.BPE]) -> models.Model:
    return model(unk_token="<unk>", byte_fallback=False, fuse_unk=True)


CUT: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": byte_level,
    "Llama 3": lambda: byte_level(LLAMA3),
    "Qwen": lambda: byte_level(QWEN, normalizer=normalizers.NFC()),
    "NFKC and lower case": lambda: byte_level(
        LLAMA3, normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "o200k": lambda: byte_level(O200K),
    "DeepSeek": lambda: byte_level(*DEEPSEEK),
    "digits apart": with_digits,
    "Unigram": lambda: metaspace(models.Unigram(), "always", True),
    "BPE of SentencePiece": lambda: metaspace(unknown(models.BPE), "first", True),
    "WordPiece": bert,
}
NOT_CUT: dict[str, Callable[[], Tokenizer]] = {
    "superwords": lambda: byte_level(SUPERWORDS),
    "look-behind": lambda: byte_level(r"(?<=a) ?\p{L}+|" + GPT2_PATTERN),
    "accents removed": lambda: byte_level(
        LLAMA3, normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "strip": lambda: byte_level(normalizer=normalizers.Strip()),
    "words over spaces": lambda: metaspace(unknown(models.BPE), "first", False),
}


def trained(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    kinds = {"BPE": trainers.BpeTrainer, "Unigram": trainers.UnigramTrainer, "WordPiece": trainers.WordPieceTrainer}
    options = {"unk_token": "<unk>"} if isinstance(tokenizer.model, models.Unigram) else {}
    trainer = kinds[type(tokenizer.model).__name__](
        vocab_size=700,
        special_tokens=["<unk>", "<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        **options,
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def in_pieces(encoder: Encoder, text: str, size: int) -> list[int]:
    pieces = list(encoder.pieces(text, size))
    assert "".join(pieces) == text
    return list(chain(*(ids.tolist() for ids in encoder.encode(pieces))))


FRAGMENTS = [
    *" \n\t\r\v\f\x00\x01\x1c\x1f\x7f\x85\u00a0\u1680\u180e\u2003\u200b\u2028\u3000\ufeff",
    *"aZsé'’.,/!<>|_-₂½٣9ßǅʰक👩中あ한Ж▁，。“\u0301\u200d\ufe0f",
    " ", " ", "  ", "    ", "\n\n", "\r\n", "\n    ", ".\n", "。\n", "'s", "'S", "'ll", "don't", "HTTPServer", "the",
    "12345", "👩‍👩‍👧", "🏳️‍🌈", "e\u0301", "中文没有空格", "<|endoftext|>", "<unk>", "<tag>", "a\u0301\u0302",
    "ﷺ", "¨", "ͺ", "ﬁ",
]  # fmt: skip
TEXTS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join),
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.lists(st.sampled_from(["word", " ", "\n", ".", "é", "9", "'s"]), max_size=60).map("".join),
)


@pytest.mark.parametrize("kind", CUT)
def test_pieces_have_the_tokens_of_the_whole(kind: str) -> None:
    tokenizer = trained(CUT[kind]())
    encoder = Encoder(tokenizer)
    long = " ".join(SAMPLE)
    # The longest text without a place to cut is a part of the Chinese one.
    assert max(map(len, encoder.pieces(long, 1))) < 40
    assert in_pieces(encoder, long, 1) == whole(tokenizer, long)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(text=TEXTS, size=st.sampled_from([1, 2, 7, 30]))
    @example(text="a.\n/b a.\n\nb a \n b\n", size=1)
    @example(text="a\u2003 b\u00a0\n c \u3000 d", size=1)
    def same(text: str, size: int) -> None:
        assert in_pieces(encoder, text, size) == whole(tokenizer, text)

    same()


@pytest.mark.parametrize("kind", NOT_CUT)
def test_where_sameness_is_not_certain_nothing_is_cut(kind: str) -> None:
    tokenizer = trained(NOT_CUT[kind]())
    encoder = Encoder(tokenizer)
    for text in SAMPLE:
        assert list(encoder.pieces(text, 1)) == [text]
        assert in_pieces(encoder, text, 1) == whole(tokenizer, text)


def test_a_prefix_space_and_dropout_are_not_cut() -> None:
    prefixed = byte_level()
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    dropping = byte_level()
    tokenizer = trained(dropping)
    tokenizer.backend_tokenizer.model.dropout = 0.5
    for encoder in (Encoder(trained(prefixed)), Encoder(tokenizer)):
        assert list(encoder.pieces("one two three", 1)) == ["one two three"]


def test_sentencepiece_without_words_is_cut_where_no_token_spans() -> None:
    """Llama 2 and Mistral: the whole text is one word, but no token has a space inside."""
    tokenizer = metaspace(unknown(models.BPE), "first", True)
    trained(tokenizer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    encoder = Encoder(fast)
    for text in (*SAMPLE, "a  b▁c ▁ d\n e", " leading spaces"):
        assert len(list(encoder.pieces(text, 1))) > 1
        assert in_pieces(encoder, text, 1) == whole(fast, text)


@pytest.mark.parametrize("content", ["    ", "<tag>", " the"])
def test_added_tokens_are_found_in_pieces(content: str) -> None:
    tokenizer = trained(byte_level())
    tokenizer.add_tokens([AddedToken(content, normalized=False)])
    encoder = Encoder(tokenizer)
    text = "a <tag> b    c <tag>d the    the<tag>" * 3
    assert tokenizer.convert_tokens_to_ids(content) in whole(tokenizer, text)
    assert len(list(encoder.pieces(text, 1))) > 5
    assert in_pieces(encoder, text, 1) == whole(tokenizer, text)


@pytest.mark.parametrize("added", [AddedToken("two words"), AddedToken("<tag>", rstrip=True)], ids=["space", "rstrip"])
def test_added_tokens_that_could_span_a_cut_prevent_it(added: AddedToken) -> None:
    tokenizer = trained(byte_level())
    tokenizer.add_tokens([added])
    assert list(Encoder(tokenizer).pieces("a two words <tag> b", 1)) == ["a two words <tag> b"]


def test_the_order_of_documents_and_what_was_seen_before_do_not_matter() -> None:
    tokenizer = tiny_tokenizer()
    texts = [*SAMPLE[:2], "", *SAMPLE[1::-1], " ".join(SAMPLE)]
    encoder = Encoder(tokenizer)
    expected = [whole(tokenizer, text) for text in texts]
    for _ in range(2):
        assert [ids.tolist() for ids in encoder(texts)] == expected
        assert [ids.tolist() for ids in encoder(reversed(texts))] == expected[::-1]
    assert all(ids.dtype == np.int32 for ids in encoder(texts))


def test_what_was_seen_does_not_change_the_identity_of_an_encoder() -> None:
    encoder = Encoder(tiny_tokenizer())
    before = pickle.dumps(encoder)
    encoder(SAMPLE)
    assert pickle.dumps(encoder) == before
    assert [ids.tolist() for ids in pickle.loads(before)(SAMPLE)] == [ids.tolist() for ids in encoder(SAMPLE)]


def test_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_alibi.text.encoding.MOST_KEPT", 1000)
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer)
    for n in range(20):
        text = " ".join(f"word{n}x{m}" for m in range(50))
        assert encoder([text])[0].tolist() == whole(tokenizer, text)
        assert encoder._kept < 2500


def test_a_tokenizer_keeps_its_settings() -> None:
    tokenizer = trained(byte_level())
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    assert len(Encoder(tokenizer)([SAMPLE[0]])[0]) > 8
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 3


class Halves:
    """A pre-tokenizer written in Python."""

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        """Splits the text in two."""
        text.split(lambda _, part: [part[: len(str(part)) // 2], part[len(str(part)) // 2 :]])


def test_tokenizers_in_python_are_called_themselves() -> None:
    tokenizer = trained(byte_level())
    custom = pre_tokenizers.PreTokenizer.custom(Halves())
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [custom, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    encoder = Encoder(tokenizer)
    assert [ids.tolist() for ids in encoder(SAMPLE[:2])] == [whole(tokenizer, text) for text in SAMPLE[:2]]


def test_streams_of_tokens_end_where_asked() -> None:
    tokenizer = tiny_tokenizer()
    expected = list(chain(*([*whole(tokenizer, text), tokenizer.eos_token_id] for text in SAMPLE)))
    assert encode_stream(tokenizer, SAMPLE).tolist() == expected
    assert encode_stream(tokenizer, SAMPLE, 50).tolist() == expected[:50]
    assert encode_stream(tokenizer, []).tolist() == []


@pytest.mark.parametrize(
    ("pattern", "local"),
    [
        (GPT2_PATTERN, True), (LLAMA3, True), (O200K, True), (DEEPSEEK[2], True),
        (r"\b\w+", False), (r"^a", False), (r"a$", False), (r"a(?=b)", False), (r"a(?!b)", False), (r"(?<!a)b", False),
        (r"(a)\1", False), (r".+", False), (r"[.^$]+", True), (r"\Aa", False), (r"[[:alpha:]]+", False),
        (r"a|\s+(?!\S)", False),
    ],
)  # fmt: skip
def test_patterns_that_look_around_are_recognised(pattern: str, local: bool) -> None:
    assert is_local(pattern) == local


def test_patterns_that_python_cannot_express_are_left_to_the_tokenizer() -> None:
    assert ascii_pattern(LLAMA3) is not None
    for pattern in (r"\p{Greek}", r"[\p{M}]a]", r"\p{M}+", r"\P{L}", r"\p{^L}"):
        assert ascii_pattern(pattern) is None
