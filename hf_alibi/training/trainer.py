"""Train a causal language model on blocks of tokens with `transformers.Trainer`, and go on after an interruption.

With `hf_alibi.training.data`, a model is trained in a few lines::

    corpus = standard_library_corpus()
    tokenizer = train_tokenizer(corpus["train"]["text"], vocab_size=4096)
    blocks = pack(corpus, tokenizer, block_size=256)
    model = AlibiGPTForCausalLM(AlibiGPTConfig(vocab_size=len(tokenizer), max_position_embeddings=256))
    metrics = train(model, tokenizer, blocks, TrainingArguments("runs/first", max_steps=500))
    print(metrics["eval_perplexity"])

A run that was killed continues from its last checkpoint with ``train(..., checkpoint=find_checkpoint(args))``, and
ends with the weights that it would have had: the checkpoint holds the optimizer and the state of every random number
generator, and the order of the blocks follows from the seed.
"""

import logging
from pathlib import Path

import torch
from datasets import DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import UserError
from ..evaluation.perplexity import trainer_metrics
from ..hub.checkpoints import check_vocabulary
from ..hub.publish import publish
from .data import collate_blocks

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER_SIZE = 1000
"""Blocks of a streaming dataset among which the next one is drawn; map-style datasets are shuffled as a whole."""


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: DatasetDict | IterableDatasetDict,
    args: TrainingArguments,
    checkpoint: str | None = None,
) -> dict[str, float]:
    """Train `model` on ``blocks["train"]``, save it with its tokenizer, and evaluate it on ``blocks["validation"]``.

    With ``args.push_to_hub``, Trainer uploads its checkpoints, and in the end `publish` the model with its
    card, without the pickle that Trainer leaves.

    Args:
        blocks: what `hf_alibi.training.data.pack` makes of a corpus. A split ``validation`` is optional.
        checkpoint: folder of a checkpoint to continue from; see `find_checkpoint`.

    Returns:
        The metrics of training (``train_loss`` in nats per token, ...) and of evaluation (``eval_loss``,
        ``eval_perplexity`` per token, ``eval_bits_per_byte``, ...). They are printed, and in `args.output_dir` in
        ``train_results.json``, ``eval_results.json`` and ``all_results.json``, beside ``trainer_state.json``.

    Raises:
        UserError: the tokenizer has more tokens than the model, or `Trainer` cannot work with `args`.
    """
    check_vocabulary(tokenizer, model.config)
    train_blocks = blocks["train"]
    if isinstance(train_blocks, IterableDataset):
        train_blocks = train_blocks.shuffle(seed=args.seed, buffer_size=SHUFFLE_BUFFER_SIZE)
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False  # it is of no use then, and torch warns of it
    try:
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=train_blocks,
            eval_dataset=blocks.get("validation"),
            data_collator=collate_blocks,
            processing_class=tokenizer,
            **trainer_metrics(tokenizer),
        )
    except ValueError as error:  # arguments that exclude each other, or name what is not there
        raise UserError(str(error)) from error
    metrics = {"train": trainer.train(resume_from_checkpoint=checkpoint).metrics}
    model.config.use_cache = True  # Trainer turns the KV cache off, and would save that with the model
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():  # Trainer's own copy is a pickle, which nothing here reads
        (Path(str(args.output_dir)) / "training_args.json").write_text(args.to_json_string())
    if "validation" in blocks:
        metrics["eval"] = trainer.evaluate()
    for split, values in metrics.items():
        trainer.log_metrics(split, values)
        trainer.save_metrics(split, values)
    if args.push_to_hub and trainer.is_world_process_zero():
        publish(
            str(args.output_dir),
            str(trainer.hub_model_id),
            private=bool(args.hub_private_repo),
            revision=args.hub_revision,
            token=args.hub_token,
        )
    return {name: value for values in metrics.values() for name, value in values.items()}


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint folder that `args.resume_from_checkpoint` asks for, or None to begin at the first step.

    "True" asks for the last checkpoint in `args.output_dir` that is complete: a process killed while it saves leaves
    one without a trainer state, which is written last. There may be none yet, if it was killed earlier; then training
    begins again.

    Raises:
        UserError: training would overwrite what another run left in `args.output_dir`, or there is no such checkpoint.
    """
    output_dir = Path(str(args.output_dir))
    resume = args.resume_from_checkpoint or "False"
    if resume.lower() == "true":
        complete = [state.parent for state in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
        if complete:
            return str(max(complete, key=lambda folder: int(folder.name.rpartition("-")[2])))
        if (output_dir / "config.json").exists():
            raise UserError(f"{output_dir} holds a model but no checkpoint to resume from; give another --output_dir")
        logger.warning("%s has no complete checkpoint: training begins at the first step", output_dir)
        return None
    if resume.lower() == "false":
        _require_empty(output_dir)
        return None
    if not (Path(resume) / TRAINER_STATE_NAME).is_file():
        raise UserError(f"{resume} is no checkpoint to resume from: it has no {TRAINER_STATE_NAME}")
    if Path(resume).resolve().parent != output_dir.resolve():
        _require_empty(output_dir)
    return resume


def _require_empty(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{folder} is not an empty folder: give another --output_dir, or continue the run in it with "
            "--resume_from_checkpoint True"
        )
