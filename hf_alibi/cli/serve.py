"""Serves a checkpoint with an OpenAI-compatible API: `transformers serve`, with the models of this package registered.

    hf_alibi serve runs/books --port 8000

It differs from `transformers serve` in this: it serves one checkpoint, has the checks of `serving/server.py` and the
option --max_total_tokens, and leaves out options that would have no effect.
"""

import functools
import inspect
import json
import math
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import transformers
import typer
from transformers.cli.serve import Serve
from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

from ..errors import UserError
from ..hub.checkpoints import LOADING_ERRORS, available_device, check_vocabulary, load_config, load_tokenizer
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM
from ..positions import POSITION_METHODS

# Click's exception for a wrong command line. Newer versions of Typer contain Click under another module name.
UsageError: Any = typer.BadParameter.__base__

# Options for other routes than chat and completions, or for several models.
NOT_OPTIONS = {"decision_config", "model_timeout", "non_blocking", "reasoning"}

MODELS = (AlibiGPTForCausalLM, *POSITION_METHODS)


def main(argv: Sequence[str] | None = None) -> None:
    """Serves as the command line `argv` (default: the process's own) says."""
    run_typer(serve, argv, "hf_alibi serve")


def run_typer(function: Callable[..., Any], argv: Sequence[str] | None, name: str) -> None:
    """Calls `function` with the arguments in `argv`. Options are spelled with underscores or dashes.

    Raises:
        UserError: If an argument is unknown, missing or has a bad value.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(function)
    command = typer.main.get_command(app)
    command.context_settings = {"token_normalize_func": lambda token: token.replace("-", "_")}
    for parameter in command.params:
        for spellings in (parameter.opts, parameter.secondary_opts):
            spellings[:] = [
                "--" + option[2:].replace("-", "_") if option[:2] == "--" else option for option in spellings
            ]
    try:
        command.main(None if argv is None else list(argv), name, standalone_mode=False)
    except UsageError as error:
        raise UserError(f"{error.format_message()} ({name} --help lists the options)") from error
    except typer.Abort:
        raise KeyboardInterrupt from None


def serve(
    force_model: str,
    max_total_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a prompt and its continuation together; longer ones get a 400.")
    ] = 131_072,
    **options: Any,
) -> None:
    """Serves a checkpoint with an OpenAI-compatible API: completions and chat, streamed or not.

    Endpoints: POST /v1/completions, POST /v1/chat/completions, GET /v1/models, GET /health. Requests are answered one
    after the other, or together with --continuous_batching.
    """
    if not is_serve_available():
        raise UserError("the server needs further packages: pip install 'hf_alibi[serve]'")
    from transformers.cli.serving import server

    from ..serving import server as guarded

    for model_class in MODELS:
        # Transformers' server looks for model classes here.
        setattr(transformers, model_class.__name__, model_class)
    check(force_model, options)
    server.build_server = functools.partial(guarded.build_server, max_total_tokens=max_total_tokens)
    try:
        Serve(force_model, **options)
    except UserError:
        raise
    except LOADING_ERRORS as error:
        raise UserError(f"cannot serve {force_model}: {shorten(str(error), 300)}") from error


def check(force_model: str, options: dict[str, Any]) -> None:
    """Raises `UserError` for mistakes that would show only after the model is loaded, or as a traceback."""
    trust = options["trust_remote_code"]
    # A model id may end with @REVISION.
    path = force_model if Path(force_model).exists() else force_model.partition("@")[0]
    config = load_config(path, trust_remote_code=trust)
    architecture = (config.architectures or ["no model"])[0]
    if not hasattr(transformers, architecture):
        raise UserError(f"{force_model} holds {architecture}; a language model, AlibiGPTForCausalLM, can be served")
    check_vocabulary(load_tokenizer(path, trust_remote_code=trust), config)
    if options["log_level"].lower() not in logging.log_levels:
        raise UserError(f"--log_level must be one of {', '.join(logging.log_levels)}, got {options['log_level']}")
    if options["dtype"] not in (None, "auto", "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype must be auto, float32, bfloat16 or float16, got {options['dtype']}")
    device = options["device"]
    if device != "auto":
        available_device(int(device) if device.isdigit() else device)
    if options["chat_template_kwargs"]:
        try:
            is_object = isinstance(json.loads(options["chat_template_kwargs"]), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise UserError(f"--chat_template_kwargs must be a JSON object, got {options['chat_template_kwargs']}")
    seed = options["default_seed"]
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise UserError(f"--default_seed must fit into 64 bits, got {seed}")
    for name, value in options.items():
        is_count = name.startswith("cb_") and isinstance(value, int | float) and not isinstance(value, bool)
        if is_count and not 0 < value < math.inf:
            raise UserError(f"--{name} must be positive, got {value}")
    _check_address(options["host"], options["port"])


def _check_address(host: str, port: int) -> None:
    """Raises `UserError` if no server can listen at this address."""
    if not 0 <= port <= 65_535:
        raise UserError(f"--port must be from 0 to 65535, got {port}")
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(address)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen at --host {host} --port {port}: {error}") from error


def _signature() -> inspect.Signature:
    """Returns the signature from which typer makes the command line: `serve` with the options of Transformers."""
    own = inspect.signature(serve).parameters
    theirs = {name: option for name, option in inspect.signature(Serve).parameters.items() if name not in NOT_OPTIONS}
    theirs["force_model"] = theirs["force_model"].replace(default=inspect.Parameter.empty)
    return inspect.Signature([*theirs.values(), own["max_total_tokens"]])


# Typer reads the signature from here.
serve.__signature__ = _signature()  # type: ignore[attr-defined]
