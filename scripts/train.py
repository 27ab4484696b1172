"""Does the same as `hf_alibi train`."""

from hf_alibi.cli.train import main
from hf_alibi.errors import run

if __name__ == "__main__":
    run(main)
