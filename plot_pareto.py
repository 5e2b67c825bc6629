"""Step 5: draw what accuracy costs, as three Pareto panels (memory, MACs, relative energy).

    python plot_pareto.py            # after python evaluate.py
    python plot_pareto.py --smoke    # the seconds-long run, after python evaluate.py --smoke
    python plot_pareto.py --budget flash_kib=512 accuracy=85  # shades what a budget allows
    python plot_pareto.py --layers pruned_50_int8             # where one variant's costs sit
    python plot_pareto.py --break-even                        # where sparsity starts to pay

Reads   results/metrics.json, a list of flat rows, one a variant (of several seeds the lowest),
        or results/layers.json with --layers, results/break_even.json with --break-even.
Writes  results/optimization_results.png and results/optimization_results.svg
        (optimization_results_budget.* with --budget, layers_<variant>.*, break_even.*).

A point is on the front of a panel when no other variant is at least as accurate for at most the
same cost and better in one of the two. The front's points are filled and named. Figures of others
never enter it, and stand only beside accuracies of the same test set.
"""

import os
import re
import textwrap
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook's setting names a backend that may be missing here

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from edgecnn.axes import set_accuracy_axis, set_cost_axis
from edgecnn.budget import (
    HELP,
    KIB,
    LIMITS,
    competitors,
    figure_for,
    number,
    parse_budget,
    ranked,
)
from edgecnn.cli import Parser, add_force_argument, run_folder, run_name
from edgecnn.compare import pareto_front
from edgecnn.errors import user_errors_exit_2
from edgecnn.figures import GREY, draw_break_even, draw_layers, drawn, layers_of
from edgecnn.files import read_rows, write_files
from edgecnn.hardware import read_break_even
from edgecnn.labels import label_points
from edgecnn.names import NAME_PATTERN, results_dir
from edgecnn.peers import ORIGINAL, RESNET8, TEST_SET
from edgecnn.step import results_step, source_digests

# A panel a line: the row's key, what one axis unit is in the key's unit, the axis label, and the
# limits of a budget that take its place.
FLASH = ("m4_flash_bytes", KIB, "flash on a Cortex-M4\n(KiB, the linked program)")
FILE = ("size_bytes", KIB, "file size\n(KiB)")
PANELS = (
    (FILE, ("flash_kib",)),  # FLASH, where any row has it
    (("macs_nonzero", 1e6, "non-zero MACs\n(millions an image)"), ("macs_m",)),
    (
        ("relative_energy", 1, "relative energy score\n(million MACs × bits/8, zeros skipped)"),
        ("energy_uj", "energy_stm32l4r5_uj"),
    ),
)
LIMIT_LABELS = {
    "flash_kib": "flash\n(KiB, {origin})",
    "macs_m": "non-zero MACs\n(millions an image)",
    "energy_uj": "energy an inference, weights in SRAM\n(µJ, {origin})",
    "energy_stm32l4r5_uj": "energy an inference, STM32L4R5\n(µJ, {origin})",
}
CI_KEYS = ("accuracy_ci95_low_percent", "accuracy_ci95_high_percent")  # optional
# Precision -> marker and colour (Okabe-Ito); the shape alone tells them apart in grey.
STYLES = {"fp32": ("o", "#0072B2"), "int8": ("s", "#D55E00")}
OTHER_STYLE = ("D", "#009E73")
# Points from elsewhere: legend text, marker, figures under our keys.
REFERENCES = [
    *((f"original: {o['name']}", "+xv"[i], o) for i, o in enumerate(ORIGINAL.values())),
    (RESNET8["name"], "*", RESNET8),
]
NOTES = """
The energy score is relative, not joules, and credits every skipped zero. Sparse kernels and NPUs \
with weight compression do skip zeros; dense kernels run a pruned network no faster. \
Control: the same fine-tuning without pruning.
"""
CHANNEL_NOTE = "ch: the share of the MACs that went with whole channels, before any weights."
REFERENCE_NOTE = """
Grey: "original" as published by the table that this project started from; its pruned MACs and sizes \
were assumed. ResNet-8: accuracy as published, dense MACs, flash as counted with CMSIS-NN.
"""
BUDGET_NOTE = """
Budget: {budget}. Green: what a panel's own limit and the accuracy floor allow. Ringed: the variants \
that meet every limit{no_panel}. {best}
"""
COST_RANGE = (1e-6, 1e15)  # a cost of zero or less has no place on a logarithmic axis
GREEN, DARK = "#009E73", "#444444"
MARKER_POINTS, SMALL_MARKER_POINTS, RING_POINTS = 7, 4, 12
LABEL_LENGTH = 24  # longer names are cut, or one label could be wider than its panel


# ---- data --------------------------------------------------------------------------------------


