#!/usr/bin/env bash
# Makes the environment, checks style and types, and runs the tests; arguments go to pytest (-m slow, -k name, ...).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=passive  # threads that wait by spinning slow down whatever else the machine does
source scripts/environment.sh dev

ruff check
ruff format --check
mypy
pytest "$@"
