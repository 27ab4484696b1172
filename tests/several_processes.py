"""Runs a program in two or more processes that communicate with gloo on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def in_processes(program: Path, *arguments: str | Path, timeout: int = 600, processes: int = 2) -> str:
    """Runs `program` under torchrun, and returns what it prints. It must assert the number of processes itself.

    Raises:
        AssertionError: If it fails, with what it has printed.
    """
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return launched([sys.executable, "-m", *launcher, str(program), *map(str, arguments)], timeout)


def launched(command: list[str], timeout: int = 600, **variables: str) -> str:
    """Runs a command with the package on its path, and returns what it prints to both streams."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    finished = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert finished.returncode == 0, finished.stdout[-6000:]
    return finished.stdout
