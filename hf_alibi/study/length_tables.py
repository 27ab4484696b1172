"""Tables about length: what the models have learnt, the claim, extrapolation with both protocols, interpolation."""

from collections.abc import Sequence
from statistics import mean

from ..tables import markdown
from .records import (
    FAR_FROM_OTHERS,
    PAPER,
    SOURCE,
    Record,
    cell,
    final_loss,
    grouped,
    label,
    lengths_of,
    of,
    over_seeds,
    perplexities,
    results,
    texts_of,
    unconverged,
)
from .runs import LONGEST_TEST, MAIN

NAMES_IN_PAPER = {"sinusoidal": "sinusoidal", "rotary": "rotary", "t5": "t5_bias", "alibi": "alibi"}


def models(records: Sequence[Record]) -> str:
    """What was trained and how far it learnt."""
    far = unconverged(records)
    rows = []
    for (variant, length), group in grouped(of(records, MAIN)).items():
        settings, training = group[0]["settings"], group[0]["training"]
        excess = far.get((variant, length))
        rows.append(
            [
                label(variant),
                f"{length:,}",
                str(len(group)),
                f"{training['tokens']:,}",
                f"{training['parameters']['all']:,}",
                f"{settings['learning_rate']:g}",
                over_seeds(map(final_loss, group), ".3f"),
                "yes" if excess is None else f"**no**, {excess:.2f} above the median",
            ]
        )
    if not rows:
        return ""
    head = ["method", "trained at", "seeds", "tokens", "parameters", "learning rate", "held-out loss", "converged"]
    return (
        "## What the models have learnt\n\n"
        "Loss on held-out text at the training length after the last step, in nats per token. A method has converged "
        f"like the others if it is at most {FAR_FROM_OTHERS} nats above the median of the methods at this length. "
        "Learning rates and other settings that the sweep chose are in `sweep.json`.\n\n" + markdown(head, rows)
    )


def claim(records: Sequence[Record]) -> str:
    """ALiBi trained at L and tested at 2L, against every method trained at 2L."""
    main = of(records, MAIN)
    groups = grouped(main)
    trained = sorted({length for _, length in groups})
    pairs = [(length, 2 * length) for length in trained if 2 * length in trained]
    parts = []
    for text in texts_of(main):
        for short, long in pairs:
            rows = []
            for (variant, length), group in groups.items():
                if length in (short, long):
                    times, busy = (
                        [1e6 * record["training"][key] / record["training"]["tokens"] for record in group]
                        for key in ("seconds", "cpu_seconds")
                    )
                    memory = [record["training"]["peak_mib"] - record["training"]["start_mib"] for record in group]
                    name = f"**{label(variant)}**" if (variant, length) == ("alibi", short) else label(variant)
                    rows.append(
                        [
                            name,
                            f"{length:,}",
                            cell(group, text, long),
                            over_seeds(times, ".1f"),
                            over_seeds(busy, ".1f"),
                            over_seeds(memory, ",.0f"),
                        ]
                    )
            head = [
                "method",
                "trained at",
                f"perplexity at {long:,}",
                "µs a training token",
                "CPU µs",
                "MiB of training",
            ]
            parts.append(f"On {text}, trained at {short:,} or {long:,}:\n\n" + markdown(head, rows))
    if not parts:
        return ""
    return (
        "## The claim: train short, test at twice the length\n\n"
        "Non-overlapping windows. Time and memory are those of the runs, on a machine that did other work too. The "
        "time of the CPU in all threads hardly shows that; the table of speed below measures all methods in turns. "
        "The paper: ALiBi trained at 1,024 and tested at 2,048 equals a sinusoidal model trained at 2,048 in "
        "perplexity, and trains 11% faster with 11% less memory "
        f"(1.3 billion parameters; {SOURCE}).\n\n" + "\n\n".join(parts)
    )


def extrapolation(records: Sequence[Record]) -> str:
    """Perplexity at every length with both protocols, and the part of the gain that is the early-token curse."""
    main = of(records, MAIN)
    parts = []
    protocols = {
        "nats": "non-overlapping windows",
        "sliding": "sliding windows",
        "same_targets": "non-overlapping windows, only the targets of the sliding windows",
    }
    for text in texts_of(main):
        lengths = lengths_of(main, text)
        for key, name in protocols.items():
            rows = [
                [label(variant), f"{length:,}", *(cell(group, text, test, key) for test in lengths)]
                for (variant, length), group in grouped(main).items()
            ]
            head = ["method", "trained at", *(f"{length:,}" for length in lengths)]
            parts.append(f"On {text}, {name}:\n\n" + markdown(head, rows))
        parts.append(_early_tokens(main, text))
    if not parts:
        return ""
    return (
        "## Extrapolation\n\nPerplexity per token by length. All lengths score the same targets.\n\n"
        + "\n\n".join(part for part in parts if part)
        + "\n\n"
        + _paper()
    )


