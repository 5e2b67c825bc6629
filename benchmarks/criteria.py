"""Which pruning criterion spares most energy and bytes at equal accuracy, on the validation split.

Reads   results/holdout/metrics.json, which `make criteria` fills: for every criterion the same levels
        of sparsity, the same fine-tuning effort, INT8, accuracy on 5,000 held-out training images
Writes  results/criteria.json  results/criteria.md  results/criteria.png

    make criteria                               # trains what is missing, then runs this script
    python benchmarks/criteria.py --run reference
    python benchmarks/criteria.py --smoke       # seconds: made-up curves, in results/smoke/

A criterion's curve joins its levels. What it needs for an accuracy is read off the curve, linearly in
accuracy and in the logarithm of the cost, at the cheapest crossing.
"""

import io
import math
import os
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook's setting names a backend that may be missing here

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from edgecnn.cells import markdown_table
from edgecnn.cli import Parser, add_force_argument, run_folder
from edgecnn.errors import UserError, user_errors_exit_2
from edgecnn.files import json_bytes, read_record, read_rows
from edgecnn.names import results_dir
from edgecnn.step import results_step, source_digests

OUTPUTS = ("criteria.json", "criteria.md", "criteria.png")
# The yardsticks: plain global L1 at these percents of zeros; the first is the one of the picture.
YARDSTICK, YARDSTICK_PERCENTS = "l1", (80.0, 90.0, 95.0)
LEVELS = (70.0, 80.0, 90.0, 95.0)  # percent of zeros, as `make criteria` prunes
# What is to be spared: the row's key, its name in tables, its name on an axis and the axis' unit.
COSTS = {
    "energy_sram_uj": ("energy, µJ", "modelled energy (µJ an image, weights in SRAM)", 1),
    "weight_stored_bytes": ("stored bytes", "stored weights (KiB), index included", 1024),
    "macs_nonzero": ("non-zero MACs", "non-zero MACs (millions)", 1e6),
}
LOOK = {
    "l1": ("o", "#0072B2"),
    "layer-rank": ("s", "#E69F00"),
    "lamp": ("^", "#009E73"),
    "energy": ("D", "#D55E00"),
}


# ---- curves ------------------------------------------------------------------------------------


def with_effort(rows: list[dict]) -> list[dict]:
    """The pruned INT8 rows of seed 0, each with the fine-tuning epochs of its FP32 parent's level."""
    rows = [row for row in rows if not str(row.get("method")).startswith("channels")]
    asked = {"method", "precision", "seed", "criterion", "parent"}
    if any(not asked <= row.keys() or row["criterion"] not in (None, *LOOK) for row in rows):
        raise UserError("the validation rows lack columns or criteria; run: make criteria")
    chosen = [r for r in rows if r["method"].startswith("pruned") and r["precision"] == "int8"]
    made = {r["variant"]: results_dir("holdout") / f"{r['parent']}.json" for r in chosen}
    return [r | {"epochs_a_level": epochs(made[r["variant"]])} for r in chosen if r["seed"] == 0]


def epochs(path: Path):
    """The epochs that a step's JSON says it was asked for; raises UserError where it does not."""
    arguments = read_record(path, "make criteria", {"arguments": None})["arguments"]
    if not isinstance(arguments, dict) or type(arguments.get("epochs")) is not int:
        raise UserError(f"{path} does not say how many epochs it took; run: make criteria")
    return arguments["epochs"]


def curves(rows: list[dict]) -> dict[str, list[dict]]:
    """Criterion -> its rows by falling sparsity, only levels that every criterion has.

    Raises UserError where there is nothing to compare, or the levels took unequal effort.
    """
    found = {}
    for row in sorted(rows, key=level, reverse=True):
        found.setdefault(row["criterion"], []).append(row)
    shared = set.intersection(*({level(r) for r in curve} for curve in found.values()), {*LEVELS})
    found = {name: [r for r in curve if level(r) in shared] for name, curve in found.items()}
    efforts = {row["epochs_a_level"] for curve in found.values() for row in curve}
    if YARDSTICK not in found or not shared.issuperset(YARDSTICK_PERCENTS) or len(efforts) > 1:
        raise UserError(
            "the validation rows are not the same levels of every criterion at equal effort; "
            "run: make criteria"
        )
    return found


def level(row: dict) -> float:
    """The sparsity asked for, in percent; raises UserError where the method does not say."""
    try:
        return float(row["method"].removeprefix("pruned_"))
    except ValueError:
        raise UserError(f"{row['method']} is no sparsity; run: make criteria") from None


def cost_at(curve: list[dict], accuracy: float, key: str) -> float | None:
    """The least cost at which the curve reaches an accuracy; None where it does not."""
    points = sorted((row[key], row["accuracy_percent"]) for row in curve)
    if points[0][1] >= accuracy:
        return points[0][0]  # cheaper still is not measured
    for (low, below), (high, above) in zip(points, points[1:], strict=False):
        if below < accuracy <= above:
            share = (accuracy - below) / (above - below)
            return math.exp((1 - share) * math.log(low) + share * math.log(high))
    return None


