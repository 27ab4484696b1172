"""The options of `hf_alibi benchmark`: what is measured, at which sizes and lengths."""

from dataclasses import dataclass, field

from . import converted, subjects
from .measuring import MeasuringArguments

DTYPES = ["float32", "bfloat16", "float16"]


@dataclass
class AttentionArguments(MeasuringArguments):
    """The attention of one layer, without its projections."""

    lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192], metadata={"help": "Lengths in tokens."})
    dtypes: list[str] = field(
        default_factory=lambda: ["float32"], metadata={"help": "Dtypes of the input.", "choices": DTYPES}
    )
    backends: list[str] = field(
        default_factory=lambda: [backend for backend in subjects.BACKENDS if backend != "eager"],
        metadata={"help": "Our backends.", "choices": subjects.BACKENDS},
    )
    backward: bool = field(default=True, metadata={"help": "Measure forward and backward too, not just forward."})
    num_heads: int = field(default=8, metadata={"help": "Attention heads."})
    head_dim: int = field(default=64, metadata={"help": "Width of a head."})
    max_dense_length: int = field(default=8192, metadata={"help": "Longest length at which a bias is stored."})
    error_rows: int = field(
        default=2048, metadata={"help": "Queries to compare with float64: all if not more, else evenly spaced ones."}
    )


@dataclass
class ShapeArguments(MeasuringArguments):
    """The size of the models."""

    hidden_size: int = field(default=512, metadata={"help": "Width of the residual stream."})
    num_layers: int = field(default=6, metadata={"help": "Decoder layers."})
    num_heads: int = field(default=8, metadata={"help": "Attention heads."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens in the vocabulary."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of weights and input.", "choices": DTYPES})
    peers: list[str] = field(
        default_factory=lambda: list(subjects.PEERS),
        metadata={"help": "Models of Transformers to compare with.", "choices": list(subjects.PEERS)},
    )

    def shape(self, max_positions: int) -> subjects.Shape:
        """Returns the shape of models that can read `max_positions` tokens."""
        size = (self.hidden_size, self.num_layers, self.num_heads, self.vocab_size)
        return subjects.Shape(*size, max_positions, self.dtype, self.device)


@dataclass
class ModelArguments(ShapeArguments):
    """Whole models: training steps, prefills, and the agreement of our backends."""

    train_lengths: list[int] = field(
        default_factory=lambda: [1024, 4096], metadata={"help": "Lengths of training steps, in tokens."}
    )
    prefill_lengths: list[int] = field(
        default_factory=lambda: [1024, 4096, 16384], metadata={"help": "Lengths of prefills, in tokens."}
    )
    backends: list[str] = field(
        default_factory=lambda: subjects.BACKENDS, metadata={"help": "Our backends.", "choices": subjects.BACKENDS}
    )
    max_eager_length: int = field(default=2048, metadata={"help": "Longest length for our eager attention."})
    logits_length: int = field(default=2048, metadata={"help": "Tokens whose logits are compared between backends."})


@dataclass
class GenerationArguments(ShapeArguments):
    """Decoding after a long prompt."""

    contexts: list[int] = field(
        default_factory=lambda: [1024, 4096, 16384], metadata={"help": "Lengths of the prompts, in tokens."}
    )
    new_tokens: int = field(default=16, metadata={"help": "Tokens to decode in a turn."})
    chunk_size: int = field(default=2048, metadata={"help": "Tokens of the prompt to read at a time."})
    max_peer_context: int = field(default=16384, metadata={"help": "Longest prompt for the peers."})


@dataclass
class ConvertedArguments(ShapeArguments):
    """BLOOM, MPT and Falcon in Transformers' own classes, and converted to AlibiGPT, with the same weights."""

    peers: list[str] = field(
        default_factory=lambda: list(converted.FAMILIES),
        metadata={"help": "Models to convert.", "choices": list(converted.FAMILIES)},
    )
    train_lengths: list[int] = field(
        default_factory=lambda: [1024, 4096], metadata={"help": "Lengths of training steps, in tokens."}
    )
    prefill_lengths: list[int] = field(
        default_factory=lambda: [1024, 4096], metadata={"help": "Lengths of prefills in one pass, in tokens."}
    )
    contexts: list[int] = field(
        default_factory=lambda: [4096, 16384], metadata={"help": "Lengths of the prompts to decode after, in tokens."}
    )
    new_tokens: int = field(default=8, metadata={"help": "Tokens to decode in a turn."})
    chunk_size: int = field(default=2048, metadata={"help": "Tokens of the prompt to read at a time."})
    error_positions: list[int] = field(
        default_factory=lambda: [128, 1024, 2048],
        metadata={"help": "Positions at which logits in bfloat16 are compared with float64."},
    )
