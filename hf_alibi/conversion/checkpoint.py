"""Reads and writes checkpoints one weight at a time. The files to write are planned before the first weight is read.

A safetensors tensor is a view of a file that is mapped into memory. The memory is only freed when the last tensor of
the mapping is gone. So the file is opened again for each tensor, which takes less than a millisecond.
"""

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..hub.publish import hub_errors

WEIGHTS = "model.safetensors"
PICKLED = "pytorch_model.bin"
# The generation config, and files of any kind of tokenizer. None of them contains code.
CARRIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
DOCUMENTS = ("config.json", "README.md", *CARRIED)


def locate(source: str | Path, allow_pickle: bool) -> Path:
    """Returns the folder of a checkpoint. One of the Hub is downloaded, without code.

    Args:
        source: A folder, or a repository of the Hub.
        allow_pickle: Whether to download pickled weights.

    Raises:
        UserError: If there is no such checkpoint, or the Hub cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    weights = ["*.safetensors*", *(["pytorch_model*.bin*"] if allow_pickle else [])]
    try:
        with hub_errors(str(source), "download of"):
            return Path(snapshot_download(str(source), allow_patterns=[*DOCUMENTS, *weights]))
    except UserError as error:
        raise UserError(f"there is no folder {source}, and from the Hub: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        UserError: If the file is missing, damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


class Checkpoint:
    """The weights and the config in a folder.

    Args:
        folder: With config.json and weights, in one file or several with an index.
        allow_pickle: Whether weights may be read from pickles, as tensors only, if there is no safetensors file.

    Raises:
        UserError: If files are missing or damaged.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self._pickle: tuple[Path, dict[str, Tensor]] | None = None
        self.is_pickled = not self._list(WEIGHTS)
        if self.is_pickled and not self._list(PICKLED):
            raise UserError(f"{folder} has no {WEIGHTS}, no {PICKLED} and no index of several such files")
        if self.is_pickled and not allow_pickle:
            raise UserError(f"{folder} has only pickled weights; allow_pickle reads them, as tensors and nothing else")
        files = self._list(PICKLED if self.is_pickled else WEIGHTS)
        self.files: dict[str, Path] = {name: path for path in files for name in self._names(path)}
        # In bytes.
        self.size = sum(path.stat().st_size for path in files)

    def _list(self, single: str) -> list[Path]:
        """Returns the files of weights: the one called `single`, or those in its index."""
        index = self.folder / f"{single}.index.json"
        if (self.folder / single).is_file() or not index.is_file():
            return [path for path in [self.folder / single] if path.is_file()]
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name or not (self.folder / name).is_file():
                raise UserError(f"{index} names the file {name}, which is not there")
        return [self.folder / name for name in names]

    def _names(self, path: Path) -> Iterable[str]:
        if self.is_pickled:
            return self._unpickled(path)
        try:
            with safe_open(path, "pt") as file:
                return list(file.keys())
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from error

    def _unpickled(self, path: Path) -> dict[str, Tensor]:
        """Returns the tensors in a pickle, mapped into memory. The last file stays open."""
        if self._pickle is None or self._pickle[0] != path:
            try:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
                raise UserError(f"{path} is no file of tensors: {str(error).partition('.')[0]}") from error
            self._pickle = path, tensors
        return self._pickle[1]

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        """Returns the tensor `name`, on the CPU, in its own dtype."""
        path = self.files[name]
        if self.is_pickled:
            return self._unpickled(path)[name]
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    def dtype(self, names: Iterable[str]) -> torch.dtype:
        """Returns the dtype that holds all of the tensors `names` without rounding."""
        dtype = None
        for name in names:
            if self.is_pickled:
                this = self[name].dtype
            else:
                with safe_open(self.files[name], "pt") as file:
                    this = file.get_slice(name)[:0].dtype if file.get_slice(name).get_shape() else self[name].dtype
            if not this.is_floating_point or this.itemsize < 2:
                raise UserError(f"{name} has dtype {this}: convert the checkpoint that was not quantised")
            dtype = this if dtype is None else torch.promote_types(dtype, this)
        return dtype or torch.float32


class Writer:
    """Writes weights as `save_pretrained` does: one file, or several with an index.

    Args:
        folder: Gets the files.
        shapes: All tensors that will be added, on the meta device.
        max_shard_size: Most bytes in a file, as a number or like "2GB".

    Raises:
        UserError: If `max_shard_size` is no size.
    """

    def __init__(self, folder: Path, shapes: dict[str, Tensor], max_shard_size: int | str) -> None:
        self.folder = folder
        try:
            self._plan = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
        except ValueError as error:
            raise UserError(f"max_shard_size must be a size such as 500MB or 5GB, got {max_shard_size!r}") from error
        self._file_of = {name: file for file, names in self._plan.filename_to_tensors.items() for name in names}
        self._waiting: dict[str, dict[str, Tensor]] = {file: {} for file in self._plan.filename_to_tensors}
        if self._plan.is_sharded:
            index = {"metadata": self._plan.metadata, "weight_map": self._file_of}
            (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a tensor. As soon as all tensors of a file are there, it is written and they are dropped."""
        file = self._file_of[name]
        waiting = self._waiting[file]
        waiting[name] = tensor
        if len(waiting) == len(self._plan.filename_to_tensors[file]):
            save_file(waiting, self.folder / file, metadata={"format": "pt"})
            del self._waiting[file]
