"""`hf_alibi study`: a plan of seconds runs, goes on after a kill, and gives the same tables and plots every time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from tiny_study import write_plan, write_text_file

from hf_alibi.cli.study import main
from hf_alibi.errors import UserError
from hf_alibi.study.methods import METHODS

Study = tuple[list[str], Path]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Returns the arguments of a finished study, and its folder."""
    folder = tmp_path_factory.mktemp("study")
    text = write_text_file(folder)
    argv = [str(write_plan(folder)), "--output_dir", str(folder / "results"), "--text", f"train={text}"]
    argv += [f"validation={text}", f"words={text}"]
    main(argv)
    return argv, folder / "results" / "tiny"


def record(study: Study, name: str) -> dict[str, Any]:
    return json.loads((study[1] / "runs" / f"{name}.json").read_text())


def test_each_run_leaves_what_it_found(study: Study) -> None:
    found = record(study, "alibi-L16-s0")
    settings, training = found["settings"], found["training"]
    assert (settings["method"], settings["seed"], settings["training_length"]) == ("alibi", 0, 16)
    assert settings["config"]["hidden_size"] == 32
    assert (training["tokens"], training["steps"]) == (512, 8)
    # The new model is near the uniform distribution over 300 tokens, and learns.
    assert training["losses"][0][1] == pytest.approx(5.7, abs=0.1)
    assert [step for step, _ in training["evaluations"]] == [4, 8]
    assert training["evaluations"][1][1] < training["evaluations"][0][1]
    assert training["peak_mib"] >= training["start_mib"] > 0
    assert len(training["windows"]) == 9
    assert {"cpu", "torch", "transformers", "python", "date"} <= found["environment"].keys()
    assert found["command"] == "hf_alibi study tiny --text NAME=FILES --runs alibi-L16-s0"
    assert found["text"]["tests"] == ["words"]
    assert found["tests"]["words"].keys() == {"16", "32", "64"}
    for length, result in found["tests"]["words"].items():
        assert (result["targets"], result["sliding_targets"]) == (256, 64)
        assert max(map(int, result["by_position"])) == int(length)
    assert found["copies"].keys() == {"32", "64"}
    assert found["interpolated"].keys() == {"32", "64"}
    assert found["windows"]["nats"] == pytest.approx(found["windows"]["nats_without"], rel=1e-6)


def test_methods_see_the_same_text(study: Study) -> None:
    runs = [record(study, f"{method}-L16-s0") for method in ("alibi", "sinusoidal")]
    assert runs[0]["text"] == runs[1]["text"]
    assert runs[1]["windows"] is None
    assert "interpolated" not in runs[1]


def test_no_path_of_this_machine_is_recorded(study: Study) -> None:
    for path in (study[1] / "runs").glob("*.json"):
        assert str(study[1].parents[1]) not in path.read_text()


