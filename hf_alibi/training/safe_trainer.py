"""A Trainer that uploads only the model's files, and that resumes a run exactly or refuses to.

`SafeTrainer` takes the arguments of `transformers.Trainer` and differs from it in this:

- Checkpoints have no `training_args.bin`, which is a pickle with the Hub token in it. `training_args.json` has the
  arguments, with tokens masked, and `training_run.json` identifies the run.
- Checkpoints generate with a KV cache. Trainer writes `"use_cache": false`, which is only meant for training. Every
  version of Transformers can load their tokenizer.
- Uploads hold the model and its tokenizer, and no other file. The states of the optimizer and of the random number
  generators are pickles, so they are never uploaded. With the `hub_strategy` `checkpoint` or `all_checkpoints`, the
  folders on the Hub are models to load, not checkpoints to resume from.
- Evaluation and workers that live on do not change the random numbers of training, so a resumed run may evaluate more
  or less often.
- Rows can be divided among ranks, which is exact (`hf_alibi.training.context_parallel`): with
  `context_parallel_size`, and with accelerate's `ParallelismConfig(cp_size=...)`, which needs FSDP2.
- A warning says if accelerate ignores FSDP.
- A resumed run logs, evaluates and saves as often as its own arguments say, not as often as those of the checkpoint.
  If the checkpoint is at the last step, no further step is made.
- Logs have speed, memory and head windows too (`monitor.py`). There are no bars if the standard error is no terminal.

Plain Trainer has no option for any of this. If you upload with it, log in with `hf auth login` instead of passing
`hub_token`: then the pickle does not hold the token.
"""

import contextlib
import logging
import os
import shutil
import sys
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import CommitInfo, HfApi
from torch.distributed.device_mesh import init_device_mesh
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SchedulerType

from ..errors import UserError
from ..hub.files import make_tokenizer_portable, model_files
from ..hub.publish import hub_errors, publish, require_private, upload
from .context_parallel import ContextParallel
from .mixture import Mixture
from .monitor import Bars, Lines, Monitor
from .run_record import versions, write_record
from .stream import EndlessStream

logger = logging.getLogger(__name__)


