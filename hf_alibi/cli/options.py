"""Parses and checks the options of all commands, before any long work begins.

Options are spelled with underscores, as in Trainer. Dashes are accepted too, abbreviations are not. Mistakes raise a
`UserError` of one line.
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

# What a dataclass of options raises for values that it refuses, and for missing packages.
OPTION_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError, StrictDataclassError)


class OptionParser(HfArgumentParser):
    """A parser that raises `UserError` instead of printing its usage and exiting."""

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises `UserError`."""
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def parse(parser: OptionParser, argv: Sequence[str] | None, may_be_empty: Collection[str] = ()) -> tuple[Any, ...]:
    """Parses a command line.

    Args:
        parser: Made from dataclasses. It may have other options too.
        argv: Arguments; None for those of the process.
        may_be_empty: Options that accept an empty text.

    Returns:
        The dataclasses, and a namespace if other options were given.

    Raises:
        UserError: If an option is unknown, lacks its value or has a bad one, if a number is NaN, or if a text is
            empty.
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
    """Raises `UserError` unless the numbers in these fields of `arguments` are None or from `lowest` to `highest`."""
    for name in names:
        value = getattr(arguments, name)
        if not all(lowest <= number <= highest for number in _listed(value) if number is not None):
            expected = f"at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
            raise UserError(f"--{name} must be {expected}, got {value}")


def output_path(prefix: Path, suffix: str) -> Path:
    """Returns the file PREFIX + SUFFIX. Dots in PREFIX are part of its name."""
    return prefix.with_name(prefix.name + suffix)


def check_output(prefix: Path | None) -> None:
    """Creates the folder of PREFIX.json and PREFIX.png, and checks that both can be written and a plot can be drawn.

    Raises:
        UserError: If one of them cannot be written, or matplotlib is missing.
    """
    if prefix is None:
        return
    require_matplotlib()
    if prefix.name in ("", ".."):
        raise UserError(f"--output_prefix {prefix} lacks the beginning of a file name")
    for suffix in (".json", ".png"):
        path = output_path(prefix, suffix)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            path.open("ab").close()
            if is_new:
                path.unlink()
        except (OSError, ValueError) as error:
            # ValueError means a path with a NUL.
            raise UserError(f"cannot write to --output_prefix {prefix}: {error}") from error


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _suggestion(parser: ArgumentParser, unknown: Sequence[str]) -> str:
    """Returns a hint at the known option that most resembles the first unknown one, or an empty text."""
    known = [option for action in parser._actions for option in action.option_strings if "-" not in option[2:]]
    given = "--" + unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
    nearest = [option for option in known if option.startswith(given)] or get_close_matches(given, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
