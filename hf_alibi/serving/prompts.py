"""Turns the text of a request into token ids, in a separate thread.

Meanwhile the event loop answers other clients. The thread has its own copy of the tokenizer: encoding may change the
tokenizer's state (how it reads special tokens), which is not allowed while another thread decodes with it.

In a chat, everything that a client writes is plain text. A message that spells a special token, such as the one that
ends each turn, gets the tokens of these letters, and does not end its turn. Only the chat template puts special tokens
into a conversation. The prompt of a completion has no turns to protect. It is tokenized as by `tokenizer(prompt)`,
with its special tokens.
"""

import asyncio
import copy
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedTokenizerBase


class PromptEncoder:
    """Encodes prompts, one after the other.

    Args:
        tokenizer: Of the model. It is copied.
        template_options: Further variables of the chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_options: dict[str, Any]) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.template_options = template_options
        self.thread = ThreadPoolExecutor(1, "tokenizer")

    async def completion(self, prompt: str) -> list[int]:
        """Returns the token ids of a text to continue."""
        return await self._in_thread(lambda: self._ids(prompt))

    async def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Returns the token ids of a conversation, up to the beginning of the assistant's answer.

        Raises:
            jinja2.TemplateError: If the chat template refuses the conversation.
        """
        return await self._in_thread(lambda: encode_chat(self.tokenizer, messages, **self.template_options))

    async def _in_thread(self, encode: Callable[[], list[int]]) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self.thread, encode)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **template_options: Any
) -> list[int]:
    """Returns the token ids of `messages` in the chat template. Only the template's special tokens are special.

    If no message spells a special token, they are those of `apply_chat_template`. Otherwise placeholders replace such
    spellings before the template is rendered. Then the special tokens in the result are the template's own, and the
    text between them is encoded as plain text, after the spellings are put back.
    """
    special = {
        token.content: (index, token) for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    pattern = re.compile("|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)) or r"(?!)")
    # Random, so that no client can write a placeholder.
    mark = uuid.uuid4().hex
    spelled: list[str] = []

    def hide(match: re.Match[str]) -> str:
        spelled.append(match[0])
        return f"{mark}{len(spelled) - 1:08}"

    def plain(text: str) -> list[int]:
        restored = re.sub(f"{mark}([0-9]{{8}})", lambda match: spelled[int(match[1])], text)
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        return list(tokenizer(restored, verbose=False, **options)["input_ids"]) if restored else []

    hidden = [{name: pattern.sub(hide, text) for name, text in message.items()} for message in messages]
    rendered = str(
        tokenizer.apply_chat_template(hidden, tokenize=False, add_generation_prompt=True, **template_options)
    )
    if not spelled:
        return list(
            tokenizer(rendered, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        )
    input_ids: list[int] = []
    start = 0
    # Whether the previous special token absorbs the spaces that follow it.
    strips = False
    for match in [*pattern.finditer(rendered), None]:
        text = rendered[start : match.start() if match else None]
        index, token = special[match[0]] if match else (None, None)
        text = text.lstrip() if strips else text
        text = text.rstrip() if token is not None and token.lstrip else text
        input_ids += plain(text)
        if match and token is not None and index is not None:
            input_ids.append(index)
            start, strips = match.end(), token.rstrip
    return input_ids
