"""Step 5: draw what accuracy costs, as three Pareto panels (memory, MACs, energy).

    python plot_pareto.py            # after python evaluate.py
    python plot_pareto.py --smoke    # the seconds-long run, after python evaluate.py --smoke
    python plot_pareto.py --run headline resnet8              # one front over several runs
    python plot_pareto.py --budget flash_kib=512 accuracy=85  # shades what a budget allows
    python plot_pareto.py --layers pruned_50_int8             # where one variant's costs sit
    python plot_pareto.py --break-even                        # where sparsity starts to pay

Reads   results/metrics.json, a list of flat rows, one a variant (of several seeds the lowest),
        or results/layers.json with --layers, results/break_even.json with --break-even.
Writes  results/optimization_results.png and results/optimization_results.svg
        (optimization_results_budget.* with --budget, layers_<variant>.*, break_even.*).
        Of several runs results/front/<run>_<run>.png and .svg.

A point is on the front of a panel when no other variant is at least as accurate for at most the
same cost and better in one of the two. The front's points are filled and named. Figures of others
never enter it, and stand only beside accuracies of the same test set. Of several runs the variants
compete that have the figures of all panels, and a panel shows what every run has a figure of.
"""

import os
import textwrap
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook's setting names a backend that may be missing here

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from edgecnn.axes import set_accuracy_axis, set_cost_axis
from edgecnn.budget import HELP, competitors, parse_budget
from edgecnn.cli import Parser, add_force_argument, run_folder, run_names
from edgecnn.compare import pareto_front
from edgecnn.errors import user_errors_exit_2
from edgecnn.figures import draw_break_even, draw_layers, drawn, layers_of
from edgecnn.files import read_rows, write_files
from edgecnn.front import front_path, read_runs
from edgecnn.hardware import read_break_even
from edgecnn.labels import label_points
from edgecnn.marks import (
    CI_KEYS,
    DARK,
    GREY,
    MARKER_POINTS,
    SMALL_MARKER_POINTS,
    has_ci,
    kind_of,
    legend_handles,
    short_labels,
    styles_of,
)
from edgecnn.names import TEST_SET, results_dir
from edgecnn.panels import (
    ENERGY,
    FLASH,
    MEASURED,
    PANELS,
    SCORE,
    complete,
    panel_axis,
    references_for,
)
from edgecnn.shading import budget_note, shade
from edgecnn.step import results_step, source_digests

NOTES = """
The energy score is relative, not joules, and credits every skipped zero. Sparse kernels and NPUs \
with weight compression do skip zeros; dense kernels run a pruned network no faster. \
Control: the same fine-tuning without pruning.
"""
CHANNEL_NOTE = "ch: the share of the MACs that went with whole channels, before any weights."
JOINT_NOTES = """
Variants that lack a figure of a panel do not compete. Sparse kernels do skip zeros; dense kernels run \
a pruned network no faster. Control: the same fine-tuning without pruning.
"""
REFERENCE_NOTE = """
Grey: "original" as published by the table that this project started from; its pruned MACs and sizes \
were assumed. ResNet-8: accuracy as published, dense MACs, flash as counted with CMSIS-NN.
"""
JOINT_REFERENCE_NOTE = """
Grey: ResNet-8, accuracy as published, dense MACs, flash as counted with CMSIS-NN, energy as measured \
with X-CUBE-AI (round v1.3).
"""
COST_RANGE = (1e-6, 1e15)  # a cost of zero or less has no place on a logarithmic axis


# ---- data --------------------------------------------------------------------------------------


def front_corners(costs, accuracies, front, right: float) -> np.ndarray:
    """(m, 2) corners of the front's step line, up to the panel's right edge.

    Its last point stays the best choice for any larger budget.
    """
    x = np.append(np.asarray(costs, float)[front], right)
    y = np.asarray(accuracies, float)[front]
    return np.column_stack([np.repeat(x, 2)[1:-1], np.repeat(y, 2)])


# ---- the picture -------------------------------------------------------------------------------


def draw_panel(panel, rows, costs, looks, names, references) -> None:
    """Front line, filled and named front points, small hollow ones for the rest, grey references.

    looks: (marker, colour) of each row; names: its label; references: (marker, cost, accuracy) of
    points from elsewhere.
    """
    accuracies = [row["accuracy_percent"] for row in rows]
    front = pareto_front(costs, accuracies)
    corners = front_corners(costs, accuracies, front, panel.get_xlim()[1])
    panel.plot(*corners.T, color=DARK, lw=1.2, zorder=2)
    points = list(zip(costs, accuracies, strict=True))
    kinds = {}  # (marker, colour, on the front) -> the indices of its points
    for i, look in enumerate(looks):
        kinds.setdefault((*look, i in front), []).append(i)
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
    names, colors = [names[i] for i in front], [looks[i][1] for i in front]
    label_points(panel, [points[i] for i in front], names, colors, marks, MARKER_POINTS)


def notes_of(rows, limits: dict[str, float], axes: list[tuple], joint: bool, others) -> str:
    """The footnotes, wrapped: what the panels' figures are, whose the grey marks, the budget."""
    notes = [NOTES if not joint or SCORE[0] in {key for key, *_ in axes} else JOINT_NOTES]
    if any("channels_" in row["variant"] for row in rows):
        notes[0] += CHANNEL_NOTE
    if others:
        notes.append(JOINT_REFERENCE_NOTE if joint else REFERENCE_NOTE)
    if limits:
        notes.append(budget_note(rows, limits, {name for _, own in PANELS for name in own}))
    return "\n".join(textwrap.fill(note.strip(), 160) for note in notes)


