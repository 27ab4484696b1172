"""The folders of the package: which may import which, what `import hf_alibi` costs, and what the wheel holds."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_alibi
from hf_alibi.__main__ import COMMANDS, usage

PACKAGE = Path(hf_alibi.__file__).parent
ROOT = PACKAGE.parent
# Each folder may import itself and those to its left.
ORDER = [
    "model", "positions", "text", "evaluation", "hub", "conversion", "planning", "training", "serving", "benchmark",
    "study", "cli",
]  # fmt: skip
OPTIONAL = {
    "accelerate", "datasets", "evaluate", "fastapi", "gguf", "matplotlib", "peft", "tensorboard", "trl", "uvicorn",
}  # fmt: skip


def imported_rooms(file: Path) -> set[str]:
    """Returns the folders that a file imports from, also inside its functions."""
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            rooms.add((node.module or node.names[0].name).partition(".")[0])
    return rooms & set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_imports_go_one_way(room: str) -> None:
    allowed = set(ORDER[: ORDER.index(room) + 1])
    files = list((PACKAGE / room).glob("*.py"))
    assert files
    for file in files:
        assert imported_rooms(file) <= allowed, file


def test_every_folder_is_a_known_room() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ORDER)


def test_the_model_is_flat() -> None:
    for file in (PACKAGE / "model").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                # The loader of remote code only follows `from .file import name`.
                assert node.level == 1, file
                assert node.module in {path.stem for path in (PACKAGE / "model").glob("*.py")}, file


def test_importing_the_package_imports_no_optional_one() -> None:
    # Transformers' own models import optional packages that are installed, such as accelerate.
    program = """
import sys
from transformers import GPT2LMHeadModel
before = set(sys.modules)
import hf_alibi
print(*set(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    added = {name.partition(".")[0] for name in done.stdout.split()}
    assert "hf_alibi" in added
    assert not added & OPTIONAL


def test_help_fits_a_screen_and_names_every_command() -> None:
    files = {path.stem for path in (PACKAGE / "cli").glob("*.py")}
    assert set(COMMANDS) <= files
    assert len(usage().splitlines()) <= 24
    assert max(map(len, usage().splitlines())) <= 100


def test_every_recipe_for_another_library_is_run_by_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "neighbours").glob("test_*.py"))
    sections = (ROOT / "docs" / "neighbours.md").read_text(encoding="utf-8").split("\n## ")[1:]
    titles = [section.partition("\n")[0] for section in sections if "```python" in section]
    assert titles
    for title in titles:
        assert f'recipe("{title}")' in tests, title


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", str(ROOT), "--no-deps", "--wheel-dir", str(tmp_path)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests", "scripts", "docs"))]
    assert "hf_alibi/py.typed" in names
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)

    def command(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        line = [sys.executable, "-m", "hf_alibi", *arguments]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert command("--help").startswith("usage: hf_alibi")
    shape = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2"
    sizes = ["--vocab_size", "300", "--block_size", "64", "--max_train_samples", "8", "--max_eval_samples", "2"]
    command("train", "--output_dir", "run", "--max_steps", "2", "--use_cpu", "--config_overrides", shape, *sizes)
    assert command("generate", "--model_name_or_path", "run", "--prompt", "def", "--max_new_tokens", "5")
