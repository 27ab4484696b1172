"""An OpenAI-compatible server on top of Transformers' own."""

from ..errors import missing_package

try:
    import fastapi  # noqa: F401
    import pydantic  # noqa: F401
    import starlette  # noqa: F401
except ModuleNotFoundError as error:
    raise missing_package("hf_alibi.serving", "serve", error) from error
