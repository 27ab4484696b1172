"""Brings the present code to a checkpoint that was saved earlier, in a folder or on the Hub, and keeps the weights.

    hf_alibi refresh runs/books --dry_run
    hf_alibi refresh me/books --create_pr

Before anything changes, the outputs of the new code are compared with those of the old code. The old code runs only
with --trust_remote_code. Otherwise the outputs are compared with those of this package's model.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from ..hub.refresh import refresh
from .options import OptionParser, parse


@dataclass
class RefreshArguments:
    """How to refresh the checkpoint."""

    revision: str | None = field(
        default=None, metadata={"help": "Branch of the repository, or refs/pr/N; if omitted, main."}
    )
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that the checkpoint brings with it, to compare with."}
    )
    token: str | None = field(
        default=None, metadata={"help": "Token of the Hub; if omitted, that of `hf auth login` or HF_TOKEN."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Compare, list what would change, and change nothing."})


def main(argv: Sequence[str] | None = None) -> None:
    """Refreshes as the command line `argv` (default: the process's own) says."""
    parser = OptionParser([RefreshArguments], description=__doc__.partition("\n")[0])
    parser.add_argument(
        "checkpoint", help="A folder, which is changed in place, or a repository, which gets a commit."
    )
    arguments, rest = parse(parser, argv)
    refresh(rest.checkpoint, **asdict(arguments))
