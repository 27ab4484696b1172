"""Does the same as `hf_alibi publish`."""

from hf_alibi.cli.publish import main
from hf_alibi.errors import run

if __name__ == "__main__":
    run(main)
