"""Writes the card of a converted model. An AlibiGPT gets the full card, a model of Transformers a short one."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..hub.model_card import CITATION, FACTS, CardArguments, assemble, conversion, model_card, weights_licence
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM

__all__ = ["FACTS", "write_card"]


def write_card(model: PreTrainedModel | None, folder: Path, source_folder: Path, source: str) -> None:
    """Writes README.md into `folder`, from the source's stated licence and the facts of the conversion in it.

    Args:
        model: What is in `folder`; `None` for a GGUF file.
        folder: Of the converted model.
        source_folder: Of its source.
        source: What was given as source: a folder, or a repository of the Hub.
    """
    arguments = CardArguments(
        license=stated_license(source_folder), base_model=None if Path(source).is_dir() else source
    )
    if isinstance(model, AlibiGPTForCausalLM):
        card = model_card(model, folder.name, folder, arguments)
    else:
        data = ModelCardData(
            library_name="gguf" if model is None else "transformers",
            pipeline_tag="text-generation",
            tags=["alibi"] if model is not None else ["alibi", "gguf"],
            license=arguments.license,
            base_model=arguments.base_model,
        )
        sections = [
            f"# {folder.name}",
            f"## Conversion\n\n{conversion(folder)}",
            f"## Licence\n\n{weights_licence(arguments.license)}",
            f"## Citation\n\n{CITATION}",
        ]
        card = assemble(data, sections)
    card.save(folder / "README.md")


def stated_license(folder: Path) -> str | None:
    """Returns the licence in the metadata of the card in `folder`, or None."""
    try:
        return ModelCard.load(folder / "README.md").data.get("license")
    except (OSError, ValueError):
        return None
