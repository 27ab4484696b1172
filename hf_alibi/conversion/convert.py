"""Convert a checkpoint: plan, write tensor by tensor, carry the rest over, compare, and write a card."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import UserError
from ..hub.checkpoints import LOADING_ERRORS
from ..model.configuration_alibi_gpt import AlibiGPTConfig
from . import baichuan, bloom, btlm, falcon, jais, mpt, refact
from .card import FACTS, write_card
from .checkpoint import CARRIED, Checkpoint, Writer, locate
from .fields import GENERATION, Fields
from .rules import Plan
from .table import HEAD, steps
from .verify import MIN_TOKENS, TEXT, encode, quiet_transformers, verify

SOURCES: dict[str, tuple[str, Callable[[Fields], Plan]]] = {
    "bloom": ("BLOOM", bloom.read),
    "mpt": ("MPT", mpt.read),
    "falcon": ("Falcon", falcon.read),
    "baichuan": ("Baichuan", baichuan.read),
    "jais": ("JAIS", jais.read),
    "btlm": ("BTLM", btlm.read),
    "gpt_refact": ("Refact", refact.read),
    "RefinedWebModel": ("Falcon", falcon.read_refined_web),
}
TARGETS: dict[str, tuple[str, Callable[[AlibiGPTConfig, Fields], Plan]]] = {
    "bloom": ("BLOOM", bloom.write),
    "mpt": ("MPT", mpt.write),
}
OURS = AlibiGPTConfig.model_type


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str = "5GB",
    allow_pickle: bool = False,
    text: str = TEXT,
    progress: bool = False,
) -> PreTrainedModel:
    """Convert the checkpoint `source` to an AlibiGPT, or an AlibiGPT to another model, in the folder `target`.

    Args:
        source: A folder, or a repository of the Hub.
        target: A folder that does not exist or is empty. It stays so if something is refused.
        to: Keys of `TARGETS`: what an AlibiGPT becomes.
        dtype: Of the weights; "auto" for that of the source, or float32 where something is multiplied into weights
            that 16 bits would round.
        max_shard_size: Bytes in a file of weights at most, as a number or like "2GB"; so much is in memory at once.
        allow_pickle: Whether weights may be read from `pytorch_model.bin`, as tensors and nothing else.
        text: What source and result are compared on.
        progress: Whether to show a bar.

    Returns:
        The converted model, loaded from `target`, in evaluation mode.

    Raises:
        UserError: If the source cannot be read or the target not be written, if the other side has no such model, or
            if the two do not compute the same.
    """
    with new_folder(target) as folder:
        checkpoint = Checkpoint(locate(source, allow_pickle), allow_pickle)
        plan, config, name = _plan(checkpoint, to)
        is_exact, kept = _write(plan, config, checkpoint, folder, to is not None, dtype, max_shard_size, progress)
        tokenizer, remark = _carry(checkpoint, folder)
        tokens, how = encode(tokenizer, text, config.vocab_size)
        if isinstance(config, AlibiGPTConfig) and config.slopes_depend_on_length:
            # Beyond the training length, a text in pieces has other slopes than the whole text; see alibi_scaling.
            tokens = tokens[: config.training_length]
        tokens = tokens[: plan.max_length]
        check_length(tokens)
        model, verification = verify(plan, checkpoint, folder, tokens, describe(text, how), is_exact)
        facts = {
            "source": str(source),
            "direction": f"{'from' if to is None else 'to'} {name}",
            "dtype": str(kept).removeprefix("torch."),
            "folded": plan.folded,
            "differs": [*plan.differs, *remark],
            "verification": asdict(verification),
        }
        (folder / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
        write_card(model, folder, checkpoint.folder, str(source))
    return model


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Makes the folder `target`. If an error leaves the block, the folder becomes what it was.

    Raises:
        UserError: If there is something in it.
    """
    folder = Path(target)
    is_there = folder.exists()
    if is_there and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder)
        if is_there:
            folder.mkdir()
        raise


def check_length(tokens: Tensor) -> None:
    """Refuses a text that is too short to compare on."""
    if len(tokens) < MIN_TOKENS:
        raise UserError(f"the text to compare on is too short: {len(tokens)} tokens, of at least {MIN_TOKENS}")


def describe(text: str, how: str) -> str:
    """What was compared on, and how it became tokens."""
    return f"the beginning of Alice's Adventures in Wonderland, by {how}" if text == TEXT else f"a text, by {how}"


