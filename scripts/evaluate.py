"""Does the same as `hf_alibi evaluate`."""

import sys

if __name__ == "__main__":
    # Removes this folder from the import path. Otherwise `import evaluate` would import this file, not the library.
    sys.path.pop(0)

from hf_alibi.cli.evaluate import main
from hf_alibi.errors import run

if __name__ == "__main__":
    run(main)
