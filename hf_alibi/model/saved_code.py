"""The code that is saved with a config or a model, so that it loads where this package is not installed.

A checkpoint has two files of code: one for the config, and one for everything else. The code in a checkpoint copies
its own files. The package is many files, so it replaces `files_of` by a function that makes one file of them
(`hub/one_file.py`).
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path


def files_beside(names: Iterable[str]) -> dict[str, str]:
    """Returns the files of this folder that are Python modules of these names, and all files that they import.

    Returns:
        The content by file name.
    """
    # Imported here, so that a checkpoint loads even if Transformers moves this function.
    from transformers.dynamic_module_utils import get_relative_import_files

    roots = [Path(__file__).with_name(f"{name}.py") for name in names]
    files = roots + [Path(file) for root in roots for file in get_relative_import_files(root)]
    return {file.name: file.read_text(encoding="utf-8") for file in files}


files_of: Callable[[Iterable[str]], dict[str, str]] = files_beside


def code_of(auto_map: dict[str, str]) -> dict[str, str]:
    """Returns the files of code that a checkpoint needs, their content by name.

    Args:
        auto_map: Module and class by Auto class, such as "modeling_alibi_gpt.AlibiGPTModel".
    """
    # The names in order, each once.
    return files_of(dict.fromkeys(target.partition(".")[0] for target in auto_map.values()))


def save_code(auto_map: dict[str, str], folder: str | os.PathLike) -> None:
    """Writes the code of a checkpoint into a folder, which is created if it does not exist."""
    if os.path.isfile(folder):
        # Transformers says what is wrong.
        return
    os.makedirs(folder, exist_ok=True)
    for name, text in code_of(auto_map).items():
        (Path(folder) / name).write_text(text, encoding="utf-8", newline="\n")


class UploadsCode:
    """Makes `save_pretrained(push_to_hub=True)` upload the code, for a config or a model with an `_auto_map`.

    Transformers uploads what has changed since it looked at the folder, and the code is written before that.
    """

    _auto_map: dict[str, str]

    def _saved_auto_map(self) -> dict[str, str]:
        """Returns module and class by Auto class, for all code that is saved."""
        return self._auto_map

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        """Returns when files were changed, without the code, so that it counts as new."""
        timestamps = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        return {name: time for name, time in timestamps.items() if name not in code_of(self._saved_auto_map())}
