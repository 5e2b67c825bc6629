"""Step 5: draw what accuracy costs, as three Pareto panels (file size, MACs, relative energy).

    python plot_pareto.py            # after python evaluate.py
    python plot_pareto.py --smoke    # the seconds-long run, after python evaluate.py --smoke
    python plot_pareto.py --budget flash_kb=512 accuracy=85   # shades what a budget allows
    python plot_pareto.py --layers pruned_50_int8             # where one variant's costs sit
    python plot_pareto.py --break-even                        # where sparsity starts to pay

Reads   results/metrics.json, a list of flat rows, one a variant (of several seeds the lowest),
        or results/layers.json with --layers, results/break_even.json with --break-even.
Writes  results/optimization_results.png and results/optimization_results.svg
        (optimization_results_budget.* with --budget, layers_<variant>.*, break_even.*).

A point is on the front of a panel when no other variant is at least as accurate for at most the
same cost and better in one of the two. Reference points from elsewhere never enter the front.
The headline variants and each panel's front are named; every other variant is a small mark.
"""

import itertools
import os
import textwrap
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook's setting names a backend that may be missing here

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from edgecnn.budget import (
    HELP,
    LIMITS,
    amount,
    competitors,
    figure_for,
    number,
    parse_budget,
    ranked,
)
from edgecnn.cli import Parser, run_folder
from edgecnn.files import (
    MADE_BY,
    NAME_PATTERN,
    UserError,
    atomic_path,
    is_headline,
    read_rows,
    read_table,
    results_dir,
    user_errors_exit_2,
)
from edgecnn.peers import ORIGINAL, RESNET8
from edgecnn.text import picture_text

