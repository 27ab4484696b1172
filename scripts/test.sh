#!/usr/bin/env bash
# Creates the environment, checks style and types, and runs the tests. Arguments go to pytest (-m slow, -k name, ...).
set -euo pipefail
cd "$(dirname "$0")/.."
# Otherwise waiting threads spin, and slow down everything else on the machine.
export OMP_WAIT_POLICY=passive
source scripts/environment.sh dev

ruff check
ruff format --check
mypy
# Each test uses one thread, so two processes use two cores. A file stays in one process, which shares its models.
pytest --numprocesses 2 --dist loadfile "$@"
