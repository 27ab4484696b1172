"""The same decoder with other position methods, for comparison. Importing it registers all of them."""

from .fox import FoxGPTConfig, FoxGPTForCausalLM
from .hype import HypeGPTConfig, HypeGPTForCausalLM
from .kerple import KerpleGPTConfig, KerpleGPTForCausalLM
from .learned import LearnedGPTConfig, LearnedGPTForCausalLM
from .none import NopeGPTConfig, NopeGPTForCausalLM
from .rotary import RotaryGPTConfig, RotaryGPTForCausalLM
from .sinusoidal import SinusoidalGPTConfig, SinusoidalGPTForCausalLM
from .t5 import T5GPTConfig, T5GPTForCausalLM

POSITION_METHODS = (
    FoxGPTForCausalLM,
    HypeGPTForCausalLM,
    KerpleGPTForCausalLM,
    LearnedGPTForCausalLM,
    NopeGPTForCausalLM,
    RotaryGPTForCausalLM,
    SinusoidalGPTForCausalLM,
    T5GPTForCausalLM,
)

__all__ = [
    "POSITION_METHODS",
    "FoxGPTConfig",
    "FoxGPTForCausalLM",
    "HypeGPTConfig",
    "HypeGPTForCausalLM",
    "KerpleGPTConfig",
    "KerpleGPTForCausalLM",
    "LearnedGPTConfig",
    "LearnedGPTForCausalLM",
    "NopeGPTConfig",
    "NopeGPTForCausalLM",
    "RotaryGPTConfig",
    "RotaryGPTForCausalLM",
    "SinusoidalGPTConfig",
    "SinusoidalGPTForCausalLM",
    "T5GPTConfig",
    "T5GPTForCausalLM",
]
