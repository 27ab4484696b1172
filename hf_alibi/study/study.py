"""Runs a study: each run that is not finished, in a process of its own.

A run is finished when its JSON file exists. So a study that was stopped goes on with the same command, at the run that
it was in. A finished run is never run again: if the plan or the text now ask for something else, that is an error.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import read_json, run_file, write_json
from .plan import Plan
from .runs import SPEED, SWEEP, Run, all_runs, model_fields, settings
from .training import new_config

# Other runs need the choices of the sweep, and nothing may run while speed is measured.
APART = (SWEEP, SPEED)


def run_study(
    plan: Plan, plan_file: Path, text: dict[str, Any], folder: Path, patterns: Sequence[str], jobs: int
) -> None:
    """Runs what is not finished.

    Args:
        plan: The plan.
        plan_file: Its file, which is copied.
        text: What `prepare_text` returned.
        folder: Folder of the study.
        patterns: Names or patterns of the runs to make; empty for all.
        jobs: Runs that are made at the same time. They share the cores.

    Raises:
        UserError: If a finished run is another one than the plan asks for, or if runs have failed. The other runs are
            made before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if plan_file.resolve() != (folder / "plan.toml").resolve():
        shutil.copyfile(plan_file, folder / "plan.toml")
    runs = chosen(all_runs(plan), patterns)
    failed = []
    numbered = [(f"{number}/{len(runs)}", run) for number, run in enumerate(runs, 1)]
    for question, phase in groupby(numbered, lambda pair: pair[1].question if pair[1].question in APART else ""):
        failed += _make(list(phase), 1 if question == SPEED else jobs, plan, text, folder)
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


def _make(runs: list[tuple[str, Run]], jobs: int, plan: Plan, text: dict[str, Any], folder: Path) -> list[str]:
    """Makes the runs that are not finished, `jobs` at a time. Returns those that failed, with the reason."""
    choices, failed, running = sweep_choices(plan, folder), [], dict[str, subprocess.Popen]()
    try:
        for number, run in runs:
            if run.question not in APART and plan.sweep and run.method not in choices:
                failed.append(f"{run.name} (no run of the sweep for {run.method})")
                continue
            asked = settings(run, plan, choices)
            if is_finished(run_file(folder, run.name), asked, text):
                continue
            failed += _wait(running, jobs - 1, folder)
            print(f"{number}  {run.name}", flush=True)
            request = {"settings": asked, "text": text, "command": command(plan, run), "study": os.getpid()}
            if run.question == SPEED:
                request["configs"] = speed_configs(plan)
            running[run.name] = _start(request, folder, run.name, jobs)
        return failed + _wait(running, 0, folder)
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _start(request: dict[str, Any], folder: Path, name: str, jobs: int) -> subprocess.Popen:
    """Starts a run in a process of its own, which has its share of the cores."""
    log = folder / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_alibi.study.one_run", str(folder)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | threads,
        )
    assert process.stdin is not None
    # A process that has already ended shows in its exit status.
    with suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(json.dumps(request))
    return process


def _wait(running: dict[str, subprocess.Popen], most: int, folder: Path) -> list[str]:
    """Waits until at most so many runs are left. Returns those that failed."""
    failed = []
    while True:
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode or not run_file(folder, name).is_file():
                    failed.append(f"{name} (see {folder / 'logs' / name}.txt)")
        if len(running) <= most:
            return failed
        time.sleep(0.2)