def _early_tokens(records: Sequence[Record], text: str) -> str:
    rows = []
    for (variant, length), group in grouped(records).items():
        longest = max(lengths_of(group, text))
        gains = []
        for key in ("same_targets", "sliding"):
            pairs = zip(results(group, text, length, key), results(group, text, longest, key), strict=False)
            gains.append([before - after for before, after in pairs])
        if gains[0]:
            rows.append([label(variant), f"{length:,}", f"{longest:,}", *(over_seeds(gain, "+.3f") for gain in gains)])
    head = ["method", "trained at", "tested at", "gain, non-overlapping", "gain, sliding"]
    return (
        f"How much of the gain is the early-token curse, on {text}: nats per token that a model gains from the "
        "training length to the longest one, on the same targets. With non-overlapping windows, longer windows also "
        "have fewer tokens with little context. With sliding windows every target has its full context at both "
        "lengths, so what is left there is the use of more context. A negative gain is a loss.\n\n"
        + markdown(head, rows)
    )


def by_context(records: Sequence[Record]) -> str:
    """Loss by tokens of context within the training length."""
    main = of(records, MAIN)
    parts = []
    for text in texts_of(main):
        found = {
            (variant, length): [record["tests"][text].get(str(length), {}).get("by_position", {}) for record in group]
            for (variant, length), group in grouped(main).items()
        }
        ends = sorted({int(end) for group in found.values() for losses in group for end in losses})
        rows = [
            [label(variant), f"{length:,}", *(over_seeds(losses.get(str(end)) for losses in group) for end in ends)]
            for (variant, length), group in found.items()
        ]
        parts.append(f"On {text}:\n\n" + markdown(["method", "trained at", *(f"to {end:,}" for end in ends)], rows))
    if not parts:
        return ""
    return (
        "## Loss by tokens of context\n\nNats per token in windows of the training length, by the place in the "
        "window. Each column ends at twice the place of the one before.\n\n" + "\n\n".join(parts)
    )


def _paper() -> str:
    rows = []
    for line in PAPER["extrapolation_ppl"]:
        figures = [str(line[name]) for name in ("sinusoidal", "rotary", "t5_bias", "alibi")]
        rows.append([f"{line['train']:,}", f"{line['valid']:,}", *figures])
    head = ["trained at", "tested at", "sinusoidal", "rotary", "T5 bias", "ALiBi"]
    return (
        f"The paper's figures, of models with 247 million parameters on WikiText-103 ({SOURCE}, tables of its "
        "appendix). Other data, sizes and tokenizers: compare ratios, not perplexities.\n\n" + markdown(head, rows)
    )


def alibi_by_seed(records: Sequence[Record]) -> str:
    """Whether ALiBi at 16 times the training length is no worse than at the training length, for every seed."""
    main = [record for record in of(records, MAIN) if record["settings"]["variant"] == "alibi"]
    rows = []
    for text in texts_of(main):
        for (_, length), group in grouped(main).items():
            for record in group:
                near, far = (perplexities([record], text, test) for test in (length, LONGEST_TEST * length))
                if near and far:
                    verdict = "no worse" if far[0] <= near[0] else "**worse**"
                    seed = str(record["settings"]["seed"])
                    rows.append([text, f"{length:,}", seed, f"{near[0]:.2f}", f"{far[0]:.2f}", verdict])
    if not rows:
        return ""
    head = ["text", "trained at", "seed", "perplexity there", f"at {LONGEST_TEST} times the length", ""]
    return "## ALiBi at 16 times its training length\n\nNon-overlapping windows, every seed.\n\n" + markdown(
        head, rows
    )


def interpolation(records: Sequence[Record]) -> str:
    """ALiBi with position interpolation beside ALiBi without."""
    main = [record for record in of(records, MAIN) if record["settings"]["variant"] == "alibi"]
    rows = []
    for (_, length), group in grouped(main).items():
        for test in lengths_of(group, _first_text(group)):
            scaled = [record["interpolated"].get(str(test)) for record in group]
            plain = results(group, _first_text(group), test, "nats")
            if any(loss is not None for loss in scaled):
                rows.append(
                    [
                        f"{length:,}",
                        f"{test / length:g} times",
                        over_seeds(plain, ".4f"),
                        over_seeds(scaled, ".4f"),
                        f"{mean(loss for loss in scaled if loss is not None) - mean(plain):+.4f}",
                    ]
                )
    if not rows:
        return ""
    head = ["trained at", "tested at", "slopes as trained", "slopes divided", "difference"]
    return (
        "## Position interpolation\n\nLoss of ALiBi in nats per token, non-overlapping windows, with slopes divided "
        "by the factor of the length (arXiv 2310.13017) and without. Models are not fine-tuned.\n\n"
        + markdown(head, rows)
    )


def _first_text(group: Sequence[Record]) -> str:
    """Returns the text of the tests that read only one."""
    return group[0]["text"]["tests"][0]
