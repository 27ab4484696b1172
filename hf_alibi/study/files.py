"""The folder of a study, and files that are written completely or not at all.

FOLDER/plan.toml            the plan
FOLDER/sweep.json           the choice of the sweep for each method
FOLDER/runs/NAME.json       what a run found; tables and plots are made from these alone
FOLDER/tables.md, *.png     made by --tables
FOLDER/text/                tokenizer and tokens, made again from the same text if they are missing
FOLDER/models/NAME/         the model of a run; not needed for tables
FOLDER/logs/NAME.txt        what a run printed
"""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a file under another name, and then gives it its own. A process that is killed leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file completely or not at all."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file, or None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def run_file(folder: Path, name: str) -> Path:
    """Returns the path of a run's results."""
    return folder / "runs" / f"{name}.json"
