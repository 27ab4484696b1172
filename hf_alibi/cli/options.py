"""What the commands share: their options are parsed and checked here, before any long work begins.

Options are spelled with underscores, as Trainer spells them, and are accepted with dashes too. They are never
abbreviated. Whatever is wrong with them is a `UserError` of one line.
"""

import math
from argparse import ArgumentParser
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

from ..errors import UserError
from ..evaluation.plots import require_matplotlib

# What a dataclass of options raises for values that it refuses, and for packages that they need.
OPTION_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError, StrictDataclassError)


class OptionParser(HfArgumentParser):
    """A parser that raises `UserError` where argparse prints its usage and exits."""

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises `UserError`."""
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def parse(parser: OptionParser, argv: Sequence[str] | None, may_be_empty: Collection[str] = ()) -> tuple[Any, ...]:
    """The dataclasses that `parser` fills from `argv`, and a namespace of what other options were given.

    Args:
        parser: It has been made of dataclasses, and may have other options.
        argv: Arguments; None: those of the process.
        may_be_empty: Options for which an empty text means something.

    Raises:
        UserError: An option is unknown, lacks its value or has a bad one, a number is NaN, or a text is empty.
    """
    try:
        *filled, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except OPTION_ERRORS as error:
        raise UserError(shorten(str(error), 300)) from error
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}{_suggestion(parser, unknown)}")
    for arguments in filled:
        for name, value in vars(arguments).items():
            if value == "" and parser.get_default(name) != "" and name not in may_be_empty:
                raise UserError(f"--{name} is empty; give a value or leave it out")
            if any(isinstance(number, float) and math.isnan(number) for number in _listed(value)):
                raise UserError(f"--{name} must be a number, got {value}")
    return tuple(filled)


def in_range(arguments: Any, lowest: float, *names: str, highest: float = math.inf) -> None:
    """Raise `UserError` unless the numbers in these fields of `arguments` are None or from `lowest` to `highest`."""
    for name in names:
        value = getattr(arguments, name)
        if not all(lowest <= number <= highest for number in _listed(value) if number is not None):
            expected = f"at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
            raise UserError(f"--{name} must be {expected}, got {value}")


def check_output(prefix: Path | None) -> None:
    """Make the folder of PREFIX.json and PREFIX.png, and see that both can be written and that a plot can be drawn.

    Raises:
        UserError: One of them cannot be written, or matplotlib is missing.
    """
    if prefix is None:
        return
    require_matplotlib()
    if prefix.name in ("", ".."):
        raise UserError(f"--output_prefix {prefix} lacks the beginning of a file name")
    for suffix in (".json", ".png"):
        path = prefix.with_name(prefix.name + suffix)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            path.open("ab").close()
            if is_new:
                path.unlink()
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL
            raise UserError(f"cannot write to --output_prefix {prefix}: {error}") from error


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _suggestion(parser: ArgumentParser, unknown: Sequence[str]) -> str:
    """The known option that the first unknown one most resembles."""
    known = [option for action in parser._actions for option in action.option_strings if "-" not in option[2:]]
    given = "--" + unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
    nearest = [option for option in known if option.startswith(given)] or get_close_matches(given, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
