"""Publishes a trained model on the Hub: checks it, adds code and card, uploads one commit, loads it back and compares.

    publish("runs/books", "me/books", card=CardArguments(license="mit", datasets=["me/novels"]), private=True)

`publish` loads a folder that `save_pretrained` or Trainer has written, and saves the loaded model again for the
upload: weights in safetensors, config with `auto_map`, code, tokenizer, generation config and card. So no other file
of the folder is uploaded, and nothing is unpickled. The upload is one commit. If it breaks off, the repository is
unchanged; the Hub keeps the weights that have arrived, and repeating the call sends the rest.

Afterwards a new Python process that cannot import this package downloads the commit with `trust_remote_code=True`. Its
tokens and logits must equal those of the local model.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from shutil import copyfile
from tempfile import TemporaryDirectory
from textwrap import shorten

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..errors import UserError
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM
from .checkpoints import LOADING_ERRORS, load_causal_lm, load_config
from .files import make_tokenizer_portable
from .fresh_process import FreshProcessError, Request, run_fresh
from .model_card import PLOT_NAME, CardArguments, model_card

# Files of an earlier upload that loading might prefer to the new weights. An upload deletes them.
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*", "training_args.bin")

PROMPT = "The quick brown fox jumps over the lazy dog. 0123456789, (a + b) * c; été, 你好.\n"


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    card: CardArguments | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "5GB",
    token: str | None = None,
    commit_message: str = "Upload model",
    dry_run: bool = False,
) -> CommitInfo | None:
    """Publishes the checkpoint in `folder` as `repo_id`, and prints the files with their sizes.

    Args:
        folder: The checkpoint.
        repo_id: Namespace and name. The repository is created if there is none.
        card: The author's statements for the model card.
        private: Whether a new repository is private. An existing public one raises an error.
        revision: Branch to commit to, which is created from main if there is none, or `refs/pr/N` to add to a pull
            request.
        create_pr: Whether to open a pull request, against `revision` or main, instead of committing.
        max_shard_size: Most bytes in a file of weights, as a number or like "1MB".
        token: Hub token with the right to write; None for that of `hf auth login` or `HF_TOKEN`.
        commit_message: Of the commit.
        dry_run: Whether only to check and print, without the network.

    Returns:
        The commit; None after a dry run.

    Raises:
        UserError: If the checkpoint, the card or an argument is wrong, if the Hub refuses or cannot be reached, or if
            the uploaded model gives other outputs. Only in the last case have the repository's files changed.
    """
    with hub_errors(repo_id):
        validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise UserError(f"{repo_id!r} lacks its namespace; give it as me/{repo_id}")
    model, tokenizer = load_checked(folder)
    card = card or CardArguments()
    readme = model_card(model, repo_id, folder, card)
    with TemporaryDirectory() as temporary:
        staging = Path(temporary)
        readme.save(staging / "README.md")
        if card.plot is not None:
            copyfile(card.plot, staging / PLOT_NAME)
        save(model, tokenizer, staging, max_shard_size)
        sizes = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        for name, size in sizes.items():
            print(f"{size:>15,}  {name}")
        print(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files for {repo_id}")
        if dry_run:
            return None
        api = HfApi(token=token)
        with hub_errors(repo_id):
            commit = upload(api, staging, repo_id, private, revision, create_pr, commit_message)
    reload_and_compare(api, repo_id, commit.oid, model, tokenizer)
    print(f"{repo_id} at {commit.oid} loads in a new process and gives the same logits: {commit.commit_url}")
    return commit


def load_checked(folder: str | Path) -> tuple[AlibiGPTForCausalLM, PreTrainedTokenizerBase]:
    """Returns the model and the tokenizer in `folder`. Raises `UserError` if they should not be published."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder")
    architectures = load_config(folder).architectures
    if architectures != [AlibiGPTForCausalLM.__name__]:
        raise UserError(f"{folder} holds {architectures}; only {AlibiGPTForCausalLM.__name__} can be published")
    # Transformers would silently replace a generation config that it cannot read with one made from the config.
    if (Path(folder) / "generation_config.json").exists():
        try:
            GenerationConfig.from_pretrained(folder)
        except LOADING_ERRORS as error:
            raise UserError(f"{folder}: generation_config.json is not valid: {shorten(str(error), 300)}") from error
    model, tokenizer = load_causal_lm(folder, device="cpu", model_types=["alibi_gpt"])
    assert isinstance(model, AlibiGPTForCausalLM)
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise UserError(f"{folder}: weight {broken[0]} holds values that are not finite")
    return model, tokenizer


