"""Time and memory of several implementations of the same thing, measured side by side and reported.

An implementation is given as a `Prepare`: a function that makes the inputs and returns the call to measure. `compare`
takes one for each implementation and returns a record for each, a flat dictionary:

- Time: the implementations take turns within each round, so that a noisy machine disturbs all alike. Times are
  medians over the rounds, ratios medians of the ratios within a round.
- Memory: the most that a call holds at a time beyond what it found. On the CPU each implementation is called once in
  a fresh process, of which the kernel knows the peak exactly, and which gives back at once what is freed: what
  `malloc` would keep is a matter of chance. What any first call loads makes a floor of a few MiB, and where it
  compiles something, that counts too. On a GPU it is what PyTorch's allocator counted.
- An implementation that needs too much memory, or fails, gets its reason into the record and no figures.

It needs Linux, for `/proc` and for the limit of memory.
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
from ..tables import aligned
from ..version import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Prepare = Callable[[], Callable[[], object]]
Record = dict[str, Any]

# The keys of records. `compare` fills in those of the second paragraph.
TASK, DTYPE, LENGTH, PARAMETERS = "task", "dtype", "length", "parameters"
TOKENS_PER_SECOND, CACHE_MIB, PREFILL_SECONDS = "tokens_per_second", "cache_mib", "prefill_seconds"
MAX_ERROR, MAX_DIFFERENCE, RELATIVE_DIFFERENCE = "max_error", "max_difference", "relative_difference"

IMPLEMENTATION = "implementation"
MILLISECONDS = "milliseconds"  # of a call, the median
RATIO = "ratio"  # of times, to the yardstick's
BY_ROUND = "milliseconds_by_round"
PEAK_MIB = "peak_mib"
REASON = "reason"  # why there are no figures

# Heading and format of what the tables show.
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
    PARAMETERS: ("parameters", ","),
    CACHE_MIB: ("cache MiB", ",.1f"),
    PREFILL_SECONDS: ("prefill s", ",.2f"),
    MAX_DIFFERENCE: ("max difference", ".2e"),
    RELATIVE_DIFFERENCE: ("of largest logit", ".2e"),
}

MIB, GIB = 2**20, 2**30
M_MMAP_THRESHOLD = -3  # of glibc's mallopt: blocks from so many bytes on are given back as soon as they are freed
WARM_UP_CALLS = 2  # the first may load and compile, the second tells how long a call takes
LONG_CALL = 5.0  # seconds
SECONDS_A_TURN = 0.1  # shorter calls are repeated within a turn until it takes about that long
# What failing allocations, kernels and missing packages raise; a process that dies of a call is a RuntimeError too.
FAILURES = (RuntimeError, ValueError, MemoryError, ImportError)


def machine_memory_gib() -> float:
    """All the memory that this machine has, in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


@dataclass
class MeasuringArguments:
    """Command-line arguments that say how to measure, and where the results go."""

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
    """Measure every implementation.

    Args:
        implementations: By name; picklable, as each is also prepared in a process of its own.
        yardstick: The name of the one that ratios are relative to; where it has no time, there are no ratios.
        how: Rounds, device and memory.
        label: What is compared, for the progress bar.
        skip: Implementations to leave out, by name, and why.
        repeats: Calls in a turn; if omitted, as many as `SECONDS_A_TURN` asks for.
        in_memory: What memory is measured of, by name, if that is something else than the call that is timed.

    Returns:
        A record for each implementation, by name, with the keys from `IMPLEMENTATION` to `REASON`;
        `None` stands for what was not measured.
    """
    keys = (MILLISECONDS, RATIO, BY_ROUND, PEAK_MIB)
    skip = skip or {}
    records = {name: {IMPLEMENTATION: name, **dict.fromkeys(keys), REASON: skip.get(name)} for name in implementations}
    names = [name for name in implementations if name not in skip]
    times: dict[str, list[float]] = {}
    with tqdm(total=len(names) * (how.measure_memory + 1 + how.rounds), desc=label, leave=False) as progress:
        if how.measure_memory:  # first of all: what fails in its own process is not tried in this one
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
    tqdm.write(f"{label}: {', '.join(found)}", file=sys.stderr)  # the table comes at the very end
    return records


def warmed_up(call: Callable[[], object], how: MeasuringArguments, repeats: int | None) -> Callable[[], float]:
    """Call until it is warm; return what takes one turn and returns the seconds of a call."""

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
            break  # it is warm from its own beginning
    calls_a_turn = repeats or math.ceil(SECONDS_A_TURN / seconds)
    return lambda: turn(calls_a_turn)


def synchronize(device: str) -> None:
    """Wait for what a GPU has still to do."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def peak_mib(prepare: Prepare, how: MeasuringArguments) -> float:
    """The most memory in MiB that the call holds at a time, beyond what it found."""
    if how.device == "cpu":
        context = get_context("forkserver")
        context.set_forkserver_preload(["hf_alibi.benchmark.subjects"])
        with ProcessPoolExecutor(1, mp_context=context) as process:
            return process.submit(_peak_resident_mib, prepare, how, torch.get_num_threads()).result()
    call = prepare()
    before = torch.cuda.memory_allocated(how.device)
    call()  # the first call may compile, which is not what a call needs
    torch.cuda.reset_peak_memory_stats(how.device)
    call()
    return (torch.cuda.max_memory_allocated(how.device) - before) / MIB


def _peak_resident_mib(prepare: Prepare, how: MeasuringArguments, threads: int) -> float:
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**17)  # where it starts, and now stays
    with limited_memory(how):
        call = prepare()
        libc.malloc_trim(0)  # give back what preparing has freed: the call would take it unseen
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of preparing
        before = _status_mib("VmRSS")
        call()
    return _status_mib("VmHWM") - before  # getrusage's peak includes what the parent process held, even through exec


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024 / MIB


@contextmanager
def limited_memory(how: MeasuringArguments) -> Iterator[None]:
    """Let allocations on the CPU fail beyond `memory_gib`, before the kernel kills a process for them."""
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    if how.device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (int(how.memory_gib * GIB), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


@contextmanager
def noted_failure(record: Record) -> Iterator[None]:
    """If the block fails, go on, and put the reason into the record."""
    try:
        yield
    except FAILURES as error:
        record[REASON] = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")


def environment(device: str) -> Record:
    """The hardware, the versions and the date of a measurement."""
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
    """A line for each record, "-" for what was not measured, and the reasons below."""
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
    """Draw `key` against length: a panel for each dtype and task, a line for each implementation."""
    from matplotlib.figure import Figure  # only those who plot need it

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
    """Write names at the ends of lines `(value, length, name, colour)`, higher where one would stand on another."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    last: dict[int, float] = {}  # the highest name so far at each length, as a fraction of the axis
    for value, length, name, colour in sorted(ends):
        height = math.log(value / bottom) / math.log(top / bottom)
        last[length] = max(height, last.get(length, -1) + 0.06)
        axes.annotate(
            name,
            (length, last[length]),
            xycoords=axes.get_xaxis_transform(),  # data coordinates across, a fraction of the axis up
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            verticalalignment="center",
        )
