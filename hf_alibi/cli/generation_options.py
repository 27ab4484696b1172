"""The options of `hf_alibi generate` that are arguments of `transformers.GenerationConfig`.

Options, types and help texts are read from the docstring of `GenerationConfig`, because nothing else states the types.
Deprecated arguments are not documented, so they are no options. Values that `generate` would accept, and then fail on
or misread, are checked here.
"""

import argparse
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import GenerationConfig
from transformers.hf_argparser import string_to_bool

from ..errors import UserError

# Arguments of GenerationConfig that take a Python object, that only change what `generate` returns in Python, or that
# only affect encoder-decoder models or a second model.
NOT_OPTIONS = {
    *GenerationConfig.extra_output_flags,
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "compile_config",
    "decoder_start_token_id",
    "is_assistant",
    "return_dict_in_generate",
    "speculation_type",
    "target_lookbehind",
}

# The least values of numbers. It is 0 for those that are not listed.
LOWEST = dict.fromkeys(
    (
        "assistant_early_exit",
        "max_cache_len",
        "max_length",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_beams",
        "num_return_sequences",
        "prompt_lookup_num_tokens",
    ),
    1.0,
) | {"length_penalty": -100.0}
HIGHEST = dict.fromkeys(
    ("assistant_confidence_threshold", "epsilon_cutoff", "eta_cutoff", "min_p", "top_h", "top_p", "typical_p"), 1.0
) | {"length_penalty": 100.0}
# Numbers that must not be 0, because that would divide by zero, or leave no token or no time.
POSITIVE = {"encoder_repetition_penalty", "max_time", "repetition_penalty", "temperature", "top_h", "typical_p"}

# Options that are no plain numbers: a check of the value, and how to write it. JSON's null unsets any option.
FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bad_words_ids": (lambda value: _is_list(value, _is_tokens), "lists of token ids, such as [[5, 6], [7]]"),
    "begin_suppress_tokens": (lambda value: _is_list(value, _is_int), "a list of token ids, such as [5, 6]"),
    "cache_config": (lambda value: isinstance(value, dict), 'an object, such as {"nbits": 4}'),
    "early_stopping": (lambda value: isinstance(value, bool) or value == "never", "true, false or never"),
    "eos_token_id": (lambda value: _is_int(value) or _is_tokens(value), "a token id or a list of them"),
    "exponential_decay_length_penalty": (
        lambda value: isinstance(value, list) and len(value) == 2 and _is_int(value[0]) and _is_number(value[1]),
        "a length and a factor, such as [20, 1.05]",
    ),
    "forced_eos_token_id": (lambda value: _is_int(value) or _is_tokens(value), "a token id or a list of them"),
    "num_assistant_tokens_schedule": (
        lambda value: value in ("heuristic", "heuristic_transient", "constant"),
        "heuristic, heuristic_transient or constant",
    ),
    "sequence_bias": (
        lambda value: _is_list(value, _is_biased),
        "pairs of token ids and a bias, such as [[[5, 6], -2.5]]",
    ),
    "stop_strings": (lambda value: bool(value) and (isinstance(value, str) or _is_list(value, _is_text)), "text"),
    "suppress_tokens": (lambda value: _is_list(value, _is_int), "a list of token ids, such as [5, 6]"),
    "watermarking_config": (lambda value: isinstance(value, dict), 'an object, such as {"bias": 2.5}'),
}
TOKEN_OPTIONS = {
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "pad_token_id",
    "sequence_bias",
    "suppress_tokens",
}


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `GenerationConfig` to `parser`. Its result has only those that are given."""
    group = parser.add_argument_group("arguments of GenerationConfig")
    entry = re.compile(r"^ {4}(?P<name>\w+):? *\((?P<type>.+)\):\n(?P<text>(?: {8}.+\n)+)", re.MULTILINE)
    for argument in entry.finditer(inspect.cleandoc(GenerationConfig.__doc__ or "") + "\n"):
        name = argument["name"]
        if name in NOT_OPTIONS:
            continue
        first_sentence = re.split(r"(?<=\.)\s", " ".join(argument["text"].split()))[0]
        settings: dict[str, Any] = {"type": value_parser(argument["type"]), "help": first_sentence.replace("%", "%%")}
        if settings["type"] is string_to_bool:
            # --do_sample means --do_sample true.
            settings |= {"nargs": "?", "const": True}
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        group.add_argument(*spellings, default=argparse.SUPPRESS, **settings)


def value_parser(documented_type: str) -> Callable[[str], Any]:
    """Returns the function that reads values of a documented type, such as "`int`, *optional*"."""
    first = documented_type.split(",")[0].strip("`")
    if first.startswith("str` or "):
        return text_or_list
    scalars: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": string_to_bool}
    return scalars.get(first, json_or_text)


def json_or_text(value: str) -> Any:
    """Returns `value` parsed as JSON, or unchanged if it is no JSON: some arguments also accept plain words."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def text_or_list(value: str) -> Any:
    """Returns a JSON list or a JSON string parsed, and any other `value` unchanged: 5 and true are texts here."""
    read = json_or_text(value)
    return read if isinstance(read, str | list) else value


def check_generation_options(options: dict[str, Any], vocab_size: int) -> None:
    """Raises an error for values that `generate` would fail on or misread.

    Args:
        options: Values as `add_generation_options` reads them, by name.
        vocab_size: Of the model.

    Raises:
        UserError: If a value has the wrong type or is out of range, or the model has no such token.
    """
    for name, value in options.items():
        if value is None:
            continue
        if name in FORMS:
            is_right, form = FORMS[name]
            if not is_right(value):
                raise UserError(f"--{name} must be {form}, got {value!r}")
        elif _is_number(value):
            _check_range(name, value)
        elif isinstance(value, float):
            raise UserError(f"--{name} must be a finite number, got {value}")
        if name in TOKEN_OPTIONS:
            ids = [pair[0] for pair in value] if name == "sequence_bias" else value
            beyond = [token for token in _tokens(ids) if not 0 <= token < vocab_size]
            if beyond:
                raise UserError(f"--{name}: the model has {vocab_size} tokens, but no {beyond[0]}")


def _check_range(name: str, value: float) -> None:
    lowest, highest = LOWEST.get(name, 0.0), HIGHEST.get(name, 2.0**31)
    if value == 0 and name in POSITIVE:
        raise UserError(f"--{name} must be more than 0, got {value}")
    if not lowest <= value <= highest:
        raise UserError(f"--{name} must be from {lowest:.12g} to {highest:.12g}, got {value}")


def _tokens(value: Any) -> Iterator[int]:
    """Yields the token ids in a value or in nested lists."""
    if isinstance(value, list):
        for part in value:
            yield from _tokens(part)
    else:
        yield value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_list(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_right, value))


def _is_tokens(value: Any) -> bool:
    return _is_list(value, _is_int)


def _is_biased(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_tokens(value[0]) and _is_number(value[1])
