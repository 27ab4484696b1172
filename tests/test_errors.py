"""A command reports a user's mistake in one line, and bugs with their traceback."""

import pytest

from hf_alibi.errors import UserError, run


def fail(error: Exception) -> None:
    raise error


def test_a_user_error_ends_in_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(lambda: fail(UserError("no such file: x")))
    assert exit_info.value.code == 2
    assert capsys.readouterr() == ("", "error: no such file: x\n")


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="a defect"):
        run(lambda: fail(ValueError("a defect")))
