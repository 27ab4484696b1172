r"""Publish a trained model on the Hub, with its code and a card, and see that it loads from there.

    hf_alibi publish --folder runs/books --repo_id me/books --private --dry_run
    hf_alibi publish --folder runs/books --repo_id me/books --license mit --language en \
        --datasets me/novels --evaluation runs/books/extrapolation.json --evaluation_text me/novels

The first command only checks the checkpoint and lists what would be uploaded. The second uploads in one commit, with
the table and the plot of hf_alibi evaluate in the card, and compares the logits of the upload with the local ones.
Log in with `hf auth login` before. An upload that broke off goes on when the command is repeated.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from transformers import HfArgumentParser

from ..errors import parse_arguments
from ..hub.model_card import CardArguments
from ..hub.publish import publish


@dataclass
class PublishArguments:
    """What is published, and where."""

    folder: str = field(metadata={"help": "Checkpoint: a folder that save_pretrained or Trainer has written."})
    repo_id: str = field(metadata={"help": "Repository of the Hub, namespace/name; made if there is none."})
    private: bool = field(default=False, metadata={"help": "Make the repository private."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch, made if there is none, or refs/pr/N; if omitted, main."}
    )
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Size of a file of weights at most."})
    token: str | None = field(
        default=None, metadata={"help": "Token of the Hub; if omitted, that of `hf auth login` or HF_TOKEN."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Only check, and list what would be uploaded."})


def main(argv: Sequence[str] | None = None) -> None:
    """Publish as the command line `argv` (default: the process's own) says."""
    parser = HfArgumentParser(
        [PublishArguments, CardArguments],  # type: ignore[list-item]  # Transformers' annotation is too narrow
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
    )
    arguments, card = parse_arguments(parser, argv)
    publish(**asdict(arguments), card=card)
