"""Chat with a served checkpoint in the terminal: `transformers chat`.

hf_alibi serve runs/books &
hf_alibi chat runs/books
"""

from collections.abc import Sequence

from .serve import run_transformers


def main(argv: Sequence[str]) -> None:
    """Chat as the command line `argv` says."""
    run_transformers(["chat", *argv])
