"""The chat template of tokenizers that are trained here: its format, its marks for training, and what it refuses."""

from typing import Any

import pytest
from jinja2 import TemplateError
from tiny import tiny_tokenizer

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": " the fox\n"},
    {"role": "assistant", "content": "jumps\n\n over"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "the dog"},
]


def render(messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tiny_tokenizer().apply_chat_template(messages, tokenize=False, **options))


def test_each_message_is_a_document() -> None:
    end = tiny_tokenizer().eos_token
    expected = "".join(f"{message['role']}\n{message['content']}{end}" for message in CHAT)
    assert render(CHAT) == expected
    assert render(CHAT[:2], add_generation_prompt=True) == expected[: expected.index("jumps")]


def test_earlier_messages_stay_what_they_were() -> None:
    """Trainers that search for a turn's tokens in the whole conversation rely on it."""
    for count in range(1, len(CHAT)):
        assert render(CHAT).startswith(render(CHAT[:count]))
        if CHAT[count]["role"] == "assistant":
            assert render(CHAT).startswith(render(CHAT[:count], add_generation_prompt=True))


def test_what_the_assistant_says_is_marked() -> None:
    tokenizer = tiny_tokenizer()
    encoded = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    marked = tokenizer.decode([token for token, is_marked in pairs if is_marked])
    assert marked == "jumps\n\n over<|endoftext|>the dog<|endoftext|>"


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": " the "}, {"type": "text", "text": "fox\n"}]
    assert render([{"role": "user", "content": parts}]) == render([{"role": "user", "content": " the fox\n"}])


USER: dict[str, Any] = {"role": "user", "content": "x"}
REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "a picture": ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], {}, "type image, only for text"),
    "tools": ([USER], {"tools": [{"type": "function", "function": {"name": "f"}}]}, "no form for tools"),
    "documents": ([USER], {"documents": [{"title": "x", "text": "y"}]}, "no form for documents"),
    "tool calls": ([{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}], {}, "no form for tool_calls"),
    "no content": ([{"role": "user"}], {}, "must be a text or a list of parts"),
    "null": ([{"role": "user", "content": None}], {}, "must be a text or a list of parts"),
    "a mapping": ([{"role": "user", "content": {"text": "x"}}], {}, "must be a text or a list of parts"),
    "a number": ([{"role": "user", "content": 5}], {}, "must be a text or a list of parts"),
    "no parts": ([{"role": "user", "content": []}], {}, "must be a text or a list of parts"),
}


@pytest.mark.parametrize(("messages", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_it_has_no_form_for_is_refused(
    messages: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TemplateError, match=message):
        render(messages, **options)
