"""A plan of seconds, and its text."""

from pathlib import Path

PLAN = """
[model]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
vocab_size = 300

[training]
tokens = 512
tokens_per_step = 64
lengths = [16]
seeds = [0]
methods = ["alibi", "sinusoidal"]
at_all_lengths = []
evaluations = 2
evaluation_tokens = 128

[test]
lengths = [16, 32, 64]
tokens = 256
stride = 8
sliding_targets = 64
copy_distances = [32, 64]
copy_tokens = 256
"""


def write_plan(folder: Path, more: str = "", **changes: str) -> Path:
    """Writes the plan, with lines replaced by `key = value` and sections added, and returns its path."""
    lines = [
        f"{key} = {changes.get(key)}" if (key := line.partition(" ")[0]) in changes else line
        for line in PLAN.split("\n")
    ]
    path = folder / "tiny.toml"
    path.write_text("\n".join(lines) + more)
    return path


def write_text_file(folder: Path) -> Path:
    """Writes a text of some thousand tokens, and returns its path."""
    path = folder / "words.txt"
    path.write_text("".join(f"the quick brown fox number {n} jumps over the lazy dog\n" for n in range(120)))
    return path
