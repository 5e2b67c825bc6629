"""What the JSON files of results/ may hold: one rule for every key of every row. Imports no torch.

A key that names a unit holds a number or null; a name is text that can be shown and can be part of
a file's name; all else is plain: text, numbers, true, false, null, and lists and objects of them.
"""

import re

from edgecnn.text import NAME_LENGTH, TEXT_LENGTH, is_name, is_text

MOST = 1e15  # of any figure: bytes, operations, microjoules
LARGEST = 10**18  # of any number at all
DEEPEST, MOST_VALUES = 8, 1_000_000
# A key with one of these words is a number, in that unit or a count of that.
COUNTED = re.compile(
    r"(^|_)(bits|bytes|cycles|energy|epochs|images|instructions|lsb|macs|mcnemar|mhz|ms|parameters|"
    r"percent|points|seeds|uj|values|weights)(_|$)"
)
# An object of such numbers.
SEVERAL = (
    "_per_layer",
    "_by_class",
    "layer_sparsity_percent",
    "averaged_validation_accuracy_percent",
)
NAMES, NAMES_OR_NULL = ("variant", "layer"), ("parent", "dominated_by")
LABELS = ("method", "precision", "test_set")  # shown, never null
LABELS_OR_NULL = ("criterion", "checkpoint_sha256", "parent_sha256", "test_sha256")
CHANGES = ("points", "saved_percent")  # may be negative
# What a row of layers.json needs.
LAYER = {"variant": None, "layer": None, "zeros_percent": (0, 100)}
LAYER |= dict.fromkeys(("stored_bytes", "macs_nonzero"), (0, MOST))
LAYER |= {
    f"energy_{part}_uj": (0, MOST)
    for part in ("arithmetic", "weights_sram", "weights_dram", "activations")
}
INTEGERS = ("seed", "test_images", "tflite_micro_images")


def in_range(value, low: float, high: float) -> bool:
    """True for a number from low to high; booleans, text, NaN and infinity are out of any range."""
    return type(value) in (int, float) and low <= value <= high


def plain_problem(value, most_values: int = MOST_VALUES) -> str | None:
    """Why a value is not plain data of a sane size; None where it is."""
    waiting, seen = [("the value", value, 0)], 0
    while waiting:
        key, item, depth = waiting.pop()
        seen += 1
        if depth > DEEPEST:
            return "it is nested too deeply"
        if seen + len(waiting) + (len(item) if isinstance(item, list | dict) else 0) > most_values:
            return "it holds too many values"
        if isinstance(item, dict):
            if not all(is_text(key, NAME_LENGTH) for key in item):
                return "a key is not text that can be shown"
            waiting += [(name, part, depth + 1) for name, part in item.items()]
        elif isinstance(item, list):
            waiting += [(key, part, depth + 1) for part in item]
        elif isinstance(item, str):
            if not is_text(item, TEXT_LENGTH):
                return f'"{key}" is {ascii(item):.40}, not text that can be shown'
        elif type(item) in (int, float):
            if not in_range(item, -LARGEST, LARGEST):
                return f'"{key}" is {item!r:.40}, not a number of a sane size'
        elif item is not None and not isinstance(item, bool):
            return f'"{key}" is of type {type(item).__name__}, not plain data'
    return None


def expected(key: str, value) -> str | None:
    """What the value of a key has to be, where it is not; None where it is right."""
    if (
        key in NAMES
        and not is_name(value)
        or key in NAMES_OR_NULL
        and not (value is None or is_name(value))
    ):
        return "a name of at most 200 characters that can be shown and be part of a file's name"
    if key in LABELS and not is_text(value, NAME_LENGTH):
        return "text that can be shown"
    if key in LABELS_OR_NULL and not (value is None or is_text(value, NAME_LENGTH)):
        return "text that can be shown, or null"
    if key in INTEGERS and not (type(value) is int and 0 <= value < 2**31):
        return None if value is None and key != "seed" else "an integer from 0"
    if key.endswith("_fits") and not (value is None or isinstance(value, bool)):
        return "true, false or null"
    if key == "arguments" and not isinstance(value, dict | str):
        return "an object or text"
    if not COUNTED.search(key) or value is None:
        return None
    low = -MOST if key.endswith(CHANGES) else 0
    high = 100 if key.endswith("percent") else MOST
    if key.endswith(SEVERAL):
        right = isinstance(value, dict) and all(in_range(x, low, high) for x in value.values())
        return None if right else "an object of numbers"
    return None if in_range(value, low, high) else f"a number (from {low:g} to {high:g}) or null"


def row_problem(row, needed: dict, optional: dict | None = None) -> str | None:
    """What is wrong with a row, as `"key" is ...`; None for a row that can be used.

    needed, optional: key -> (low, high), between which its number must lie, or None where the rule
    of the key says enough; an optional one may be absent or null.
    """
    if not isinstance(row, dict):
        return "it is not an object"
    given = {key: ends for key, ends in (optional or {}).items() if row.get(key) is not None}
    for key, ends in (needed | given).items():
        if key not in row:
            return f'"{key}" is missing'
        if ends and not in_range(row[key], *ends):
            low, high = ends
            return f'"{key}" is {ascii(row[key]):.40}, not a number (from {low:g} to {high:g})'
    for key, value in row.items():
        wanted = expected(key, value)
        if wanted:
            return f'"{key}" is {ascii(value):.40}, not {wanted}'
    return None
