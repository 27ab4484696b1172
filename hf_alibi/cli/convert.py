r"""Convert a checkpoint of another model with ALiBi to AlibiGPT, or an AlibiGPT to such a model.

    hf_alibi convert bigscience/bloom-560m runs/bloom
    hf_alibi convert runs/mine runs/mine-as-mpt --to mpt
    hf_alibi convert runs/mine runs/mine-gguf --to gguf --outtype q8_0

Known are BLOOM, MPT, Falcon, Baichuan, JAIS, BTLM and Refact. The logits of both are compared on a text, and what was
found is printed and in the card. What the other side cannot express is refused by name.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..conversion.convert import TARGETS, convert
from ..conversion.gguf_file import OUTTYPES, to_gguf
from ..errors import UserError
from ..hub.model_card import conversion
from .options import OptionParser, parse


@dataclass
class ConversionArguments:
    """How it is converted."""

    to: str | None = field(
        default=None,
        metadata={
            "help": "What an AlibiGPT becomes; if omitted, the source becomes one.",
            "choices": [*TARGETS, "gguf"],
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the weights; auto: that of the source, or float32 where folded weights need it.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    outtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the matrices in a GGUF file; auto, the default: that of the source.",
            "choices": [*OUTTYPES],
        },
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Size of a file of weights at most."})
    allow_pickle: bool = field(
        default=False, metadata={"help": "Read pytorch_model.bin where there is no safetensors file, as tensors only."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Convert as the command line `argv` (default: the process's own) says."""
    parser = OptionParser([ConversionArguments], description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="Checkpoint: a folder, or a repository of the Hub.")
    parser.add_argument("target", help="Folder for the result, new or empty.")
    arguments, places = parse(parser, argv)
    if arguments.to == "gguf":
        for name in ("dtype", "max_shard_size"):
            if getattr(arguments, name) != parser.get_default(name):
                raise UserError(f"--{name} says nothing about a GGUF file, which is one file; its weights: --outtype")
        to_gguf(
            places.source,
            places.target,
            outtype=arguments.outtype or "auto",
            allow_pickle=arguments.allow_pickle,
            progress=True,
        )
    else:
        options = asdict(arguments)
        if options.pop("outtype") is not None:
            raise UserError("--outtype is for --to gguf; other models take --dtype")
        convert(places.source, places.target, **options, progress=True)
    print(conversion(Path(places.target)))
