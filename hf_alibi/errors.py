"""The exception for a user's mistakes, and how a command reports it.

Library code raises `UserError` for input that only the user can correct: a missing folder, or a length that the model
cannot read. A command passes its `main` to `run`, which reports such a mistake in one line:

    if __name__ == "__main__":
        run(main)

Every other exception is a bug in the program and keeps its traceback.
"""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A user's bad input. The message says what was wrong and what would be right."""


def missing_package(user: str, extra: str, error: ImportError) -> ModuleNotFoundError:
    """Returns the error for a package that is not installed: it says who needs it, and which extra installs it."""
    return ModuleNotFoundError(
        f"{user} needs the package {error.name}: pip install 'hf_alibi[{extra}]'", name=error.name
    )


def run(main: Callable[[], None]) -> None:
    """Calls `main` and ends the process as a command should.

    A `UserError` becomes one `error:` line on stderr and status 2. Ctrl-C becomes status 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A character that the terminal's encoding lacks is printed as an escape. By default it would raise an
            # error.
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
