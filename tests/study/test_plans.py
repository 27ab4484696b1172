"""Plans: those of the package are sound, mistakes are named, and a dry run lists every run."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tiny_study import write_plan, write_text_file
from transformers import AutoConfig

from hf_alibi.cli.study import main
from hf_alibi.errors import UserError
from hf_alibi.model.alibi import alibi_slopes
from hf_alibi.study.files import run_file, write_json
from hf_alibi.study.methods import METHODS, SLOPES
from hf_alibi.study.plan import PLANS, find_plan, load_plan
from hf_alibi.study.runs import Run, all_runs, settings
from hf_alibi.study.study import sweep_choices

CONFIGS = Path(__file__).parents[2] / "configs"
EVERYTHING = """
[sweep]
tokens = 256
learning_rate = [1e-3, 3e-3]
options.sinusoidal.mimetic_init = [true, false]

[ablations]
tokens = 256
length = 16
seeds = [0, 1]
test_lengths = [16, 32]
variants = [{ name = "4 heads", config = { num_attention_heads = 4 } }, { name = "halved", slopes = "halved" }]

[windows]
steps = 8
length = 8

[recall]
tokens = 256
length = 16
pairs = 2
distances = [8]

[speed]
lengths = [16]
"""


def plan_of(folder: Path, more: str = "", **changes: str) -> Any:
    return load_plan(write_plan(folder, more, **changes))


def test_runs_come_in_the_order_of_their_questions(tmp_path: Path) -> None:
    names = [run.name for run in all_runs(plan_of(tmp_path, EVERYTHING, seeds="[0, 1]"))]
    assert names == [
        "sweep-alibi-0.001",
        "sweep-alibi-0.003",
        "sweep-sinusoidal-mimetic_init=True-0.001",
        "sweep-sinusoidal-mimetic_init=True-0.003",
        "sweep-sinusoidal-mimetic_init=False-0.001",
        "sweep-sinusoidal-mimetic_init=False-0.003",
        "alibi-L16-s0",
        "sinusoidal-L16-s0",
        "alibi-L16-s1",
        "sinusoidal-L16-s1",
        "speed",
        "ablations-4_heads-s0",
        "ablations-halved-s0",
        "ablations-4_heads-s1",
        "ablations-halved-s1",
        "windows-alibi-s0",
        "recall-alibi-s0",
        "recall-sinusoidal-s0",
    ]


def test_only_some_methods_train_at_twice_the_length(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, lengths="[16, 32]", at_all_lengths='["alibi"]')
    assert [run.name for run in all_runs(plan)] == ["alibi-L16-s0", "sinusoidal-L16-s0", "alibi-L32-s0"]
    with pytest.raises(UserError, match="at_all_lengths has 'rotary', which is not one of methods"):
        plan_of(tmp_path, at_all_lengths='["rotary"]')


def test_variants_change_the_model(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, EVERYTHING)
    found = {run.name: settings(run, plan, {})["config"] for run in all_runs(plan)}
    assert found["ablations-4_heads-s0"]["num_attention_heads"] == 4
    assert found["ablations-halved-s0"]["alibi_slopes"] == [slope / 2 for slope in alibi_slopes(2)]
    assert found["sinusoidal-L16-s0"]["model_type"] == "sinusoidal_gpt"


@pytest.mark.parametrize("rule", SLOPES)
@pytest.mark.parametrize("heads", [1, 6])
def test_slopes_of_the_ablations(rule: str, heads: int) -> None:
    found, paper = SLOPES[rule](heads), alibi_slopes(heads)
    expected = {
        "halved": [slope / 2 for slope in paper],
        "doubled": [slope * 2 for slope in paper],
        # The product of all slopes stays.
        "uniform": [pytest.approx(float.fromhex("0x1p0") * _geometric_mean(paper))] * heads,
        "shifted": [2 ** (-8 * h / 5) for h in range(6)] if heads == 6 else [1],
    }[rule]
    assert found == expected


def _geometric_mean(values: list[float]) -> float:
    product = 1.0
    for value in values:
        product *= value
    return product ** (1 / len(values))


def test_the_sweep_chooses_the_lowest_loss_of_each_method(tmp_path: Path) -> None:
    plan, numbers = plan_of(tmp_path, EVERYTHING), count()
    losses = [5.0, 4.0, 3.0, None, 2.5, 9.0]
    runs = [run for run in all_runs(plan) if run.question == "sweep"]
    for run, loss in zip(runs[:5], losses, strict=False):
        write_json(run_file(tmp_path, run.name), {"training": {"evaluations": [[1, next(numbers)], [4, loss]]}})
    assert sweep_choices(plan, tmp_path).keys() == {"alibi"}
    write_json(run_file(tmp_path, runs[5].name), {"training": {"evaluations": [[4, losses[5]]]}})
    choices = sweep_choices(plan, tmp_path)
    assert (choices["alibi"]["learning_rate"], choices["alibi"]["config"]) == (3e-3, {})
    assert (choices["sinusoidal"]["learning_rate"], choices["sinusoidal"]["config"]) == (1e-3, {"mimetic_init": False})
    assert choices["sinusoidal"]["tried"]["sweep-sinusoidal-mimetic_init=True-0.003"] is None
    asked = settings(Run("x", "main", "sinusoidal", "sinusoidal", training_length=16), plan, choices)
    assert asked["learning_rate"] == 1e-3
    assert asked["config"]["mimetic_init"] is False


@pytest.mark.parametrize("path", [*PLANS.glob("*.toml"), *CONFIGS.glob("*.toml")], ids=lambda path: path.stem)
def test_plans_that_come_with_the_package_are_sound(path: Path) -> None:
    plan = load_plan(path)
    names = [run.name for run in all_runs(plan)]
    assert len(names) == len(set(names))
    for run in all_runs(plan):
        if run.question != "speed":
            AutoConfig.for_model(**settings(run, plan, {})["config"])


def test_the_reported_plan_is_what_its_results_claim() -> None:
    plan = load_plan(find_plan("reported"))
    assert plan.training.methods == list(METHODS)
    assert plan.training.tokens >= 3_000_000
    assert len(plan.training.seeds) >= 3
    assert plan.ablations.tokens >= 1_000_000
    assert plan.windows.steps >= 5000
    assert plan.windows.points >= 10
    assert max(plan.test.lengths) >= 16 * max(plan.training.lengths)


@pytest.mark.parametrize(("name", "parameters"), [("wikitext103", "201.4M"), ("large", "1,258.4M")])
def test_a_dry_run_tells_the_papers_shapes(name: str, parameters: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(CONFIGS / f"{name}.toml"), "--dry_run", "--runs", "alibi-L512*"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "run",
        "parameters",
        "without",
        "embeddings",
        "tokens",
        "a",
        "step",
        "steps",
        "memory",
        "GiB",
        "minutes",
    ]
    assert lines[1].split()[2] == parameters
    assert "training tokens" in lines[-1]


def test_a_dry_run_lists_every_run_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_plan(tmp_path, EVERYTHING)
    main([str(path), "--dry_run", "--output_dir", str(tmp_path / "results")])
    found = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert found == [run.name for run in all_runs(load_plan(path))]
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"methods": '["alibi", "rotari"]'}, "", "names a method 'rotari'; the methods are alibi, "),
        ({"methods": '["alibi", "alibi"]'}, "", "makes the run alibi-L16-s0 2 times"),
        ({"stride": "8\nstridee = 3"}, "", r"\[test\] has no key 'stridee'; did you mean stride\?"),
        ({}, "[tests]\n", r"has no key 'tests'; did you mean test\?"),
        ({"tokens_per_step": "60"}, "", "tokens_per_step 60 must be a multiple of each training length"),
        ({"seeds": "[]"}, "", "at least one training length, one seed and one test length"),
        ({"seeds": '"0"'}, "", r"\[training\].*seeds"),
        ({"sliding_targets": "60"}, "", "sliding_targets must be 2, for the pieces of the text, times a multiple of"),
        ({"sliding_targets": "0"}, "", "sliding_targets must be 2"),
        ({"sliding_targets": "256"}, "", "sliding_targets must be 2"),
        ({"evaluation_tokens": "15"}, "", "evaluation_tokens must be at least the longest training length"),
        ({"stride": "32"}, "", "stride must be from 1 to the shortest length"),
        ({"hidden_size": "33"}, "", "impossible model.*33 does not divide into 2 heads"),
        ({"hidden_size": "32\nhiden_act = 'silu'"}, "", "impossible model.*hiden_act"),
        ({}, "[windows]\nlength = 16\n", r"\[windows\].*steps"),
        ({}, "[windows]\nsteps = 2\nlength = 16\nvariants = [{ name = 'x', slope = 3 }]\n", "has no key 'slope'"),
        ({}, "[windows]\nsteps = 2\nlength = 16\nvariants = [{ name = 'x', slopes = 'y' }]\n", "no slopes 'y'"),
        ({"tokens": "= 3"}, "", "cannot read the plan"),
    ],
)  # fmt: skip
def test_mistakes_in_a_plan_are_named(changes: dict[str, str], more: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        main([str(write_plan(tmp_path, more, **changes)), "--dry_run"])


def test_mistakes_on_the_command_line_are_named(tmp_path: Path) -> None:
    plan, text = str(write_plan(tmp_path)), write_text_file(tmp_path)
    out = ["--output_dir", str(tmp_path / "results")]
    with pytest.raises(UserError, match="no plan hours: give a TOML file, or one of gpu, minutes, reported"):
        main(["hours"])
    with pytest.raises(UserError, match="no such file"):
        main([plan, *out, "--text", f"train={tmp_path / 'nowhere.txt'}"])
    with pytest.raises(UserError, match=r"--text takes NAME=FILES, such as train=books.jsonl, not 'words.txt'"):
        main([plan, *out, "--text", "words.txt"])
    with pytest.raises(UserError, match="--text needs a text called train, only got words"):
        main([plan, *out, "--text", f"words={text}"])
    with pytest.raises(UserError, match="has no finished runs"):
        main([plan, *out, "--tables"])
    with pytest.raises(UserError, match=r"--runs alibi-L3\*: no such run"):
        main([plan, *out, "--dry_run", "--runs", "alibi-L3*"])
    few = tmp_path / "few.txt"
    few.write_text("a")
    with pytest.raises(UserError, match="the text train has 2 tokens, but the plan needs 16 of it"):
        main([plan, *out, "--text", f"train={few}", f"validation={text}"])
    short = tmp_path / "short.txt"
    short.write_text("a few words\n")
    with pytest.raises(UserError, match=r"the text short has \d+ tokens, but the plan needs 257 of it"):
        main([plan, *out, "--text", f"train={text}", f"validation={text}", f"short={short}"])