def asks_for_fsdp(args: TrainingArguments) -> bool:
    """Whether Trainer's arguments, or `accelerate launch` through its environment variable, ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


class SafeTrainer(Trainer):
    """`transformers.Trainer` with the differences that the module describes.

    Args:
        record: The identity of the run (see `hf_alibi.training.run_record`), which each checkpoint gets.
        fresh_optimizer: Whether to resume with a new optimizer, at the learning rate of the checkpoint's step.
        context_parallel_size: Number of ranks among which every row is divided. They get the same batches.
    """

    def __init__(
        self,
        *args: Any,
        record: dict[str, Any] | None = None,
        fresh_optimizer: bool = False,
        context_parallel_size: int = 1,
        **kwargs: Any,
    ) -> None:
        self.record = record or {}
        self.fresh_optimizer = fresh_optimizer
        self.pushes: list[Future[CommitInfo]] = []
        self.monitor = Monitor()
        super().__init__(*args, **kwargs)
        self.add_callback(self.monitor)
        self._choose_display()
        self.context_parallel = self._context_parallel(context_parallel_size)
        self._share_batches()
        self._warn_if_not_sharded()

    # Several processes

    def _context_parallel(self, size: int) -> ContextParallel | None:
        """Returns how rows are divided among `size` ranks, or as accelerate's config says; `None` if they are not.

        Raises:
            UserError: For arguments that do not go together with divided rows.
        """
        if size == 1 and self.get_cp_size() == 1:
            return None
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise UserError("context parallelism needs the model's own loss: leave out --label_smoothing_factor")
        if size > 1:
            ranks, kind = self.args.world_size, self.accelerator.distributed_type.value
            if self.accelerator.parallelism_config is not None or not kind.startswith("MULTI_"):
                raise UserError(
                    f"--context_parallel_size is for data parallelism of several processes, not for {kind}; with "
                    "FSDP2 set parallelism_config_cp_size in accelerate's config"
                )
            if ranks % size:
                raise UserError(f"--context_parallel_size {size} does not divide the {ranks} processes")
            # Accelerate's data loaders give the ranks along "cp" the same batches.
            self.accelerator.state.device_mesh = init_device_mesh(
                self.args.device.type, (ranks // size, size), mesh_dim_names=("dp_replicate", "cp")
            )
        return ContextParallel(self.accelerator.torch_device_mesh["cp"].get_group())

    def get_cp_size(self) -> int:
        """Returns the number of ranks among which every row is divided."""
        parallel = getattr(self, "context_parallel", None)
        return super().get_cp_size() if parallel is None else dist.get_world_size(parallel.group)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Leaves out Transformers' note on tensor parallelism, which accelerate refuses on the CPU."""
        args = super()._build_accelerator_args(**kwargs)
        if (getattr(self.model, "tp_size", None) or 1) > 1:
            args.pop("parallelism_config", None)
        return args

    def _share_batches(self) -> None:
        """Gives ranks that share the heads of a model the same batches, by the mesh of accelerate's data loaders."""
        size = self.get_tp_size()
        if size == 1:
            return
        if self.context_parallel is not None:
            raise UserError("a model whose heads are divided among ranks cannot have divided rows too")
        self.accelerator.state.device_mesh = init_device_mesh(
            self.args.device.type, (self.args.world_size // size, size), mesh_dim_names=("dp_shard", "tp")
        )

    def _warn_if_not_sharded(self) -> None:
        if asks_for_fsdp(self.args) and self.accelerator.distributed_type.value != "FSDP":
            logger.warning(
                "FSDP was asked for, but accelerate ignores it on %s: every process holds the whole model, as in DDP",
                self.args.device.type,
            )

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trains on one batch. The model is in training mode before its inputs are prepared."""
        model.train()
        inputs = args[0] if args else kwargs["inputs"]
        ranks = self.args.world_size // self.get_cp_size() // self.get_tp_size()
        self.monitor.add(inputs, self.accelerator.unwrap_model(self.model), ranks)
        return super().training_step(model, *args, **kwargs)

    def _prepare_context_parallel_inputs(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Divides rows in training. In evaluation every rank computes whole rows, as metrics need them."""
        if self.context_parallel is not None and model.training:
            inputs = self.context_parallel.split(inputs)
        return contextlib.nullcontext, inputs

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Computes the loss. Trainer multiplies it by the number of ranks that share a row, also in evaluation."""
        result = super().compute_loss(model, *args, **kwargs)
        if self.context_parallel is None or model.training or kwargs.get("num_items_in_batch") is None:
            return result
        loss, *others = result if isinstance(result, tuple) else (result,)
        loss = loss / self.get_cp_size()
        return (loss, *others) if others else loss

    # Watching

    def _choose_display(self) -> None:
        """Shows bars on a terminal, and otherwise a line for each log. Bars would fill a log file."""
        for callback, in_terminal in ((ProgressCallback, True), (PrinterCallback, False)):
            if self.pop_callback(callback) is not None:
                self.add_callback(Bars() if in_terminal and sys.stderr.isatty() else Lines())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the metrics of `monitor.py` with each training loss."""
        if "loss" in logs:
            logs |= self.monitor.metrics(self.accelerator.unwrap_model(self.model), self.args)
        super().log(logs, start_time)

    # Saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            # A state left by an earlier attempt would make a half-written folder look complete.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            record = self.record | {"versions": versions()}
            if isinstance(self.train_dataset, EndlessStream):
                record["data"] = self.train_dataset.state(self.state.global_step)
            write_record(folder, record)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves the model, so that it generates with a cache, without the pickle that Trainer adds."""
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
        """Creates the repository. Raises `UserError` if it should be private but exists and is public."""
        repo_id = str(self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name)
        with hub_errors(repo_id):
            # Transformers 5.19 does not have `private`.
            super().init_hf_repo(token, **({} if private is None else {"private": private}))
            if self.is_world_process_zero() and (self.args.hub_private_repo if private is None else private):
                require_private(HfApi(token=token or self.args.hub_token), str(self.hub_model_id))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads the model of a checkpoint in the background, as `args.hub_strategy` says."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and any(not push.done() for push in self.pushes):
            return
        self._finish_current_push(wait=False)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        copies = {"checkpoint": ["last-checkpoint"], "all_checkpoints": [Path(checkpoint_folder).name]}
        folders = [".", *copies.get(HubStrategy(self.args.hub_strategy).value, [])]
        # A copy is sent, because `save_total_limit` may delete the checkpoint first.
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
        """Warns of each upload that has failed. With `wait`, first waits until all have ended."""
        running = [push for push in self.pushes if not wait and not push.done()]
        for push in self.pushes:
            if push not in running and (error := push.exception()) is not None:
                logger.warning("an upload to %s failed while training: %s", self.hub_model_id, error)
        self.pushes = running

    # `publish` writes the card, so the arguments of Trainer's card are not accepted.
    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str = "End of training",
        *,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """Saves the model, publishes it with its card (see `hf_alibi.hub.publish`), and returns the commit.

        Raises:
            UserError: If another argument of Trainer's method is given, or publishing fails.
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

    def get_train_dataloader(self) -> DataLoader:
        """Returns the data loader, whose seed for its workers is none of the random numbers of training.

        Workers that live on get one seed for all epochs, but a resumed run starts them again and would draw another.
        """
        loader = super().get_train_dataloader()
        if self.args.dataloader_persistent_workers:
            getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return loader

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Restores the state, but takes the intervals of logging, evaluating and saving from the new arguments."""
        start = super()._init_training_state(*args, **kwargs)
        self.state.compute_steps(self.args, self.state.max_steps)
        return start

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Stops at the last step before training another one. Trainer compares the number only after a step.

        Tells a mixture its epoch, which accelerate does not do in several processes.
        """
        if isinstance(self.train_dataset, Mixture):
            self.train_dataset.set_epoch(kwargs["epoch"])
        if self.state.global_step > self.state.max_steps:
            raise UserError(
                f"the checkpoint is at step {self.state.global_step}, beyond the {self.state.max_steps} of this run"
            )
        if self.state.global_step == self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates without changing the random numbers of training. A new data loader would draw a seed from them."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads both. With a fresh optimizer, only sets the learning rate to that of the step."""
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
