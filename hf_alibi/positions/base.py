"""What the position methods share: a config without a bias, and a model that saves its code with it."""

import inspect
import os
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.dynamic_module_utils import get_relative_import_files

from ..model.configuration_alibi_gpt import AlibiGPTConfig
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM, AlibiGPTModel


@strict
class UnbiasedConfig(AlibiGPTConfig):
    """An AlibiGPT without a bias: every slope is zero. A head without a slope has no window."""

    # The model saves the code of both; Transformers would not find the files of `model/`.
    _auto_class = None  # type: ignore[assignment]
    window_tolerance: int | float = 0.0

    @property
    def slopes(self) -> list[float]:
        """No penalty on distance."""
        return [0.0] * self.num_attention_heads


class PositionedCausalLM(AlibiGPTForCausalLM):
    """A language model whose decoder, `decoder_class`, knows positions in another way than by ALiBi."""

    _auto_class = None  # type: ignore[assignment]

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves the model with its code: its own file, this one, and those of `model/` that the decoder needs."""
        own = Path(inspect.getfile(type(self)))
        names = {"AutoConfig": type(self.config), "AutoModelForCausalLM": type(self)}
        self._auto_map = {auto_class: f"{own.stem}.{known.__name__}" for auto_class, known in names.items()}
        super().save_pretrained(save_directory, *args, **kwargs)
        decoder = Path(inspect.getfile(AlibiGPTModel))
        for file in [own, Path(__file__), decoder, *map(Path, get_relative_import_files(decoder))]:
            # In the saved folder all files lie side by side.
            code = file.read_text(encoding="utf-8").replace("from ..model.", "from .")
            (Path(save_directory) / file.name).write_text(code, encoding="utf-8")
