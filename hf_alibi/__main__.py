"""The command `hf_alibi`: hands its arguments to the file of a sub-command in `cli/`.

`hf_alibi COMMAND ...` and `python -m hf_alibi COMMAND ...` are the same; the second form serves
`accelerate launch -m hf_alibi ...`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from .errors import UserError, run

COMMANDS = {
    "train": "train a model from scratch, or fine-tune a checkpoint",
    "evaluate": "perplexity against length: a table, a plot, a JSON file",
    "generate": "continue a prompt of any length",
    "convert": "bring a BLOOM, MPT, Falcon, Baichuan, JAIS, BTLM or Refact in, or take a model out",
    "publish": "upload a checkpoint to the Hub with a card, and check that it loads from there",
    "serve": "serve a checkpoint with an OpenAI-compatible API",
    "chat": "chat with a served checkpoint in the terminal",
    "benchmark": "measure attention, models and generation on this machine",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own)."""
    command, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
    elif command in COMMANDS:
        sys.argv[0] = f"hf_alibi {command}"  # the name in usage lines
        import_module(f".cli.{command}", __package__).main(arguments)
    else:
        raise UserError(f"hf_alibi has no command {command!r}, only {', '.join(COMMANDS)}")


def usage() -> str:
    """Returns the help text: one line for each command."""
    lines = [f"  {name:<10} {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        ["usage: hf_alibi COMMAND [options]", "", *lines, "", "hf_alibi COMMAND --help lists its options."]
    )


def cli() -> None:
    """Run the process's command line; a user's mistake ends in one line and status 2."""
    run(main)


if __name__ == "__main__":
    cli()
