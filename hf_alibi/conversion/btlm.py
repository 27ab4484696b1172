"""BTLM-3B-8K (remote code `BTLMLMHeadModel`; Dey et al., arXiv 2309.11568): the architecture of JAIS, see there.

Sources: flash-attention's `models/btlm.py`, which has all names of weights, and the model's README for its scaling.
"""

from .fields import Fields
from .jais import read as read_jais
from .rules import Plan

ARCHITECTURES = ("BTLMLMHeadModel", "BTLMModel")


def read(source: Fields) -> Plan:
    """What the config of a BTLM means here."""
    return read_jais(source, ARCHITECTURES)
