"""Updates the code in a checkpoint, and leaves its weights untouched.

A checkpoint holds the code of the release that saved it, which a later Transformers may break. A newer release of this
package repairs it only where that is installed. `refresh` replaces the code, in a folder or on the Hub:

    refresh("runs/books")
    refresh("me/books", create_pr=True)

Before anything changes, a new process that cannot import this package loads the weights with the new code. Its outputs
are compared with those of the old code. Old code runs only with `trust_remote_code`. Without it, or if the old code
fails, the outputs are compared with those of the package's own model.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from transformers.dynamic_module_utils import get_relative_imports

import hf_alibi

from ..errors import UserError
from ..model import modeling_alibi_gpt
from ..version import __version__
from .checkpoints import LOADING_ERRORS, load_config
from .fresh_process import FreshProcessError, Request, run_fresh
from .one_file import files_of
from .publish import hub_errors

AUTO_MAP = modeling_alibi_gpt.AlibiGPTPreTrainedModel._auto_map
# Length of the text whose outputs are compared.
TOKENS = 256
# As a fraction of the largest output. Rounding stays below it.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Change:
    """The changes that update a checkpoint.

    Attributes:
        written: New content, by file name.
        deleted: Files of the old code that the new code does not have.
    """

    written: dict[str, bytes]
    deleted: list[str]

    def lines(self) -> list[str]:
        """Returns one line for each file."""
        return [*(f"  write   {name}" for name in self.written), *(f"  delete  {name}" for name in self.deleted)]


def refresh(
    checkpoint: str | Path,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    trust_remote_code: bool = False,
    token: str | None = None,
    dry_run: bool = False,
) -> CommitInfo | Change | None:
    """Brings the present code to the checkpoint in a folder or on the Hub, and prints what changes.

    Args:
        checkpoint: A folder, which is changed in place, or the id of a Hub repository, which gets one commit.
        revision: Branch of the repository to read from and commit to, or `refs/pr/N`; None for main.
        create_pr: Whether to open a pull request instead of committing.
        trust_remote_code: Whether to run the old code in the checkpoint, to compare with.
        token: Hub token with the right to write; None for that of `hf auth login` or `HF_TOKEN`.
        dry_run: Whether only to compare and print.

    Returns:
        The commit, or what changed in the folder; None if nothing had to change, and after a dry run.

    Raises:
        UserError: If the checkpoint is damaged or no AlibiGPT, an argument is wrong, the outputs differ, or the Hub
            refuses or cannot be reached. Nothing has changed then.
    """
    with masked(token):
        if Path(checkpoint).is_dir():
            if revision is not None or create_pr:
                raise UserError(f"{checkpoint} is a folder; revision and create_pr are for repositories of the Hub")
            change = checked_change(Path(checkpoint), str(checkpoint), trust_remote_code)
            if not change.lines() or dry_run:
                return None
            apply(change, Path(checkpoint))
            print(f"{checkpoint} has the code of hf_alibi {__version__}")
            return change
        return refresh_repository(str(checkpoint), revision, create_pr, trust_remote_code, token, dry_run)


def refresh_repository(
    repo_id: str, revision: str | None, create_pr: bool, trust_remote_code: bool, token: str | None, dry_run: bool
) -> CommitInfo | None:
    """Does what `refresh` does, for a repository of the Hub."""
    with hub_errors(repo_id, "download of"):
        validate_repo_id(repo_id)
        api = HfApi(token=token)
        commit = api.repo_info(repo_id, revision=revision).sha
        names = [name for name in api.list_repo_files(repo_id, revision=commit) if "/" not in name]
        wanted = [name for name in names if name.endswith((".py", ".json", ".safetensors"))]
        folder = Path(snapshot_download(repo_id, revision=commit, token=token, allow_patterns=wanted))
    change = checked_change(folder, repo_id, trust_remote_code)
    if not change.lines() or dry_run:
        return None
    operations: list[Any] = [
        *(CommitOperationAdd(name, content) for name, content in change.written.items()),
        *(CommitOperationDelete(name, is_folder=False) for name in change.deleted),
    ]
    with hub_errors(repo_id):
        done = api.create_commit(
            repo_id,
            operations,
            commit_message=f"Bring the model's code to hf_alibi {__version__}",
            commit_description="The weights are unchanged, and a forward pass gives the same outputs.",
            revision=revision,
            create_pr=create_pr,
            # The Hub refuses the commit if another one was made since the comparison.
            parent_commit=commit,
        )
    print(f"{repo_id} has the code of hf_alibi {__version__}: {done.pr_url or done.commit_url}")
    return done


def checked_change(folder: Path, name: str, trust_remote_code: bool) -> Change:
    """Returns the change that updates a checkpoint, after printing it and comparing the outputs.

    Args:
        folder: Where the checkpoint is.
        name: What messages call it.
        trust_remote_code: Whether the old code may run.
    """
    change = find_change(folder, name)
    if not change.lines():
        print(f"{name} already has the code of hf_alibi {__version__}")
        return change
    print("\n".join([f"{name}: the code of hf_alibi {__version__}", *change.lines()]))
    difference, reference = compare(folder, change, trust_remote_code)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{name}: with the new code, outputs differ from those of {reference} by {difference:.1g} of the largest; "
            "nothing was changed"
        )
    print(f"  outputs differ from those of {reference} by {difference:.1g} of the largest")
    return change


def find_change(folder: Path, name: str) -> Change:
    """Returns the files to write and to delete, from the config and the code in `folder`."""
    # Raises an error for pickled weights and invalid values.
    load_config(folder)
    text = (folder / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    if config.get("model_type") != hf_alibi.AlibiGPTConfig.model_type:
        raise UserError(f"{name} is a {config.get('model_type')!r} checkpoint; only alibi_gpt can be refreshed")
    auto_class_of(config, name)
    auto_map = config.get("auto_map") or {}
    old = old_code(folder, auto_map)
    new = new_code()
    others = {
        key: target
        for key, target in auto_map.items()
        if key not in AUTO_MAP and not (isinstance(target, str) and module_file(target) in old)
    }
    written = dict(new)
    if auto_map != others | AUTO_MAP:
        config["auto_map"] = others | AUTO_MAP
        written["config.json"] = (json.dumps(config, indent=2, ensure_ascii=text.isascii()) + "\n").encode()
    changed = {file: content for file, content in sorted(written.items()) if content_of(folder / file) != content}
    return Change(changed, sorted(old - new.keys()))


def content_of(path: Path) -> bytes | None:
    """Returns the content of a file, or None if there is no such file."""
    return path.read_bytes() if path.exists() else None


def new_code() -> dict[str, bytes]:
    """Returns the code that `save_pretrained` writes beside the weights, by file name."""
    names = dict.fromkeys(target.partition(".")[0] for target in AUTO_MAP.values())
    return {name: text.encode() for name, text in files_of(names).items()}


def old_code(folder: Path, auto_map: dict[str, Any]) -> set[str]:
    """Returns the names of the files in `folder` that our Auto classes load, directly or through another file."""
    targets = [*AUTO_MAP.values(), *(target for key, target in auto_map.items() if key in AUTO_MAP)]
    waiting, found = [module_file(target) for target in targets], set()
    while waiting:
        file = waiting.pop()
        if file not in found and (folder / file).is_file():
            found.add(file)
            waiting += [f"{module}.py" for module in get_relative_imports(folder / file)]
    return found


def module_file(target: str) -> str:
    """Returns the file of an `auto_map` entry, which may name another repository: "me/books--modeling_x.Class"."""
    return target.rpartition("--")[2].rpartition(".")[0] + ".py"


def auto_class_of(config: dict[str, Any], name: str) -> tuple[str, str]:
    """Returns the names of the Auto class and of the model class for the head that the weights have."""
    by_class = {target.rpartition(".")[2]: auto for auto, target in AUTO_MAP.items() if auto != "AutoConfig"}
    architectures = config.get("architectures") or []
    if len(architectures) != 1 or architectures[0] not in by_class:
        raise UserError(f"{name} holds {architectures}; expected one of {', '.join(by_class)}")
    return by_class[architectures[0]], architectures[0]


def compare(folder: Path, change: Change, trust_remote_code: bool) -> tuple[float, str]:
    """Returns the largest difference in the outputs over the largest output, and what they were compared with."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto_class, class_name = auto_class_of(config, str(folder))
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(config["vocab_size"], (1, TOKENS), generator=generator)
    with TemporaryDirectory() as scratch:
        expected, reference = None, ""
        if trust_remote_code and config.get("auto_map"):
            reference = "the old code"
            try:
                expected = run_code(folder, auto_class, input_ids, Path(scratch) / "old")
            except FreshProcessError as error:
                print(f"  the old code does not run: {shorten(str(error), 300)}")
        if expected is None:
            expected, reference = own_outputs(folder, class_name, input_ids), "the package's own model"
        staging = Path(scratch) / "staging"
        stage(folder, change, staging)
        try:
            found = run_code(staging, auto_class, input_ids, Path(scratch) / "new")
        except FreshProcessError as error:
            reason = shorten(str(error), 300)
            raise UserError(f"{folder}: the new code does not run: {reason}; nothing was changed") from error
    if found.keys() != expected.keys():
        raise UserError(f"{folder}: the new code returns {sorted(found)}, the old code {sorted(expected)}")
    differences = [(found[key] - expected[key]).abs().max() / expected[key].abs().max() for key in found]
    return float(max(differences)), reference