# ---------------------------------------------------------------------------------------------
# Constants
# One panel each: the row's key, what one axis unit is in the key's unit, the axis label, and the
# limits of a budget that belong to it.
PANELS = [
    ("size_bytes", 2**20, "file size\n(MB of $2^{20}$ bytes)", ("flash_kb",)),
    ("macs_nonzero", 1e6, "non-zero MACs\n(millions an image)", ("macs_m",)),
    (
        "relative_energy",
        1,
        "relative energy score\n(million MACs × bits/8, zeros skipped)",
        ("energy_uj", "energy_stm32l4r5_uj"),
    ),
]
# The axes that take a panel's place when a budget limits what it stands for.
LIMIT_LABELS = {
    "flash_kb": "flash\n(KB of $2^{10}$ bytes, {origin})",
    "energy_uj": "energy an inference, weights in SRAM\n(µJ, {origin})",
    "energy_stm32l4r5_uj": "energy an inference, STM32L4R5\n(µJ, {origin})",
}
# Panels of --layers: the axis label, what an axis unit is, and the stacked keys with name and colour.
LAYER_PANELS = [
    ("stored bytes (kB),\nindex included", 1e3, [("stored_bytes", "stored", "#0072B2")]),
    ("non-zero MACs\n(millions)", 1e6, [("macs_nonzero", "executed", "#0072B2")]),
    (
        "modelled energy (µJ),\nweights in SRAM",
        1,
        [
            ("energy_arithmetic_uj", "arithmetic", "#D55E00"),
            ("energy_weights_sram_uj", "weights", "#0072B2"),
            ("energy_activations_uj", "activations", "#009E73"),
        ],
    ),
    (
        "modelled energy (µJ),\nweights in DRAM",
        1,
        [
            ("energy_arithmetic_uj", "arithmetic", "#D55E00"),
            ("energy_weights_dram_uj", "weights", "#0072B2"),
            ("energy_activations_uj", "activations", "#009E73"),
        ],
    ),
]
# Panels of --break-even: the axis label, what an axis unit is, and key, name, marker, colour of a line.
BREAK_EVEN_PANELS = [
    (
        "Cortex-M instructions (millions), counted",
        1e6,
        [
            ("m4_dense_instructions", "dense kernels", "s", "#0072B2"),
            ("m4_sparse_instructions", "sparse kernels", "o", "#D55E00"),
            ("m7_dense_instructions", "dense, Cortex-M7", "+", "#56B4E9"),
            ("m7_sparse_instructions", "sparse, Cortex-M7", "x", "#E69F00"),
        ],
    ),
    (
        "Cortex-M4 flash (kB), linked",
        1e3,
        [
            ("m4_dense_flash_bytes", "dense kernels", "s", "#0072B2"),
            ("m4_sparse_flash_bytes", "sparse kernels", "o", "#D55E00"),
        ],
    ),
    (
        "Ethos-U55-128 (modelled by Vela)",
        1e3,
        [
            ("u55_128_cycles_modelled", "thousand cycles", "^", "#009E73"),
            ("u55_128_flash_bytes_modelled", "flash, kB", "v", "#CC79A7"),
        ],
    ),
]
CI_KEYS = ("accuracy_ci95_low_percent", "accuracy_ci95_high_percent")  # optional
# Precision -> marker and colour (Okabe-Ito); the shape alone tells them apart in grey.
STYLES = {"fp32": ("o", "#0072B2"), "int8": ("s", "#D55E00")}
OTHER_STYLE = ("D", "#009E73")
# Points from elsewhere: legend text, marker, accuracy (%), then one cost a panel, in axis units.
REFERENCES = [
    (
        f"original project: {row['name']}",
        marker,
        row["accuracy_percent"],
        (row["size_mb"], row["macs_m"], row["relative_energy"]),
    )
    for marker, row in zip("+xv", ORIGINAL.values(), strict=True)
]
REFERENCES += [
    (
        RESNET8["name"],
        "*",
        RESNET8["accuracy_percent"],
        (RESNET8["tflite_bytes"] / 2**20, RESNET8["macs"] / 1e6, RESNET8["macs"] / 1e6),
    ),
]
FOOTNOTES = """
The energy score is relative, not joules, and credits every skipped zero. Sparse kernels and NPUs \
with weight compression do skip zeros; dense kernels run a pruned network no faster. \
Control: the same fine-tuning without pruning.
Grey marks: "original project" as published by the original table; its pruned MACs and sizes were \
assumed, not counted. ResNet-8: MLPerf Tiny benchmark v1.x reference model, int8 .tflite, \
accuracy on the 10,000 test images.
"""
COST_RANGE = (1e-6, 1e15)  # a cost of zero or less has no place on a logarithmic axis
BUDGET_NOTE = """
Budget: {budget}. Green: what a panel's own limit and the accuracy floor allow. Ringed: the variants \
that meet every limit{no_panel}. {best}
"""
GREEN = "#009E73"
GREY = "#808080"
MARKER_POINTS, SMALL_MARKER_POINTS, RING_POINTS = 7, 4, 12
LABEL_FONT = 9.5
LABEL_LENGTH = 24  # longer names are cut, or one label could be wider than its panel
LEADER_POINTS = 9  # a label further from its mark than this gets a leader line
LOG_RATIO = 5  # a cost that spans more than this gets a logarithmic axis
TICK_STEPS = [1, 2, 5, 10]
BAND_GAP = 1.5  # references further below the variants than this (points) share a compressed band
BAND_SHARE = 0.15  # the part of the panel's height which that band takes
# The detour in pixels that a label makes to keep off a mark, clear of doubt whose label it is,
# off the front's line, and off an error bar.
OFF_MARK, OFF_DOUBT, OFF_LINE, OFF_BAR = 1e4, 80, 60, 12


# ---------------------------------------------------------------------------------------------
# Data
def pareto_front(costs, accuracies) -> list[int]:
    """Indices of the non-dominated points (least cost, most accuracy), by rising cost.

    A point is dominated when another costs no more and is no less accurate, and is better in one
    of the two. So of two points of equal cost only the more accurate one stays, of two equally
    accurate ones only the cheaper, and points equal in both stay together.
    """
    costs, accuracies = np.asarray(costs, float), np.asarray(accuracies, float)

    def dominated(i):
        no_worse = (costs <= costs[i]) & (accuracies >= accuracies[i])
        return np.any(no_worse & ((costs < costs[i]) | (accuracies > accuracies[i])))

    return sorted((i for i in range(len(costs)) if not dominated(i)), key=lambda i: costs[i])


