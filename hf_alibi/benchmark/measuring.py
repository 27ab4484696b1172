"""Measures time and memory of several implementations of the same computation, side by side, and reports them.

An implementation is given as a `Prepare`: a function that makes the inputs and returns the call to measure. `compare`
takes one for each implementation, and returns a record (a flat dictionary) for each:

- Time: the implementations take turns within each round, so that noise of the machine affects all alike. Times are
  medians over the rounds. Ratios are medians of the ratios within a round.
- Memory: the most that a call holds at a time beyond what was held before. On the CPU each implementation is called
  once in a fresh process, whose exact peak the kernel reports. This process returns freed memory at once, because how
  much `malloc` keeps is random. Whatever a first call loads adds a few MiB to each figure, and so does compiling. On a
  GPU the figure is that of PyTorch's allocator.
- An implementation that needs too much memory, or fails, has the reason in its record, and no figures.

This needs Linux, for `/proc` and for the memory limit.
"""

import ctypes
import math
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import cycle, product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from textwrap import shorten
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tqdm import tqdm

from ..evaluation.plots import COLOURS, MARKERS, dress
from ..planning.memory import status_mib
from ..tables import aligned
from ..version import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Prepare = Callable[[], Callable[[], object]]
Record = dict[str, Any]

# The keys of records. `compare` fills in those of the second block.
TASK, DTYPE, LENGTH, PARAMETERS = "task", "dtype", "length", "parameters"
TOKENS_PER_SECOND, CACHE_MIB, PREFILL_SECONDS = "tokens_per_second", "cache_mib", "prefill_seconds"
MAX_ERROR, MEAN_ERROR = "max_error", "mean_error"
MAX_DIFFERENCE, RELATIVE_DIFFERENCE = "max_difference", "relative_difference"

IMPLEMENTATION = "implementation"
# The median time of a call.
MILLISECONDS = "milliseconds"
# The time over that of the yardstick.
RATIO = "ratio"
BY_ROUND = "milliseconds_by_round"
PEAK_MIB = "peak_mib"
# Why there are no figures.
REASON = "reason"

# Heading and format of each column in the tables.
COLUMNS = {
    TASK: ("task", ""),
    DTYPE: ("dtype", ""),
    LENGTH: ("tokens", ","),
    IMPLEMENTATION: ("implementation", ""),
    MILLISECONDS: ("ms", ",.2f"),
    RATIO: ("ratio", ".2f"),
    TOKENS_PER_SECOND: ("tokens/s", ",.0f"),
    PEAK_MIB: ("peak MiB", ",.1f"),
    MAX_ERROR: ("max error", ".2e"),
    MEAN_ERROR: ("mean error", ".2e"),
    PARAMETERS: ("parameters", ","),
    CACHE_MIB: ("cache MiB", ",.1f"),
    PREFILL_SECONDS: ("prefill s", ",.2f"),
    MAX_DIFFERENCE: ("max difference", ".2e"),
    RELATIVE_DIFFERENCE: ("of largest logit", ".2e"),
}

MIB, GIB = 2**20, 2**30
# A parameter of glibc's mallopt: blocks of at least that many bytes are returned to the system when they are freed.
M_MMAP_THRESHOLD = -3
# The first call may load and compile. The second shows how long a call takes.
WARM_UP_CALLS = 2
# Seconds. After a call this long, no second one is needed.
LONG_CALL = 5.0
# Shorter calls are repeated until a turn takes about that long.
SECONDS_A_TURN = 0.1
# What failing allocations, failing kernels and missing packages raise. A process that dies is a RuntimeError too.
FAILURES = (RuntimeError, ValueError, MemoryError, ImportError)