def _plan(checkpoint: Checkpoint, to: str | None) -> tuple[Plan, PreTrainedConfig, str]:
    """What to do, the new config, and the name of the architecture on the other side."""
    kind = checkpoint.config.get("model_type")
    if to is None and kind in SOURCES:
        name, read = SOURCES[kind]
        fields = Fields(checkpoint.config, name)
        plan = read(fields)
        fields.finish()
        return plan, _config(AlibiGPTConfig, plan, checkpoint), name
    if to in TARGETS:
        ours = our_config(checkpoint, to)
        name, write = TARGETS[to]
        fields = Fields(ours.to_dict(), f"for {name}")
        plan = write(ours, fields)
        fields.finish()
        return plan, _config(type(AutoConfig.for_model(to)), plan, checkpoint), name
    if to is not None:
        raise UserError(f"{to!r} is no target; choose {' or '.join(TARGETS)}, or call to_gguf for a GGUF file")
    if kind == OURS:
        raise UserError(
            f"{checkpoint.folder} is an AlibiGPT already; --to says what it becomes: {', '.join(TARGETS)} or gguf"
        )
    raise UserError(f"{checkpoint.folder} is of type {kind!r}; known are {', '.join(SOURCES)}")


def our_config(checkpoint: Checkpoint, to: str) -> AlibiGPTConfig:
    """The config of a checkpoint that is to become a model of the kind `to`.

    Raises:
        UserError: If it is none of ours.
    """
    kind = checkpoint.config.get("model_type")
    if kind != OURS:
        raise UserError(f"only {OURS} becomes {to}; {checkpoint.folder} is of type {kind!r}: convert that first")
    try:
        return AlibiGPTConfig.from_pretrained(checkpoint.folder)
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"{checkpoint.folder}: {error}") from error


def _config(config_class: type[PreTrainedConfig], plan: Plan, checkpoint: Checkpoint) -> Any:
    try:
        return config_class(**plan.fields)
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"{checkpoint.folder}: {error}") from error


def _write(
    plan: Plan,
    config: PreTrainedConfig,
    checkpoint: Checkpoint,
    folder: Path,
    outward: bool,
    dtype: str | torch.dtype,
    max_shard_size: int | str,
    progress: bool,
) -> tuple[bool, torch.dtype]:
    """Writes config, code and weights; returns whether no weight was rounded, and the dtype."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes: dict[str, Tensor] = dict(model.state_dict())
    if config.tie_word_embeddings:
        del shapes[HEAD]
    todo = steps(plan, checkpoint, shapes, config.num_hidden_layers, outward)
    original = checkpoint.dtype(name for step in todo for name in step.sources)
    exact = torch.promote_types(original, torch.float32) if plan.folded else original
    chosen = exact if dtype == "auto" else _dtype(dtype)
    model.to(chosen)
    model.generation_config.update(
        **{name: value for name, value in checkpoint.config.items() if name in GENERATION and value is not None}
    )
    try:
        with quiet_transformers():
            model.save_pretrained(folder, state_dict={})
    except ValueError as error:
        raise UserError(
            f"{checkpoint.folder}: its config has defaults of generation that are refused: {error}"
        ) from error
    shapes = {name: shape.to(chosen) for name, shape in shapes.items()}
    writer = Writer(folder, shapes, max_shard_size)
    for step in tqdm(todo, desc="weights", disable=not progress):
        weights = step.function([checkpoint[name] for name in step.sources])
        for name, weight in zip(step.targets, weights, strict=True):
            if weight.shape != shapes[name].shape:
                raise UserError(
                    f"{' and '.join(step.sources)} gives {name} the shape {list(weight.shape)}, but the config asks "
                    f"for {list(shapes[name].shape)}"
                )
            # A copy, so that neither the rest of a fused matrix nor its file is kept in memory.
            writer.add(name, weight.to(chosen, copy=True).contiguous())
    return torch.promote_types(exact, chosen) == chosen, chosen


def _dtype(name: str | torch.dtype) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype {name!r} is none for weights; choose auto, float32, bfloat16 or float16")
    return dtype


def _carry(checkpoint: Checkpoint, folder: Path) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """Copies what else belongs to the source; returns the tokenizer, if it loads, and a remark if it does not."""
    for name in CARRIED:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    try:
        GenerationConfig.from_pretrained(folder)
    except LOADING_ERRORS as error:
        raise UserError(f"{checkpoint.folder}: generation_config.json is not valid: {error}") from error
    if not any((folder / name).is_file() for name in CARRIED if name.startswith(("tokenizer", "vocab", "spiece"))):
        return None, ["The source has no tokenizer."]
    try:
        return AutoTokenizer.from_pretrained(folder), []
    except Exception:
        # Whatever a damaged tokenizer raises, or one that needs the code of its source.
        return None, ["The tokenizer was copied, but does not load without code of the source."]