def precision(row: dict) -> str:
    """`fp32`, `int8` or whatever else the row, or else the end of its name, says."""
    return str(row.get("precision") or row["variant"].rsplit("_", 1)[-1]).lower()


def style(row: dict) -> tuple[str, str]:
    """The marker and colour of the row's precision."""
    return STYLES.get(precision(row), OTHER_STYLE)


def has_ci(row: dict) -> bool:
    """True when the row carries both ends of its accuracy's confidence interval."""
    return all(row.get(key) is not None for key in CI_KEYS)


def short_label(row: dict) -> str:
    """`pruned_50_l1_int8` -> `50 % L1` (the marker tells the precision); cut when long."""
    match = NAME_PATTERN.fullmatch(row["variant"])
    text = row["variant"]
    if match and match["percent"]:
        criterion = match["criterion"] or ""
        text = (
            f"{match['percent']} % {criterion.upper() if len(criterion) < 3 else criterion}".strip()
        )
    elif match:
        text = match["method"]
    return text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "…"


# ---------------------------------------------------------------------------------------------
# Labels: all in pixels; a box is (left, bottom, right, top)
def overlap(boxes, others):
    """(n, m) booleans: which of n boxes overlap which of m others."""
    a, b = np.asarray(boxes, float)[:, None, :], np.asarray(others, float)[None, :, :]
    return np.all((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:]), axis=-1)


def along(start, end):
    """Small boxes along a line, so that lines and boxes are compared alike."""
    points = np.linspace(start, end, 12)
    return np.concatenate([points - 0.5, points + 0.5], axis=-1)


def leader_start(anchor, box):
    """The point of the box's edge nearest to the anchor."""
    return np.clip(anchor, box[:2], box[2:])


def place_labels(anchors, sizes, bounds, marks, lines, bars) -> list[np.ndarray]:
    """A box for each label: near its anchor, in bounds, off the marks and the other labels.

    anchors (n, 2) points, sizes (n, 2) widths and heights, bounds one box; marks, lines and bars
    are (m, 4) boxes to keep off, in falling order of weight. Each label in turn takes the
    cheapest of a fixed set of offsets, then all are reconsidered; the best of three orders (the
    crowded ones first, from the left, from the right) is kept. Nothing random.
    """
    anchors, sizes = np.asarray(anchors, float), np.asarray(sizes, float)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    gaps = np.array([10, 14, 19, 26, 36, 50, 70, 100, 140])
    inner = np.array([bounds[0], bounds[1], -bounds[2], -bounds[3]]) + 3
    crowd = (np.linalg.norm(anchors[:, None] - anchors[None], axis=-1) < 70).sum(axis=1)

    def cheapest(i, placed):
        shifts = directions[None] * (sizes[i] / 2 + gaps[:, None, None])  # (gaps, directions, 2)
        centres = anchors[i] + shifts.reshape(-1, 2)
        boxes = np.concatenate([centres - sizes[i] / 2, centres + sizes[i] / 2], axis=1)
        rest = [(anchors[j], box) for j, box in placed.items() if j != i]
        others = np.reshape([box for _, box in rest], (-1, 4))
        leaders = [along(leader_start(anchor, box), anchor) for anchor, box in rest]
        starts = np.clip(anchors[i], boxes[:, :2], boxes[:, 2:])
        distance = np.linalg.norm(starts - anchors[i], axis=1)
        # Straight beside, above or below looks tidier than aslant.
        cost = distance + 3 * np.tile(np.abs(np.sin(2 * angles)), len(gaps))
        # Nearer to another mark than to its own, a label would be read as that mark's name.
        own = overlap(marks, [[*(anchors[i] - 1), *(anchors[i] + 1)]])[:, 0]
        strange = (marks[~own, :2] + marks[~own, 2:]) / 2
        nearest = np.clip(strange, boxes[:, None, :2], boxes[:, None, 2:]) - strange
        doubtful = (np.linalg.norm(nearest, axis=-1) < distance[:, None] + 4).any(axis=1)
        # A leader should pass over nothing either, but for the mark it points at.
        solid = np.concatenate([marks[~own], others])
        crossed = overlap(along(starts, anchors[i]).reshape(-1, 4), solid)
        crossed = crossed.reshape(-1, len(boxes), len(solid)).any(axis=(0, 2))
        outside = np.concatenate([boxes[:, :2], -boxes[:, 2:]], axis=1) < inner
        cost += OFF_MARK * overlap(boxes, np.concatenate([marks, others])).sum(axis=1)
        cost += OFF_MARK * outside.sum(axis=1)
        cost += OFF_DOUBT * doubtful + OFF_DOUBT * crossed
        cost += OFF_LINE * overlap(boxes, np.concatenate([lines, *leaders])).any(axis=1)
        cost += OFF_BAR * overlap(boxes, bars).any(axis=1)
        return cost.min(), boxes[np.argmin(cost)]

    results = []
    for rank in (-crowd, anchors[:, 0], -anchors[:, 0]):
        placed: dict[int, np.ndarray] = {}
        for _ in range(3):
            total = 0.0
            for i in np.argsort(rank, kind="stable"):
                cost, placed[i] = cheapest(i, placed)
                total += cost
        results.append((total, [placed[i] for i in range(len(anchors))]))
    return min(results, key=lambda result: result[0])[1]