def machine_memory_gib() -> float:
    """Returns the memory of this machine, in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


@dataclass
class MeasuringArguments:
    """Command-line arguments for how to measure, and where to write the results."""

    rounds: int = field(default=5, metadata={"help": "Rounds, in each of which every implementation has its turn."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; if omitted, PyTorch's choice."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu or cuda."})
    measure_memory: bool = field(default=True, metadata={"help": "Measure peak memory too; on the CPU it takes time."})
    memory_gib: float = field(
        default=round(0.9 * machine_memory_gib(), 1),
        metadata={"help": "GiB that this process may take on the CPU; an implementation that needs more is left out."},
    )
    output_prefix: Path | None = field(
        default=None, metadata={"help": "Write PREFIX.json and PREFIX.png; if omitted, only the table is printed."}
    )


def compare(
    implementations: Mapping[str, Prepare],
    yardstick: str,
    how: MeasuringArguments,
    *,
    label: str,
    skip: Mapping[str, str] | None = None,
    repeats: int | None = None,
    in_memory: Mapping[str, Prepare] | None = None,
) -> dict[str, Record]:
    """Measures every implementation.

    Args:
        implementations: By name. They must be picklable, because each is also prepared in a separate process.
        yardstick: The name of the implementation that ratios are relative to. If it has no time, there are no ratios.
        how: Rounds, device and memory.
        label: Describes the comparison in the progress bar.
        skip: The reason to leave an implementation out, by name.
        repeats: Calls in a turn; None for as many as `SECONDS_A_TURN` asks for.
        in_memory: Implementations whose memory is measured, by name, if they differ from the timed ones.

    Returns:
        A record for each implementation, by name, with the keys from `IMPLEMENTATION` to `REASON`. What was not
        measured is `None`.
    """
    keys = (MILLISECONDS, RATIO, BY_ROUND, PEAK_MIB)
    skip = skip or {}
    records = {name: {IMPLEMENTATION: name, **dict.fromkeys(keys), REASON: skip.get(name)} for name in implementations}
    names = [name for name in implementations if name not in skip]
    times: dict[str, list[float]] = {}
    with tqdm(total=len(names) * (how.measure_memory + 1 + how.rounds), desc=label, leave=False) as progress:
        if how.measure_memory:
            # This comes first, so that what fails in a separate process is not tried in this one.
            for name in names:
                with noted_failure(records[name]):
                    records[name][PEAK_MIB] = peak_mib((in_memory or implementations)[name], how)
                progress.update()
        names = [name for name in names if records[name][REASON] is None]
        with limited_memory(how):
            turns = {}
            for name in names:
                with noted_failure(records[name]):
                    turns[name] = warmed_up(implementations[name](), how, repeats)
                progress.update()
            for _ in range(how.rounds):
                for name, turn in turns.items():
                    times.setdefault(name, []).append(1000 * turn())
                    progress.update()
    for name, milliseconds in times.items():
        records[name] |= {MILLISECONDS: median(milliseconds), BY_ROUND: milliseconds}
        if yardstick in times:
            ratios = (mine / its for mine, its in zip(milliseconds, times[yardstick], strict=True))
            records[name][RATIO] = median(ratios)
    found = (f"{name} {median(milliseconds):,.2f} ms" for name, milliseconds in times.items())
    # The table is printed only at the end of all measurements.
    tqdm.write(f"{label}: {', '.join(found)}", file=sys.stderr)
    return records


def warmed_up(call: Callable[[], object], how: MeasuringArguments, repeats: int | None) -> Callable[[], float]:
    """Warms `call` up, and returns a function that takes one turn and returns the seconds per call."""

    def turn(calls: int) -> float:
        synchronize(how.device)
        start = perf_counter()
        for _ in range(calls):
            call()
        synchronize(how.device)
        return (perf_counter() - start) / calls

    for _ in range(WARM_UP_CALLS):
        seconds = turn(1)
        if seconds > LONG_CALL:
            # Its warm-up is a small part of the call.
            break
    calls_a_turn = repeats or math.ceil(SECONDS_A_TURN / seconds)
    return lambda: turn(calls_a_turn)


def synchronize(device: str) -> None:
    """Waits until a GPU has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def peak_mib(prepare: Prepare, how: MeasuringArguments) -> float:
    """Returns the most memory in MiB that the call holds at a time, beyond what was held before."""
    if how.device == "cpu":
        context = get_context("forkserver")
        context.set_forkserver_preload(["hf_alibi.benchmark.subjects"])
        with ProcessPoolExecutor(1, mp_context=context) as process:
            return process.submit(_peak_resident_mib, prepare, how, torch.get_num_threads()).result()
    call = prepare()
    before = torch.cuda.memory_allocated(how.device)
    # The first call may compile, and the memory for that is not counted.
    call()
    torch.cuda.reset_peak_memory_stats(how.device)
    call()
    return (torch.cuda.max_memory_allocated(how.device) - before) / MIB