def test_finished_runs_are_not_run_again(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    files = list((study[1] / "runs").iterdir())
    times = [path.stat().st_mtime_ns for path in files]
    main(study[0])
    assert [path.stat().st_mtime_ns for path in files] == times
    assert "1/2" not in capsys.readouterr().out


def test_tables_and_plots_are_made_again_byte_for_byte(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    made = {path.name: path.read_bytes() for path in study[1].iterdir() if path.suffix in (".md", ".png")}
    assert set(made) == {"tables.md", "lengths-words-L16.png", "positions-L16.png", "copies-L16.png"}
    for name in made:
        (study[1] / name).unlink()
    main([study[0][0], "--output_dir", study[0][2], "--tables"])
    assert {name: (study[1] / name).read_bytes() for name in made} == made
    assert imread(study[1] / "copies-L16.png").std() > 0
    alibi = record(study, "alibi-L16-s0")["tests"]["words"]["64"]["nats"]
    assert f" {2.718281828**alibi:.2f} |" in made["tables.md"].decode()


def test_a_run_that_was_killed_after_training_is_only_tested_again(study: Study) -> None:
    found = record(study, "sinusoidal-L16-s0")
    (study[1] / "runs" / "sinusoidal-L16-s0.json").unlink()
    main(study[0])
    again = record(study, "sinusoidal-L16-s0")
    # Even the times are those of the first process.
    assert again["training"] == found["training"]
    for length, result in found["tests"]["words"].items():
        assert again["tests"]["words"][length]["sliding"] == pytest.approx(result["sliding"], rel=1e-6)


def test_the_first_seed_is_the_best_run_of_a_sweep_with_as_many_tokens(tmp_path: Path) -> None:
    text = write_text_file(tmp_path)
    sweep = "[sweep]\ntokens = 512\nlearning_rate = [1e-3, 1e-4]\n"
    plan = write_plan(tmp_path, sweep, methods='["alibi"]', seeds="[0, 1]")
    main([str(plan), "--output_dir", str(tmp_path), "--text", f"train={text}", f"validation={text}", f"words={text}"])
    swept, first, second = (
        record(([], tmp_path / "tiny"), name) for name in ("sweep-alibi-0.001", "alibi-L16-s0", "alibi-L16-s1")
    )
    assert first["training"] == swept["training"]
    assert first["training"]["losses"] != second["training"]["losses"]
    models = [path.name for path in (tmp_path / "tiny" / "models").iterdir()]
    assert sorted(models) == ["alibi-L16-s1", "sweep-alibi-0.0001", "sweep-alibi-0.001"]
    # The test reads the model of the sweep.
    assert first["tests"]["words"]["16"]["nats"] == pytest.approx(first["training"]["evaluations"][-1][1], abs=0.1)


def test_two_runs_at_a_time_share_the_cores_and_find_the_same(study: Study, tmp_path: Path) -> None:
    plan, _, _, *text = study[0]
    main([plan, "--output_dir", str(tmp_path), *text, "--jobs", "2"])
    for name in ("alibi-L16-s0", "sinusoidal-L16-s0"):
        one, both = record(study, name), record((study[0], tmp_path / "tiny"), name)
        assert both["environment"]["threads"] == max(1, (os.cpu_count() or 1) // 2)
        assert both["settings"] == one["settings"]
        for (step, loss), (same_step, other) in zip(
            one["training"]["evaluations"], both["training"]["evaluations"], strict=True
        ):
            assert (step, loss) == (same_step, pytest.approx(other, rel=1e-4))


def test_another_plan_does_not_take_the_results_for_its_own(study: Study, tmp_path: Path) -> None:
    changed = write_plan(tmp_path, tokens_per_step="128")
    with pytest.raises(
        UserError, match=r"alibi-L16-s0.json .* differs in settings.training.tokens_per_step \(64, not 128\)"
    ):
        main([str(changed), *study[0][1:]])


def test_a_killed_study_goes_on_where_it_was(tmp_path: Path) -> None:
    text = write_text_file(tmp_path)
    argv = [str(write_plan(tmp_path)), "--output_dir", str(tmp_path)]
    argv += ["--text", f"train={text}", f"validation={text}", f"words={text}"]
    first, second = (tmp_path / "tiny" / "runs" / f"{name}-L16-s0.json" for name in ("alibi", "sinusoidal"))
    process = subprocess.Popen([sys.executable, "-m", "hf_alibi", "study", *argv])
    try:
        while not (first.exists() and (workers := _children(process.pid))):
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    # The process of the second run ends by itself.
    while any(map(_is_alive, workers)):
        time.sleep(0.05)
    assert not second.exists()
    written = first.stat().st_mtime_ns
    main(argv)
    assert second.exists()
    assert first.stat().st_mtime_ns == written


def test_a_run_that_fails_is_named_and_the_others_are_made(tmp_path: Path) -> None:
    text = write_text_file(tmp_path)
    more = "[ablations]\ntokens = 128\nlength = 16\nseeds = [0]\ntest_lengths = [16]\n"
    more += "variants = [{ name = 'lost', config = { initializer_range = 1e30 } }, { name = 'sound' }]\n"
    argv = [str(write_plan(tmp_path, more)), "--output_dir", str(tmp_path), "--runs", "ablations*"]
    argv += ["--text", f"train={text}", f"validation={text}"]
    with pytest.raises(UserError, match=r"1 runs have failed: ablations-lost-s0 \(see .*ablations-lost-s0.txt\)"):
        main(argv)
    assert [path.name for path in (tmp_path / "tiny" / "runs").iterdir()] == ["ablations-sound-s0.json"]
    assert "not finite" in (tmp_path / "tiny" / "logs" / "ablations-lost-s0.txt").read_text()


@pytest.mark.slow
def test_the_plan_of_minutes_compares_all_methods(tmp_path: Path) -> None:
    main(["minutes", "--jobs", "2", "--output_dir", str(tmp_path)])
    tables = (tmp_path / "minutes" / "tables.md").read_text()
    for method in METHODS.values():
        assert f"| {method.label} | 64 | 1 | 199,680 |" in tables
    assert "## Speed and memory" in tables


def _children(parent: int) -> list[int]:
    return list(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()))


def _is_alive(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
