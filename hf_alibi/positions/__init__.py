"""The same decoder with other position methods, for comparison. Importing it registers all of them."""

from .learned import LearnedGPTConfig, LearnedGPTForCausalLM
from .none import NopeGPTConfig, NopeGPTForCausalLM
from .rotary import RotaryGPTConfig, RotaryGPTForCausalLM
from .sinusoidal import SinusoidalGPTConfig, SinusoidalGPTForCausalLM

POSITION_METHODS = (
    LearnedGPTForCausalLM,
    NopeGPTForCausalLM,
    RotaryGPTForCausalLM,
    SinusoidalGPTForCausalLM,
)

__all__ = [
    "POSITION_METHODS",
    "LearnedGPTConfig",
    "LearnedGPTForCausalLM",
    "NopeGPTConfig",
    "NopeGPTForCausalLM",
    "RotaryGPTConfig",
    "RotaryGPTForCausalLM",
    "SinusoidalGPTConfig",
    "SinusoidalGPTForCausalLM",
]
