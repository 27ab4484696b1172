"""All tables of a study in one Markdown text, from its JSON files alone: the same bytes every time."""

from collections.abc import Sequence

from .length_tables import alibi_by_seed, by_context, claim, extrapolation, interpolation, models
from .other_tables import ablations, machines, recall, speed, sweep, windows
from .records import Record

PARTS = (
    models, claim, extrapolation, alibi_by_seed, by_context, interpolation, recall, speed, ablations, windows, sweep,
    machines,
)  # fmt: skip


def make_tables(name: str, records: Sequence[Record]) -> str:
    """Returns the tables of the study `name`. A table without records is left out."""
    parts = [part(records) for part in PARTS]
    head = (
        f"# Results of the study `{name}`\n\nMade by `hf_alibi study {name} --tables` from the JSON files in `runs/`. "
        "Figures are means ± standard deviations over seeds; a single figure is of one seed."
    )
    return "\n\n".join([head, *filter(None, parts)]) + "\n"
