"""Text for people: tables aligned for a terminal or in Markdown, and shortened lists."""

from collections.abc import Collection, Iterable, Sequence


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> str:
    """Returns a table for the terminal, with columns two spaces apart.

    Args:
        rows: The cells of each line.
        left: Numbers of the columns that are aligned left. The others are aligned right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = [
            cell.ljust(width) if column in left else cell.rjust(width) for column, (cell, width) in enumerate(cells)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table. Bars in cells are escaped, and line breaks become spaces."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines
    )


def some_of(names: Collection[str]) -> str:
    """Returns the first three of `names` in sorted order, and the total if there are more."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown}, … ({len(names)} in all)"
