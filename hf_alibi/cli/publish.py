r"""Publishes a trained model on the Hub, with its code and a card, and verifies that it loads from there.

    hf_alibi publish --folder runs/books --repo_id me/books --private --dry_run
    hf_alibi publish --folder runs/books --repo_id me/books --license mit --language en \
        --datasets me/novels --evaluation runs/books/extrapolation.json --evaluation_text me/novels

The first command only checks the checkpoint and lists what would be uploaded. The second uploads one commit. Its card
has the table and the plot of hf_alibi evaluate. Then it compares the logits of the uploaded model with the local ones.
Log in with `hf auth login` first. If an upload breaks off, repeat the command to continue it.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from ..errors import UserError
from ..hub.model_card import CardArguments
from ..hub.publish import publish
from .options import OptionParser, parse

SHARD_SIZE = re.compile(r"[1-9][0-9]*([KMGT]i?B)?", re.IGNORECASE)


@dataclass
class PublishArguments:
    """What to publish, and where."""

    folder: str = field(metadata={"help": "Checkpoint: a folder that save_pretrained or Trainer has written."})
    repo_id: str = field(metadata={"help": "Repository of the Hub, namespace/name; created if there is none."})
    private: bool = field(default=False, metadata={"help": "Make the repository private."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch, created if there is none, or refs/pr/N; if omitted, main."}
    )
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest size of a file of weights."})
    token: str | None = field(
        default=None, metadata={"help": "Token of the Hub; if omitted, that of `hf auth login` or HF_TOKEN."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Only check, and list what would be uploaded."})


def main(argv: Sequence[str] | None = None) -> None:
    """Publishes as the command line `argv` (default: the process's own) says."""
    parser = OptionParser([PublishArguments, CardArguments], description=__doc__.partition("\n")[0])
    arguments, card = parse(parser, argv)
    check(arguments)
    publish(**asdict(arguments), card=card)


def check(arguments: PublishArguments) -> None:
    """Raises `UserError` for mistakes that Transformers and the Hub's client notice late or never."""
    if not SHARD_SIZE.fullmatch(arguments.max_shard_size):
        raise UserError(f"--max_shard_size must be a size such as 500MB or 5GB, got {arguments.max_shard_size!r}")
