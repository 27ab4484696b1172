"""The requests that the server accepts: a part of OpenAI's API.

Names and meanings are OpenAI's (https://platform.openai.com/docs/api-reference). Transformers adds
`generation_config`, where its `chat` puts its settings. Fields that are not listed here, and values that `generate`
would refuse, get an error that names the field, before anything is computed.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Json, PositiveInt


def is_unicode(text: str) -> str:
    """Returns `text`. Raises `ValueError` for a lone surrogate, which JSON can spell but UTF-8 cannot encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{found} at index {error.start} is half of a surrogate pair and no character") from error
    return text


Text = Annotated[str, AfterValidator(is_unicode)]
StopString = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(is_unicode)]
# 0 turns sampling off. Logits divided by less than 0.01 could overflow.
Temperature = Literal[0] | Annotated[float, Field(ge=0.01)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]


class Body(BaseModel):
    """The JSON object of a request. Values must have the declared types, and there are no further fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class GenerationOptions(Body):
    """The arguments of `transformers.GenerationConfig` that a client may set."""

    max_new_tokens: PositiveInt
    min_new_tokens: PositiveInt | None = None
    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0.01)
    top_k: PositiveInt | None = None
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    no_repeat_ngram_size: PositiveInt | None = None
    # Has no effect.
    transformers_version: Text | None = None


class ModelRequest(Body):
    """A request that only names the model."""

    model: Text


class StreamOptions(Body):
    """Options of a stream. They have no effect: every stream ends with the number of tokens used."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(Body):
    """What completions and chat have in common."""

    model: Text | None = None
    stream: bool | None = None
    max_tokens: PositiveInt | None = None
    temperature: Temperature | None = None
    top_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, gt=-1, le=2)
    stop: StopString | Annotated[list[StopString], Field(min_length=1, max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    generation_config: Json[GenerationOptions] | None = None
    n: Literal[1] | None = None
    # Has no effect.
    user: Text | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(GenerationRequest):
    """A text to continue."""

    prompt: Annotated[str, Field(min_length=1), AfterValidator(is_unicode)]
    suffix: Text | None = None


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """A turn of the conversation."""

    role: Literal["developer", "system", "user", "assistant"]
    content: Text | list[TextPart]

    def as_text(self) -> dict[str, str]:
        """Returns the turn in the form that chat templates expect, with the texts of its parts joined."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": self.role, "content": "".join(parts)}


class ChatRequest(GenerationRequest):
    """A conversation to continue."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: PositiveInt | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(min_length=1)] | None = None
