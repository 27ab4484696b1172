"""Continue a prompt with a causal language model, printed as it is generated.

    hf_alibi generate --model_name_or_path runs/demo/alibi --prompt "def main" --max_new_tokens 200
    head -n 500 book.txt | hf_alibi generate --model_name_or_path runs/demo/alibi --do_sample --top_p 0.9

The prompt is --prompt, or the text of --prompt_file, or standard input, taken as it is to the last newline. Standard
output gets the continuation and a newline, nothing else. Every argument that transformers.GenerationConfig documents
is an option of the same name, with JSON for lists and dictionaries (--stop_strings '["END", "STOP"]'). Options that
are not given keep the values of the checkpoint's generation_config.json.
"""

import argparse
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)
from transformers.hf_argparser import string_to_bool

from ..errors import UserError, parse_arguments
from ..evaluation.perplexity import position_limit
from ..hub.checkpoints import LoadingArguments, load_causal_lm

# Arguments of GenerationConfig that take a Python object, or that only add to what `generate` returns to Python.
NOT_OPTIONS = {"compile_config", "return_dict_in_generate", *GenerationConfig.extra_output_flags}
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
    """Generate as the command line `argv` (default: the process's own) says."""
    parser = HfArgumentParser(
        [GenerationArguments, LoadingArguments],  # type: ignore[list-item]  # Transformers' annotation is too narrow
        description=__doc__.partition("\n")[0],
        usage="%(prog)s --model_name_or_path CHECKPOINT [--prompt TEXT | --prompt_file FILE] [options]",
        allow_abbrev=False,
    )
    add_generation_options(parser)
    arguments, loading, *options = parse_arguments(parser, argv)
    prompt = read_prompt(arguments)
    if arguments.seed is not None:
        set_seed(arguments.seed)
    model, tokenizer = load_causal_lm(arguments.model_name_or_path, **asdict(loading))
    input_ids = encode_prompt(tokenizer, prompt)
    configure(model, input_ids, dict(vars(options[0])) if options else {})
    try:
        if arguments.include_prompt:
            print(prompt, end="", flush=True)
        print_continuation(model, tokenizer, input_ids)
    except BrokenPipeError:  # the reader, such as `head`, has had enough; the interpreter must not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `GenerationConfig` to `parser`; those that are not given are left out of its result.

    Only its docstring says what type an argument has, so types and help texts are read there. Deprecated arguments are
    not documented and hence no options.
    """
    group = parser.add_argument_group("arguments of GenerationConfig")
    entry = re.compile(r"^ {4}(?P<name>\w+):? *\((?P<type>.+)\):\n(?P<text>(?: {8}.+\n)+)", re.MULTILINE)
    for argument in entry.finditer(inspect.cleandoc(GenerationConfig.__doc__ or "") + "\n"):
        if argument["name"] in NOT_OPTIONS:
            continue
        first_sentence = re.split(r"(?<=\.)\s", " ".join(argument["text"].split()))[0]
        settings: dict[str, Any] = {"type": value_parser(argument["type"]), "help": first_sentence.replace("%", "%%")}
        if settings["type"] is string_to_bool:
            settings |= {"nargs": "?", "const": True}  # --do_sample means --do_sample true
        group.add_argument(f"--{argument['name']}", default=argparse.SUPPRESS, **settings)


def value_parser(documented_type: str) -> Callable[[str], Any]:
    """The reader of values of a type as documented: "`int`, *optional*"."""
    scalars: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": string_to_bool}
    return scalars.get(documented_type.split(",")[0].strip("`"), json_or_text)


def json_or_text(value: str) -> Any:
    """`value` read as JSON, or as it is if it is none: arguments of several types accept plain words too."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def read_prompt(arguments: GenerationArguments) -> str:
    """The text to continue, from the command line, a file or standard input."""
    if arguments.prompt is not None:
        return arguments.prompt
    try:
        return sys.stdin.read() if arguments.prompt_file == "-" else Path(arguments.prompt_file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        source = "standard input" if arguments.prompt_file == "-" else arguments.prompt_file
        raise UserError(f"cannot read the prompt from {source}: {error}") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """Token ids `[1, num_tokens]` of the prompt; of no text: the beginning-of-sequence token."""
    input_ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not input_ids and tokenizer.bos_token_id is None:
        raise UserError("the prompt is empty, and the tokenizer has no beginning-of-sequence token to start from")
    return torch.tensor([input_ids or [tokenizer.bos_token_id]])


def configure(model: PreTrainedModel, input_ids: Tensor, options: dict[str, Any]) -> None:
    """Set `options` in the generation config of `model`, and see that there are positions for all tokens."""
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
    """Generate and print; as a stream if there is one sequence to follow, otherwise in the end."""
    input_ids = input_ids.to(model.device)
    config = model.generation_config
    is_stream = (config.num_beams or 1) == 1 and (config.num_return_sequences or 1) == 1
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if is_stream else None
    try:
        sequences = model.generate(  # type: ignore[operator]  # every causal model has it, PreTrainedModel has not
            input_ids, attention_mask=torch.ones_like(input_ids), streamer=streamer, tokenizer=tokenizer
        )
    except ValueError as error:
        raise UserError(f"these options cannot be used for generation: {error}") from error
    if not is_stream:
        for sequence in sequences:
            print(tokenizer.decode(sequence[input_ids.shape[1] :], skip_special_tokens=True))