# ---------------------------------------------------------------------------------------------
# Picture
def set_accuracy_axis(axes, rows, floor: float | None = None) -> None:
    """One accuracy axis for all, with a budget's floor; references far below share a compressed band."""
    own = [row.get(key) for row in rows for key in ("accuracy_percent", *CI_KEYS)]
    own = [value for value in [*own, floor] if value is not None]
    references = [accuracy for _, _, accuracy, _ in REFERENCES]
    low, high = min(own + references), max(own + references)
    low, high = low - 0.4 - 0.04 * (high - low), high + 0.2 + 0.04 * (high - low)
    axes[0].set_ylim(low, high)  # before the scale, which has no room outside its ends
    label = f"accuracy (%), {picture_text(rows[0].get('test_set', 'CIFAR-10 test set'))}"
    ticks = MaxNLocator(8, steps=TICK_STEPS).tick_values(low, high)
    if min(references) < min(own) - BAND_GAP:
        edge = np.floor(2 * min(own) - 0.2) / 2
        ends, heights = [low, edge, high], [0, BAND_SHARE, 1]
        axes[0].set_yscale(
            "function",
            functions=(
                lambda y: np.interp(y, ends, heights),
                lambda h: np.interp(h, heights, ends),
            ),
        )
        ticks = [t for t in MaxNLocator(8, steps=TICK_STEPS).tick_values(edge, high) if t >= edge]
        ticks += [t for t in MaxNLocator(2, integer=True).tick_values(low, edge) if t < edge - 1]
        label += f", compressed below {edge:g} (shaded)"
        for panel in axes:
            panel.axhspan(low, edge, color="#EFEFEF", zorder=0)
    axes[0].yaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes[0].set_ylabel(label)


def set_cost_axis(panel, costs, label: str) -> None:
    """Logarithmic when the costs span much, always with plain numbers on the ticks."""
    low, high = min(costs), max(costs)
    if high / low > LOG_RATIO:
        panel.set_xscale("log")
        margin = (high / low) ** 0.09
        low, high = low / margin, high * margin
        decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
        steps = (1, 2, 5) if high / low < 1000 else (1,)
        panel.xaxis.set_major_locator(FixedLocator([d * s for d in decades for s in steps]))
        panel.xaxis.set_minor_locator(NullLocator())
        label = label.replace("\n", ", log scale\n")
    else:
        margin = 0.12 * (high - low)
        low, high = max(0, low - margin), high + margin
    panel.set_xlim(low, high)
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.set_xlabel(label)


def front_corners(costs, accuracies, front, right: float) -> np.ndarray:
    """(m, 2) corners of the front's step line, up to the panel's right edge.

    Its last point stays the best choice for any larger budget.
    """
    x = np.append(np.asarray(costs, float)[front], right)
    y = np.asarray(accuracies, float)[front]
    return np.column_stack([np.repeat(x, 2)[1:-1], np.repeat(y, 2)])


