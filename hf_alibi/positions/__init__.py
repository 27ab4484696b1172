"""The same decoder with other position methods, for comparison. Importing it registers all of them."""

from .none import NopeGPTConfig, NopeGPTForCausalLM
from .rotary import RotaryGPTConfig, RotaryGPTForCausalLM
from .sinusoidal import SinusoidalGPTConfig, SinusoidalGPTForCausalLM

__all__ = [
    "NopeGPTConfig",
    "NopeGPTForCausalLM",
    "RotaryGPTConfig",
    "RotaryGPTForCausalLM",
    "SinusoidalGPTConfig",
    "SinusoidalGPTForCausalLM",
]
