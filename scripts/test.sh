#!/usr/bin/env bash
# Makes the environment, checks style and types, and runs the tests; arguments go to pytest (-m slow, -k name, ...).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh dev

ruff check
ruff format --check
mypy
pytest "$@"
