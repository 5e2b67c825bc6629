"""Pick the best variant for a budget (--budget flash_kb=128 ram_kb=32 ...). Imports no torch."""

from typing import NamedTuple

from edgecnn.files import MADE_BY, UserError, lowest_seed_rows
from edgecnn.records import in_range

KB = 1024  # bytes: what the datasheets of microcontrollers mean by a KB or Kbyte
SHOWN = 3  # names in a line of the answer; the others are counted


class Figure(NamedTuple):
    """A key of metrics.json, and how its values came to be."""

    key: str
    origin: str


class Limit(NamedTuple):
    """What a key of --budget bounds: its unit, the row's units in one of it, figures by preference.

    All figures of a limit are the same quantity, so that rows with one and rows with another compare.
    """

    unit: str
    scale: float
    figures: tuple[Figure, ...]
    floor: bool = False  # at least, instead of at most


LIMITS = {
    "flash_kb": Limit(
        "KB",
        KB,
        (
            Figure("m4_flash_bytes", "measured: the linked Cortex-M4 image"),
            Figure(
                "weight_stored_bytes",
                "modelled: weights and biases uncoded, with an index of the non-zeros; no program code",
            ),
        ),
    ),
    "ram_kb": Limit(
        "KB",
        KB,
        (
            Figure("m4_ram_bytes", "measured: the linked Cortex-M4 image and its stack"),
            Figure(
                "activations_peak_bytes", "modelled: peak of the live activations; no stack or data"
            ),
        ),
    ),
    "energy_uj": Limit(
        "uJ", 1, (Figure("energy_sram_uj", "modelled: 45 nm arithmetic, weights in on-chip SRAM"),)
    ),
    "energy_stm32l4r5_uj": Limit(
        "uJ",
        1,
        (
            Figure("stm32l4r5_energy_modelled_uj", "modelled from the cycles of the M4 kernels"),
            Figure(
                "energy_stm32l4r5_extrapolated_uj", "extrapolated from MLPerf Tiny measurements"
            ),
        ),
    ),
    "macs_m": Limit("M", 1e6, (Figure("macs_nonzero", "counted: MACs of non-zero weights"),)),
    "accuracy": Limit("%", 1, (Figure("accuracy_percent", "measured"),), floor=True),
}


class Board(NamedTuple):
    """Flash and RAM of a part in KB, RAM as the largest block that data can take; the source."""

    flash_kb: int
    ram_kb: int
    source: str


BOARDS = {
    "stm32f405": Board(
        1024, 128, "STM32F405xG, datasheet DS8626; RAM: 128 KB in one block, 64 KB CCM apart"
    ),
    "stm32l4r5": Board(2048, 640, "STM32L4R5xI, datasheet DS12023; RAM: three adjoining blocks"),
    "stm32h743": Board(
        2048, 512, "STM32H743xI, datasheet DS12110; RAM: the AXI SRAM of about 1 MB in all"
    ),
    "nrf52840": Board(1024, 256, "nRF52840 Product Specification, chapter Memory"),
    "rp2040": Board(
        2048, 264, "RP2040 datasheet; flash: the external 2 MB of the Pico board (its datasheet)"
    ),
    "esp32s3": Board(
        8192,
        512,
        "ESP32-S3-WROOM-1-N8 datasheet; flash: external; RAM: instruction RAM and caches included",
    ),
}
HELP = (
    "any of "
    + ", ".join(
        f"{name} (at {'least' if limit.floor else 'most'})" for name, limit in LIMITS.items()
    )
    + f", or board= one of {', '.join(BOARDS)}; 1 KB = 1,024 bytes"
)


# ---- a budget ----------------------------------------------------------------------------------


def parse_budget(items: list[str]) -> dict[str, float]:
    """Limits by name, from `key=value` words; a board stands for its flash and its RAM.

    Raises UserError for an unknown or repeated key, an unknown board, or what is no number above 0.
    """
    limits = {}
    for item in items:
        key, _, text = item.partition("=")
        if key == "board":
            board = BOARDS.get(text.lower().replace("-", ""))
            if board is None:
                raise UserError(f"--budget {item}: unknown board; known are {', '.join(BOARDS)}")
            given = {"flash_kb": board.flash_kb, "ram_kb": board.ram_kb}
        elif key in LIMITS:
            given = {key: limit_value(item, text)}
        else:
            known = ", ".join([*LIMITS, "board"])
            raise UserError(f"--budget {item}: give key=value with one of {known}")
        repeated = sorted(given.keys() & limits.keys())
        if repeated:
            raise UserError(f"--budget {item}: {repeated[0]} is limited already; leave one out")
        limits |= given
    if not 1 < limits.get("accuracy", 100) <= 100:
        raise UserError(
            "--budget accuracy is in percent, above 1 and at most 100; give for example 85"
        )
    return limits


def limit_value(item: str, text: str) -> float:
    """A finite number above zero; raises UserError."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise UserError(f"--budget {item}: {text or 'nothing'} is not a number above 0")
    return value


def figure_for(rows: list[dict], name: str) -> Figure:
    """The limit's preferred figure that any row has; raises UserError without one."""
    for figure in LIMITS[name].figures:
        for row in rows:
            value = row.get(figure.key)
            if value is not None and not in_range(value, 0, 1e15):
                problem = f"{figure.key} is {value!r:.40}, not a number from 0"
                raise UserError(f"{row['variant']}: {problem}; run: {MADE_BY}")
        if any(row.get(figure.key) is not None for row in rows):
            return figure
    keys = " or ".join(figure.key for figure in LIMITS[name].figures)
    raise UserError(f"no variant has {keys}, which {name} needs; run: {MADE_BY}")


