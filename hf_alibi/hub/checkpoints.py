"""Loads a causal language model and its tokenizer, or says in one sentence why that is impossible.

    model, tokenizer = load_causal_lm("runs/demo/alibi")

It takes a folder or a model id of the Hub, with any model that `AutoModelForCausalLM` knows. Transformers initialises
missing weights at random and reads pickled weights. Here both raise a `UserError`.
"""

import ast
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from .. import positions  # noqa: F401  registers its models with the Auto classes
from ..errors import UserError
from ..tables import some_of

logger = logging.getLogger(__name__)

# What Transformers raises for files, values, config fields or weights that it cannot read, and for missing packages.
LOADING_ERRORS = (OSError, ValueError, StrictDataclassError, SafetensorError, ImportError)


@dataclass
class LoadingArguments:
    """Command-line arguments for `load_causal_lm(path, **asdict(arguments))`."""

    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the weights; auto: as saved.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1, …; if omitted, an accelerator if there is one, else cpu."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention backend, e.g. sdpa or eager; if omitted, the model's choice."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the model code that the checkpoint brings with it."}
    )
    config_overrides: str = field(
        default="",
        metadata={"help": "Fields of the config to change, such as alibi_scaling={'type': 'linear', 'factor': 4}."},
    )


def parse_overrides(text: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the fields in `text`, "name=value, ...", by name. Values that are no Python literals are strings.

    Raises:
        UserError: If `config` has no field of that name.
    """
    overrides = {}
    # The pattern splits at commas outside brackets.
    for item in re.split(r",(?![^\[{]*[\]}])", text) if text else []:
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in vars(config):
            raise UserError(f"config_overrides: {config.model_type} has no field '{name}'; see its config class")
        try:
            overrides[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            overrides[name] = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    return overrides


def load_config(path: str | Path, *, trust_remote_code: bool = False, config_overrides: str = "") -> PreTrainedConfig:
    """Returns the config of the checkpoint `path` with `config_overrides`. It is a quick check before loading weights.

    Raises:
        UserError: If the config cannot be read or refuses a value, or if the folder has no weights in safetensors.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no checkpoint: it has no config.json")
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no *.safetensors weights; pickled weights can run code and are never read")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise _unreadable("the config", path, error) from error
    overrides = parse_overrides(config_overrides, config)
    try:
        for name, value in overrides.items():
            setattr(config, name, value)
        config.validate()
    except LOADING_ERRORS as error:
        raise UserError(f"config_overrides of {path}: {shorten(str(error), 300)}") from error
    return config


def load_causal_lm(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    config_overrides: str = "",
    model_types: Collection[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the model, in evaluation mode, and the tokenizer of a checkpoint.

    Args:
        path: A folder, or a model id of the Hub.
        dtype: Of the weights; "auto" keeps the dtype in which they were saved.
        device: See `available_device`.
        attn_implementation: Attention backend; None for the model's own choice.
        trust_remote_code: Whether to run the code in the checkpoint.
        config_overrides: Changes to the config, see `parse_overrides`.
        model_types: The accepted values of `config.model_type`; None for any.

    Raises:
        UserError: If the folder, its config, weights or tokenizer are missing or damaged, if a weight is missing or
            does not have the shape that the config says, if the tokenizer has more tokens than the model, or if the
            device is not available.
    """
    device = available_device(device)
    config = load_config(path, trust_remote_code=trust_remote_code, config_overrides=config_overrides)
    if model_types is not None and config.model_type not in model_types:
        raise UserError(f"{path} is a {config.model_type!r} checkpoint; expected {' or '.join(sorted(model_types))}")
    model = _load_weights(
        path,
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    ).to(device)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    check_vocabulary(tokenizer, config)
    return model, tokenizer


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of `path`. Raises `UserError` if there is none, or it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (*LOADING_ERRORS, KeyError, TypeError, AttributeError) as error:
        # The last three mean valid JSON with unexpected content.
        raise _unreadable("a tokenizer", path, error) from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raises `UserError` if the tokenizer has tokens for which the model has no embedding."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer has {largest + 1} tokens, more than the {config.vocab_size} of the model's vocabulary"
        )


def _load_weights(path: str | Path, **kwargs: Any) -> Any:
    """Calls `AutoModelForCausalLM.from_pretrained`, but reads only safetensors and requires every weight."""
    verbosity = transformers_logging.get_verbosity()
    # Transformers would print a table of missing weights. One sentence follows below.
    transformers_logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
    except LOADING_ERRORS as error:
        raise _unreadable("the weights", path, error) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model, info = loaded
    if info["mismatched_keys"]:
        name, found, expected = min(info["mismatched_keys"])
        raise UserError(f"{path}: weight {name} has shape {list(found)}, but its config asks for {list(expected)}")
    if info["missing_keys"]:
        raise UserError(f"{path} lacks {some_of(info['missing_keys'])} of the weights that its config asks for")
    if info["unexpected_keys"]:
        logger.warning("%s: ignored %s, which its config has no place for", path, some_of(info["unexpected_keys"]))
    return model


def available_device(device: str | int | torch.device | None) -> torch.device:
    """Returns `device`, or if it is None the accelerator of this machine, or else the CPU.

    Raises:
        UserError: If there is no such device, or it is "meta", which holds no data.
    """
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        # AssertionError: torch was built without CUDA. ImportError: the device's own package is missing.
        raise UserError(f"device {str(device)!r} is not available: {shorten(str(error), 120)}") from error
    if found.type == "meta":
        raise UserError("device 'meta' holds no data and computes nothing; give cpu or an accelerator")
    return found


def _unreadable(what: str, path: str | Path, error: Exception) -> UserError:
    """Returns a `UserError` of one line for an error of Transformers, whose message may have many lines."""
    where = path if Path(path).is_dir() else f"{path} (which is no folder here, so taken for a model id of the Hub)"
    reason = shorten(str(error), 300, placeholder=" …")
    if "trust_remote_code=True" in str(error):
        reason = "it needs the code in its folder; look at that, and allow it with trust_remote_code"
    return UserError(f"cannot load {what} of {where}: {reason}")
