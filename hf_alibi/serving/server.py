"""Transformers' server, hardened against clients that make mistakes, ask for too much, or disconnect.

Loading, generation and streaming are Transformers' own (`transformers.cli.serving`). Its `Serve` calls `build_server`
to make the FastAPI application. `hf_alibi/cli/serve.py` replaces that function with the one below. The application

- has routes for completions, chat, the list of models and loading the model, and none for what it does not support
  (responses, audio, decisions);
- validates requests with `requests.py`, so that bad ones get a 4xx with a message in OpenAI's form;
- tokenizes with `prompts.py`, outside the event loop;
- refuses bodies that are too large, and prompts that together with their continuations have more than
  `max_total_tokens`, because ALiBi itself has no limit;
- stops generating when the client disconnects, whether the answer is streamed or not;
- ends streams with `data: [DONE]`, as OpenAI does.

`generate` handles one request at a time. With `--continuous_batching` requests run together.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server as transformers_server
from transformers.cli.serving.utils import BaseGenerateManager, GenerationState, Modality
from transformers.generation import StoppingCriteria

from ..errors import UserError
from .prompts import PromptEncoder
from .requests import ChatRequest, CompletionRequest, GenerationOptions, GenerationRequest, ModelRequest

KEPT_PATHS = {"/health", "/openapi.json"}
"""Routes of Transformers that stay. They take no body, so no request to them can be bad."""

BYTES_PER_TOKEN, BYTES_BESIDES = 16, 65_536
"""Size of a body: 16 bytes per token, and 64 KiB for everything else.

