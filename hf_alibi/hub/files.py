"""The files of a model among others, and tokenizers that every version of Transformers can load."""

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as TransformersTokenizer

# Files that `save_pretrained` writes for a model and its tokenizer: config, weights, code, tokenizer, chat template.
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

# Suffixes of pickles. Some tokenizers save their vocabulary as one.
PICKLES = {".pkl", ".pickle", ".bin", ".pt", ".pth"}

# Fields that say how the tokenizer was loaded. They are private, and may hold a Hub token.
PRIVATE = ("is_local", "local_files_only", "token", "use_auth_token", "cache_dir")


class PreTrainedTokenizerFast(TransformersTokenizer):
    """The class of Transformers, saved under this name.

    A saved tokenizer names its class. Transformers 5 writes `TokenizersBackend`, which Transformers 4 and the
    converters of llama.cpp and MLX do not know. All of them, and Transformers 5, know the name of this class.
    """


def make_tokenizer_portable(folder: Path) -> None:
    """Makes the tokenizer saved in `folder` name a class that all versions can load, and removes private fields.

    Does nothing if the folder has no tokenizer.
    """
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
    """Yields the files in `folder` that belong to a model or its tokenizer, without pickles."""
    vocabulary = getattr(tokenizer, "vocab_files_names", {}).values()
    for path in sorted(folder.iterdir()):
        is_ours = any(fnmatch(path.name, pattern) for pattern in (*MODEL_FILES, *vocabulary))
        if is_ours and path.is_file() and path.suffix not in PICKLES:
            yield path