def front_corners(costs, accuracies, front, right: float) -> np.ndarray:
    """(m, 2) corners of the front's step line, up to the panel's right edge.

    Its last point stays the best choice for any larger budget.
    """
    x = np.append(np.asarray(costs, float)[front], right)
    y = np.asarray(accuracies, float)[front]
    return np.column_stack([np.repeat(x, 2)[1:-1], np.repeat(y, 2)])


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
    """`pruned_50_l1_int8` -> `50 % L1` (the marker tells the precision); cut when long.

    `channels_30_pruned_80_int8` -> `ch 30 %, 80 %`.
    """
    match = NAME_PATTERN.fullmatch(row["variant"])
    text = row["variant"]
    if match:
        text = re.sub(r"_([\d.]+)", r" \1 %", match["method"]).removeprefix("pruned ")
        text = text.replace("_pruned", ",").replace("channels", "ch").replace("_l1", " L1")
        text = text.replace("_", " ")
    return text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "…"


def references_for(rows: list[dict]) -> list[tuple]:
    """Others' points, where every accuracy is of the test set that theirs are of."""
    return REFERENCES if all(row.get("test_set") == TEST_SET for row in rows) else []


def panel_axis(n: int, rows: list[dict], limits: dict[str, float]) -> tuple:
    """What panel n shows: (key, unit, label, the limit that belongs to it or None).

    A limit on flash or energy brings its own figure along: neither the coded file's bytes nor the
    relative score is what it bounds.
    """
    axis, own = PANELS[n]
    bound = next((name for name in own if name in limits), None)
    if bound:
        key = figure_for(rows, bound)
        origin = LIMITS[bound].figures[key].split(":")[0].split()[0]
        return key, LIMITS[bound].scale, LIMIT_LABELS[bound].replace("{origin}", origin), bound
    if axis is FILE and any(row.get(FLASH[0]) is not None for row in rows):
        axis = FLASH
    return *axis, None


# ---- the picture -------------------------------------------------------------------------------


def draw_panel(panel, rows, costs, references) -> None:
    """Front line, filled and named front points, small hollow ones for the rest, grey references.

    references: (marker, cost, accuracy) of points from elsewhere.
    """
    accuracies = [row["accuracy_percent"] for row in rows]
    front = pareto_front(costs, accuracies)
    corners = front_corners(costs, accuracies, front, panel.get_xlim()[1])
    panel.plot(*corners.T, color=DARK, lw=1.2, zorder=2)
    points = list(zip(costs, accuracies, strict=True))
    kinds = {}  # (marker, colour, on the front) -> the indices of its points
    for i, row in enumerate(rows):
        kinds.setdefault((*style(row), i in front), []).append(i)
    for (marker, color, best), which in kinds.items():
        look = {"ms": MARKER_POINTS, "mfc": color} if best else {"ms": SMALL_MARKER_POINTS}
        look = {"mfc": "white", "color": color, "zorder": 4 + best} | look
        panel.plot(*zip(*(points[i] for i in which), strict=True), marker, ls="", **look)
        bars = [(costs[i], *(rows[i][key] for key in CI_KEYS)) for i in which if has_ci(rows[i])]
        if best and bars:
            panel.vlines(*zip(*bars, strict=True), color=color, lw=0.7, alpha=0.35)
    for marker, cost, accuracy in references:
        panel.plot(cost, accuracy, marker, ms=MARKER_POINTS + 1, color=GREY, zorder=3)
    marks = points + [(cost, accuracy) for _, cost, accuracy in references]
    names, colors = ([f(rows[i]) for i in front] for f in (short_label, lambda r: style(r)[1]))
    label_points(panel, [points[i] for i in front], names, colors, marks, MARKER_POINTS)


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


def budget_note(rows, limits: dict[str, float]) -> str:
    """The footnote of a picture with a budget: the limits, what shows them, the best variant."""
    fitting = ranked(rows, limits)
    no_panel = [name for name in limits if not any(name in own for _, own in PANELS)]
    no_panel = [name for name in no_panel if name != "accuracy"]
    best = f"Best: {fitting[0]['variant']}." if fitting else "Nothing fits."
    budget = ", ".join(
        f"{name} at {'least' if LIMITS[name].floor else 'most'} {number(limit)}"
        for name, limit in limits.items()
    )
    no_panel = f" ({', '.join(no_panel)}, which no panel shows, included)" if no_panel else ""
    return BUDGET_NOTE.format(budget=budget, no_panel=no_panel, best=best).strip()


def legend_handles(rows, references, budget: bool) -> list:
    """What shapes, fills, grey marks and percentages mean."""

    def mark(label, marker, color, fill=None, **look):
        look = {"ms": MARKER_POINTS, "mfc": fill or color} | look
        return Line2D([], [], ls="", marker=marker, color=color, label=label, **look)

    present = {precision(row) for row in rows}
    handles = [mark(name.upper(), *STYLES[name]) for name in STYLES if name in present]
    if present - set(STYLES):
        handles.append(mark("other precision", *OTHER_STYLE))
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