def run_code(folder: Path, auto_class: str, input_ids: Tensor, scratch: Path) -> dict[str, Tensor]:
    """Returns the outputs of the code in `folder`, from a process that has neither this package nor a token."""
    scratch.mkdir()
    environment = {key: value for key, value in os.environ.items() if "TOKEN" not in key}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    request = Request(str(folder.resolve()), input_ids.tolist(), auto_class)
    found = run_fresh({"checkpoint": request}, scratch, environment)
    outputs = {name.removeprefix("checkpoint "): value for name, value in found.items()}
    return {name: value for name, value in outputs.items() if name not in ("input_ids", "is remote")}


@torch.no_grad()
def own_outputs(folder: Path, class_name: str, input_ids: Tensor) -> dict[str, Tensor]:
    """Returns the outputs of this package's class."""
    loaded: Any
    try:
        loaded = getattr(hf_alibi, class_name).from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except LOADING_ERRORS as error:
        raise UserError(f"cannot load the weights of {folder}: {shorten(str(error), 300)}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(f"{folder} lacks weights that its config asks for, such as {min(info['missing_keys'])}")
    return dict(model(input_ids, use_cache=False))


def stage(folder: Path, change: Change, staging: Path) -> None:
    """Makes `staging` what `folder` will be, with links to the files that stay."""
    staging.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name not in change.written and path.name not in change.deleted:
            (staging / path.name).symlink_to(path.resolve())
    for name, content in change.written.items():
        (staging / name).write_bytes(content)


def apply(change: Change, folder: Path) -> None:
    """Changes the files in `folder`.

    Every file is replaced at once, and the config comes after the code it names, so that an interruption leaves no
    broken file.
    """
    try:
        for name in sorted(change.written, key=lambda name: (name == "config.json", name)):
            part = folder / f".{name}.part"
            part.write_bytes(change.written[name])
            part.replace(folder / name)
        for name in change.deleted:
            (folder / name).unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}; make it writable and repeat the command") from error


@contextmanager
def masked(token: str | None) -> Iterator[None]:
    """Removes the token from the message of a `UserError`."""
    secret = (token or get_token() or "").strip()
    try:
        yield
    except UserError as error:
        if secret and secret in str(error):
            raise UserError(str(error).replace(secret, "***")) from None
        raise
