"""Trainer whose checkpoints and uploads are the model's own files, and which continues a run exactly or not at all.

`SafeTrainer` takes the arguments of `transformers.Trainer`, from which it differs so:

- Its checkpoints have no ``training_args.bin``, a pickle that holds the token of the Hub. The arguments are in
  ``training_args.json``, with tokens masked, and what identifies the run is in ``training_run.json``.
- A checkpoint generates with a KV cache, and every version of Transformers can load its tokenizer. Trainer writes
  ``"use_cache": false``, which is meant for training.
- It uploads the model and its tokenizer, and no other file of the folder. The states of the optimizer and of the
  random number generators are pickles, so they stay here under every `hub_strategy`: with ``checkpoint`` and
  ``all_checkpoints``, the folders on the Hub are models to load, and not checkpoints to resume from.
- Evaluation draws no random numbers from those of training, so it may be more or less frequent after an interruption.
- A resumed run logs, evaluates and saves as often as its arguments say, and not as the checkpoint's did. If it has
  reached its last step, it makes no further one.

Trainer itself cannot be kept from any of this from outside. Whoever pushes with it should log in with
``hf auth login`` in place of passing `hub_token`, which keeps the token out of the pickle.
"""

import logging
import shutil
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SchedulerType

from ..errors import UserError
from ..hub.files import make_tokenizer_portable, model_files
from ..hub.publish import hub_errors, publish, require_private, upload
from .run_record import versions, write_record
from .stream import EndlessStream

logger = logging.getLogger(__name__)


class SafeTrainer(Trainer):
    """`transformers.Trainer` with the differences that the module describes.

    Args:
        record: What identifies the run, see `hf_alibi.training.run_record`; it goes into each checkpoint.
        fresh_optimizer: Resume with a new optimizer. The learning rate is still that of the checkpoint's step.
    """

    def __init__(
        self, *args: Any, record: dict[str, Any] | None = None, fresh_optimizer: bool = False, **kwargs: Any
    ) -> None:
        self.record = record or {}
        self.fresh_optimizer = fresh_optimizer
        self.pushes: list[Future[CommitInfo]] = []
        super().__init__(*args, **kwargs)

    # Saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            # An earlier attempt may have left its state, by which a folder that is half written would look complete.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            record = self.record | {"versions": versions()}
            if isinstance(self.train_dataset, EndlessStream):
                record["data"] = self.train_dataset.state(self.state.global_step)
            write_record(folder, record)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model as one that generates with a cache, without the pickle that Trainer adds."""
        folder = Path(output_dir or str(self.args.output_dir))
        config = self.accelerator.unwrap_model(self.model).config
        in_training, token = config.use_cache, self.args.hub_token
        config.use_cache, self.args.hub_token = True, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            config.use_cache, self.args.hub_token = in_training, token
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            (folder / "training_args.json").write_text(self.args.to_json_string())
            make_tokenizer_portable(folder)

    # Uploading

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository; `UserError` if it shall be private and there is a public one."""
        repo_id = str(self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name)
        with hub_errors(repo_id):
            super().init_hf_repo(token, private)
            if self.is_world_process_zero() and (self.args.hub_private_repo if private is None else private):
                require_private(HfApi(token=token or self.args.hub_token), str(self.hub_model_id))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the model of a checkpoint in the background, as `args.hub_strategy` says."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and any(not push.done() for push in self.pushes):
            return
        self._finish_current_push(wait=False)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        copies = {"checkpoint": ["last-checkpoint"], "all_checkpoints": [Path(checkpoint_folder).name]}
        folders = [".", *copies.get(HubStrategy(self.args.hub_strategy).value, [])]
        # The checkpoint may be deleted, for `save_total_limit`, before it is sent.
        staging = TemporaryDirectory()
        for folder in folders:
            (Path(staging.name) / folder).mkdir(exist_ok=True)
            for path in model_files(Path(checkpoint_folder), self.processing_class):
                shutil.copyfile(path, Path(staging.name) / folder / path.name)
        api = HfApi(token=self.args.hub_token)
        push = api.run_as_future(
            upload,
            api,
            Path(staging.name),
            str(self.hub_model_id),
            bool(self.args.hub_private_repo),
            self.args.hub_revision,
            create_pr=False,
            commit_message=f"Training in progress, step {self.state.global_step}",
        )
        push.add_done_callback(lambda _: staging.cleanup())
        self.pushes.append(push)

    def _finish_current_push(self, wait: bool = True) -> None:
        """Warn of each upload that has failed; if `wait`, after all have ended."""
        running = [push for push in self.pushes if not wait and not push.done()]
        for push in self.pushes:
            if push not in running and (error := push.exception()) is not None:
                logger.warning("an upload to %s failed while training: %s", self.hub_model_id, error)
        self.pushes = running

    def push_to_hub(  # type: ignore[override]  # what a card says, `publish` takes
        self,
        commit_message: str = "End of training",
        *,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """Save the model and publish it with its card, see `hf_alibi.hub.publish`; returns the commit.

        Raises:
            UserError: another argument of Trainer's own method is given, or publishing fails.
        """
        if kwargs:
            raise UserError(f"push_to_hub takes commit_message, token and revision only, not {', '.join(kwargs)}")
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        self._finish_current_push()
        if not self.is_world_process_zero():
            return None
        return publish(
            str(self.args.output_dir),
            str(self.hub_model_id),
            private=bool(self.args.hub_private_repo),
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            commit_message=commit_message,
        )

    # Training

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Restore the state, but log, evaluate and save as often as the arguments say: Trainer keeps the old steps."""
        start = super()._init_training_state(*args, **kwargs)
        self.state.compute_steps(self.args, self.state.max_steps)
        return start

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Make no step beyond the last: Trainer looks at their number only after a step."""
        if self.state.global_step > self.state.max_steps:
            raise UserError(
                f"the checkpoint is at step {self.state.global_step}, beyond the {self.state.max_steps} of this run"
            )
        if self.state.global_step == self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, and leave the random numbers as they were: a data loader draws a seed from them."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load them, or with a fresh optimizer set the learning rate to that of the step."""
        if checkpoint is None or not self.fresh_optimizer:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if not isinstance(self.lr_scheduler, LambdaLR):
            raise UserError(
                "--fresh_optimizer: the learning rate of "
                f"{SchedulerType(self.args.lr_scheduler_type).value} does not follow from the step"
            )
        step = self.lr_scheduler.last_epoch = self.state.global_step
        bases, factors = self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas
        rates = [base * factor(step) for base, factor in zip(bases, factors, strict=True)]
        self.lr_scheduler._last_lr = rates
        for group, rate in zip(self.lr_scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
