"""What stands in a cell of a Markdown table, and the table of cells: pure text. Imports no torch."""

import math

from edgecnn.compare import CHANGE_KEYS
from edgecnn.text import markdown_cell

KIB = 1024  # bytes: what the datasheets of microcontrollers mean by a KB or Kbyte
SIGNIFICANCE = 0.05  # of one comparison; the many are not corrected for
NOT_MEASURED = "not measured"
ENERGY = "stm32l4r5_energy_modelled{}_uj"


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, aligned so that it reads in a terminal too; the first column is text.

    Names come from files: what Markdown or HTML would take for markup is shown as it is.
    """
    header, *lines = ([markdown_cell(cell) for cell in line] for line in (header, *lines))
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def render(cells):
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(f"{'-' * (w + 1)}{'-' if i == 0 else ':'}" for i, w in enumerate(widths))
    return "\n".join([render(header), f"|{rule}|", *map(render, lines)])


def significant(value: float, digits: int = 2) -> str:
    """A number rounded to some significant digits: 1,987 -> 2,000, 3.51 -> 3.5."""
    if not value:
        return "0"
    value = float(f"{value:.{digits - 1}e}")
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def scaled(row: dict, key: str, unit: float = 1, decimals: int | None = 0) -> str:
    """A figure in a unit, of two digits without `decimals`; "not measured" where the row lacks it."""
    value = row.get(key)
    if value is None:
        return NOT_MEASURED
    return significant(value / unit) if decimals is None else f"{value / unit:,.{decimals}f}"


def band(row: dict, key: str, unit: float = 1) -> str:
    """A modelled figure with the ends of its band: `2,000 (1,800-5,200)`."""
    middle, low, high = (scaled(row, key.format(end), unit, None) for end in ("", "_low", "_high"))
    return NOT_MEASURED if NOT_MEASURED in (middle, low, high) else f"{middle} ({low}-{high})"


def energy(row: dict) -> str:
    """The modelled energy on the STM32L4R5, whose flash must hold the program."""
    text = band(row, ENERGY)
    return "does not fit" if text == NOT_MEASURED and "m4_flash_bytes" in row else text


def interval(row: dict) -> str:
    """The ends of the accuracy's 95 % interval."""
    return f"{row['accuracy_ci95_low_percent']:.1f}-{row['accuracy_ci95_high_percent']:.1f}"


def change(row: dict, name: str) -> str:
    """A change of accuracy, marked n.s. where McNemar's test does not tell it from none; or a dash."""
    points, p = row.get(CHANGE_KEYS[name]), row.get(f"mcnemar_p_vs_{name}")
    if points is None:
        return "-"
    return f"{points:+.2f}" + (" n.s." if p is not None and p >= SIGNIFICANCE else "")


def per_seed(runs: list[dict], name: str) -> str:
    """The change of every run, or a dash where one lacks it."""
    changes = [change(run, name) for run in runs]
    return "-" if "-" in changes else ", ".join(changes)


def columns(rows: list[dict], parts: dict) -> str:
    """A table of rows, a column for each header and what it makes of a row; empty without rows."""
    lines = [[row["variant"], *(text(row) for text in parts.values())] for row in rows]
    return markdown_table(["Variant", *parts], lines) if rows else ""


def key(name: str, unit: float = 1, decimals: int | None = 0):
    """The column of a key."""
    return lambda row: scaled(row, name, unit, decimals)
