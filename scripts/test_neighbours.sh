#!/usr/bin/env bash
# Tests the recipes of docs/neighbours.md with the real packages, in the environment .venv-neighbours (about 4.5 GB).
# Usage: bash scripts/test_neighbours.sh [GROUP] [pytest's arguments], GROUP as in tests/neighbours/test_neighbours_GROUP.py
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=passive  # threads that wait by spinning slow down whatever else the machine does
export HF_HUB_OFFLINE=1  # no test needs the Hub, and MLflow would wait a minute for it
source scripts/environment.sh dev,neighbours .venv-neighbours constraints-neighbours.txt

# Its metadata forbids huggingface_hub 2, which Transformers 5.24 comes with. It works with it.
python -m pip install --quiet --no-deps langchain-huggingface==1.2.3

# It needs PyTorch while it is built, and no CUDA if its operators are left for later.
DS_BUILD_OPS=0 python -m pip install --quiet --no-build-isolation --constraint constraints-neighbours.txt deepspeed

tests=tests/neighbours
if [[ $# -gt 0 && "$1" != -* ]]; then
    tests="tests/neighbours/test_neighbours_$1.py"
    shift
fi
pytest -m neighbours "$tests" "$@"
