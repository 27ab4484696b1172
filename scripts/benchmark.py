"""Does the same as `hf_alibi benchmark`."""

from hf_alibi.cli.benchmark import main
from hf_alibi.errors import run

if __name__ == "__main__":
    run(main)