def _peak_resident_mib(prepare: Prepare, how: MeasuringArguments, threads: int) -> float:
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    # This is the initial value. Setting it keeps malloc from raising it.
    libc.mallopt(M_MMAP_THRESHOLD, 2**17)
    with limited_memory(how):
        call = prepare()
        # Returns what the preparation has freed. Otherwise the call could use it without being counted.
        libc.malloc_trim(0)
        # Resets the peak.
        Path("/proc/self/clear_refs").write_text("5")
        before = status_mib("VmRSS")
        call()
    # The peak of getrusage includes the memory of the parent process, even after exec.
    return status_mib("VmHWM") - before


@contextmanager
def limited_memory(how: MeasuringArguments) -> Iterator[None]:
    """Makes allocations on the CPU beyond `memory_gib` fail, before the kernel kills a process because of them."""
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    if how.device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (int(how.memory_gib * GIB), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


@contextmanager
def noted_failure(record: Record) -> Iterator[None]:
    """Catches a failure of the block, and writes its reason into the record."""
    try:
        yield
    except FAILURES as error:
        record[REASON] = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")


def environment(device: str) -> Record:
    """Returns the hardware, the versions and the date of a measurement."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine_memory_gib": round(machine_memory_gib(), 1),
        "gpu": None if device == "cpu" else torch.cuda.get_device_name(device),
        "hf_alibi": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(records: Sequence[Record], columns: Sequence[str]) -> str:
    """Returns a table with a line for each record, "-" for what was not measured, and the reasons below it."""
    formats = [COLUMNS[key] for key in columns]
    rows = [[heading for heading, _ in formats]]
    for record in records:
        rows.append(["-" if record[key] is None else format(record[key], COLUMNS[key][1]) for key in columns])
    lines = [aligned(rows, left=[index for index, (_, spec) in enumerate(formats) if not spec])]
    for record in records:
        if record[REASON] is not None:
            which = [str(record[key]) for key in (TASK, DTYPE, LENGTH, IMPLEMENTATION) if key in columns]
            lines.append(f"{', '.join(which)}: {record[REASON]}")
    return "\n".join(lines)


def plot(records: Sequence[Record], key: str, ylabel: str, path: Path) -> None:
    """Draws `key` against length, with a panel for each dtype and task, and a line for each implementation."""
    # Only plots need matplotlib.
    from matplotlib.figure import Figure

    tasks, dtypes, names = (list(dict.fromkeys(r[k] for r in records)) for k in (TASK, DTYPE, IMPLEMENTATION))
    figure = Figure(figsize=(6.5 * len(tasks), 4.2 * len(dtypes)), dpi=140, layout="constrained")
    panels = figure.subplots(len(dtypes), len(tasks), squeeze=False).flat
    for axes, (dtype, task) in zip(panels, product(dtypes, tasks), strict=True):
        axes.set_yscale("log", base=2)
        ends = []
        for name, colour, marker in zip(names, cycle(COLOURS), cycle(MARKERS), strict=False):
            drawn = [r for r in records if (r[DTYPE], r[TASK], r[IMPLEMENTATION]) == (dtype, task, name) and r[key]]
            if drawn:
                lengths, values = [r[LENGTH] for r in drawn], [r[key] for r in drawn]
                axes.plot(lengths, values, color=colour, marker=marker, linewidth=2, markersize=5)
                ends.append((values[-1], lengths[-1], name, colour))
        _label_lines(axes, ends)
        dress(axes, f"{task}, {dtype}")
        axes.set(xlabel="length in tokens", ylabel=ylabel)
        axes.yaxis.set_major_formatter("{x:,g}")
    figure.savefig(path)


def _label_lines(axes: "Axes", ends: list[tuple[float, int, str, str]]) -> None:
    """Writes the names at the ends of the lines, and moves one up where it would overlap another.

    Args:
        axes: The panel.
        ends: `(value, length, name, colour)` of each line.
    """
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    # The highest name so far at each length, as a fraction of the axis.
    last: dict[int, float] = {}
    for value, length, name, colour in sorted(ends):
        height = math.log(value / bottom) / math.log(top / bottom)
        last[length] = max(height, last.get(length, -1) + 0.06)
        axes.annotate(
            name,
            (length, last[length]),
            # x is in data coordinates, y a fraction of the axis.
            xycoords=axes.get_xaxis_transform(),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            verticalalignment="center",
        )
