# The other shell scripts source this. It creates the virtual environment .venv with the tested versions and activates it.
# Usage: source scripts/environment.sh EXTRA, where EXTRA is one of the extras in pyproject.toml.

if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or later is needed; set PYTHON to its path" >&2
    exit 2
fi
stamp=".venv/installed-$1"
if ! [[ "$stamp" -nt pyproject.toml && "$stamp" -nt constraints.txt ]]; then
    "${PYTHON:-python3}" -m venv .venv
    echo "Installing the tested versions into .venv ..."
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[$1]"
    touch "$stamp"
fi
source .venv/bin/activate
