"""The notebooks: what a reader finds in them on a page, and (slow) that they run from top to bottom."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = ["train_short_test_long", "inside_alibi", "longer_texts", "long_prompts"]
MOST_BYTES = 500_000
# Seconds that a cell may take on a busy machine.
TIMEOUT = 3600

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
# An absolute path of two parts or more, on Unix or Windows. Addresses of web pages and relative paths are none.
PATH = re.compile(r"(?<![\w.:/<])/[\w.~-]+/[\w.-]+|\b[A-Z]:\\\w")
# Code, links, names and formulas in prose, whose digits are no figures.
NO_FIGURES = re.compile(r"`[^`]*`|\]\([^)]*\)|https?://\S+|\barXiv \S+|\bfloat\d+|\bexp\([^)]*\)+|n \+ 1")


def read(name: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def num_pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def texts(notebook: nbformat.NotebookNode) -> str:
    """Returns everything that the outputs say."""
    found = []
    for output in outputs(notebook):
        found.append(output.get("text", ""))
        found += [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(found)


def test_every_notebook_is_tested() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_was_run_from_top_to_bottom(name: str) -> None:
    cells = code_cells(read(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        shows = re.search(r"^(print\(|pyplot\.show\(\)|plot)", cell.source, re.MULTILINE)
        assert bool(cell.outputs) or not shows or cell.source.startswith("%%capture"), cell.source


@pytest.mark.parametrize("name", NAMES)
def test_it_has_pictures_and_neither_errors_nor_noise(name: str) -> None:
    notebook = read(name)
    assert num_pictures(notebook) >= 2
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES
    for output in outputs(notebook):
        assert output.output_type in ("stream", "display_data", "execute_result")
        assert output.get("name", "stdout") == "stdout", output.text
        assert set(output.get("data", {})) <= {"image/png", "text/plain", "text/markdown"}
    # Progress bars return to the start of their line.
    assert "\r" not in texts(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_it_names_no_machine(name: str) -> None:
    notebook = read(name)
    prose_and_code = "\n".join(cell.source for cell in notebook.cells)
    assert not PATH.findall(texts(notebook) + prose_and_code)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(not cell.metadata for cell in notebook.cells)


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_in_its_prose_is_in_an_output_or_a_setting(name: str) -> None:
    notebook = read(name)
    sources = "\n".join(cell.source for cell in code_cells(notebook)).replace("_", "")
    # A setting of 100_000 in the code is 100,000 in the prose.
    known = {number.replace(",", "").rstrip(".") for number in NUMBER.findall(texts(notebook) + "\n" + sources)}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            figures = NUMBER.findall(NO_FIGURES.sub(" ", cell.source))
            assert {figure.rstrip(",").replace(",", "") for figure in figures} <= known, cell.source


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, tmp_path: Path) -> None:
    notebook = read(name)
    pictures = num_pictures(notebook)
    NotebookClient(notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert num_pictures(notebook) == pictures
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