def competitors(rows: list[dict], limits: dict[str, float]) -> list[dict]:
    """The lowest seed's rows that have every figure the limits are held against.

    Once one variant is measured, an estimate of another would not compare: it stays out.
    """
    rows = lowest_seed_rows(rows)
    keys = [figure_for(rows, name).key for name in limits]
    return [row for row in rows if all(row.get(key) is not None for key in keys)]


def amount(row: dict, name: str) -> float:
    """What the row needs (of accuracy: has), in the limit's unit."""
    return row[figure_for([row], name).key] / LIMITS[name].scale


def excess(row: dict, name: str, limit: float) -> float:
    """By what share of the limit the row misses it; negative is slack."""
    over = amount(row, name) / limit - 1
    return -over if LIMITS[name].floor else over


def distance(row: dict, limits: dict[str, float]) -> float:
    """The largest excess over a limit, as a share of that limit: what a nearest miss is nearest in."""
    return max(excess(row, name, limit) for name, limit in limits.items())


def ranked(rows: list[dict], limits: dict[str, float]) -> list[dict]:
    """The rows that fit, best first: the most accurate, of equals the smallest file."""
    fitting = [row for row in rows if distance(row, limits) <= 0]
    return sorted(
        fitting, key=lambda row: (-row["accuracy_percent"], row["size_bytes"], row["variant"])
    )


def nearest(rows: list[dict], limits: dict[str, float]) -> dict:
    """The row of the smallest distance; of equals the most accurate."""
    return min(rows, key=lambda row: (distance(row, limits), -row["accuracy_percent"]))


# ---- the answer --------------------------------------------------------------------------------


def number(value: float) -> str:
    """Four digits, with thousands separators; whole numbers whole."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"


def names(rows: list[dict]) -> str:
    """A few variants by name, the rest counted."""
    shown = ", ".join(row["variant"] for row in rows[:SHOWN])
    return shown + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")


def misses(row: dict, limits: dict[str, float]) -> str:
    """By how much a row misses each limit that it misses."""
    parts = []
    for name, limit in limits.items():
        share = excess(row, name, limit)
        if share > 0:
            unit, side = LIMITS[name].unit, "below" if LIMITS[name].floor else "above"
            gap = number(abs(amount(row, name) - limit))
            parts.append(f"{name} by {gap} {unit} ({number(100 * share)} % {side} {number(limit)})")
    return ", ".join(parts)


def limit_lines(best: dict, better: list[dict], limits: dict[str, float]) -> list[str]:
    """A line a limit: what the best variant has of it, and which more accurate ones it keeps out."""
    lines = []
    for name, limit in limits.items():
        kept_out = [row for row in better if excess(row, name, limit) > 0]
        slack = -100 * excess(best, name, limit)
        side = "at least" if LIMITS[name].floor else "at most"
        effect = f"binds, keeps out {names(kept_out)}" if kept_out else "does not bind"
        lines.append(
            f"  {name} {side} {number(limit)}: {number(amount(best, name))} "
            f"{LIMITS[name].unit}, slack {number(slack)} %; {effect}"
        )
    return lines


def figure_lines(rows: list[dict], limits: dict[str, float]) -> list[str]:
    """A line a limit: the figure it was held against."""
    figures = {name: figure_for(rows, name) for name in limits}
    return [f"  {name}: {figure.key} ({figure.origin})" for name, figure in figures.items()]


def answer(rows: list[dict], limits: dict[str, float]) -> tuple[bool, str]:
    """(whether a variant fits, the text): the best, why, the runner-up and what moving up takes.

    Raises UserError when no row has a figure that a limit needs.
    """
    rival = competitors(rows, limits)
    absent = len(lowest_seed_rows(rows)) - len(rival)
    seeds = sorted({row.get("seed", 0) for row in rows})
    fitting = ranked(rival, limits)
    budget = ", ".join(f"{name}={number(limit)}" for name, limit in limits.items())
    lines = [f"Budget: {budget} (1 KB = 1,024 bytes). {len(fitting)} of {len(rival)} variants fit."]
    if len(seeds) > 1:
        lines.append(f"Seed {seeds[0]} alone competes, of seeds {', '.join(map(str, seeds))}.")
    if absent:
        lines.append(f"{absent} more lack a figure that the others have, and do not compete.")
    if not fitting:
        near = nearest(rival, limits)
        lines += [
            f"Nothing fits. Nearest miss: {near['variant']} ({near['accuracy_percent']:.2f} %) "
            f"misses {misses(near, limits)}.",
            "Nearest: the smallest excess over any limit, as a share of that limit.",
        ]
    else:
        best = fitting[0]
        better = [row for row in rival if row["accuracy_percent"] > best["accuracy_percent"]]
        better.sort(key=lambda row: -row["accuracy_percent"])
        lines.append(
            f"Best: {best['variant']}, {best['accuracy_percent']:.2f} %, the most accurate that fits."
        )
        lines += limit_lines(best, better, limits)
        if fitting[1:]:
            second = fitting[1]
            loss = best["accuracy_percent"] - second["accuracy_percent"]
            needs = ", ".join(f"{name} {number(amount(second, name))}" for name in limits)
            lines.append(f"Runner-up: {second['variant']}, {loss:.2f} points less, with {needs}.")
        else:
            lines.append("Runner-up: none, nothing else fits.")
        if better:
            up = nearest(better, limits)
            gain = up["accuracy_percent"] - best["accuracy_percent"]
            lines.append(
                f"To move up: {up['variant']}, +{gain:.2f} points, misses {misses(up, limits)}."
            )
        else:
            lines.append("To move up: no variant is more accurate.")
    return bool(fitting), "\n".join([*lines, "Figures:", *figure_lines(rival, limits)])
