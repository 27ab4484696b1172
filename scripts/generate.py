"""The same as `hf_alibi generate`; see there: `python scripts/generate.py --help`."""

from hf_alibi.cli.generate import main
from hf_alibi.errors import run

if __name__ == "__main__":
    run(main)
