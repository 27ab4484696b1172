"""The same as `hf_alibi evaluate`; see there: `python scripts/evaluate.py --help`."""

import sys

if __name__ == "__main__":
    # Without this folder on the path, `import evaluate` finds the library and not this file.
    sys.path.pop(0)

from hf_alibi.cli.evaluate import main
from hf_alibi.errors import run

if __name__ == "__main__":
    run(main)