def draw_panel(panel, rows, costs, references) -> None:
    """Front line, filled front points, hollow dominated ones, small ones without a name, labels.

    references: (marker, cost, accuracy) of points from elsewhere.
    """
    accuracies = [row["accuracy_percent"] for row in rows]
    front = pareto_front(costs, accuracies)
    corners = front_corners(costs, accuracies, front, panel.get_xlim()[1])
    panel.plot(*corners.T, color="#444444", lw=1.2, zorder=2)
    named = [i for i, row in enumerate(rows) if i in front or is_headline(row["variant"])]
    for i, (row, cost) in enumerate(zip(rows, costs, strict=True)):
        marker, color = style(row)
        if has_ci(row) and i in named:
            panel.vlines(cost, *(row[key] for key in CI_KEYS), color=color, lw=0.7, alpha=0.35)
        panel.plot(
            cost,
            accuracies[i],
            marker,
            ms=MARKER_POINTS if i in named else SMALL_MARKER_POINTS,
            color=color,
            mfc=color if i in front else "white",
            zorder=3.5 + (i in named) + (i in front),
        )
    for marker, cost, accuracy in references:
        panel.plot(cost, accuracy, marker, ms=MARKER_POINTS, color=GREY, zorder=3)
    others = [(cost, accuracies[i]) for i, cost in enumerate(costs) if i not in named]
    others += [(cost, accuracy) for _, cost, accuracy in references]
    label_points(panel, [rows[i] for i in named], [costs[i] for i in named], others, corners)


def label_points(panel, rows, costs, others, corners) -> None:
    """A label beside each of the rows' points, with a leader line where it had to move away.

    others: (cost, accuracy) of the marks without a label.
    """
    pixels = panel.figure.dpi / 72
    pairs = list(zip(costs, rows, strict=True))
    points = [(cost, row["accuracy_percent"]) for cost, row in pairs]
    offset = {
        "textcoords": "offset points",
        "xytext": (0, 0),
        "parse_math": False,
        "va": "bottom",
        "zorder": 6,
    }
    labels = [
        panel.annotate(short_label(row), point, fontsize=LABEL_FONT, color=style(row)[1], **offset)
        for row, point in zip(rows, points, strict=True)
    ]
    anchors = panel.transData.transform(points)
    marks = np.concatenate([anchors, panel.transData.transform(np.reshape(others, (-1, 2)))])
    half = 0.65 * MARKER_POINTS * pixels
    bars = [[(cost, row[key]) for key in CI_KEYS] for cost, row in pairs if has_ci(row)]

    def thin_boxes(lines):  # upright or level ones: a box one pixel wide holds each exactly
        ends = panel.transData.transform(np.reshape(lines, (-1, 2))).reshape(-1, 2, 2)
        return np.concatenate([ends.min(axis=1) - 0.5, ends.max(axis=1) + 0.5], axis=1)

    boxes = place_labels(
        anchors,
        [label.get_window_extent().size + 3 * pixels for label in labels],
        panel.get_window_extent().extents,
        np.concatenate([marks - half, marks + half], axis=1),
        thin_boxes(list(itertools.pairwise(corners))),
        thin_boxes(bars),
    )
    for label, point, anchor, box in zip(labels, points, anchors, boxes, strict=True):
        label.set_position((box[:2] + 1.5 * pixels - anchor) / pixels)
        start = leader_start(anchor, box) - anchor
        if np.linalg.norm(start) > LEADER_POINTS * pixels:
            arrow = {"arrowstyle": "-", "lw": 0.6, "color": label.get_color(), "shrinkA": 0}
            offset["xytext"] = start / pixels
            panel.annotate("", point, arrowprops=arrow | {"shrinkB": MARKER_POINTS / 2}, **offset)


