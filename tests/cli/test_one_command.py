"""The command `hf_alibi` itself: its help, its version, and how it starts."""

import json
import re
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


# Imports all modules and starts all commands without the package that is named. Prints the errors.
WITHOUT = """
import contextlib, importlib, io, json, pkgutil, sys
sys.modules[sys.argv[1]] = None
import hf_alibi
from hf_alibi.__main__ import COMMANDS, main

def message(action, name):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            action()
    except SystemExit:
        pass
    except Exception as error:
        return {name: f"{type(error).__name__}: {error}"}
    return {}

errors = {}
for module in pkgutil.walk_packages(hf_alibi.__path__, "hf_alibi.", onerror=lambda name: None):
    room = module.name.split(".")[1]
    if room not in ("model", "cli", "__main__"):
        errors |= message(lambda: importlib.import_module(module.name), module.name)
for command in COMMANDS:
    errors |= message(lambda: main([command, "--help"]), command)
print(json.dumps(errors))
"""
# What cannot be used without a package, among other things. Each takes several seconds.
NEEDED_BY = {
    "accelerate": ("hf_alibi.training", "train"),
    "datasets": ("hf_alibi.training", "hf_alibi.evaluation.metric", "train"),
    "evaluate": ("hf_alibi.evaluation.metric",),
    "fastapi": ("hf_alibi.serving",),
    "gguf": (),
    "matplotlib": (),
    "pydantic": ("hf_alibi.serving",),
    "starlette": ("hf_alibi.serving", "serve"),
    "tensorboard": (),
    "typer": ("serve",),
}
QUICK = ("datasets", "starlette")


@pytest.mark.parametrize(
    "package", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NEEDED_BY]
)
def test_a_missing_package_is_named_with_its_extra(package: str) -> None:
    errors = json.loads(run("-c", WITHOUT, package).stdout)
    assert set(NEEDED_BY[package]) <= set(errors)
    for name, error in errors.items():
        kind = "UserError" if name in COMMANDS else "ModuleNotFoundError"
        assert re.fullmatch(
            rf"{kind}: hf_alibi.* needs the package {package}: pip install 'hf_alibi\[\w+\]'", error
        ), name
        if name in COMMANDS:
            assert error.endswith(f"[{COMMANDS[name].extra}]'")
    if not NEEDED_BY[package]:
        assert errors == {}


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
