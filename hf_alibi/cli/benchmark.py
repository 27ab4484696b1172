"""Measures time, memory and exactness by length: our attention, model and generation beside those of peers.

    hf_alibi benchmark attention --lengths 512 2048 8192 --dtypes float32 bfloat16 --output_prefix runs/layer
    hf_alibi benchmark model --train_lengths 1024 4096 --prefill_lengths 4096 16384 --output_prefix runs/model
    hf_alibi benchmark generation --contexts 1024 16384 65536 --output_prefix runs/generation
    hf_alibi benchmark converted --peers BLOOM Falcon --contexts 4096 --output_prefix runs/converted

attention: PyTorch's causal attention without any bias (the yardstick), with a stored ALiBi mask, and with a mask that
is made in each call; Transformers' attention with a stored `position_bias`; and our backends with and without head
windows. All have the same QK-normed input. Measured are forward, and forward with backward. The error is the largest
difference from float64.

model: training steps (forward and backward of one sequence) and prefills (last logits and the cache) of our model and
of Transformers' Llama (the yardstick), GPT-2, BLOOM and MPT at the same size. Also, how much the logits of our
backends differ for the same weights.

generation: the time of a decoded token after a long prompt, the size of the cache, and the prefill in chunks. This is
the cost of the models alone, without what `generate` adds.

converted: BLOOM, MPT and Falcon with random weights in Transformers' own classes (the yardsticks), and converted to
AlibiGPT: training steps, prefills, decoding after a prompt, and the errors of their logits in bfloat16 by position.

hf_alibi/benchmark/measuring.py says how time and memory are measured, and subjects.py what is measured. PREFIX.json
gets every figure with hardware and versions, PREFIX.png a plot. "-" means that something was not measured; the reason
is below the table.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from ..benchmark import converted, subjects
from ..benchmark.arguments import (
    AttentionArguments,
    ConvertedArguments,
    GenerationArguments,
    ModelArguments,
    ShapeArguments,
)
from ..benchmark.measuring import (
    CACHE_MIB,
    DTYPE,
    IMPLEMENTATION,
    LENGTH,
    MAX_DIFFERENCE,
    MAX_ERROR,
    MILLISECONDS,
    PARAMETERS,
    PEAK_MIB,
    PREFILL_SECONDS,
    RATIO,
    REASON,
    RELATIVE_DIFFERENCE,
    TASK,
    TOKENS_PER_SECOND,
    WARM_UP_CALLS,
    MeasuringArguments,
    Record,
    compare,
    environment,
    noted_failure,
    plot,
    table,
)
from ..errors import UserError
from ..hub.checkpoints import available_device
from .options import OptionParser, check_output, in_range, output_path

# Columns of every table.
MEASURED = (IMPLEMENTATION, MILLISECONDS, RATIO, PEAK_MIB)


class Report(NamedTuple):
    """The results of a sub-command.

    Attributes:
        records: The measurements.
        columns: Keys that the table shows.
        plotted: Key that the plot shows.
        ylabel: Label of the plot.
        more: Further tables, by their names in the JSON file.
    """

    records: list[Record]
    columns: Sequence[str]
    plotted: str
    ylabel: str
    more: dict[str, list[Record]] = {}


def main(argv: Sequence[str] | None = None) -> None:
    """Benchmarks as the command line `argv` (default: the process's own) says."""
    parser = OptionParser([], description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OptionParser)
    for name, (arguments_class, _) in COMMANDS.items():
        about = arguments_class.__doc__
        commands.add_parser(name, dataclass_types=arguments_class, help=about, description=about)
    values, unknown = parser.parse_known_args(argv)
    arguments_class, measure = COMMANDS[values.command]
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    arguments = arguments_class(**{name: value for name, value in vars(values).items() if name != "command"})
    check(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    report = measure(arguments)
    for records in report.more.values():
        print(table(records, [key for key in records[0] if key != REASON]), end="\n\n")
    print(table(report.records, report.columns))
    if arguments.output_prefix is not None:
        write(report, arguments, arguments.output_prefix)


def write(report: Report, arguments: MeasuringArguments, prefix: Path) -> None:
    """Writes PREFIX.json and PREFIX.png."""
    result = {"environment": environment(arguments.device), "arguments": asdict(arguments), "records": report.records}
    text = json.dumps(result | report.more, indent=2, default=str)
    output_path(prefix, ".json").write_text(text + "\n")
    plot(report.records, report.plotted, report.ylabel, output_path(prefix, ".png"))


def check(arguments: MeasuringArguments) -> None:
    """Raises `UserError` for what cannot be measured, before hours are spent."""
    numbers = [name for name, value in vars(arguments).items() if _is_numeric(value)]
    for name in numbers:
        in_range(arguments, 1 if name != "memory_gib" else 0.001, name, highest=2.0**31)
    if arguments.device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {arguments.device}")
    available_device(arguments.device)
    if isinstance(arguments, ShapeArguments) and arguments.hidden_size % arguments.num_heads:
        raise UserError(f"--hidden_size {arguments.hidden_size} does not divide into {arguments.num_heads} heads")
    check_output(arguments.output_prefix)


def _is_numeric(value: Any) -> bool:
    """Returns whether `value` is a number or a list of them."""
    return all(type(number) in (int, float) for number in (value if isinstance(value, list) else [value]))


def attention(arguments: AttentionArguments) -> Report:
    """Measures attention forward, and forward and backward."""
    ours = list(subjects.our_implementations(arguments.backends))
    names = [subjects.CAUSAL, *subjects.WITH_MASK, *ours]
    records = []
    for dtype, length in product(arguments.dtypes, sorted(arguments.lengths)):
        problem = subjects.Problem(length, arguments.num_heads, arguments.head_dim, dtype, arguments.device)
        is_long = length > arguments.max_dense_length
        skip = dict.fromkeys(subjects.WITH_MASK, "longer than --max_dense_length") if is_long else {}
        tasks = {"forward": False} | ({"forward and backward": True} if arguments.backward else {})
        for task, backward in tasks.items():
            calls = {name: partial(subjects.attention_call, name, problem, backward) for name in names}
            label = f"{task}, {length} tokens, {dtype}"
            measured = compare(calls, subjects.CAUSAL, arguments, label=label, skip=skip)
            errors = {}
            if not backward:
                able = [name for name in (subjects.POSITION_BIAS, *ours) if measured[name][REASON] is None]
                errors = subjects.max_errors([subjects.DENSE, *able], problem, arguments.error_rows)
            for name, record in measured.items():
                records.append({TASK: task, DTYPE: dtype, LENGTH: length, **record, MAX_ERROR: errors.get(name)})
    return Report(records, (TASK, DTYPE, LENGTH, *MEASURED, MAX_ERROR), RATIO, f"time relative to {subjects.CAUSAL}")


def model(arguments: ModelArguments) -> Report:
    """Measures training steps and prefills, the sizes of the models, and the differences between our logits."""
    shape = arguments.shape(max(arguments.train_lengths + arguments.prefill_lengths))
    ours = list(subjects.our_implementations(arguments.backends))
    names = [*ours, *arguments.peers]
    jobs = [("training step", subjects.training_step, length) for length in sorted(arguments.train_lengths)]
    jobs += [("prefill", subjects.prefill, length) for length in sorted(arguments.prefill_lengths)]
    records = []
    for task, subject, length in jobs:
        calls = {name: partial(subject, partial(subjects.build_model, name, shape), length) for name in names}
        skip = {subjects.EAGER: "longer than --max_eager_length"} if length > arguments.max_eager_length else {}
        measured = compare(calls, subjects.LLAMA, arguments, label=f"{task}, {length} tokens", skip=skip)
        for record in measured.values():
            speed = 1000 * length / record[MILLISECONDS] if record[MILLISECONDS] is not None else None
            records.append({TASK: task, DTYPE: shape.dtype, LENGTH: length, **record, TOKENS_PER_SECOND: speed})
    more = {"sizes": sizes(names, shape), "logits": logit_differences(ours, shape, arguments.logits_length)}
    return Report(
        records, (TASK, LENGTH, *MEASURED, TOKENS_PER_SECOND), RATIO, f"time relative to {subjects.LLAMA}", more
    )


def sizes(names: Sequence[str], shape: subjects.Shape) -> list[Record]:
    """Returns the number of parameters of each model."""
    records: list[Record] = []
    for name in names:
        records.append({IMPLEMENTATION: name, PARAMETERS: None, REASON: None})
        with noted_failure(records[-1]):
            records[-1][PARAMETERS] = subjects.build_model(name, shape).num_parameters()
    return records


def logit_differences(names: Sequence[str], shape: subjects.Shape, length: int) -> list[Record]:
    """Returns the largest difference of our backends' logits from those of `eager` with the same weights."""
    expected = subjects.logits(subjects.EAGER, shape, length)
    largest = expected.abs().max().item()
    records: list[Record] = []
    for name in names:
        records.append({IMPLEMENTATION: name, MAX_DIFFERENCE: None, RELATIVE_DIFFERENCE: None, REASON: None})
        with noted_failure(records[-1]):
            difference = (subjects.logits(name, shape, length) - expected).abs().max().item()
            records[-1] |= {MAX_DIFFERENCE: difference, RELATIVE_DIFFERENCE: difference / largest}
    return records


def generation(arguments: GenerationArguments) -> Report:
    """Measures decoding after prompts."""
    decoded = WARM_UP_CALLS + arguments.rounds * arguments.new_tokens
    shape = arguments.shape(max(arguments.contexts) + decoded)
    records = [record for context in sorted(arguments.contexts) for record in decoding(arguments, shape, context)]
    return Report(records, (LENGTH, *MEASURED, CACHE_MIB, PREFILL_SECONDS), MILLISECONDS, "milliseconds a token")


def decoding(arguments: GenerationArguments, shape: subjects.Shape, context: int) -> list[Record]:
    """Measures decoding after a prompt of `context` tokens."""
    ways = {
        name: subjects.way_to_decode(name, shape)
        for name in subjects.DECODERS
        if name in arguments.peers or name not in subjects.PEERS
    }
    is_long = context > arguments.max_peer_context
    skip = dict.fromkeys(arguments.peers, "longer than --max_peer_context") if is_long else {}
    return decoded(ways, arguments, shape, context, yardstick=subjects.LLAMA, label="decoding", skip=skip)


def decoded(
    ways: Mapping[str, tuple[subjects.Build, Callable[[Any], Any]]],
    arguments: GenerationArguments | ConvertedArguments,
    shape: subjects.Shape,
    context: int,
    label: str,
    **options: Any,
) -> list[Record]:
    """Measures decoding after a prompt of `context` tokens. The memory is that of reading the prompt.

    The decoders take turns, so all caches are in memory until the end.

    Args:
        ways: Model and empty cache of each decoder, by its name.
        arguments: Say how.
        shape: Of the models.
        context: Tokens in the prompt.
        label: Begins the label in the progress bar.
        **options: For `compare`.
    """
    decoders: dict[str, subjects.Decoder] = {}

    def prepare(name: str) -> subjects.Decoder:
        decoders[name] = subjects.Decoder(*ways[name], context, arguments.chunk_size)
        return decoders[name]

    measured = compare(
        {name: partial(prepare, name) for name in ways},
        how=arguments,
        label=f"{label} after {context} tokens",
        repeats=arguments.new_tokens,
        in_memory={
            name: partial(subjects.prompt_reading, *way, context, arguments.chunk_size) for name, way in ways.items()
        },
        **options,
    )
    for name, record in measured.items():
        record |= {TASK: "decoding", DTYPE: shape.dtype, LENGTH: context, CACHE_MIB: None, PREFILL_SECONDS: None}
        if record[REASON] is None:
            decoder = decoders[name]
            record |= {CACHE_MIB: subjects.cache_mib(decoder.cache), PREFILL_SECONDS: decoder.prefill_seconds}
    return list(measured.values())


def converted_models(arguments: ConvertedArguments) -> Report:
    """Measures models in their own class and converted to ours, one family after the other.

    The memory is measured of prefills only, because each measurement runs the slower models once more.
    """
    without_memory = replace(arguments, measure_memory=False)
    decoded_tokens = WARM_UP_CALLS + arguments.rounds * arguments.new_tokens
    others = arguments.train_lengths + arguments.prefill_lengths + arguments.error_positions
    shape = arguments.shape(max(max(arguments.contexts) + decoded_tokens, *others))
    records: list[Record] = []
    errors: list[Record] = []
    with TemporaryDirectory() as folder:
        for family in arguments.peers:
            folders = converted.save_both(family, shape, Path(folder))
            builds = {name: partial(converted.load, path, shape.dtype, shape.device) for name, path in folders.items()}
            for task, subject, lengths, how in (
                ("training step", subjects.training_step, arguments.train_lengths, without_memory),
                ("prefill", subjects.prefill, arguments.prefill_lengths, arguments),
            ):
                for length in sorted(lengths):
                    calls = {name: partial(subject, build, length) for name, build in builds.items()}
                    measured = compare(calls, family, how, label=f"{family}, {task}, {length} tokens")
                    place = {TASK: task, DTYPE: shape.dtype, LENGTH: length, CACHE_MIB: None, PREFILL_SECONDS: None}
                    records += [place | record for record in measured.values()]
            caches = (subjects.dynamic_cache, subjects.own_cache)
            ways = {name: (build, cache) for (name, build), cache in zip(builds.items(), caches, strict=True)}
            for context in sorted(arguments.contexts):
                records += decoded(ways, without_memory, shape, context, yardstick=family, label=f"{family}, decoding")
            errors += converted.errors_by_position(folders, arguments.error_positions, arguments.device)
            converted.load.cache_clear()
    columns = (TASK, LENGTH, *MEASURED, CACHE_MIB, PREFILL_SECONDS)
    return Report(records, columns, MILLISECONDS, "milliseconds", {"errors": errors})


COMMANDS: dict[str, tuple[type[MeasuringArguments], Callable[[Any], Report]]] = {
    "attention": (AttentionArguments, attention),
    "model": (ModelArguments, model),
    "generation": (GenerationArguments, generation),
    "converted": (ConvertedArguments, converted_models),
}
