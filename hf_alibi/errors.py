"""The one exception for a user's mistakes, and how a command reports it.

Library code raises :class:`UserError` for input that only its user can put right: a missing folder, a length beyond
what a model can see. A command passes its ``main`` to :func:`run`, so that such a mistake ends in one readable line::

    if __name__ == "__main__":
        run(main)

Every other exception is a defect of the program and keeps its traceback.
"""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input of a user; the message says what was wrong and what would be right."""


def run(main: Callable[[], None]) -> None:
    """Call `main` and end the process as a command should.

    A `UserError` becomes one ``error:`` line on stderr and status 2, Ctrl-C becomes status 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A character that the terminal's encoding lacks is shown as an escape and does not end the command.
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