def draw(rows: list[dict], limits: dict[str, float] | None = None) -> Figure:
    """The whole picture, of the rows with the lowest seed, with what a budget's limits allow.

    Raises UserError when no row has the figure that a limit is about.
    """
    limits = limits or {}
    rows = competitors(rows, limits)
    others = references_for(rows)
    notes = [NOTES, REFERENCE_NOTE if others else "", budget_note(rows, limits) if limits else ""]
    if any(row["variant"].startswith("channels_") for row in rows):
        notes[0] += CHANNEL_NOTE
    notes = "\n".join(textwrap.fill(note.strip(), 160) for note in notes if note)
    figure = Figure(figsize=(12, 7.4), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)  # no window system needed, and text can be measured
    bottom = 0.195 + 0.022 * (notes.count("\n") - 3)
    figure.subplots_adjust(left=0.065, right=0.99, top=0.875, bottom=bottom, wspace=0.06)
    axes = figure.subplots(1, len(PANELS), sharey=True)
    drawn = {}  # what legend entries stand for
    own = [row.get(key) for row in rows for key in ("accuracy_percent", *CI_KEYS)]
    own = [value for value in [*own, limits.get("accuracy")] if value is not None]
    theirs = [row["accuracy_percent"] for *_, row in others]
    set_accuracy_axis(axes, own, theirs, rows[0].get("test_set", TEST_SET))
    for n, panel in enumerate(axes):
        key, unit, label, bound = panel_axis(n, rows, limits)
        here = [row for row in rows if row.get(key) is not None]
        costs = [row[key] / unit for row in here]
        found = [entry for entry in others if key in entry[2]]
        drawn |= {entry[0]: entry for entry in found}
        references = [(mark, o[key] / unit, o["accuracy_percent"]) for _, mark, o in found]
        ends = [*costs, *(cost for _, cost, _ in references)]
        if bound:  # the limit too, so far as a region below it has anything to show
            ends.append(min(max(limits[bound], min(ends) / 2), max(ends)))
        set_cost_axis(panel, ends, label)
        panel.grid(color="#DDDDDD", lw=0.6)
        panel.set_axisbelow(True)
        if limits:
            shade(panel, here, costs, limits, bound)
        draw_panel(panel, here, costs, references)
    figure.suptitle(
        "What accuracy costs: memory, computation and energy score", fontsize=14, y=0.985
    )
    figure.legend(
        handles=legend_handles(rows, list(drawn.values()), bool(limits)),
        loc="upper center",
        bbox_to_anchor=(0.5, 0.955),
        ncol=6 if limits else 5,
        frameon=False,
        columnspacing=1.2 if limits else None,
    )
    look = {"fontsize": 9.5, "color": "#333333", "va": "bottom", "parse_math": False}
    figure.text(0.065, 0.012, notes, **look)
    return figure


# ---- the step ----------------------------------------------------------------------------------


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument(
        "--run",
        type=run_folder,
        default="",
        metavar="NAME",
        help="folder below results/ (default: results/ itself)",
    )
    parser.add_argument("--smoke", action="store_true", help="the same as --run smoke")
    parser.add_argument(
        "--metrics",
        type=Path,
        metavar="FILE",
        help="rows to draw, the pictures beside it (default: the run's metrics.json)",
    )
    add_force_argument(parser)
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


def figure_of(args, source: Path, limits) -> Figure | None:
    """The picture that the arguments ask for; None where its figures were not measured."""
    if args.break_even:
        rows = read_break_even(source.parent)
        return draw_break_even(rows) if rows else None
    if args.layers:
        return draw_layers(args.layers, layers_of(source, args.layers))
    needed = {key: COST_RANGE for (key, *_), _ in PANELS}
    optional = dict.fromkeys(CI_KEYS, (0, 100)) | {FLASH[0]: COST_RANGE}
    return draw(read_rows(source, needed, optional), limits)


@user_errors_exit_2
def main() -> None:
    args = parse_arguments()
    limits = parse_budget(args.budget or [])
    source = args.metrics or results_dir(run_name(args)) / "metrics.json"
    name = "optimization_results_budget" if limits else "optimization_results"
    if args.break_even:
        name, source = "break_even", source.with_name("break_even.json")
    elif args.layers:
        name, source = f"layers_{args.layers}", source.with_name("layers.json")
    code, files = source_digests("plot_pareto.py"), (f"{name}.png", f"{name}.svg")
    step = results_step(source.parent, name, code, {}, [source], files, args.force)
    if not limits and step.kept():  # limits are for trying out: always drawn
        return
    figure = figure_of(args, source, limits)
    if figure is None:
        return print("break-even: not measured, no picture")
    write = write_files if limits else step.commit
    write(dict(zip(step.outputs, drawn(figure), strict=True)))
    print(*step.outputs, sep="\n")


if __name__ == "__main__":
    main()