def save(
    model: AlibiGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, max_shard_size: int | str
) -> None:
    """Saves model, code, generation config and tokenizer in `folder`."""
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(f"the model cannot be saved: {shorten(str(error), 300)}") from error
    tokenizer.save_pretrained(folder)
    make_tokenizer_portable(folder)


def upload(
    api: HfApi,
    staging: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
) -> CommitInfo:
    """Commits the files in `staging`. The repository and the branch are created if they do not exist."""
    if not create_pr:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private:
        require_private(api, repo_id)
    if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    added = [CommitOperationAdd(path.relative_to(staging).as_posix(), path) for path in paths]
    kept = {operation.path_in_repo for operation in added}
    folders = {PurePosixPath(path).parent for path in kept}
    deleted = [
        CommitOperationDelete(path, is_folder=False)
        for path in api.list_repo_files(repo_id, revision=revision)
        if path not in kept
        and PurePosixPath(path).parent in folders
        and any(fnmatch(PurePosixPath(path).name, pattern) for pattern in WEIGHTS)
    ]
    return api.create_commit(
        repo_id, [*added, *deleted], commit_message=commit_message, revision=revision, create_pr=create_pr
    )


def require_private(api: HfApi, repo_id: str) -> None:
    """Raises `UserError` if the repository is public."""
    if not api.repo_info(repo_id).private:
        raise UserError(f"{repo_id} is public; make it private in its settings first, or choose another name")


@torch.no_grad()
def reload_and_compare(
    api: HfApi, repo_id: str, commit: str, model: AlibiGPTForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Loads `commit` in a new process without this package, and raises `UserError` if tokens or logits differ.

    Both models compute in float32. Rounding may change logits by 1e-5 of the largest one.
    """
    input_ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    logits = model.float()(input_ids).logits
    with TemporaryDirectory() as scratch:
        environment = os.environ | {"HF_ENDPOINT": api.endpoint, "HF_HUB_CACHE": scratch, "HF_MODULES_CACHE": scratch}
        if isinstance(api.token, str):
            environment["HF_TOKEN"] = api.token
        request = Request(repo_id, revision=commit, text=PROMPT)
        try:
            found = run_fresh({"upload": request}, Path(scratch), environment)
        except FreshProcessError as error:
            reason = shorten(str(error), 300)
            raise UserError(f"{repo_id} was uploaded, but {commit} cannot be loaded: {reason}") from error
    if not torch.equal(found["upload input_ids"], input_ids):
        raise UserError(f"{repo_id} was uploaded, but the tokenizer of {commit} gives other tokens than the local one")
    difference = (found["upload logits"] - logits).abs().max() / logits.abs().max()
    if not difference <= 1e-5:
        raise UserError(
            f"{repo_id} was uploaded, but the logits of {commit} differ by {difference:.1g} of the largest"
        )


@contextmanager
def hub_errors(repo_id: str, transfer: str = "upload to") -> Iterator[None]:
    """Turns the errors of the Hub's client into a `UserError` of one line.

    Args:
        repo_id: The repository.
        transfer: What may break off, for the message.
    """
    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled as error:
        raise UserError(f"{repo_id} cannot be reached: HF_HUB_OFFLINE is set") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"there is no repository {repo_id}, or the token may not see it") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repo_id} has no such revision: {error.server_message}") from error
    except HfHubHTTPError as error:
        advice = {401: "log in with `hf auth login`", 403: "use a token with the right to write"}
        status = error.response.status_code
        refusal = (error.server_message or error.response.reason_phrase).rstrip(".")
        raise UserError(
            f"{repo_id}: the Hub answers {status}, {refusal}; {advice.get(status, 'try again')}"
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:
        # The client raises the last two while it uploads weights.
        reason = shorten(str(error.__cause__ or error), 200)
        raise UserError(
            f"the {transfer} {repo_id} broke off: {reason}; try again, and only what is missing is sent"
        ) from error
    except (HFValidationError, ValueError) as error:
        raise UserError(f"{repo_id}: {shorten(str(error), 300)}") from error