def shade(panel, rows, costs, limits: dict[str, float], bound: str | None) -> None:
    """The region that a panel's limit and the accuracy floor allow, and a ring about what fits all."""
    (left, right), (low, high) = panel.get_xlim(), panel.get_ylim()
    floor = limits.get("accuracy", low)
    edge = min(limits[bound], right) if bound else right
    if bound or "accuracy" in limits:
        panel.fill_between([left, edge], floor, high, color=GREEN, alpha=0.13, lw=0, zorder=1)
        panel.plot([left, edge], [floor, floor], color=GREEN, lw=1, ls="--", zorder=1)
        panel.plot([edge, edge], [floor, high], color=GREEN, lw=1, ls="--", zorder=1)
        panel.set_ylim(low, high)
    fitting = ranked(rows, limits)
    for row, cost in zip(rows, costs, strict=True):
        if row in fitting:
            point = (cost, row["accuracy_percent"])
            panel.plot(*point, "o", ms=RING_POINTS, color=GREEN, mfc="none", mew=1.6, zorder=3)


def panel_costs(n: int, rows, limits: dict[str, float]):
    """What panel n shows: (a cost a row, references, label, the limit that belongs to it or None).

    A limit on flash or energy brings its own figure along: neither the coded file's bytes nor the
    relative score is what it bounds.
    """
    key, unit, label, own = PANELS[n]
    bound = next((name for name in own if name in limits), None)
    references = [(marker, costs[n], accuracy) for _, marker, accuracy, costs in REFERENCES]
    if bound not in LIMIT_LABELS:
        return [row[key] / unit for row in rows], references, label, bound
    origin = figure_for(rows, bound).origin.split(":")[0].split()[0]
    label = LIMIT_LABELS[bound].replace("{origin}", origin)
    return [amount(row, bound) for row in rows], [], label, bound


def budget_note(rows, limits: dict[str, float]) -> str:
    """The footnote of a picture with a budget: the limits, what shows them, the best variant."""
    fitting = ranked(rows, limits)
    shown = {next((name for name in own if name in limits), None) for *_, own in PANELS}
    no_panel = [name for name in limits if name not in shown | {"accuracy"}]
    best = f"Best: {picture_text(fitting[0]['variant'])}." if fitting else "Nothing fits."
    budget = ", ".join(
        f"{name} at {'least' if LIMITS[name].floor else 'most'} {number(limit)}"
        for name, limit in limits.items()
    )
    no_panel = f" ({', '.join(no_panel)}, which no panel shows, included)" if no_panel else ""
    return BUDGET_NOTE.format(budget=budget, no_panel=no_panel, best=best).strip()


def legend_handles(rows, budget: bool) -> list:
    """What shapes, fills, grey marks and percentages mean."""

    def mark(label, marker, color, fill=None, **look):
        look = {"ms": MARKER_POINTS, "mfc": fill or color} | look
        return Line2D([], [], ls="", marker=marker, color=color, label=label, **look)

    present = {precision(row) for row in rows}
    handles = [mark(name.upper(), *STYLES[name]) for name in STYLES if name in present]
    if present - set(STYLES):
        handles.append(mark("other precision", *OTHER_STYLE))
    handles += [
        Line2D([], [], color="#444444", lw=1.2, marker="o", label="on the front"),
        mark("dominated", "o", "#444444", "white"),
    ]
    handles += [mark(label, marker, GREY) for label, marker, _, _ in REFERENCES]
    if any(has_ci(row) for row in rows):
        handles.append(mark("95 % confidence interval", "|", "#444444"))
    handles.append(mark("share of weights pruned", r"$50\,\%$", "#444444", ms=22, mew=0))
    if budget:
        handles.append(Patch(color=GREEN, alpha=0.2, label="allowed by this panel's limits"))
        handles.append(mark("meets the whole budget", "o", GREEN, "none", ms=RING_POINTS - 2))
    return handles