def add_legend(figure: Figure, handles: list, panels_top: float, budget: bool) -> None:
    """The legend above the panels, in the largest letters that leave it room; panels_top: pixels."""
    for size in range(10, 4, -1):
        legend = figure.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.955),
            ncol=6 if budget else 5,
            frameon=False,
            columnspacing=1.2 if budget else None,
            fontsize=size,
        )
        box = legend.get_window_extent()
        if size == 5 or box.x0 >= 0 and box.y0 >= panels_top:
            return
        legend.remove()


def draw(rows: list[dict], limits: dict[str, float] | None = None, joint: bool = False) -> Figure:
    """The whole picture, of the rows with the lowest seed, with what a budget's limits allow.

    joint: the rows are those of several runs, as front.read_runs joins them. Raises UserError when no
    row has the figure that a limit is about, or those of all panels.
    """
    limits = limits or {}
    rows = competitors(rows, limits)
    shown = [panel_axis(n, rows, limits, joint) for n in range(len(PANELS))]
    rows = complete(rows, [key for key, *_ in shown]) if joint else rows
    others, styles = references_for(rows, joint), styles_of(rows, joint)
    notes = notes_of(rows, limits, shown, joint, others)
    figure = Figure(figsize=(12, 7.4), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)  # no window system needed, and text can be measured
    bottom = 0.195 + 0.022 * (notes.count("\n") - 3)
    figure.subplots_adjust(left=0.065, right=0.99, top=0.875, bottom=bottom, wspace=0.06)
    axes = figure.subplots(1, len(PANELS), sharey=True)
    entries = {}  # what legend entries stand for
    names = dict(zip((row["variant"] for row in rows), short_labels(rows), strict=True))
    own = [row.get(key) for row in rows for key in ("accuracy_percent", *CI_KEYS)]
    own = [value for value in [*own, limits.get("accuracy")] if value is not None]
    theirs = [row["accuracy_percent"] for *_, row in others]
    set_accuracy_axis(axes, own, theirs, rows[0].get("test_set", TEST_SET))
    for panel, (key, unit, label, bound) in zip(axes, shown, strict=True):
        here = [row for row in rows if row.get(key) is not None]
        costs = [row[key] / unit for row in here]
        found = [entry for entry in others if key in entry[2]]
        entries |= {entry[0]: entry for entry in found}
        references = [(mark, o[key] / unit, o["accuracy_percent"]) for _, mark, o in found]
        ends = [*costs, *(cost for _, cost, _ in references)]
        if bound:  # the limit too, so far as a region below it has anything to show
            ends.append(min(max(limits[bound], min(ends) / 2), max(ends)))
        if joint and references and key in MEASURED:
            label = label.replace("modelled", "modelled; grey: measured")
        set_cost_axis(panel, ends, label)
        panel.grid(color="#DDDDDD", lw=0.6)
        panel.set_axisbelow(True)
        if limits:
            shade(panel, here, costs, limits, bound)
        looks = [styles[kind_of(row, joint)] for row in here]
        labels = [names[row["variant"]] for row in here]
        draw_panel(panel, here, costs, looks, labels, references)
    figure.suptitle(
        f"What accuracy costs: memory, computation and energy{'' if joint else ' score'}",
        fontsize=14,
        y=0.985,
    )
    handles = legend_handles(rows, styles, list(entries.values()), bool(limits))
    add_legend(figure, handles, axes[0].get_window_extent().y1, bool(limits))
    look = {"fontsize": 9.5, "color": "#333333", "va": "bottom", "parse_math": False}
    figure.text(0.065, 0.012, notes, **look)
    return figure


# ---- the step ----------------------------------------------------------------------------------


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument(
        "--run",
        type=run_folder,
        nargs="+",
        default=[""],
        metavar="NAME",
        help="folder below results/ (default: results/ itself); several: one picture of them all",
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


def figure_of(args, sources: list[Path], runs: list[str], limits) -> Figure | None:
    """The picture that the arguments ask for; None where its figures were not measured."""
    if args.break_even:
        rows = read_break_even(sources[0].parent)
        return draw_break_even(rows) if rows else None
    if args.layers:
        return draw_layers(args.layers, layers_of(sources[0], args.layers))
    needed = {key: COST_RANGE for (key, *_), _ in PANELS}
    optional = dict.fromkeys(CI_KEYS, (0, 100)) | dict.fromkeys((FLASH[0], ENERGY[0]), COST_RANGE)
    if len(runs) > 1:
        return draw(read_runs(runs, needed, optional), limits, joint=True)
    return draw(read_rows(sources[0], needed, optional), limits)


@user_errors_exit_2
def main() -> None:
    args = parse_arguments()
    limits = parse_budget(args.budget or [])
    runs = run_names(args, several=not (args.metrics or args.layers or args.break_even))
    sources = [args.metrics or results_dir(run) / "metrics.json" for run in runs]
    folder, name = sources[0].parent, "optimization_results"
    if args.break_even:
        name, sources = "break_even", [folder / "break_even.json"]
    elif args.layers:
        name, sources = f"layers_{args.layers}", [folder / "layers.json"]
    elif len(runs) > 1:
        folder, name = front_path(runs, "png").parent, front_path(runs, "png").stem
    name += "_budget" * bool(limits)
    code, files = source_digests("plot_pareto.py"), (f"{name}.png", f"{name}.svg")
    step = results_step(folder, name, code, {}, sources, files, args.force)
    if not limits and step.kept():  # limits are for trying out: always drawn
        return
    figure = figure_of(args, sources, runs, limits)
    if figure is None:
        return print("break-even: not measured, no picture")
    write = write_files if limits else step.commit
    write(dict(zip(step.outputs, drawn(figure), strict=True)))
    print(*step.outputs, sep="\n")


if __name__ == "__main__":
    main()
