"""Does the same as `hf_alibi generate`."""

from hf_alibi.cli.generate import main
from hf_alibi.errors import run

if __name__ == "__main__":
    run(main)