def draw(rows: list[dict], limits: dict[str, float] | None = None) -> Figure:
    """The whole picture, of the rows with the lowest seed, with what a budget's limits allow.

    Raises UserError when no row has the figure that a limit is about.
    """
    limits = limits or {}
    rows = competitors(rows, limits)
    notes = FOOTNOTES.strip().split("\n") + ([budget_note(rows, limits)] if limits else [])
    notes = "\n".join(textwrap.fill(note, 160) for note in notes)
    figure = Figure(figsize=(12, 7.4), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)  # no window system needed, and text can be measured
    bottom = 0.195 + 0.022 * (notes.count("\n") - 3)
    figure.subplots_adjust(left=0.065, right=0.99, top=0.875, bottom=bottom, wspace=0.06)
    axes = figure.subplots(1, len(PANELS), sharey=True)
    set_accuracy_axis(axes, rows, limits.get("accuracy"))
    for n, panel in enumerate(axes):
        costs, references, label, bound = panel_costs(n, rows, limits)
        ends = [*costs, *(cost for _, cost, _ in references)]
        if bound:  # the limit too, so far as a region below it has anything to show
            ends.append(min(max(limits[bound], min(ends) / 2), max(ends)))
        set_cost_axis(panel, ends, label)
        panel.grid(color="#DDDDDD", lw=0.6)
        panel.set_axisbelow(True)
        if limits:
            shade(panel, rows, costs, limits, bound)
        draw_panel(panel, rows, costs, references)
    title = "What accuracy costs: size, computation and energy score of each variant"
    figure.suptitle(title, fontsize=14, y=0.985)
    handles = legend_handles(rows, bool(limits))
    columns = 6 if limits else 5
    figure.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.955),
        ncol=columns,
        frameon=False,
        columnspacing=1.2 if limits else None,
    )
    figure.text(0.065, 0.012, notes, fontsize=9.5, color="#333333", va="bottom")
    return figure