A token of text takes about 4 bytes in JSON. A character that is not ASCII takes up to 6.
"""

PER_REQUEST = {"max_new_tokens", "transformers_version"}
SAMPLING = sorted({*GenerationOptions.model_fields, "sequence_bias", "stop_strings"} - PER_REQUEST)
"""Generation settings that continuous batching cannot have per request."""


def build_server(
    model_manager: ModelManager,
    chat_handler: ChatCompletionHandler,
    *,
    completion_handler: CompletionHandler,
    generation_state: GenerationState,
    max_total_tokens: int,
    **others: Any,
) -> FastAPI:
    """Returns the application that serves the one model `model_manager.force_model`.

    Args:
        model_manager: Has loaded the model.
        chat_handler: Transformers' handler of chats.
        completion_handler: Transformers' handler of completions.
        generation_state: Has the managers that run generations.
        max_total_tokens: Most tokens of a prompt and its continuation together.
        others: Further arguments of Transformers' `build_server`.
    """
    app = transformers_server(
        model_manager,
        chat_handler,
        completion_handler=completion_handler,
        generation_state=generation_state,
        **others,
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in KEPT_PATHS]
    model_id = model_manager.process_model_name(str(model_manager.force_model))
    # Returns the model that was loaded at the start.
    model, processor = model_manager.load_model_and_processor(model_id)
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    use_cb = generation_state.use_continuous_batching(model, Modality.LLM)
    manager = generation_state.get_manager(model_id, use_cb=use_cb)
    if use_cb:
        max_total_tokens = min(max_total_tokens, _start_batching(manager, model))
    service = Service(model_id, model, tokenizer, BoundedManager(manager, max_total_tokens), use_cb)
    encoder = PromptEncoder(tokenizer, chat_handler.chat_template_kwargs)
    app.add_middleware(BodyLimit, max_bytes=BYTES_PER_TOKEN * max_total_tokens + BYTES_BESIDES)
    app.add_exception_handler(StarletteHTTPException, lambda _, error: _error(error.status_code, error.detail))
    app.add_exception_handler(RequestValidationError, lambda _, error: _error(422, _explain(error)))
    app.add_exception_handler(TemplateError, lambda _, error: _error(400, f"the chat template refuses this: {error}"))

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionRequest) -> Response:
        async def answer() -> Response:
            _check_model(model_manager, body.model)
            input_ids = await encoder.completion(body.prompt)
            return await service.generate(completion_handler, request, body, input_ids, suffix=body.suffix)

        return await _unless_gone(request, answer())

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        async def answer() -> Response:
            _check_model(model_manager, body.model)
            if tokenizer.chat_template is None:
                raise HTTPException(400, "the tokenizer has no chat template: give it one, or use /v1/completions")
            beyond = [token for token in body.logit_bias or {} if int(token) >= model.config.vocab_size]
            if beyond:
                size = model.config.vocab_size
                raise HTTPException(400, f"logit_bias: the model has {size} tokens, but no {beyond[0]}")
            input_ids = await encoder.chat([message.as_text() for message in body.messages])
            return await service.generate(chat_handler, request, body, input_ids)

        return await _unless_gone(request, answer())

    _add_model_routes(app, model_manager)
    return app


def _add_model_routes(app: FastAPI, model_manager: ModelManager) -> None:
    """Adds the list of models, and the loading with which `transformers chat` starts. Both know only the one model."""
    name = str(model_manager.force_model)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "hf_alibi"}]}

    @app.post("/load_model")
    async def load_model(body: ModelRequest) -> Response:
        _check_model(model_manager, body.model)
        progress = model_manager.load_model_streaming(model_manager.process_model_name(name))
        return StreamingResponse(progress, media_type="text/event-stream")


def _start_batching(manager: Any, model: PreTrainedModel) -> int:
    """Starts continuous batching and returns how many tokens its cache holds. A longer request would crash it."""
    manager.init_cb(model, model.generation_config)
    while manager.is_alive():
        try:
            return int(manager.scheduler.cache.max_tokens_read)
        except RuntimeError:
            # Its thread is still creating the cache.
            time.sleep(0.05)
    raise UserError("continuous batching could not start; the log says why")


def _check_model(model_manager: ModelManager, name: str | None) -> None:
    if name not in (None, str(model_manager.force_model)):
        raise HTTPException(404, f"this server has {str(model_manager.force_model)!r}, not {name!r}")


@dataclass
class Service:
    """The served model, and the manager that runs its generations.

    Attributes:
        model_id: The name under which Transformers knows the model.
        model: The model.
        tokenizer: Of the model.
        manager: Runs generations.
        use_cb: Whether continuous batching is used.
    """

    model_id: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manager: "BoundedManager"
    use_cb: bool

    async def generate(
        self,
        handler: ChatCompletionHandler | CompletionHandler,
        request: Request,
        body: GenerationRequest,
        input_ids: list[int],
        **options: Any,
    ) -> Response:
        """Returns the answer of Transformers' `handler` to `body`, whose prompt is `input_ids`."""
        fields = body.model_dump(exclude_unset=True, round_trip=True)
        gen_config = handler._build_generation_config(fields, self.model.generation_config, use_cb=self.use_cb)
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if self.use_cb:
            self.manager.init_cb(self.model, gen_config)
        else:
            prompt = torch.tensor([input_ids], device=self.model.device)
            inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        generation: tuple[Any, ...] = (request.state.request_id, self.model, self.tokenizer, self.model_id)
        generation += (inputs, gen_config, self.manager)
        if not body.stream:
            return await handler._non_streaming(*generation, **options)
        response = handler._streaming(*generation, **options)
        response.body_iterator = _with_end(response.body_iterator)
        return response


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """Returns the answer. Cancels it if the client disconnects first."""
    task = asyncio.ensure_future(answer)
    # After the body, the only thing that can arrive is the disconnection.
    gone = asyncio.ensure_future(request.receive())
    await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        # Nobody receives this response. The status is for the log.
        return Response(status_code=499)
    gone.cancel()
    return task.result()


async def _with_end(events: AsyncIterable[Any]) -> AsyncIterator[Any]:
    async for event in events:
        yield event
    yield "data: [DONE]\n\n"


