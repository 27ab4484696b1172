"""Checkpoints as the first releases saved them, with every file of the model's code."""

import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

import hf_alibi

MODEL = Path(hf_alibi.__file__).parent / "model"


def write_many_files(folder: Path) -> None:
    """Replaces the code in a checkpoint by the files of the package that it is made of."""
    for file in folder.glob("*.py"):
        file.unlink()
    modeling = MODEL / "modeling_alibi_gpt.py"
    for source in [modeling, *map(Path, get_relative_import_files(modeling))]:
        shutil.copy(source, folder)
