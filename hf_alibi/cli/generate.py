"""Continues a prompt with a causal language model, and prints the text while it is generated.

    hf_alibi generate --model_name_or_path runs/demo/alibi --prompt "def main" --max_new_tokens 200
    head -n 500 book.txt | hf_alibi generate --model_name_or_path runs/demo/alibi --do_sample --top_p 0.9

The prompt is --prompt, or the UTF-8 text of --prompt_file, or standard input. It is not changed: even its last newline
stays. It is tokenized by `tokenizer(prompt)`, so a special token that is spelled out in it is that token. Standard
output gets the continuation and a newline, and nothing else.

Every argument that transformers.GenerationConfig documents is an option of the same name. Lists and dictionaries are
JSON (--stop_strings '["END", "STOP"]'). Options that are not given keep the values in the checkpoint's
generation_config.json.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

from ..errors import UserError
from ..evaluation.perplexity import position_limit
from ..hub.checkpoints import LoadingArguments, available_device, load_causal_lm, load_config
from .generation_options import add_generation_options, check_generation_options
from .options import OptionParser, in_range, parse

DEFAULT_NEW_TOKENS = 256


@dataclass
class GenerationArguments:
    """The model and the prompt."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint: a folder, or a model id of the Hub."})
    prompt: str | None = field(default=None, metadata={"help": "The text to continue."})
    prompt_file: str = field(default="-", metadata={"help": "File with the text to continue; -: standard input."})
    include_prompt: bool = field(default=False, metadata={"help": "Print the prompt before its continuation."})
    seed: int | None = field(default=None, metadata={"help": "Seed of sampling; if omitted, every run differs."})


def main(argv: Sequence[str] | None = None) -> None:
    """Generates as the command line `argv` (default: the process's own) says."""
    parser = OptionParser(
        [GenerationArguments, LoadingArguments],
        description=__doc__.partition("\n")[0],
        usage="%(prog)s --model_name_or_path CHECKPOINT [--prompt TEXT | --prompt_file FILE] [options]",
    )
    add_generation_options(parser)
    arguments, loading, *namespaces = parse(parser, argv, may_be_empty=["prompt"])
    options = dict(vars(namespaces[0])) if namespaces else {}
    in_range(arguments, 0, "seed", highest=2**32 - 1)
    available_device(loading.device)
    path = arguments.model_name_or_path
    config = load_config(path, trust_remote_code=loading.trust_remote_code, config_overrides=loading.config_overrides)
    check_generation_options(options, config.vocab_size)
    prompt = read_prompt(arguments)
    model, tokenizer = load_causal_lm(path, **asdict(loading))
    input_ids = encode_prompt(tokenizer, prompt)
    configure(model, input_ids, options)
    if arguments.seed is not None:
        set_seed(arguments.seed)
    try:
        if arguments.include_prompt:
            print(prompt, end="", flush=True)
        print_continuation(model, tokenizer, input_ids)
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. The interpreter must not flush into it when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_prompt(arguments: GenerationArguments) -> str:
    """Returns the text to continue, from the command line, a file or standard input, with its line ends unchanged."""
    if arguments.prompt is not None:
        source, read = "--prompt", lambda: os.fsencode(str(arguments.prompt))
    elif arguments.prompt_file != "-":
        source, read = arguments.prompt_file, Path(arguments.prompt_file).read_bytes
    elif sys.stdin is None:
        raise UserError("there is no standard input to read the prompt from; give --prompt or --prompt_file")
    else:
        source, read = "standard input", sys.stdin.buffer.read
    try:
        return read().decode("utf-8")
    except (OSError, ValueError) as error:
        # ValueError means bytes that are not UTF-8, or a path with a NUL.
        raise UserError(f"cannot read the prompt from {source}: {error}") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """Returns the token ids of the prompt, `[1, num_tokens]`. An empty one becomes the beginning-of-sequence token."""
    input_ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not input_ids and tokenizer.bos_token_id is None:
        raise UserError("the prompt is empty, and the tokenizer has no beginning-of-sequence token to start from")
    return torch.tensor([input_ids or [tokenizer.bos_token_id]])


def configure(model: PreTrainedModel, input_ids: Tensor, options: dict[str, Any]) -> None:
    """Sets `options` in the generation config of `model`, and checks that it has positions for all tokens."""
    config = model.generation_config
    try:
        config.update(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"these options cannot be used for generation: {error}") from error
    if config.max_length is None and config.max_new_tokens is None:
        config.max_new_tokens = DEFAULT_NEW_TOKENS
    num_tokens = config.max_length if config.max_new_tokens is None else input_ids.shape[1] + config.max_new_tokens
    limit = position_limit(model)
    if limit is not None and num_tokens > limit:
        raise UserError(
            f"{model.config.model_type} has {limit} position embeddings, too few for {num_tokens} tokens: "
            f"a prompt of {input_ids.shape[1]} and its continuation"
        )


def print_continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: Tensor) -> None:
    """Generates and prints: token by token for a single sequence, otherwise at the end."""
    input_ids = input_ids.to(model.device)
    config = model.generation_config
    is_stream = (config.num_beams or 1) == 1 and (config.num_return_sequences or 1) == 1
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if is_stream else None
    try:
        # Every causal model has this method, but PreTrainedModel does not declare it.
        sequences = model.generate(  # type: ignore[operator]
            input_ids, attention_mask=torch.ones_like(input_ids), streamer=streamer, tokenizer=tokenizer
        )
    except (ValueError, NotImplementedError, ImportError, OverflowError) as error:
        # Only the model knows which combinations, caches and attention backends it lacks.
        raise UserError(f"these options cannot be used for generation: {error}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: {shorten(str(error), 200)}") from error
    if not is_stream:
        for sequence in sequences:
            print(tokenizer.decode(sequence[input_ids.shape[1] :], skip_special_tokens=True))
