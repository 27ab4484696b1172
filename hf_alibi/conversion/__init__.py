"""Converts checkpoints of other models with ALiBi to AlibiGPT, and AlibiGPT to some of them.

    model = convert("bigscience/bloom-560m", "runs/bloom")           # BLOOM, MPT, Falcon, Baichuan, JAIS, BTLM, Refact
    model = convert("runs/bloom", "runs/bloom-again", to="bloom")    # or "mpt": a model of Transformers
    path = to_gguf("runs/mine", "runs/mine-gguf", outtype="q8_0")    # a file for llama.cpp

Each architecture is one file. It has the meaning of the config's fields, a table of weights with a few reshapes, and
the architecture's formula in float64 if Transformers has no class to compare with. `convert.py` does the rest: it
reads and writes tensor by tensor, copies tokenizer and generation config, and compares the logits of both models.

Transformers' own conversion of weights at load (`WeightConverter`) is not used, for three reasons. It renames, splits,
joins and transposes, but folded factors, biases that the source lacks and refused config fields would need further
code. Its operations are in a module that may change at any time. And `save_pretrained` undoes its conversions, so a
converted model would be saved in the source's format again.
"""

from .convert import convert
from .gguf_file import to_gguf

__all__ = ["convert", "to_gguf"]
