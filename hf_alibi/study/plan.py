"""A plan says what a study trains and tests. It is a TOML file with a section for each question.

`[model]` has the config fields that all models share, `[training]` how the main comparison trains, and `[test]` how
every model is tested. Other sections are optional: `[sweep]` chooses a learning rate for each method, `[ablations]`
varies ALiBi, `[windows]` follows the head windows along a longer run, `[speed]` measures time and memory, and
`[recall]` trains an associative-recall task with the text. The dataclasses below list the keys.
"""

import tomllib
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..errors import UserError
from .methods import METHODS, SLOPES

PLANS = Path(__file__).parent / "plans"

Number = int | float


@strict
@dataclass
class Training:
    """How the models of the main comparison train: each of `methods`, with each of `seeds`.

    Attributes:
        tokens: Training tokens of a run.
        tokens_per_step: Tokens of an optimizer step, a multiple of the longest of `lengths`.
        lengths: Training lengths in tokens.
        seeds: Seeds of the initial weights and of the order of the text.
        methods: Names in `METHODS`; all of them if empty.
        at_all_lengths: Those of `methods` that train at each of `lengths`; all of them if empty. The others train at
            the shortest.
        learning_rate: Peak rate, where there is no sweep.
        warmup_fraction: Part of the steps in which the rate rises. It falls along a cosine afterwards.
        evaluations: Number of evaluations along a run.
        evaluation_tokens: Held-out tokens of each evaluation.
        gradient_accumulation_steps: Forward passes of a step.
        bf16: Whether to train with bfloat16 autocast.
        text_tokens: Tokens of the text that runs draw their rows from; None for those of the longest run. Longer runs
            read it again. If it is given, runs that are added to a plan later do not change the others.
        tokens_per_second: Speed that `--dry_run` assumes, measured where the plan says.
    """

    tokens: int
    tokens_per_step: int
    lengths: list[int]
    seeds: list[int]
    methods: list[str] = field(default_factory=list)
    at_all_lengths: list[str] = field(default_factory=list)
    learning_rate: Number = 3e-3
    warmup_fraction: Number = 0.1
    weight_decay: Number = 0.1
    adam_beta2: Number = 0.95
    max_grad_norm: Number = 1.0
    evaluations: int = 10
    evaluation_tokens: int = 16_384
    gradient_accumulation_steps: int = 1
    bf16: bool = False
    text_tokens: int | None = None
    tokens_per_second: Number = 6500


@strict
@dataclass
class Sweep:
    """Runs at the shortest training length, which choose the settings of each method.

    Attributes:
        tokens: Training tokens of a run. With those of the main comparison, the best run is its first seed.
        learning_rate: Peak rates to try.
        options: For each method, config fields and the values to try.
        seed: The seed of all runs.
    """

    tokens: int
    learning_rate: list[Number]
    options: dict[str, dict[str, list]] = field(default_factory=dict)
    seed: int = 0


@strict
@dataclass
class Test:
    """How every model is tested, on each text.

    Attributes:
        lengths: Lengths in tokens. A model is tested at those up to 16 times its training length.
        tokens: Targets with non-overlapping windows, a multiple of twice the longest length: of a piece of text.
        stride: Tokens between sliding windows.
        sliding_targets: Targets with sliding windows, spread over the second half of every piece.
        copy_distances: Tokens from the beginning of a segment to that of its copy; none if empty.
        copy_tokens: Tokens of segment, distance and copy that are read at each distance.
        tokens_per_forward: Most tokens in a forward pass.
    """

    lengths: list[int]
    tokens: int
    stride: int
    sliding_targets: int
    copy_distances: list[int] = field(default_factory=list)
    copy_tokens: int = 32_768
    tokens_per_forward: int = 8192


@strict
@dataclass
class Ablations:
    """Variants of a method, each trained once for every seed.

    Attributes:
        tokens: Training tokens of a run.
        length: Training length.
        seeds: Seeds.
        variants: Tables with `name`, `method` (alibi by default), `slopes` (a name in `SLOPES`) and `config` (fields).
        test_lengths: Lengths to test at.
    """

    tokens: int
    length: int
    seeds: list[int]
    variants: list[dict]
    test_lengths: list[int]


@strict
@dataclass
class Windows:
    """A longer run along which the head windows are recorded.

    Attributes:
        steps: Optimizer steps.
        length: Training length.
        seeds: Seeds.
        variants: As in `Ablations`; ALiBi alone by default.
        points: Number of records along the run.
    """

    steps: int
    length: int
    seeds: list[int] = field(default_factory=lambda: [0])
    variants: list[dict] = field(default_factory=lambda: [{"name": "alibi"}])
    points: int = 20


@strict
@dataclass
class Speed:
    """Time and memory of training steps and of inference, of all methods in turns.

    Attributes:
        lengths: Lengths in tokens.
        rounds: Rounds in which every method has its turn.
    """

    lengths: list[int]
    rounds: int = 5


