"""How the Pareto picture draws and calls a variant: marker, colour, short name, legend. No torch.

Marker and colour tell the precision, or the run where a picture has several. Colours are Okabe
and Ito's, which colour-blind eyes tell apart; the shape alone does in grey.
"""

import re
from collections import Counter

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from edgecnn.compare import run_of
from edgecnn.errors import UserError
from edgecnn.names import NAME_PATTERN
from edgecnn.text import picture_text

GREY, GREEN, DARK = "#808080", "#009E73", "#444444"
MARKER_POINTS, SMALL_MARKER_POINTS, RING_POINTS = 7, 4, 12
OTHER = "other precision"
PRECISIONS = {"FP32": ("o", "#0072B2"), "INT8": ("s", "#D55E00"), OTHER: ("D", "#009E73")}
RUNS = (
    ("s", "#D55E00"),
    ("o", "#0072B2"),
    ("^", "#CC79A7"),
    ("D", "#000000"),
    ("v", "#E69F00"),
    ("P", "#56B4E9"),
    ("X", "#009E73"),
)
CI_KEYS = ("accuracy_ci95_low_percent", "accuracy_ci95_high_percent")  # optional
LABEL_LENGTH = 24  # longer names are cut, or one label could be wider than its panel


def cut(text: str) -> str:
    """The text in at most LABEL_LENGTH characters."""
    return text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "…"


def short_label(row: dict, with_criterion: bool = True) -> str:
    """`pruned_50_l1_int8` -> `50 % L1` (the marker tells the rest); cut when long.

    `channels_30_pruned_80_int8` -> `ch 30 %, 80 %`.
    """
    text = row["variant"].rpartition("/")[2]
    match = NAME_PATTERN.fullmatch(text)
    if match:
        text = match["method"]
        if not with_criterion:
            text = re.sub(r"(_[\d.]+)_(?!control|pruned)[a-z][a-z0-9-]*", r"\1", text)
        text = re.sub(r"_([\d.]+)", r" \1 %", text).removeprefix("pruned ")
        text = text.replace("_pruned", ",").replace("channels", "ch").replace("_l1", " L1")
        text = text.replace("_", " ")
    return cut(text)


def short_labels(rows: list[dict]) -> list[str]:
    """Each row's short label, with its criterion only where another of its kind has the same level."""
    levels = [(run_of(row), precision(row), short_label(row, False)) for row in rows]
    count = Counter(levels)
    return [short_label(row, count[level] > 1) for row, level in zip(rows, levels, strict=True)]


def precision(row: dict) -> str:
    """`fp32`, `int8` or whatever else the row, or else the end of its name, says."""
    return str(row.get("precision") or row["variant"].rsplit("_", 1)[-1]).lower()


def has_ci(row: dict) -> bool:
    """True when the row carries both ends of its accuracy's confidence interval."""
    return all(row.get(key) is not None for key in CI_KEYS)


def kind_of(row: dict, joint: bool) -> str:
    """What marker and colour tell of a row: its precision, or in a joint picture its run."""
    name = run_of(row) if joint else precision(row).upper()
    return name if joint or name in PRECISIONS else OTHER


def styles_of(rows: list[dict], joint: bool) -> dict[str, tuple[str, str]]:
    """Kind -> (marker, colour) of the kinds present; raises UserError for more than there are."""
    present = dict.fromkeys(kind_of(row, joint) for row in rows)
    if not joint:
        return {kind: style for kind, style in PRECISIONS.items() if kind in present}
    if len(present) > len(RUNS):
        raise UserError(f"{len(present)} runs, and {len(RUNS)} marks; leave some out")
    return dict(zip(present, RUNS, strict=False))


def legend_handles(rows, styles: dict, references, budget: bool) -> list:
    """What shapes, fills, grey marks and percentages mean.

    styles: as of styles_of; references: (name, marker, figures) of points from elsewhere.
    """

    def mark(label, marker, color, fill=None, **look):
        look = {"ms": MARKER_POINTS, "mfc": fill or color} | look
        label = picture_text(label)
        return Line2D([], [], ls="", marker=marker, color=color, label=label, **look)

    handles = [mark(cut(kind), *style) for kind, style in styles.items()]
    handles += [
        Line2D([], [], color=DARK, lw=1.2, marker="o", label="on the front"),
        mark("not on the front", "o", DARK, "white", ms=SMALL_MARKER_POINTS),
    ]
    handles += [mark(label, marker, GREY) for label, marker, _ in references]
    if any(has_ci(row) for row in rows):
        handles.append(mark("95 % confidence interval", "|", DARK))
    handles.append(mark("share of weights pruned", r"$50\,\%$", DARK, ms=22, mew=0))
    if budget:
        handles.append(Patch(color=GREEN, alpha=0.2, label="allowed by this panel's limits"))
        handles.append(mark("meets the whole budget", "o", GREEN, "none", ms=RING_POINTS - 2))
    return handles
