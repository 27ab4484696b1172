#!/usr/bin/env bash
# Makes GGUF files and runs them in llama.cpp, which the package xllamacpp (100 MB) holds; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=passive  # threads that wait by spinning slow down whatever else the machine does
source scripts/environment.sh dev

# The layout of the structures in tests/llama_cpp_library.py is that of this version.
python -m pip install --quiet xllamacpp==2026.10.11549
pytest -m llama_cpp "$@"
