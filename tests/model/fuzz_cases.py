"""Random cases for the differential fuzz: a model, a batch, how the batch is described, and how it is read.

A `Case` prints as one line that makes the same case again. `cases` is the strategy of `hypothesis` that draws them.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

# The number of a document, from 1, or 0 for padding; and its number of tokens.
Run = tuple[int, int]
Step = tuple[Any, ...]

HEADS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 20]
# Numbers of tokens in long texts. Up to 1,024 tokens, windows are ignored.
LONG = (1025, 1300)
SHAPES = ["whole", "left", "right", "both sides", "holes", "packed", "packed and padded"]
# All ways to describe a batch: with one document per row, with any documents, with documents but no padding.
ONE_DOCUMENT = ["mask", "boolean mask", "float mask"]
DOCUMENTS = [
    "positions and mask",
    "positions from 1 and mask",
    "continued positions and mask",
    "document numbers",
    "sequence numbers and mask",
]
WITHOUT_PADDING = [
    "positions",
    "positions from 1",
    "positions from 2",
    "sequence numbers",
    "cumulative lengths",
    "cumulative lengths and positions",
]
CAUSAL_MASKS = ["4D boolean", "4D lowest", "4D infinite", "4D by head", "4D numbers"]
# These work without a cache only.
ALL_AT_ONCE = ["4D with positions", "4D future"]
FOUR_DIMENSIONS = CAUSAL_MASKS + ALL_AT_ONCE


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        config: Fields of `AlibiGPTConfig`.
        gain: The gain of QK-norm, which makes windows short or long.
        dtype: Of the model; "autocast" is a float32 model under autocast to bfloat16.
        backend: Attention implementation.
        small_tiles: Whether tiles, rings and the smallest lengths with windows are a fraction of their usual size.
        rows: The batch, every row as runs.
        encoding: How the batch is described to the model.
        cache: Its kind; `None`: no cache, and one step.
        steps: `("read", tokens)`; `("mistake", tokens)`, which reads other tokens and takes them back;
            `("reorder", rows)`; `("repeat", times)`; `("select", rows)`.
        gradients: Whether to compare these too: "none", "plain", or with "checkpointing".
        seed: Of weights and tokens.
    """

    config: dict[str, Any]
    gain: float
    dtype: str
    backend: str
    small_tiles: bool
    rows: list[list[Run]]
    encoding: str
    cache: str | None
    steps: list[Step]
    gradients: str
    seed: int

    @property
    def length(self) -> int:
        """Slots in a row."""
        return sum(tokens for _, tokens in self.rows[0])

    @property
    def needs_lost_keys(self) -> bool:
        """Whether padding after a token, or a mask, may need keys that the windowed cache no longer has."""
        inner = any(document == 0 for row in self.rows for document, _ in row[1:])
        return self.cache == "windowed" and (inner or self.encoding in FOUR_DIMENSIONS)


@st.composite
def cases(draw: st.DrawFn, backends: tuple[str, ...] = ("eager", "sdpa")) -> Case:
    """Draws a case with one of these attention implementations."""
    backend = draw(st.sampled_from(backends))
    of_sdpa = ["windowed", "windowed", "growing"] if backend == "sdpa" else []
    cache = draw(st.sampled_from([None, None, "dynamic", "static", "growing", *of_sdpa]))
    is_long = draw(st.integers(0, 9)) == 9
    config = draw(_configs(is_long, needs_windows=cache == "windowed"))
    shape = draw(st.sampled_from(SHAPES))
    is_dynamic = config.get("alibi_scaling") == {"type": "dynamic"}
    if is_dynamic and cache is not None:
        # The length of a pass is that of the longest text in the batch. For texts that have ended, this length would
        # be ambiguous.
        shape = draw(st.sampled_from(["whole", "left"]))
    length = draw(st.integers(*LONG) if is_long else st.integers(1, 60) | st.integers(1, 200))
    batch = draw(st.integers(1, 2 if is_long else 3))
    rows = [draw(_rows(shape, length)) for _ in range(batch)]
    encoding = draw(st.sampled_from(_encodings(rows, cache)))
    steps = [("read", length)] if cache is None else draw(_steps(length, batch, cache, is_long))
    dtypes = ["float32", "float32", "bfloat16", "float16", "autocast"]
    if backend != "flex_attention":
        dtypes.append("float64")
    return Case(
        config=config,
        gain=draw(st.sampled_from([1.0, 0.1, 0.5, 3.0])) if config["qk_norm"] else 1.0,
        dtype=draw(st.sampled_from(dtypes)),
        backend=backend,
        small_tiles=not is_long and draw(st.booleans()),
        rows=rows,
        encoding=encoding,
        cache=cache,
        steps=steps,
        gradients=draw(st.sampled_from(_gradients(cache, backend))),
        seed=draw(st.integers(0, 999)),
    )