class BoundedManager(BaseGenerateManager):
    """Wraps Transformers' manager of generations. Refuses requests that are too long, and stops abandoned ones."""

    def __init__(self, manager: BaseGenerateManager, max_total_tokens: int) -> None:
        self.manager = manager
        self.max_total_tokens = max_total_tokens

    def init_cb(self, model: PreTrainedModel, gen_config: GenerationConfig) -> None:
        """Prepares continuous batching, which samples all requests with the same settings.

        Raises:
            HTTPException: 400, if the request asks for other settings than those of the checkpoint.
        """
        own = model.generation_config
        asked = [name for name in SAMPLING if (getattr(gen_config, name) or None) != (getattr(own, name) or None)]
        if asked:
            raise HTTPException(
                400, f"with --continuous_batching all requests are sampled alike: leave out {', '.join(asked)}"
            )
        self.manager.init_cb(model, gen_config)

    # The override passes on all further arguments, which Transformers lists by name.
    def generate_streaming(  # type: ignore[override]
        self, model: PreTrainedModel, processor: Any, inputs: Any, gen_config: GenerationConfig, **kwargs: Any
    ) -> tuple[asyncio.Queue[Any], Any]:
        """Does what the method of Transformers does. Raises `HTTPException` for a request that is too long."""
        self._prepare(model, inputs, gen_config)
        return self.manager.generate_streaming(model, processor, inputs, gen_config, **kwargs)

    async def generate_non_streaming(  # type: ignore[override]
        self, model: PreTrainedModel, processor: Any, inputs: Any, gen_config: GenerationConfig, **kwargs: Any
    ) -> Any:
        """Does what the method of Transformers does, and stops when it is cancelled.

        Raises:
            HTTPException: 400, for a request that is too long.
        """
        self._prepare(model, inputs, gen_config)
        # Continuous batching ignores it: there a cancelled generation continues beside the others.
        cancellation = Cancellation()
        inputs = {**inputs, "stopping_criteria": [cancellation]}
        generation = self.manager.generate_non_streaming(model, processor, inputs, gen_config, **kwargs)
        try:
            # Shielded, because the generating thread reports to it even after a cancellation.
            return await asyncio.shield(generation)
        except asyncio.CancelledError:
            cancellation.event.set()
            raise

    def _prepare(self, model: PreTrainedModel, inputs: Any, gen_config: GenerationConfig) -> None:
        prompt, new = torch.as_tensor(inputs["input_ids"]).shape[-1], gen_config.max_new_tokens
        if prompt + new > self.max_total_tokens:
            raise HTTPException(
                400,
                f"{prompt} tokens of prompt and {new} new ones (max_tokens) are more than the {self.max_total_tokens} "
                "that this server takes in all (--max_total_tokens; in continuous batching also --cb_num_blocks)",
            )
        own = model.generation_config
        given = [getattr(gen_config, name) not in (None, getattr(own, name)) for name in ("temperature", "top_p")]
        if gen_config.do_sample is None and any(given):
            # OpenAI's API has no other way to ask for sampling.
            gen_config.do_sample = True

    def stop(self) -> None:
        """Stops the manager."""
        self.manager.stop()


class Cancellation(StoppingCriteria):
    """Ends a generation at its next token once `event` is set."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Returns whether each sequence ends here, `[batch]`, booleans. `input_ids` is `[batch, length]`."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class BodyLimit:
    """ASGI middleware that refuses a body of more than `max_bytes` before it is read."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request to the application, or answers 411 or 413."""
        answer = self.app
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            if b"transfer-encoding" in headers:
                answer = _error(411, "send the length of the body (Content-Length) instead of chunks")
            elif int(headers.get(b"content-length", 0)) > self.max_bytes:
                answer = _error(413, f"the body has more than {self.max_bytes} bytes (raise --max_total_tokens)")
        await answer(scope, receive, send)


def _error(status: int, message: Any) -> JSONResponse:
    """Returns an error in OpenAI's form. Characters that UTF-8 cannot encode become escapes."""
    message = str(message).encode("utf-8", "backslashreplace").decode()
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": None}}, status)


def _explain(error: RequestValidationError) -> str:
    """Returns what is wrong with a request, field by field."""
    reasons = []
    for problem in error.errors():
        # For a field with a choice of types, pydantic adds the type to the path, in brackets.
        path = [str(part) for part in problem["loc"][1:] if "[" not in str(part)]
        field = ".".join(path) or "the body"
        if problem["msg"] == "JSON decode error":
            # The position of the error takes the place of the field.
            reasons.append(f"the body is not JSON: {problem['ctx']['error']} (character {field})")
        else:
            reasons.append(f"{field}: {problem['msg']}")
    return "; ".join(reasons)
