"""The command `hf_alibi`. It passes its arguments to the file in `cli/` that has the sub-command's name.

`hf_alibi COMMAND ...` and `python -m hf_alibi COMMAND ...` are the same. The second form makes
`accelerate launch -m hf_alibi ...` work.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from .errors import UserError, missing_package, run
from .version import __version__


class Command(NamedTuple):
    """What the help says about a command, and which extra of the package installs what it needs."""

    summary: str
    extra: str


COMMANDS = {
    "plan": Command("what training would take: memory, operations, time, KV cache", "train"),
    "train": Command("train a model from scratch, or fine-tune a checkpoint", "train"),
    "prepare": Command("tokenise texts once, for any number of training runs", "train"),
    "evaluate": Command("perplexity against length: a table, a plot, a JSON file", "train"),
    "generate": Command("continue a prompt of any length", "train"),
    "convert": Command("bring a BLOOM, MPT, Falcon, Baichuan, JAIS, BTLM or Refact in, or take a model out", "train"),
    "publish": Command("upload a checkpoint to the Hub with a card, and check that it loads from there", "train"),
    "refresh": Command("bring the present code to a checkpoint that was saved earlier", "train"),
    "serve": Command("serve a checkpoint with an OpenAI-compatible API", "serve"),
    "chat": Command("chat with a served checkpoint in the terminal", "serve"),
    "study": Command("compare position methods: train, test, make tables and plots", "train"),
    "benchmark": Command("measure attention, models, generation and converted models", "train"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's own)."""
    command, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
    elif command == "--version":
        print(f"hf_alibi {__version__}")
    elif command not in COMMANDS:
        raise UserError(f"hf_alibi has no command {command!r}, only {', '.join(COMMANDS)}")
    else:
        # Usage lines begin with this name.
        sys.argv[0] = f"hf_alibi {command}"
        try:
            module = import_module(f".cli.{command}", __package__)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("", "hf_alibi"):
                raise
            raise UserError(str(missing_package(f"hf_alibi {command}", COMMANDS[command].extra, error))) from error
        module.main(arguments)


def usage() -> str:
    """Returns the help text: one line for each command."""
    lines = [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf_alibi COMMAND [options]",
            "       hf_alibi --version",
            "",
            *lines,
            "",
            "hf_alibi COMMAND --help lists its options.",
        ]
    )


def cli() -> None:
    """Runs the process's command line. A user's mistake ends it with one line and status 2."""
    run(main)


if __name__ == "__main__":
    cli()
