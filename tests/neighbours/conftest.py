"""Tests with the real packages of others: recipes from the docs are run, and what they show becomes a table.

Every test here has the marker `neighbours`, and is skipped if its package is missing. `--write_table` writes the table
of `docs/neighbours.md` if all tests of the run passed.
"""

import gc
import linecache
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from recipes import DOCS, TRAINING_LENGTH
from tiny import VOCAB_SIZE, save_checkpoint, tiny_tokenizer

from hf_alibi import AlibiGPTConfig

HEAD = "| package | version | what was shown |\n|---|---|---|\n"
TABLE = re.compile(re.escape(HEAD) + r"((?:\|.*\n)*)")

rows: dict[str, str] = {}
"""A line of the table by its test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write_table", action="store_true", help="write the table of docs/neighbours.md")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker("neighbours")
            # Other packages use names that their own dependencies have deprecated.
            item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--write_table", default=False) and exitstatus == 0:
        page = DOCS / "neighbours.md"
        text = page.read_text(encoding="utf-8")
        page.write_text(with_rows(text, list(rows.values())), encoding="utf-8")


def with_rows(text: str, new: list[str]) -> str:
    """Returns the page with the lines `new` in its table. Lines of packages that did not run now stay."""
    table = TABLE.search(text)
    if table is None:
        raise ValueError(f"docs/neighbours.md has no table that begins with {HEAD!r}")
    ran = {line.split("|")[1] for line in new}
    kept = [line for line in table[1].splitlines() if line.split("|")[1] not in ran]
    return text.replace(table[0], HEAD + "".join(f"{line}\n" for line in sorted(kept + new)))


@pytest.fixture(autouse=True)
def leftovers() -> Iterator[None]:
    """Frees what a package leaves open, such as event loops, while its warnings are no errors."""
    yield
    gc.collect()


@pytest.fixture
def cook() -> Callable[..., dict[str, Any]]:
    """Returns a function that runs code of the docs with `names` defined, and returns all names that exist then."""

    def run(code: str, **names: Any) -> dict[str, Any]:
        # nnsight reads the source of its `with` blocks.
        linecache.cache["docs"] = (len(code), None, code.splitlines(keepends=True), "docs")
        exec(compile(code, "docs", "exec"), names)
        return names

    return run


@pytest.fixture
def shown(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Returns a function that takes the name of a package and what the test has shown of it."""

    def record(package: str, what: str) -> None:
        what = what.replace("0e+00", "0")
        rows[request.node.nodeid] = f"| {package} | {version(package)} | {what} |"

    return record


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Saves a model with `TRAINING_LENGTH` as `runs/books` in a new working directory, and returns this name."""
    config = AlibiGPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        training_length=TRAINING_LENGTH,
        # Large enough for the context to matter.
        initializer_range=0.2,
        bos_token_id=tiny_tokenizer().bos_token_id,
        eos_token_id=tiny_tokenizer().eos_token_id,
        pad_token_id=tiny_tokenizer().pad_token_id,
    )
    save_checkpoint(tmp_path / "runs" / "books", config)
    monkeypatch.chdir(tmp_path)
    return "runs/books"
