# The other shell scripts source this. It creates a virtual environment with the tested versions and activates it.
# Usage: source scripts/environment.sh EXTRA [FOLDER CONSTRAINTS], where EXTRA is one of the extras in pyproject.toml.
# Without FOLDER and CONSTRAINTS it creates .venv with the versions in constraints.txt.

if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or later is needed; set PYTHON to its path" >&2
    exit 2
fi
folder="${2:-.venv}"
constraints="${3:-constraints.txt}"
stamp="$folder/installed-$1"
if ! [[ "$stamp" -nt pyproject.toml && "$stamp" -nt "$constraints" ]]; then
    "${PYTHON:-python3}" -m venv "$folder"
    echo "Installing the tested versions into $folder ..."
    "$folder/bin/python" -m pip install --quiet --constraint "$constraints" --editable ".[$1]"
    touch "$stamp"
fi
source "$folder/bin/activate"
