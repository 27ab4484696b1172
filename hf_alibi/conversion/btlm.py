"""BTLM-3B-8K (remote code `BTLMLMHeadModel`; Dey et al., arXiv 2309.11568). It has the architecture of JAIS.

Sources: flash-attention's `models/btlm.py` for the names of weights, and the model's README for its scaling.
"""

from .fields import Fields
from .jais import read as read_jais
from .rules import Plan

ARCHITECTURES = ("BTLMLMHeadModel", "BTLMModel")


def read(source: Fields) -> Plan:
    """Returns the plan that the config of a BTLM asks for."""
    return read_jais(source, ARCHITECTURES)
