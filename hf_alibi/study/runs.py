"""From a plan to its runs: which model each run trains, on how much text, and how it is tested.

Runs are in the order in which their results are wanted: the sweep, the first seed of the main comparison, the other
seeds, speed, ablations, windows, recall. A run is one process and leaves one JSON file (`one_run.py`).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from ..errors import UserError
from .methods import METHODS, SLOPES
from .plan import Plan

SWEEP, MAIN, ABLATIONS, WINDOWS, SPEED, RECALL = "sweep", "main", "ablations", "windows", "speed", "recall"

# Keys of [training] that belong to the plan: what a run has of them is in its other settings.
OF_THE_PLAN = (
    "methods", "at_all_lengths", "seeds", "lengths", "tokens", "learning_rate", "text_tokens", "tokens_per_second",
)  # fmt: skip

# Keys of a run's settings that do not change its model.
NOT_OF_THE_MODEL = {"name", "question", "variant", "method", "test_lengths", "test"}

# Points along a run at which the windows are recorded, if the plan does not say.
POINTS = 10
LONGEST_TEST = 16


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: Names its file.
        question: The part of the plan it belongs to.
        variant: The row of the table that it belongs to: a method, or the name of an ablation.
        method: In `METHODS`.
        config: Fields of the model's config beyond the plan's and the method's.
        training_length: In tokens.
        seed: Of the initial weights and the order of the text.
        tokens: To train on.
        test_lengths: To test at; empty for a run of the sweep.
        learning_rate: Peak rate; None for the choice of the sweep.
        points: How often the windows are recorded.
    """

    name: str
    question: str
    variant: str
    method: str = "alibi"
    config: dict[str, Any] = field(default_factory=dict)
    training_length: int = 0
    seed: int = 0
    tokens: int = 0
    test_lengths: list[int] = field(default_factory=list)
    learning_rate: float | None = None
    points: int = POINTS


def all_runs(plan: Plan) -> list[Run]:
    """Returns the runs of a plan in order. Raises `UserError` if two have the same name."""
    parts = (_sweep, _main, _speed, _ablations, _windows, _recall)
    runs = [run for part in parts for run in part(plan)]
    for name, number in Counter(run.name for run in runs).items():
        if number > 1:
            raise UserError(f"the plan {plan.name} makes the run {name} {number} times; each needs another name")
    return runs


def settings(run: Run, plan: Plan, choices: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns everything that decides the result of a run, as a JSON object.

    Args:
        run: The run.
        plan: Its plan.
        choices: Of the sweep: `learning_rate` and `config`, by method. Empty without a sweep.
    """
    choice = choices.get(run.method, {"learning_rate": plan.training.learning_rate, "config": {}})
    values = asdict(run)
    if run.question == SWEEP:
        choice = {"learning_rate": run.learning_rate, "config": {}}
    values["learning_rate"] = choice["learning_rate"]
    values["config"] = model_fields(run, plan) | choice["config"] | run.config
    values["training"] = asdict(plan.training)
    values["test"] = asdict(plan.test)
    if run.question == RECALL:
        values["recall"] = asdict(plan.recall)  # type: ignore[arg-type]
        values["recall"].pop("seeds")
    if run.question == SPEED:
        values["speed"] = asdict(plan.speed)  # type: ignore[arg-type]
    for key in OF_THE_PLAN:
        values["training"].pop(key)
    # The chunks in which the text is shuffled, the same at every training length.
    values["training"]["chunk"] = max(plan.training.lengths)
    return values


def training_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns those of a run's settings that decide its model."""
    return {key: value for key, value in settings.items() if key not in NOT_OF_THE_MODEL}


def model_fields(run: Run, plan: Plan) -> dict[str, Any]:
    """Returns the config fields of a run's model that the plan and the method decide."""
    method = METHODS[run.method]
    return {"model_type": method.model_type, "training_length": run.training_length} | plan.model | method.config


def _sweep(plan: Plan) -> Iterator[Run]:
    if plan.sweep is None:
        return
    length = min(plan.training.lengths)
    for method in swept_methods(plan):
        options = plan.sweep.options.get(method, {})
        settings_tried = [dict(zip(options, values, strict=True)) for values in product(*options.values())]
        for config, rate in product(settings_tried, plan.sweep.learning_rate):
            marks = [f"{key}={value}" for key, value in config.items()]
            name = "-".join(["sweep", method, *marks, f"{rate:g}"])
            yield Run(name, SWEEP, method, method, config, length, plan.sweep.seed, plan.sweep.tokens, [], float(rate))


def swept_methods(plan: Plan) -> list[str]:
    """Returns every method that a run of the plan trains."""
    variants = [*(plan.ablations.variants if plan.ablations else []), *(plan.windows.variants if plan.windows else [])]
    return list(dict.fromkeys([*plan.training.methods, *(variant.get("method", "alibi") for variant in variants)]))


def _tests(plan: Plan, length: int) -> list[int]:
    return [test for test in plan.test.lengths if test <= LONGEST_TEST * length]


def _main(plan: Plan) -> Iterator[Run]:
    training = plan.training
    for seed, length in product(training.seeds, training.lengths):
        methods = training.methods if length == min(training.lengths) else training.at_all_lengths
        for method in methods:
            name = f"{method}-L{length}-s{seed}"
            yield Run(name, MAIN, method, method, {}, length, seed, training.tokens, _tests(plan, length))


def _speed(plan: Plan) -> Iterator[Run]:
    if plan.speed is not None:
        yield Run("speed", SPEED, "all methods", "alibi")


def _ablations(plan: Plan) -> Iterator[Run]:
    if plan.ablations is None:
        return
    asked = plan.ablations
    for seed, variant in product(asked.seeds, asked.variants):
        yield _variant(plan, variant, ABLATIONS, asked.length, seed, asked.tokens, asked.test_lengths)


def _windows(plan: Plan) -> Iterator[Run]:
    if plan.windows is None:
        return
    asked = plan.windows
    tokens = asked.steps * plan.training.tokens_per_step
    for seed, variant in product(asked.seeds, asked.variants):
        yield _variant(
            plan, variant, WINDOWS, asked.length, seed, tokens, _tests(plan, asked.length), points=asked.points
        )


def _variant(
    plan: Plan,
    variant: dict[str, Any],
    question: str,
    length: int,
    seed: int,
    tokens: int,
    tests: list[int],
    **more: Any,
) -> Run:
    config = dict(variant.get("config", {}))
    if "slopes" in variant:
        heads = (plan.model | config)["num_attention_heads"]
        config["alibi_slopes"] = SLOPES[variant["slopes"]](heads)
    name = f"{question}-{variant['name'].replace(' ', '_')}-s{seed}"
    method = variant.get("method", "alibi")
    return Run(name, question, variant["name"], method, config, length, seed, tokens, list(tests), **more)


def _recall(plan: Plan) -> Iterator[Run]:
    if plan.recall is None:
        return
    asked = plan.recall
    for seed, method in product(asked.seeds, plan.training.methods):
        name = f"recall-{method}-s{seed}"
        yield Run(name, RECALL, method, method, {}, asked.length, seed, asked.tokens, [asked.length])
