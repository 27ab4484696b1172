#!/usr/bin/env bash
# Runs the tests with the newest release of every dependency, in a new environment, and lists what changed and what failed.
# PyTorch stays at the tested version unless TORCH=newest is set. Arguments go to pytest (-k name, tests/model, ...).
set -euo pipefail
cd "$(dirname "$0")/.."
# Otherwise waiting threads spin, and slow down everything else on the machine.
export OMP_WAIT_POLICY=passive

if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or later is needed; set PYTHON to its path" >&2
    exit 2
fi
folder=$(mktemp -d -t hf_alibi_newest.XXXXXX)
trap 'rm -rf "$folder"' EXIT
if [[ "${TORCH:-}" == newest ]]; then
    touch "$folder/constraints.txt"
else
    grep '^torch==' constraints.txt > "$folder/constraints.txt"
fi

echo "== Installing the newest releases into $folder"
"${PYTHON:-python3}" -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
    --constraint "$folder/constraints.txt" ".[dev]"

echo "== Changed against constraints.txt"
"$python" - constraints.txt <<'PYTHON'
import re
import sys
from importlib.metadata import distributions
from pathlib import Path


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
pinned = dict(line.split("==") for line in lines if "==" in line)
tested = {normal(name): version for name, version in pinned.items()}
found = {normal(item.name): item.version for item in distributions()}
for name in sorted(tested.keys() | found.keys() - {"hf-alibi", "pip", "setuptools"}):
    before, now = tested.get(name, "not there"), found.get(name, "not there").partition("+")[0]
    if before != now:
        print(f"{name:<28} {before} -> {now}")
PYTHON

echo "== Tests"
# The package under test is this checkout. With PYTHONPATH, programs that tests start find it too.
set +e
PYTHONPATH="$PWD" "$python" -m pytest -q -p no:cacheprovider -rfE "$@" | tee "$folder/report.txt"
status=${PIPESTATUS[0]}
set -e

echo "== What failed"
grep -E '^(FAILED|ERROR) ' "$folder/report.txt" || echo "nothing"
exit "$status"
