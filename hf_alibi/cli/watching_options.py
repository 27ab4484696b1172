"""The options of `train` that decide when it stops early, and what it writes about its steps."""

from dataclasses import dataclass, field

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from ..errors import UserError
from ..training.monitor import Profile
from .options import in_range

# Excludes infinity, and no useful number.
MOST = 1e30


@dataclass
class WatchingArguments:
    """When to stop early, and what to write about the steps."""

    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without progress; needs --load_best_model_at_end True."},
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much --metric_for_best_model must improve to count as progress."}
    )
    profile_steps: int | None = field(
        default=None, metadata={"help": "Write a profiler trace of so many steps to OUTPUT_DIR/profile."}
    )

    def callbacks(self) -> list[TrainerCallback]:
        """Returns the callbacks that these arguments ask for."""
        found: list[TrainerCallback] = []
        if self.early_stopping_patience is not None:
            found.append(EarlyStoppingCallback(self.early_stopping_patience, self.early_stopping_threshold))
        if self.profile_steps is not None:
            found.append(Profile(self.profile_steps))
        return found


def check_watching(watching_args: WatchingArguments, training_args: TrainingArguments) -> None:
    """Raises `UserError` if training cannot stop early as asked. A resumed run goes on counting evaluations."""
    in_range(watching_args, 1, "early_stopping_patience", "profile_steps")
    in_range(watching_args, 0, "early_stopping_threshold", highest=MOST)
    if watching_args.early_stopping_patience is None:
        if watching_args.early_stopping_threshold:
            raise UserError("--early_stopping_threshold needs --early_stopping_patience")
        return
    if training_args.eval_strategy == "no":
        raise UserError("--early_stopping_patience needs evaluations: give --eval_strategy steps or epoch")
    if not training_args.load_best_model_at_end:
        raise UserError(
            "--early_stopping_patience needs --load_best_model_at_end True, and --save_strategy and --save_steps "
            "that fit --eval_strategy and --eval_steps"
        )
    training_args.restore_callback_states_from_checkpoint = True
