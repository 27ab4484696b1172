"""The committed results: their tables follow from the JSON files, and the docs quote their figures."""

import re
from pathlib import Path

import pytest

from hf_alibi.study.methods import METHODS
from hf_alibi.study.plan import find_plan, load_plan
from hf_alibi.study.records import load_records
from hf_alibi.study.runs import all_runs
from hf_alibi.study.tables import make_tables

ROOT = Path(__file__).parents[2]
STUDIES = sorted(path.name for path in (ROOT / "results").iterdir() if path.is_dir())


@pytest.mark.parametrize("name", STUDIES)
def test_tables_are_those_of_the_json_files(name: str) -> None:
    folder = ROOT / "results" / name
    assert make_tables(name, load_records(folder)) == (folder / "tables.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_says_how_it_was_made(name: str) -> None:
    for record in load_records(ROOT / "results" / name):
        assert record["command"].startswith(f"hf_alibi study {name} ")
        assert {"cpu", "cores", "threads", "gpu", "torch", "transformers", "python"} <= record["environment"].keys()
        assert "seed" in record["settings"]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_all_methods(name: str) -> None:
    trained = {record["settings"]["method"] for record in load_records(ROOT / "results" / name)}
    assert trained == set(METHODS)


def test_the_reported_study_is_complete() -> None:
    plan = load_plan(find_plan("reported"))
    made = {record["settings"]["name"] for record in load_records(ROOT / "results" / "reported")}
    assert made == {run.name for run in all_runs(plan)}


@pytest.mark.parametrize("name", STUDIES)
def test_the_docs_quote_the_tables(name: str) -> None:
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    section = re.search(rf"^## Results of the plan `{name}`\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    quoted = re.findall(r"\d+\.\d+", section[1])
    tables = (ROOT / "results" / name / "tables.md").read_text(encoding="utf-8")
    assert len(quoted) > 10
    assert [figure for figure in quoted if figure not in tables] == []


def test_the_readme_quotes_the_tables() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Does it work\?\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    quoted = re.findall(r"\d+\.\d+ ± \d+\.\d+", section[1])
    tables = (ROOT / "results" / "reported" / "tables.md").read_text(encoding="utf-8")
    assert len(quoted) == 20
    assert [figure for figure in quoted if figure not in tables] == []
