"""Large texts made from Python's standard library, and the memory of commands that read them."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hf_alibi.training.data import standard_library_corpus

MEASURED = """
import resource, sys, threading, time

import psutil

from hf_alibi.__main__ import main
from hf_alibi.planning.memory import status_mib


def measure_all():
    # Pss counts memory that processes share once.
    while True:
        together = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                together += process.memory_full_info().pss
            except psutil.Error:
                pass  # It has just ended.
        most[0] = max(most[0], together)
        time.sleep(1)


most, start = [0], time.perf_counter()
threading.Thread(target=measure_all, daemon=True).start()
main(sys.argv[1:])
own, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
seconds = sum(usage.ru_utime + usage.ru_stime for usage in (own, workers))
# The `ru_maxrss` of this process counts the memory of the one that started it.
largest = max(int(status_mib("VmHWM")), workers.ru_maxrss // 1024)
print(f"{time.perf_counter() - start:.0f} seconds, {seconds:.0f} CPU seconds; megabytes of all processes together:")
print(f"{most[0] >> 20}; megabytes in the largest process: {largest}")
"""


def varied_texts(num_bytes: int) -> Iterator[str]:
    """Yields texts of the standard library again and again, in which 2% of the words are new each time."""
    texts = list(standard_library_corpus()["train"]["text"])
    draws = random.Random(0)

    def renamed(word: re.Match[str]) -> str:
        return f"{word[0]}{draws.randrange(10**6)}" if draws.random() < 0.02 else word[0]

    while num_bytes > 0:
        text = re.sub(r"[a-z]{4,}", renamed, draws.choice(texts))
        yield text
        num_bytes -= len(text.encode())


def write_jsonl(path: Path, num_bytes: int) -> None:
    """Writes about `num_bytes` of varied texts, one in each row."""
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in varied_texts(num_bytes))


def write_document(path: Path, num_bytes: int) -> None:
    """Writes about `num_bytes` of varied texts as one document."""
    with path.open("w") as file:
        file.writelines(varied_texts(num_bytes))


def peak_megabytes(folder: Path, *arguments: str) -> int:
    """Runs `hf_alibi` with these arguments in `folder`. Returns the memory of its largest process."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-c", MEASURED, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    return int(done.stdout.split()[-1])
