"""Chats with a served checkpoint in the terminal, with `transformers chat`.

hf_alibi serve runs/books &
hf_alibi chat runs/books
"""

from collections.abc import Sequence
from textwrap import shorten

from huggingface_hub.errors import HTTPError
from transformers.cli.chat import Chat

from ..errors import UserError
from .serve import run_typer

# What Transformers raises if no server answers, or for settings and files that it cannot read.
CHAT_ERRORS = (HTTPError, OSError, ValueError, TypeError, RuntimeError, ImportError)


def main(argv: Sequence[str] | None = None) -> None:
    """Chats as the command line `argv` (default: the process's own) says."""
    try:
        run_typer(Chat, argv, "hf_alibi chat")
    except UserError:
        raise
    except CHAT_ERRORS as error:
        raise UserError(f"cannot chat: {shorten(str(error), 300)}") from error