@strict
@dataclass
class Recall:
    """Training with text in which pairs of random tokens occur, and later again.

    Attributes:
        tokens: Training tokens of a run.
        length: Training length.
        seeds: Seeds.
        pairs: Pairs of key and value in a row.
        distances: Tokens from the pairs to the questions in tests.
        rows: Rows of a test.
    """

    tokens: int
    length: int
    distances: list[int]
    seeds: list[int] = field(default_factory=lambda: [0])
    pairs: int = 4
    rows: int = 64


@strict
@dataclass
class Plan:
    """A study. `name` is that of its file, and `model` holds config fields that all models share."""

    name: str
    model: dict[str, Any]
    training: Training
    test: Test
    sweep: Sweep | None = None
    ablations: Ablations | None = None
    windows: Windows | None = None
    speed: Speed | None = None
    recall: Recall | None = None


SECTIONS = {
    "training": Training,
    "test": Test,
    "sweep": Sweep,
    "ablations": Ablations,
    "windows": Windows,
    "speed": Speed,
    "recall": Recall,
}
VARIANT_KEYS = {"name", "method", "slopes", "config"}


def find_plan(name: str) -> Path:
    """Returns the file of a plan: one of the package by its name, or any path.

    Raises:
        UserError: If there is no such file.
    """
    known = sorted(path.stem for path in PLANS.glob("*.toml"))
    path = PLANS / f"{name}.toml" if name in known else Path(name)
    if not path.is_file():
        raise UserError(f"no plan {name}: give a TOML file, or one of {', '.join(known)}")
    return path


def load_plan(path: Path) -> Plan:
    """Reads and checks a plan. Raises `UserError` for what is wrong in it."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the plan {path}: {shorten(str(error), 200)}") from error
    _known(tables, ["model", *SECTIONS], str(path))
    for needed in ("model", "training", "test"):
        if needed not in tables:
            raise UserError(f"{path} has no section [{needed}]")
    sections = {
        name: _section(SECTIONS[name], tables[name], f"{path} [{name}]") for name in SECTIONS if name in tables
    }
    plan = Plan(name=path.stem, model=tables["model"], **sections)
    if not plan.training.methods:
        plan.training.methods = list(METHODS)
    if not plan.training.at_all_lengths:
        plan.training.at_all_lengths = plan.training.methods
    _check(plan, str(path))
    return plan


def _section(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a section")
    _known(values, [entry.name for entry in fields(kind)], where)
    try:
        return kind(**values)
    except (TypeError, StrictDataclassError) as error:
        raise UserError(f"{where}: {shorten(str(error), 200)}") from error


def _known(values: dict[str, Any], known: list[str], where: str) -> None:
    """Raises `UserError` for a key that is not known."""
    for key in values:
        if key not in known:
            nearest = get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"only {', '.join(known)}"
            raise UserError(f"{where} has no key {key!r}; {hint}")


def _check(plan: Plan, where: str) -> None:
    training, test = plan.training, plan.test
    variants = [*(plan.ablations.variants if plan.ablations else []), *(plan.windows.variants if plan.windows else [])]
    for variant in variants:
        _known(variant, sorted(VARIANT_KEYS), f"{where}, a variant")
        if not isinstance(variant.get("name"), str):
            raise UserError(f"{where}: the variant {variant} needs a name")
        if variant.get("slopes") not in {None, *SLOPES}:
            raise UserError(f"{where}: no slopes {variant['slopes']!r}, only {', '.join(SLOPES)}")
    named = [*training.methods, *(variant.get("method", "alibi") for variant in variants)]
    for method in [*named, *(plan.sweep.options if plan.sweep else [])]:
        if method not in METHODS:
            raise UserError(f"{where} names a method {method!r}; the methods are {', '.join(METHODS)}")
    for method in training.at_all_lengths:
        if method not in training.methods:
            raise UserError(f"{where} [training]: at_all_lengths has {method!r}, which is not one of methods")
    step = training.tokens_per_step
    asked = [section for section in (plan.ablations, plan.windows, plan.recall) if section]
    lengths = {*training.lengths, *(section.length for section in asked)}
    if not training.lengths or not training.seeds or not test.lengths:
        raise UserError(f"{where} needs at least one training length, one seed and one test length")
    for length in lengths:
        rows = training.gradient_accumulation_steps * length
        if length < 8 or step % rows or max(training.lengths) % length:
            raise UserError(
                f"{where}: tokens_per_step {step} must be a multiple of each training length times "
                f"gradient_accumulation_steps, and the longest of lengths a multiple of each; {length} does not fit"
            )
    if training.evaluation_tokens < max(lengths):
        raise UserError(f"{where} [training]: evaluation_tokens must be at least the longest training length")
    longest = max(test.lengths)
    if test.tokens % (2 * longest) or any(longest % length for length in test.lengths):
        raise UserError(
            f"{where} [test]: tokens must be a multiple of twice the longest length, and that of every other length"
        )
    pieces = test.tokens // (2 * longest)
    if not 1 <= test.stride <= min(test.lengths):
        raise UserError(f"{where} [test]: stride must be from 1 to the shortest length")
    windows, rest = divmod(test.sliding_targets, test.stride * pieces)
    if rest or windows < 1 or longest % (windows * test.stride):
        raise UserError(
            f"{where} [test]: sliding_targets must be {pieces}, for the pieces of the text, times a multiple of "
            "stride that divides the longest length"
        )