@st.composite
def _configs(draw: st.DrawFn, is_long: bool, needs_windows: bool) -> dict[str, Any]:
    num_heads = draw(st.sampled_from(HEADS[:4] if is_long else HEADS))
    config: dict[str, Any] = {
        "num_attention_heads": num_heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in range(1, num_heads + 1) if num_heads % n == 0])),
        "hidden_size": draw(st.sampled_from([8, 12, 15])),
        "intermediate_size": 16,
        "num_hidden_layers": draw(st.integers(1, 1 if is_long else 3)),
        "hidden_act": draw(st.sampled_from(["relu2", "gelu", "silu"])),
        "norm_type": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "training_length": draw(st.sampled_from([1, 16, 40, 512])),
    }
    for name in ("attention_bias", "mlp_bias", "embedding_norm", "tie_word_embeddings", "alibi_slopes_trainable"):
        config[name] = draw(st.booleans())
    config["qk_norm"] = needs_windows or draw(st.booleans())
    config["qk_norm_gain"] = draw(st.sampled_from(["head", "channel", "none"]))
    # A norm over a single number returns its sign, for which rounding errors can be arbitrarily large.
    config["head_dim"] = draw(st.sampled_from([2, 3, 5, 8, 16] if config["qk_norm"] else [1, 2, 3, 5, 8, 16]))
    if config["norm_type"] == "layernorm":
        config["norm_bias"] = draw(st.booleans())
    which = draw(st.sampled_from(["paper", "max_bias", "custom"]))
    if which == "max_bias":
        config["alibi_max_bias"] = draw(st.sampled_from([1, 4.5, 16, 30.0]))
    elif which == "custom":
        exponents = draw(st.lists(st.integers(-12, 3), min_size=num_heads, max_size=num_heads))
        config["alibi_slopes"] = [1.25 * 2.0**exponent for exponent in exponents]
    scalings: list[dict[str, Any] | None] = [None, None, {"type": "linear", "factor": 2.5}, {"type": "dynamic"}]
    config["alibi_scaling"] = draw(st.sampled_from(scalings[: 3 if needs_windows else 4]))
    tolerances = [2.0**-24, 1e-3, 0.1, 0]
    config["window_tolerance"] = draw(st.sampled_from(tolerances[: 3 if needs_windows else 4]))
    return config


@st.composite
def _rows(draw: st.DrawFn, shape: str, length: int) -> list[Run]:
    """Draws a row of `length` slots."""
    most = {"whole": 1, "left": 2, "right": 2, "both sides": 3}.get(shape, 6)
    sizes = draw(_partitions(length, most))
    if shape == "left":
        documents = [0, 1][-len(sizes) :]
    elif shape in ("whole", "right", "both sides"):
        documents = [[1], [1, 0] if shape == "right" else [0, 1], [0, 1, 0]][len(sizes) - 1]
    elif shape == "packed":
        documents = [n + 1 for n in range(len(sizes))]
    else:
        # In "holes" the single document continues after them.
        documents, document = [], 1
        for _ in sizes:
            is_hole = draw(st.booleans())
            documents.append(0 if is_hole else document)
            document += not is_hole and shape != "holes"
    return list(zip(documents, sizes, strict=True))


@st.composite
def _partitions(draw: st.DrawFn, total: int, most: int) -> list[int]:
    """Draws up to `most` positive numbers with this sum."""
    cuts: list[int] = []
    if total > 1 and most > 1:
        cuts = draw(st.lists(st.integers(1, total - 1), max_size=min(most, total) - 1, unique=True))
    return [end - start for start, end in pairwise([0, *sorted(cuts), total])]


def _encodings(rows: list[list[Run]], cache: str | None) -> list[str]:
    """Returns every way to describe these rows."""
    documents = [[document for document, _ in row if document] for row in rows]
    is_packed = any(len(set(row)) > 1 for row in documents)
    is_padded = any(document == 0 for row in rows for document, _ in row)
    has_holes = any(document == 0 for row in rows for document, _ in row[1:-1])
    found = list(DOCUMENTS)
    if not is_packed:
        found += ONE_DOCUMENT
    if not is_padded:
        found += WITHOUT_PADDING
    if not is_packed and not is_padded:
        found.append("nothing")
    # In a mask of queries times keys, holes count as distance.
    if not has_holes:
        found += CAUSAL_MASKS if cache else FOUR_DIMENSIONS
    return found


@st.composite
def _steps(draw: st.DrawFn, length: int, batch: int, cache: str, is_long: bool) -> list[Step]:
    """Draws how `length` slots are read into a cache."""
    if not is_long and length <= 60 and draw(st.booleans()):
        prompt = draw(st.integers(1, length))
        sizes = [prompt] + [1] * (length - prompt)
    else:
        sizes = draw(_partitions(length, 8))
    steps: list[Step] = []
    changes = draw(st.booleans())
    for size in sizes:
        kind = draw(st.sampled_from(["none", "mistake", "reorder", "repeat", "select"])) if changes else "none"
        if kind == "mistake":
            steps.append(("mistake", draw(st.integers(1, 5 if cache == "windowed" else 20))))
        elif kind == "reorder":
            steps.append(("reorder", tuple(draw(st.integers(0, batch - 1)) for _ in range(batch))))
        elif kind == "repeat" and cache != "static" and batch <= 3:
            steps.append(("repeat", 2))
            batch *= 2
        elif kind == "select" and cache != "static":
            chosen = draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=batch))
            steps.append(("select", tuple(chosen)))
            batch = len(chosen)
        steps.append(("read", size))
    return steps


def _gradients(cache: str | None, backend: str) -> list[str]:
    can_be_had = cache is None and backend != "flex_attention"
    return ["none", "plain", "plain", "checkpointing"] if can_be_had else ["none"]
