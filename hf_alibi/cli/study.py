"""Trains and tests every position method on the same text, and makes tables and plots of what was found.

    hf_alibi study minutes

makes results/minutes/ from the source files of Python's standard library, and needs no network. With other text:

    hf_alibi study reported --text "train=books/train*.jsonl" books=books/test.jsonl wikitext=wiki/test.txt

A study that was stopped goes on with the same command. --dry_run lists its runs and what they cost. --tables makes
tables and plots again from the JSON files alone. docs/evidence.md says what each table answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..evaluation.plots import require_matplotlib
from ..study.dry_run import describe
from ..study.figures import draw_figures
from ..study.files import write_text
from ..study.plan import find_plan, load_plan
from ..study.records import load_records
from ..study.runs import all_runs
from ..study.study import check_models, chosen, run_study
from ..study.tables import make_tables
from ..study.text import parse_texts, prepare_text
from ..training.data import reading_errors
from .options import OptionParser, parse


@dataclass
class StudyArguments:
    """On which text, and where to write."""

    text: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME=FILES for each text: train, validation, and any others to test on. FILES is a path or a "
            "glob pattern of text, JSON Lines or Parquet files. Default: Python's standard library."
        },
    )
    output_dir: Path = field(
        default=Path("results"), metadata={"help": "The study is in a folder in it that has the name of the plan."}
    )
    runs: list[str] = field(
        default_factory=list, metadata={"help": "Names or patterns of the runs to make; default: all."}
    )
    jobs: int = field(
        default=1,
        metadata={"help": "Runs that are made at the same time; on a CPU, small models train faster in total."},
    )
    tables: bool = field(default=False, metadata={"help": "Only make tables and plots, from the JSON files."})
    dry_run: bool = field(default=False, metadata={"help": "Only list the runs, with their estimated cost."})


@reading_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Makes a study as the command line `argv` (default: the process's own) says."""
    parser = OptionParser([StudyArguments], description=__doc__.partition("\n")[0])
    parser.add_argument("plan", help="minutes, reported or gpu, which are in the package, or a TOML file.")
    arguments, named = parse(parser, argv)
    plan_file = find_plan(named.plan)
    plan = load_plan(plan_file)
    check_models(plan)
    folder = arguments.output_dir / plan.name
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: give at least 1")
    if arguments.dry_run:
        print(describe(plan, chosen(all_runs(plan), arguments.runs)))
        return
    require_matplotlib()
    if not arguments.tables:
        text = prepare_text(plan, parse_texts(arguments.text), folder / "text")
        run_study(plan, plan_file, text, folder, arguments.runs, arguments.jobs)
    records = load_records(folder)
    tables = make_tables(plan.name, records)
    write_text(folder / "tables.md", tables)
    print(f"{folder / 'tables.md'}: {len(records)} runs")
    for path in draw_figures(records, folder):
        print(path)
