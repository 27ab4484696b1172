"""The command `hf_alibi` itself: its help, its version, and how it starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_alibi import __version__
from hf_alibi.__main__ import COMMANDS, main
from hf_alibi.errors import UserError
from hf_alibi.tables import aligned, markdown

OPTIONAL = ["datasets", "evaluate", "fastapi", "matplotlib", "openai", "pydantic", "tensorboard", "typer", "uvicorn"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_the_help_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert all(any(line.startswith(f"  {command} ") for line in lines) for command in COMMANDS)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"hf_alibi {__version__}\n"


def test_an_unknown_command_ends_in_a_line() -> None:
    finished = run("-m", "hf_alibi", "trian", "--help")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == f"error: hf_alibi has no command 'trian', only {', '.join(COMMANDS)}\n"


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "publish", "benchmark model", "serve", "chat"])
def test_unknown_options_end_in_a_line_that_names_them(command: str) -> None:
    with pytest.raises(UserError, match=r"--no_such_option|required|[Mm]issing") as refusal:
        main([*command.split(), "--no_such_option", "5"])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("command", "package"), [("train", "datasets"), ("serve", "typer")])
def test_a_missing_package_is_named_with_its_extra(
    command: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("hf_alibi.cli", "hf_alibi.training"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    extra = COMMANDS[command].extra
    with pytest.raises(UserError, match=rf"needs the package {package}: pip install 'hf_alibi\[{extra}\]'"):
        main([command])


def test_the_training_package_names_what_it_lacks() -> None:
    code = "import sys; sys.modules['datasets'] = None; import hf_alibi.training"
    last = run("-c", code).stderr.splitlines()[-1]
    assert last.endswith("hf_alibi.training needs the package datasets: pip install 'hf_alibi[train]'")


def test_importing_the_package_imports_nothing_optional() -> None:
    code = f"import sys, hf_alibi; print([name for name in {OPTIONAL} if name in sys.modules])"
    assert run("-c", code).stdout == "[]\n"


def test_the_library_evaluate_is_not_shadowed(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "evaluate.py"
    finished = run(str(script), "--help")
    assert finished.returncode == 0
    assert "--tokens_per_forward" in finished.stdout


def test_tables() -> None:
    assert aligned([["a", "bcd"], ["10", "2"]], left=[1]) == " a  bcd\n10  2"
    assert markdown(["x"], [["a|b\nc"]]) == "| x |\n| --- |\n| a\\|b c |"
