"""Checkpoints of other models with ALiBi come in, and ours go out.

    model = convert("bigscience/bloom-560m", "runs/bloom")           # BLOOM, MPT, Falcon, Baichuan, JAIS, BTLM, Refact
    model = convert("runs/bloom", "runs/bloom-again", to="bloom")    # or "mpt": a model of Transformers

An architecture is a file: what its config means here, a table of weights with a few reshapes, and, where Transformers
has no class to compare with, its formula in float64. `convert.py` does the rest: it reads and writes tensor by tensor,
carries tokenizer and generation config over, and compares the logits of both.

Transformers' own conversion of weights at load (`WeightConverter`) was considered and is not used. It renames, splits,
joins and transposes; the folds, the bias that is missing in the source and the refusal of config fields would all be
code beside it. Its operations are in a module without promises. And `save_pretrained` undoes its conversions, so that
a converted model would be saved in the source's format again.
"""

from .convert import convert

__all__ = ["convert"]
