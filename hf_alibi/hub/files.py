"""Which files of a folder are the model's own, and a tokenizer that every version of Transformers can load."""

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as TransformersTokenizer

# What `save_pretrained` of a model and of its tokenizer write: config, weights, code, tokenizer, chat template.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "*.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

# A vocabulary that is saved as one of these is a pickle.
PICKLES = {".pkl", ".pickle", ".bin", ".pt", ".pth"}

# How the tokenizer was loaded is nobody else's business, and may name a token of the Hub.
PRIVATE = ("is_local", "local_files_only", "token", "use_auth_token", "cache_dir")


class PreTrainedTokenizerFast(TransformersTokenizer):
    """Transformers' own, saved under this name.

    A saved tokenizer names its class. Since Transformers 5 that is ``TokenizersBackend``, which Transformers 4 and
    the converters of llama.cpp and MLX do not know; all of them, and Transformers 5, know this name.
    """


def make_tokenizer_portable(folder: Path) -> None:
    """Let the tokenizer saved in `folder`, if there is one, name a class that all can load, and nothing private."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = PreTrainedTokenizerFast.__name__
    for name in PRIVATE:
        config.pop(name, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def model_files(folder: Path, tokenizer: PreTrainedTokenizerBase | Any | None) -> Iterator[Path]:
    """The files in `folder` that are those of a model or of its tokenizer, and no pickle."""
    vocabulary = getattr(tokenizer, "vocab_files_names", {}).values()
    for path in sorted(folder.iterdir()):
        is_ours = any(fnmatch(path.name, pattern) for pattern in (*MODEL_FILES, *vocabulary))
        if is_ours and path.is_file() and path.suffix not in PICKLES:
            yield path
