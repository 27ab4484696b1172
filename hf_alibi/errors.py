"""The one exception for a user's mistakes, and how a script reports it.

Library code raises :class:`UserError` for input that only its user can put right: a missing folder, a length beyond
what a model can see. A script passes its ``main`` to :func:`run`, so that such a mistake ends in one readable line::

    if __name__ == "__main__":
        run(main)

Every other exception is a defect of the program and keeps its traceback.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import HfArgumentParser


class UserError(ValueError):
    """Bad input of a user; the message says what was wrong and what would be right."""


def run(main: Callable[[], None]) -> None:
    """Call ``main``; end the process with status 2 and one ``error:`` line on stderr if it raises `UserError`."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse_arguments(parser: "HfArgumentParser", argv: Sequence[str] | None) -> tuple[Any, ...]:
    """The dataclasses that `parser` fills from `argv`; an argument that it does not know ends as in `argparse`."""
    *filled, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return tuple(filled)
