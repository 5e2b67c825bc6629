"""Pick the best variant for a budget (--budget flash_kib=128 ram_kib=32 ...). Imports no torch."""

from typing import NamedTuple

from edgecnn.cells import KIB
from edgecnn.compare import lowest_seed_rows
from edgecnn.errors import UserError
from edgecnn.records import in_range


class Limit(NamedTuple):
    """What a key of --budget bounds: its unit, that in the rows' units, and figures by preference.

    figures: key -> how its values came to be. All of a limit are the same quantity, and the first
    that any row has is the one that all rows are held against.
    """

    unit: str
    scale: float
    figures: dict[str, str]
    floor: bool = False  # at least, instead of at most


LIMITS = {
    "flash_kib": Limit(
        "KiB",
        KIB,
        {
            "m4_flash_bytes": "counted: the linked Cortex-M4 program",
            "weight_stored_bytes": "modelled: weights and biases, with an index of the non-zeros; "
            "no program code",
        },
    ),
    "ram_kib": Limit(
        "KiB",
        KIB,
        {
            "m4_ram_bytes": "counted: the linked Cortex-M4 program and its stack",
            "activations_peak_bytes": "modelled: peak of the live activations; no stack or data",
        },
    ),
    "energy_uj": Limit(
        "µJ", 1, {"energy_sram_uj": "modelled: 45 nm arithmetic, weights in on-chip SRAM"}
    ),
    "energy_stm32l4r5_uj": Limit(
        "µJ", 1, {"stm32l4r5_energy_modelled_uj": "modelled from the cycles of the M4 kernels"}
    ),
    "macs_m": Limit("M", 1e6, {"macs_nonzero": "counted: MACs of non-zero weights"}),
    "accuracy": Limit("%", 1, {"accuracy_percent": "measured"}, floor=True),
}


class Board(NamedTuple):
    """Flash and RAM of a part in KiB, RAM as the largest block that data can take; the source."""

    flash_kib: int
    ram_kib: int
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
    + f", or board= one of {', '.join(BOARDS)}; 1 KiB = 1,024 bytes"
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
            given = {"flash_kib": board.flash_kib, "ram_kib": board.ram_kib}
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
        raise UserError(
            f"--budget {item}: {text or 'nothing'} is not a number above 0; give key=value, several "
            "with spaces between them"
        )
    return value


def figure_for(rows: list[dict], name: str) -> str:
    """The key of the limit's preferred figure that any row has; raises UserError without one."""
    for key in LIMITS[name].figures:
        for row in rows:
            value = row.get(key)
            if value is not None and not in_range(value, 0, 1e15):
                problem = f"{key} is {value!r:.40}, not a number from 0"
                raise UserError(f"{row['variant']}: {problem}; make metrics.json again")
        if any(row.get(key) is not None for row in rows):
            return key
    keys = " or ".join(LIMITS[name].figures)
    raise UserError(
        f"no variant has {keys}, which {name} needs; for the same run make it with "
        "simulate_hardware.py, then evaluate.py"
    )


def competitors(rows: list[dict], limits: dict[str, float]) -> list[dict]:
    """The lowest seed's rows that have every figure the limits are held against.

    Once one variant is counted, an estimate of another would not compare: it stays out.
    """
    rows = lowest_seed_rows(rows)
    keys = [figure_for(rows, name) for name in limits]
    return [row for row in rows if all(row.get(key) is not None for key in keys)]


def amount(row: dict, name: str) -> float:
    """What the row needs (of accuracy: has), in the limit's unit."""
    return row[figure_for([row], name)] / LIMITS[name].scale


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


def misses(row: dict, limits: dict[str, float]) -> str:
    """By how much a row misses each limit that it misses."""
    return ", ".join(
        f"{name} by {number(abs(amount(row, name) - limit))} "
        f"{LIMITS[name].unit.replace('%', 'points')} "
        f"({100 * excess(row, name, limit):.0f} %)"
        for name, limit in limits.items()
        if excess(row, name, limit) > 0
    )


def answer(rows: list[dict], limits: dict[str, float]) -> tuple[bool, str]:
    """(whether a variant fits, the text): the best, its figure under each limit, the nearest miss.

    Raises UserError when no row has a figure that a limit needs.
    """
    rivals = competitors(rows, limits)
    first = lowest_seed_rows(rows)
    absent = len(first) - len(rivals)
    fitting = ranked(rivals, limits)
    lines = [f"{len(fitting)} of {len(rivals)} variants fit."]
    if len(first) < len(rows):
        seeds = sorted({row.get("seed", 0) for row in first})
        lines[0] += f" Seed {' or '.join(map(str, seeds))} alone competes."
    if absent:
        lines[0] += f" {absent} more lack a figure that the others have, and do not compete."
    if fitting:
        best = fitting[0]
        lines.append(f"Best: {best['variant']}, {best['accuracy_percent']:.2f} %.")
    for name, limit in limits.items():
        side = "least" if LIMITS[name].floor else "most"
        has = f"{number(amount(fitting[0], name))} {LIMITS[name].unit}, " if fitting else ""
        origin = LIMITS[name].figures[figure_for(rivals, name)]
        lines.append(f"  {name} at {side} {number(limit)}: {has}{origin}")
    better = [r for r in rivals if not fitting or r["accuracy_percent"] > best["accuracy_percent"]]
    if better:
        near = nearest(better, limits)
        what = "Nearest miss that is more accurate" if fitting else "Nothing fits. Nearest miss"
        lines.append(
            f"{what}: {near['variant']}, {near['accuracy_percent']:.2f} %, "
            f"misses {misses(near, limits)}."
        )
    else:
        lines.append("No variant is more accurate.")
    return bool(fitting), "\n".join(lines)
