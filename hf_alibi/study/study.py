"""Runs a study: each run that is not finished, one after the other, each in a process of its own.

A run is finished when its JSON file exists. So a study that was stopped goes on with the same command, at the run that
it was in. A finished run is never run again: if the plan or the text now ask for something else, that is an error.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import read_json, run_file, write_json
from .plan import Plan
from .runs import SPEED, SWEEP, Run, all_runs, model_fields, settings
from .training import new_config


def run_study(plan: Plan, plan_file: Path, text: dict[str, Any], folder: Path, patterns: Sequence[str]) -> None:
    """Runs what is not finished.

    Args:
        plan: The plan.
        plan_file: Its file, which is copied.
        text: What `prepare_text` returned.
        folder: Folder of the study.
        patterns: Names or patterns of the runs to make; empty for all.

    Raises:
        UserError: If a finished run is another one than the plan asks for, or if runs have failed. The other runs are
            made before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if plan_file.resolve() != (folder / "plan.toml").resolve():
        shutil.copyfile(plan_file, folder / "plan.toml")
    runs = chosen(all_runs(plan), patterns)
    failed = []
    for number, run in enumerate(runs, 1):
        choices = sweep_choices(plan, folder)
        if run.question != SWEEP and run.question != SPEED and plan.sweep and run.method not in choices:
            failed.append(f"{run.name} (no run of the sweep for {run.method})")
            continue
        asked = settings(run, plan, choices)
        path = run_file(folder, run.name)
        if is_finished(path, asked, text):
            continue
        print(f"{number}/{len(runs)}  {run.name}", flush=True)
        request = {"settings": asked, "text": text, "command": command(plan, run), "study": os.getpid()}
        if run.question == SPEED:
            request["configs"] = speed_configs(plan)
        if not _run_process(request, folder, run.name):
            failed.append(f"{run.name} (see {folder / 'logs' / run.name}.txt)")
    if plan.sweep:
        write_json(folder / "sweep.json", sweep_choices(plan, folder))
    if failed:
        raise UserError(f"{len(failed)} runs have failed: {'; '.join(failed)}")


def check_models(plan: Plan) -> None:
    """Raises `UserError` if the config of a run's model is impossible, before any long work begins."""
    for run in all_runs(plan):
        if run.question != SPEED:
            new_config(settings(run, plan, {})["config"])


def chosen(runs: Sequence[Run], patterns: Sequence[str]) -> list[Run]:
    """Returns the runs whose names fit one of the patterns, or all without patterns.

    Raises:
        UserError: If a pattern fits no run.
    """
    for pattern in patterns:
        if not any(fnmatchcase(run.name, pattern) for run in runs):
            raise UserError(f"--runs {pattern}: no such run; --dry_run lists them")
    return [run for run in runs if not patterns or any(fnmatchcase(run.name, pattern) for pattern in patterns)]


def is_finished(path: Path, asked: dict[str, Any], text: dict[str, Any]) -> bool:
    """Returns whether a run has its results. Raises `UserError` if they are of other settings or another text."""
    record = read_json(path)
    if record is None:
        return False
    found = _flat({"settings": record["settings"], "text": record["text"]})
    now = _flat(json.loads(json.dumps({"settings": asked, "text": text})))
    changed = [
        f"{key} ({found.get(key)}, not {now.get(key)})" for key in {**found, **now} if found.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"{path} is a finished run that differs in {'; '.join(changed[:3])}: move it away, or give another "
            "--output_dir"
        )
    return True


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Returns the leaves of a JSON object by their dotted names."""
    if not isinstance(values, dict):
        return {name: values}
    return {
        key: leaf for part, value in values.items() for key, leaf in _flat(value, f"{name}.{part}".strip(".")).items()
    }


def sweep_choices(plan: Plan, folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the best settings of each method whose runs of the sweep are finished.

    Returns:
        By method: `learning_rate` and `config`, of the run with the lowest loss on held-out text, and `tried`, the
        loss of every run by its name.
    """
    sweep: dict[str, list[tuple[Run, Any]]] = {}
    for run in all_runs(plan):
        if run.question == SWEEP:
            record = read_json(run_file(folder, run.name))
            sweep.setdefault(run.method, []).append((run, record))
    choices = {}
    for method, tried in sweep.items():
        losses = {run.name: record["training"]["evaluations"][-1][1] for run, record in tried if record is not None}
        # A loss is None if the run has diverged.
        left = [run for run, _ in tried if losses.get(run.name) is not None]
        if len(losses) == len(tried) and left:
            best = min(left, key=lambda run: losses[run.name])
            choices[method] = {"learning_rate": best.learning_rate, "config": best.config, "tried": losses}
    return choices


def speed_configs(plan: Plan) -> dict[str, dict[str, Any]]:
    """Returns the config fields of each method of the main comparison."""
    return {method: model_fields(Run("", SPEED, "", method), plan) for method in plan.training.methods}


def command(plan: Plan, run: Run) -> str:
    """Returns the command that makes this run, without the files of the texts, which differ between machines."""
    return f"hf_alibi study {plan.name} --text NAME=FILES --runs {shlex.quote(run.name)}"


def _run_process(request: dict[str, Any], folder: Path, name: str) -> bool:
    """Makes a run in a process of its own, and returns whether it has written its results."""
    log = folder / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_alibi.study.one_run", str(folder)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            process.communicate(json.dumps(request))
        except BaseException:
            process.kill()
            process.wait()
            raise
    return process.returncode == 0 and run_file(folder, name).is_file()
