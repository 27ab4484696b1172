"""A byte-level BPE tokenizer as llama.cpp has it: `tokenizer.ggml.*` in the metadata of a GGUF file.

The file holds tokens, merges and a name for the pre-tokenizer, whose regular expressions are in the program. What the
file has no place for is refused. Source: github.com/ggml-org/llama.cpp, `src/llama-vocab.cpp`.
"""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from ..errors import UserError

# The values of `llama_token_type`.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES = GPT2 | {"use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
BLOOM = {
    "type": "Split",
    "pattern": {"Regex": r" ?[^(\s|[.,!?…。，、।۔،])]+"},
    "behavior": "Isolated",
    "invert": False,
}
PRE_TOKENIZERS = {"gpt-2": [GPT2], "bloom": [BLOOM, BYTES], "starcoder": [DIGITS, GPT2]}
# llama.cpp ends a text at tokens with these texts, whatever the file says.
ENDS = {
    "</s>", "<EOT>", "<end_of_turn>", "<end_of_utterance>", "<eos>", "<|call|>", "<|end_of_text|>", "<|end|>",
    "<|endoftext|>", "<|eom_id|>", "<|eot_id|>", "<|fim_pad|>", "<|im_end|>", "<|return|>", "[EOS]", "[EOT]",
}  # fmt: skip
# llama.cpp knows one token that ends a text, one that ends a turn, and one that ends a message.
END_KEYS = ("eos", "eot", "eom")


def tokenizer_metadata(
    tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, ends: Sequence[int]
) -> tuple[dict[str, Any], list[str]]:
    """What the file says about the tokenizer, and what differs there.

    Args:
        tokenizer: A byte-level BPE.
        vocab_size: Of the model, at least that of the tokenizer.
        ends: The tokens that end a text.

    Raises:
        UserError: If llama.cpp would make other tokens of a text, or end it elsewhere.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is None or backend is None:
        raise UserError("llama.cpp needs a tokenizer with a tokenizer.json, a byte-level BPE")
    state = json.loads(backend.to_str())
    differs = _check(state)
    tokens, types = _tokens(state, vocab_size)
    differs += _ends(tokens, ends)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(state["pre_tokenizer"]),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in state["model"]["merges"]],
    }
    metadata |= {f"tokenizer.ggml.{key}_token_id": token for key, token in zip(END_KEYS, ends, strict=False)}
    bos = tokenizer.bos_token_id
    # Without one, llama.cpp takes token 11, whatever that is.
    metadata["tokenizer.ggml.bos_token_id"] = ends[0] if bos is None else bos
    if tokenizer.pad_token_id is not None:
        metadata["tokenizer.ggml.padding_token_id"] = tokenizer.pad_token_id
    return metadata | _added_to_texts(tokenizer, metadata), differs


def _check(state: dict[str, Any]) -> list[str]:
    """Refuses what llama.cpp's BPE does not do; returns what it does otherwise in rare texts."""
    model, normalizer = state["model"], state["normalizer"]
    if model["type"] != "BPE":
        raise UserError(f"the tokenizer is a {model['type']}; only a byte-level BPE can be converted")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            raise UserError(f"the tokenizer has {name}={model[name]!r}, which llama.cpp does not know")
    missing = set(ByteLevel.alphabet()) - model["vocab"].keys()
    if missing:
        raise UserError(f"the tokenizer has no tokens for {len(missing)} of the 256 bytes")
    for token in state["added_tokens"]:
        for name in ("lstrip", "rstrip", "single_word"):
            if token[name]:
                raise UserError(f"the token {token['content']!r} has {name}=True, which GGUF has no place for")
    if normalizer is None:
        return []
    if normalizer == {"type": "NFC"}:
        return ["llama.cpp does not normalise texts: give it Unicode in normal form C."]
    raise UserError(f"the tokenizer normalises texts with {normalizer['type']}, which llama.cpp does not")


def _pre_tokenizer(state: dict[str, Any] | None) -> str:
    stages = (state or {}).get("pretokenizers", [state])
    stages = [{name: value for name, value in (stage or {}).items() if name != "trim_offsets"} for stage in stages]
    for name, known in PRE_TOKENIZERS.items():
        if stages == known:
            return name
    shown = json.dumps(stages, ensure_ascii=False)
    raise UserError(
        f"the tokenizer splits texts with {shown}, for which llama.cpp has no name. Use one like that of GPT-2, as "
        "hf_alibi train makes it: ByteLevel with add_prefix_space=False"
    )


def _tokens(state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The texts and the types of `vocab_size` tokens."""
    texts = {number: text for text, number in state["model"]["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    for token in state["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if max(texts) >= vocab_size:
        raise UserError(f"the tokenizer has tokens up to {max(texts)}, but the model has only {vocab_size}")
    return (
        [texts.get(number, f"[PAD{number}]") for number in range(vocab_size)],
        [types.get(number, UNUSED) for number in range(vocab_size)],
    )


def _ends(tokens: list[str], ends: Sequence[int]) -> list[str]:
    """Refuses tokens that end a text if there are none or too many; returns where else llama.cpp would end it."""
    if not 1 <= len(ends) <= len(END_KEYS):
        raise UserError(
            f"eos_token_id is {list(ends) or None}; llama.cpp needs one to {len(END_KEYS)} tokens that end a text. "
            "Set them in generation_config.json"
        )
    if not all(0 <= end < len(tokens) for end in ends):
        raise UserError(f"eos_token_id is {list(ends)}, but the model has only {len(tokens)} tokens")
    others = sorted(ENDS & set(tokens) - {tokens[end] for end in ends})
    return [f"llama.cpp also ends texts at {', '.join(f'`{text}`' for text in others)}."] if others else []


def _added_to_texts(tokenizer: PreTrainedTokenizerBase, metadata: dict[str, Any]) -> dict[str, Any]:
    """Whether the tokenizer begins texts with the one token, and ends them with the other."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for begins, ends in [(False, False), (True, False), (False, True), (True, True)]:
        first = [metadata["tokenizer.ggml.bos_token_id"]] * begins
        last = [metadata["tokenizer.ggml.eos_token_id"]] * ends
        if whole == first + plain + last:
            return {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}
    raise UserError(
        f"the tokenizer makes {whole} of a text whose tokens are {plain}; llama.cpp can add only "
        "bos_token before and eos_token after it"
    )