def at_equal_accuracy(found: dict[str, list[dict]], percent: float) -> list[dict]:
    """A row a criterion: what it needs for the yardstick's accuracy, and how much less that is."""
    yardstick = next(row for row in found[YARDSTICK] if level(row) == percent)
    accuracy, rows = yardstick["accuracy_percent"], []
    for name, curve in found.items():
        row = {"criterion": name, "yardstick_percent": percent, "at_accuracy_percent": accuracy}
        for key in COSTS:
            cost = cost_at(curve, accuracy, key)
            row[key] = cost and round(cost, 4)
            row[f"{key}_saved_percent"] = cost and round(100 * (1 - cost / yardstick[key]), 2)
        rows.append(row)
    return rows


# ---- showing -----------------------------------------------------------------------------------


def equal_table(rows: list[dict]) -> str:
    """What each criterion needs for one yardstick's accuracy."""

    def needed(row, key):
        share, cost = row[f"{key}_saved_percent"], row[key]
        return (
            "not reached"
            if cost is None
            else f"{cost:,.{2 if cost < 100 else 0}f} ({-share:+.1f} %)"
        )

    header = ["Criterion", *(f"{name} needed" for name, *_ in COSTS.values())]
    lines = [[row["criterion"], *(needed(row, key) for key in COSTS)] for row in rows]
    return (
        f"At {rows[0]['at_accuracy_percent']:.2f} %, the accuracy of global L1 at "
        f"{rows[0]['yardstick_percent']:g} % zeros:\n\n{markdown_table(header, lines)}"
    )


def table(found: dict[str, list[dict]], equal: list[list[dict]]) -> str:
    """Every level of every criterion, then what each needs for the yardsticks' accuracies."""
    lines = [
        [
            name,
            f"{level(row):g}",
            f"{row['accuracy_percent']:.2f}",
            f"{row['macs_nonzero'] / 1e6:.2f}",
            f"{row['energy_sram_uj']:.2f}",
            f"{row['weight_stored_bytes']:,}",
        ]
        for name, curve in found.items()
        for row in reversed(curve)
    ]
    header = ["Criterion", "Zeros %", "Validation accuracy %", "Non-zero MACs M"]
    header += ["Energy µJ, SRAM", "Stored bytes"]
    return "\n\n".join([markdown_table(header, lines), *map(equal_table, equal)]) + "\n"


def draw(found: dict[str, list[dict]], accuracy: float) -> Figure:
    """Accuracy against each cost, a line a criterion, a dotted line at the yardstick's accuracy."""
    figure = Figure(figsize=(14, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(COSTS), sharey=True)
    for panel, (key, (_, label, unit)) in zip(panels, COSTS.items(), strict=True):
        for name, curve in found.items():
            marker, color = LOOK[name]
            points = [(row[key] / unit, row["accuracy_percent"]) for row in curve]
            panel.plot(*zip(*points, strict=True), marker=marker, color=color, label=name)
        panel.axhline(accuracy, color="#808080", ls=":", lw=1)
        panel.set_xlabel(label)
        panel.grid(color="#DDDDDD", lw=0.6)
    panels[0].set_ylabel("accuracy (%), 5,000 validation images, INT8")
    panels[0].legend(title="criterion")
    percent = f"{YARDSTICK_PERCENTS[0]:g} %"
    figure.suptitle(
        f"Equal fine-tuning effort; dotted: the accuracy of global L1 at {percent} zeros"
    )
    return figure


def made_up_rows() -> list[dict]:
    """Plausible rows for --smoke, so that the picture can be tried without training."""
    return [
        {
            "variant": f"pruned_{percent}_{name}_int8",
            "method": f"pruned_{percent}",
            "criterion": name,
            "precision": "int8",
            "seed": 0,
            "accuracy_percent": 86 - 300 / (105 - percent) ** 1.5 - 0.1 * n,
            "macs_nonzero": 5_000_000 + 10_000 * n,
            "energy_sram_uj": (12 + n) * (1 - percent / 110),
            "weight_stored_bytes": int(620_000 * (1.1 - percent / 100)),
            "epochs_a_level": 3,
        }
        for n, name in enumerate(LOOK)
        for percent in map(int, LEVELS)
    ]


@user_errors_exit_2
def main():
    parser = Parser(__doc__)
    parser.add_argument(
        "--run",
        type=run_folder,
        default="",
        metavar="NAME",
        help="write to results/NAME/ (default: results/)",
    )
    parser.add_argument("--smoke", action="store_true", help="made-up curves, to results/smoke/")
    add_force_argument(parser)
    args = parser.parse_args()
    folder = results_dir("smoke" if args.smoke else args.run)
    metrics = results_dir("holdout") / "metrics.json"
    parents = [] if args.smoke else [metrics]
    code = source_digests("benchmarks/criteria.py")
    step = results_step(folder, "criteria", code, {}, parents, OUTPUTS, args.force)
    if step.kept():
        return
    needed = dict.fromkeys(COSTS, (0, 1e15))
    rows = made_up_rows() if args.smoke else with_effort(read_rows(metrics, needed))

    found = curves(rows)
    equal = [at_equal_accuracy(found, percent) for percent in YARDSTICK_PERCENTS]
    result = {
        "at_equal_accuracy": sum(equal, []),
        "levels": [r for curve in found.values() for r in curve],
    }
    picture = io.BytesIO()
    draw(found, equal[0][0]["at_accuracy_percent"]).savefig(picture)
    contents = json_bytes(result), table(found, equal).encode(), picture.getvalue()
    step.commit(dict(zip(step.outputs, contents, strict=True)))
    print(table(found, equal))
    print(f"wrote {', '.join(OUTPUTS)} in {folder}")


if __name__ == "__main__":
    main()
