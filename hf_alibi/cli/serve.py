"""Serve a checkpoint with an OpenAI-compatible API: `transformers serve`, which knows the models of this package.

    hf_alibi serve runs/books --port 8000

Everything is as in `transformers serve`, but that it serves one checkpoint, has the guards of `serving/server.py` and
the option --max-total-tokens.
"""

import functools
import inspect
from collections.abc import Sequence
from textwrap import shorten
from typing import Annotated, Any

import transformers
import typer
from transformers.cli.serve import Serve
from transformers.cli.transformers import app
from transformers.utils.import_utils import is_serve_available

from ..errors import UserError
from ..hub.checkpoints import LOADING_ERRORS, load_config
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM
from ..positions.sinusoidal import SinusoidalGPTForCausalLM


def main(argv: Sequence[str]) -> None:
    """Serve as the command line `argv` says."""
    run_transformers(["serve", *argv])


def run_transformers(argv: Sequence[str]) -> None:
    """Run Transformers' command line with these models and this `serve`."""
    for model_class in (AlibiGPTForCausalLM, SinusoidalGPTForCausalLM):
        setattr(transformers, model_class.__name__, model_class)  # where Transformers' server looks for it
    app.command(name="serve")(serve)
    app(args=list(argv), prog_name="hf_alibi")


def serve(
    force_model: str,
    max_total_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a prompt and its continuation together; longer ones get a 400.")
    ] = 131_072,
    **options: Any,
) -> None:
    """Serve a checkpoint with an OpenAI-compatible API: completions and chat, streamed or not.

    Endpoints: POST /v1/completions, POST /v1/chat/completions, GET /v1/models, GET /health. Requests wait in line,
    or run together with --continuous-batching.
    """
    if not is_serve_available():
        raise UserError("the server needs further packages: pip install 'hf_alibi[serve]'")
    from transformers.cli.serving import server

    from ..serving import server as guarded

    config = load_config(force_model.partition("@")[0], trust_remote_code=options["trust_remote_code"])
    architecture = (config.architectures or ["no model"])[0]
    if not hasattr(transformers, architecture):
        raise UserError(f"{force_model} holds {architecture}; a language model, AlibiGPTForCausalLM, can be served")
    server.build_server = functools.partial(guarded.build_server, max_total_tokens=max_total_tokens)
    try:
        Serve(force_model, **options)
    except LOADING_ERRORS as error:
        raise UserError(f"cannot serve {force_model}: {shorten(str(error), 300)}") from error


_OPTIONS = dict(inspect.signature(Serve).parameters)
_OPTIONS["force_model"] = _OPTIONS["force_model"].replace(default=inspect.Parameter.empty)
_OPTIONS["max_total_tokens"] = inspect.signature(serve).parameters["max_total_tokens"]
serve.__signature__ = inspect.Signature(list(_OPTIONS.values()))  # type: ignore[attr-defined]  # the command line reads it
