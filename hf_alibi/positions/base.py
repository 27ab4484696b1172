"""The base classes of position methods: a config without a bias, and a model that saves its code."""

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
    """Configuration of an AlibiGPT whose slopes are all zero, so that it has neither bias nor windows."""

    # The model saves the code of both. Transformers would not find the files of `model/`.
    _auto_class = None  # type: ignore[assignment]
    window_tolerance: int | float = 0.0

    @property
    def slopes(self) -> list[float]:
        """Zero for every head: distance costs nothing."""
        return [0.0] * self.num_attention_heads

    def validate_architecture(self) -> None:
        """Checks what `AlibiGPTConfig` checks, and that nothing is said about slopes.

        Raises:
            ValueError: If fields contradict each other, or slopes are given or trained. The config raises it as a
                `StrictDataclassError`.
        """
        super().validate_architecture()
        if self.alibi_slopes is not None or self.alibi_slopes_trainable:
            raise ValueError(
                f"{self.model_type} has no slopes, so alibi_slopes={self.alibi_slopes} and "
                f"alibi_slopes_trainable={self.alibi_slopes_trainable} would have no effect; leave them out."
            )


class PositionedCausalLM(AlibiGPTForCausalLM):
    """A language model with another position method. `decoder_class` is its decoder."""

    _auto_class = None  # type: ignore[assignment]

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves the model with its code: the files of its classes, and those of `model/` that the decoder needs."""
        own = Path(inspect.getfile(type(self)))
        names = {"AutoConfig": type(self.config), "AutoModelForCausalLM": type(self)}
        self._auto_map = {auto_class: f"{own.stem}.{known.__name__}" for auto_class, known in names.items()}
        super().save_pretrained(save_directory, *args, **kwargs)
        decoder = Path(inspect.getfile(AlibiGPTModel))
        room = type(self).__module__.rpartition(".")[0]
        bases = [
            base for base in (*type(self).__mro__, *self.decoder_class.__mro__) if base.__module__.startswith(room)
        ]
        files = {Path(inspect.getfile(base)) for base in bases}
        for file in [*files, decoder, *map(Path, get_relative_import_files(decoder))]:
            # A saved model is one flat folder.
            code = file.read_text(encoding="utf-8").replace("from ..model.", "from .")
            (Path(save_directory) / file.name).write_text(code, encoding="utf-8")
