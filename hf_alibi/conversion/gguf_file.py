"""An AlibiGPT becomes a GGUF file for llama.cpp, with its tokenizer.

    path = to_gguf("runs/mine", "runs/mine-gguf", outtype="q8_0")    # runs/mine-gguf/mine-Q8_0.gguf

The file is planned, then written tensor by tensor, then read back: the formula of its architecture, in float64 and
from nothing but the file, must give the logits of the model. The format: github.com/ggml-org/ggml, `docs/gguf.md`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..errors import UserError
from ..hub.checkpoints import LOADING_ERRORS
from ..model.configuration_alibi_gpt import AlibiGPTConfig
from . import llama_cpp
from .card import FACTS, stated_license, write_card
from .checkpoint import Checkpoint, locate
from .convert import check_length, describe, new_folder, our_config
from .fields import Fields
from .llama_cpp_tokenizer import tokenizer_metadata
from .rules import Plan
from .table import Step, steps
from .verify import TEXT, TOLERANCE, class_logits, encode

if TYPE_CHECKING:
    from gguf import GGUFWriter

OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f32"}
# Weights that share a scale in q8_0.
BLOCK = 32


def to_gguf(
    source: str | Path,
    target: str | Path,
    *,
    outtype: str = "auto",
    allow_pickle: bool = False,
    text: str = TEXT,
    progress: bool = False,
) -> Path:
    """Write the AlibiGPT `source` as a GGUF file in the folder `target`.

    Args:
        source: A folder, or a repository of the Hub.
        target: A folder that does not exist or is empty. It stays so if something is refused.
        outtype: Of matrices: f32, f16, bf16 or q8_0, which is 8 bits and a scale for each 32 weights; "auto" for the
            dtype of the source, or f32 where something is multiplied into weights that 16 bits would round. Vectors
            are always f32.
        allow_pickle: Whether weights may be read from `pytorch_model.bin`, as tensors and nothing else.
        text: What source and result are compared on.
        progress: Whether to show a bar.

    Returns:
        The file.

    Raises:
        UserError: If llama.cpp has no such model or tokenizer, if the source cannot be read or the target not be
            written, or if the two do not compute the same.
    """
    _require_gguf()
    if outtype not in OUTTYPES:
        raise UserError(f"outtype {outtype!r} is none of {', '.join(OUTTYPES)}")
    with new_folder(target) as folder:
        checkpoint = Checkpoint(locate(source, allow_pickle), allow_pickle)
        config = our_config(checkpoint, "gguf")
        fields = Fields(config.to_dict(), "for GGUF")
        architecture, plan = llama_cpp.write(config, fields)
        fields.finish()
        tokenizer = _tokenizer(checkpoint.folder)
        about_tokens, differs = tokenizer_metadata(tokenizer, config.vocab_size, _ends(checkpoint.folder, config))
        shapes = llama_cpp.shapes(architecture, plan, config)
        todo = steps(plan, checkpoint, shapes, config.num_hidden_layers, outward=True)
        exact = _exact_outtype(plan, checkpoint, todo)
        outtype = _checked_outtype(exact if outtype == "auto" else outtype, config)
        name = Path(source).resolve().name if Path(source).is_dir() else Path(source).name
        path = folder / f"{name}-{outtype.upper()}.gguf"
        metadata = plan.fields | {"general.type": "model", "general.name": name} | about_tokens
        license = stated_license(checkpoint.folder)
        if license is not None:
            metadata["general.license"] = license
        template = getattr(tokenizer, "chat_template", None)
        _write(path, metadata, template, checkpoint, todo, shapes, outtype, progress)
        # llama.cpp computes the exact GELU by the tanh formula, so that those logits differ.
        is_exact = outtype in ("f32", exact) and config.hidden_act != "gelu"
        facts = {
            "source": str(source),
            "direction": f"to GGUF, the architecture `{architecture.name}` of llama.cpp",
            "dtype": outtype,
            "folded": plan.folded,
            "differs": [*plan.differs, *differs],
            "verification": _verify(path, checkpoint, tokenizer, text, config, is_exact),
        }
        (folder / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
        write_card(None, folder, checkpoint.folder, str(source))
    return path


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("GGUF files need the package gguf: pip install 'hf_alibi[gguf]'") from error


def _exact_outtype(plan: Plan, checkpoint: Checkpoint, todo: list[Step]) -> str:
    """The smallest type that holds the weights, or those of the plan where something is multiplied into them."""
    original = checkpoint.dtype(name for step in todo for name in step.sources)
    return OF_DTYPE[torch.promote_types(original, torch.float32) if plan.folded else original]


def _checked_outtype(outtype: str, config: AlibiGPTConfig) -> str:
    if outtype == "q8_0" and (config.hidden_size % BLOCK or config.intermediate_size % BLOCK):
        raise UserError(
            f"q8_0 needs rows of a multiple of {BLOCK} weights, but hidden_size is {config.hidden_size} and "
            f"intermediate_size is {config.intermediate_size}; choose another outtype"
        )
    return outtype


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except LOADING_ERRORS:
        return None


def _ends(folder: Path, config: AlibiGPTConfig) -> list[int]:
    """The tokens at which `generate` ends a text."""
    ends = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        try:
            ends = GenerationConfig.from_pretrained(folder).eos_token_id
        except LOADING_ERRORS as error:
            raise UserError(f"{folder}: generation_config.json is not valid: {error}") from error
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _write(
    path: Path,
    metadata: Mapping[str, Any],
    template: str | dict[str, str] | None,
    checkpoint: Checkpoint,
    todo: list[Step],
    shapes: Mapping[str, Tensor],
    outtype: str,
    progress: bool,
) -> None:
    """Writes the file. At any time, only the weights of one step are in memory."""
    from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize

    kinds = {name: GGMLQuantizationType[outtype.upper() if shapes[name].ndim > 1 else "F32"] for name in shapes}
    writer = GGUFWriter(path, metadata["general.architecture"])
    try:
        _add_metadata(writer, metadata, template)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_file_type(LlamaFileType["ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"])
        for name in (name for step in todo for name in step.targets):
            block, size = GGML_QUANT_SIZES[kinds[name]]
            shape, num_bytes = tuple(shapes[name].shape), shapes[name].numel() // block * size
            writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for step in tqdm(todo, desc="weights", disable=not progress):
            weights = step.function([checkpoint[name] for name in step.sources])
            for name, weight in zip(step.targets, weights, strict=True):
                _check_weight(step, name, weight, shapes[name], outtype)
                writer.write_tensor_data(quantize(weight.float().contiguous().numpy(), kinds[name]))
    finally:
        writer.close()


def _add_metadata(writer: "GGUFWriter", metadata: Mapping[str, Any], template: str | dict[str, str] | None) -> None:
    add: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        # The writer was made with the architecture.
        if key != "general.architecture":
            add[type(value)](key, value)
    if template is not None:
        named = {"default": template} if isinstance(template, str) else template
        writer.add_chat_template([{"name": key, "template": one} for key, one in named.items()])


def _check_weight(step: Step, name: str, weight: Tensor, shape: Tensor, outtype: str) -> None:
    if weight.shape != shape.shape:
        raise UserError(
            f"{' and '.join(step.sources)} gives {name} the shape {list(weight.shape)}, but the config asks for "
            f"{list(shape.shape)}"
        )
    if outtype == "f16" and weight.ndim > 1 and weight.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(f"{name} holds {weight.abs().max():.3g}, which is beyond f16; choose another outtype")


class GGUFWeights(Mapping[str, Tensor]):
    """Metadata and weights of a GGUF file; a weight is read when asked for, in float64."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def __getitem__(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float64))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _verify(
    path: Path,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    config: AlibiGPTConfig,
    is_exact: bool,
) -> dict[str, Any]:
    """Compares the file with the model. A difference is an error, unless rounded weights explain it."""
    tokens, how = encode(tokenizer, text, config.vocab_size)
    check_length(tokens)
    architecture, found = _logits_of_file(path, tokens)
    logits, name = class_logits(checkpoint, tokens)
    error = ((found - logits).abs().max() / logits.abs().max()).item()
    if is_exact and not error <= TOLERANCE:
        raise UserError(f"the file does not hold its source: logits differ from {name} by {error:.1g} of the largest")
    return {
        "against": f"the formula of llama.cpp's `{architecture}` in float64",
        "num_tokens": len(tokens),
        "text": describe(text, how),
        "full": error,
        "other": {},
    }


def _logits_of_file(path: Path, tokens: Tensor) -> tuple[str, Tensor]:
    """The architecture in the file, and its logits. The file is out of memory when this returns."""
    file = GGUFWeights(path)
    return file.metadata["general.architecture"], llama_cpp.reference(file.metadata, file, tokens)