# ---------------------------------------------------------------------------------------------
# Layers of one variant
def draw_layers(variant: str, rows: list[dict]) -> Figure:
    """Where weights, MACs and modelled energy of a variant sit, a bar a layer; zeros in percent."""
    figure = Figure(figsize=(12, 4.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(LAYER_PANELS), sharey=True)
    names = [f"{picture_text(row['layer'])}\n{row['zeros_percent']:.0f} % zeros" for row in rows]
    for panel, (label, unit, parts) in zip(panels, LAYER_PANELS, strict=True):
        left = np.zeros(len(rows))
        for key, name, color in parts:
            widths = np.array([row[key] / unit for row in rows])
            panel.barh(names, widths, left=left, color=color, label=name)
            left += widths
        for y, total in enumerate(left):
            panel.annotate(
                f"{total:.3g}", (total, y), (3, 0), textcoords="offset points", va="center"
            )
        panel.set_xlim(0, 1.18 * max(left) or 1)
        panel.set_xlabel(label)
        panel.spines[["top", "right"]].set_visible(False)
        if len(parts) > 1:
            panel.legend(frameon=False, fontsize=9)
    panels[0].invert_yaxis()
    figure.suptitle(
        f"{picture_text(variant)}: where weights, multiplications and modelled energy sit"
    )
    return figure


def layers_of(path: Path, variant: str) -> list[dict]:
    """The variant's rows of layers.json; raises UserError, naming those there are, without any."""
    costs = {key: (0, COST_RANGE[1]) for *_, parts in LAYER_PANELS for key, *_ in parts}
    needed = {"variant": None, "layer": None, "zeros_percent": (0, 100), **costs}
    rows = read_table(path, MADE_BY, needed)
    chosen = [row for row in rows if row["variant"] == variant]
    if not chosen:
        known = ", ".join(dict.fromkeys(row["variant"] for row in rows))
        raise UserError(f"--layers {variant}: {path} has no such variant; it has {known}")
    return chosen


# ---------------------------------------------------------------------------------------------
# Where sparsity starts to pay
def crossing(x, first, second) -> float | None:
    """Where the second line falls below the first for good, linearly between points; None if never."""
    above = np.asarray(second, float) - np.asarray(first, float)
    if above[-1] >= 0 or (above < 0).all():
        return None
    last = np.flatnonzero(above >= 0)[-1]
    return float(np.interp(0, [above[last + 1], above[last]], [x[last + 1], x[last]]))


def draw_break_even(rows: list[dict]) -> Figure:
    """Costs against the share of zeros, the same in every layer; dense against sparse kernels."""
    figure = Figure(figsize=(12, 4.4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    zeros = [row["zeros_percent"] for row in rows]
    for panel, (label, unit, lines) in zip(
        figure.subplots(1, len(BREAK_EVEN_PANELS)), BREAK_EVEN_PANELS, strict=True
    ):
        curves = [[row[key] / unit for row in rows] for key, *_ in lines]
        for curve, (_, name, marker, color) in zip(curves, lines, strict=True):
            panel.plot(zeros, curve, marker=marker, color=color, label=name)
        even = crossing(zeros, *curves[:2]) if lines[0][1] == "dense kernels" else None
        if even is not None:
            panel.axvline(even, color=GREY, ls=":")
            note = f"sparse pays\nfrom {even:.0f} % zeros"
            side = 1 if even < 50 else -1  # of the line, where there is room
            panel.annotate(
                note,
                (even, panel.get_ylim()[1]),
                (4 * side, -6),
                ha="left" if side > 0 else "right",
                va="top",
                textcoords="offset points",
                fontsize=LABEL_FONT,
            )
        panel.set_ylim(bottom=0)
        panel.set_xlabel("zeros in every layer (%)")
        panel.set_ylabel(label)
        panel.grid(color="#DDDDDD", lw=0.6)
        panel.legend(frameon=False, loc="lower left")
    figure.suptitle("Where unstructured sparsity starts to pay, target by target")
    return figure


def break_even_rows(path: Path) -> list[dict]:
    """The rows of break_even.json, every key of the picture checked; raises UserError."""
    made_by = "python simulate_hardware.py --break-even"
    keys = {key: (0, COST_RANGE[1]) for *_, lines in BREAK_EVEN_PANELS for key, *_ in lines}
    return read_table(path, made_by, {"zeros_percent": (0, 100), **keys})


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write <name>.png and <name>.svg, both or neither, and print their paths."""
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    matplotlib.rcParams["svg.hashsalt"] = "pareto"  # with Date: equal rows give an equal file
    with atomic_path(png) as png_temporary, atomic_path(svg) as svg_temporary:
        figure.savefig(png_temporary)
        figure.savefig(svg_temporary, metadata={"Date": None})
    print(png)
    print(svg)


# ---------------------------------------------------------------------------------------------
# Command line
def parse_arguments():
    parser = Parser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--run",
        type=run_folder,
        default="",
        metavar="NAME",
        help="folder below results/ (default: results/ itself)",
    )
    which.add_argument(
        "--smoke", dest="run", action="store_const", const="smoke", help="the same as --run smoke"
    )
    parser.add_argument(
        "--metrics",
        type=Path,
        metavar="FILE",
        help="rows to draw, the pictures beside it (default: the run's metrics.json)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--budget",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help=f"shade what limits allow, in a picture of its own: {HELP}",
    )
    what.add_argument(
        "--layers", metavar="VARIANT", help="draw where this variant's weights, MACs and energy sit"
    )
    what.add_argument("--break-even", action="store_true", help="draw dense against sparse kernels")
    return parser.parse_args()


@user_errors_exit_2
def main() -> None:
    args = parse_arguments()
    limits = parse_budget(args.budget or [])
    metrics = args.metrics or results_dir(args.run) / "metrics.json"
    name = "optimization_results_budget" if limits else "optimization_results"
    if args.break_even:
        name, rows = "break_even", break_even_rows(metrics.with_name("break_even.json"))
        if not rows:
            return print("break-even: not measured, no picture")
        figure = draw_break_even(rows)
    elif args.layers:
        name = f"layers_{args.layers}"
        figure = draw_layers(args.layers, layers_of(metrics.with_name("layers.json"), args.layers))
    else:
        needed = {key: COST_RANGE for key, *_ in PANELS}
        figure = draw(read_rows(metrics, needed, dict.fromkeys(CI_KEYS, (0, 100))), limits)
    save(figure, metrics.parent, name)


if __name__ == "__main__":
    main()
