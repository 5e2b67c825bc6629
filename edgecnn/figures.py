"""The further figures of step 5: a variant's layers, and where zeros start to pay. No torch."""

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from edgecnn.cells import KIB
from edgecnn.compare import crossing
from edgecnn.errors import UserError
from edgecnn.files import read_table
from edgecnn.labels import FONT
from edgecnn.marks import GREY
from edgecnn.names import command
from edgecnn.records import LAYER
from edgecnn.text import picture_text

# Panels of layers: the axis label, what an axis unit is, and the stacked keys with name and colour.
LAYER_PANELS = [
    ("stored weights (KiB),\nindex included", KIB, [("stored_bytes", "stored", "#0072B2")]),
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
# Panels of break-even: the axis label, then key, unit, name, marker and colour of each line.
BREAK_EVEN_PANELS = [
    (
        "Cortex-M instructions (millions), counted",
        [
            ("m4_dense_instructions", 1e6, "dense kernels", "s", "#0072B2"),
            ("m4_sparse_instructions", 1e6, "sparse kernels", "o", "#D55E00"),
            ("m7_dense_instructions", 1e6, "dense, Cortex-M7", "+", "#56B4E9"),
            ("m7_sparse_instructions", 1e6, "sparse, Cortex-M7", "x", "#E69F00"),
        ],
    ),
    (
        "Cortex-M4 flash (KiB), linked",
        [
            ("m4_dense_flash_bytes", KIB, "dense kernels", "s", "#0072B2"),
            ("m4_sparse_flash_bytes", KIB, "sparse kernels", "o", "#D55E00"),
        ],
    ),
    (
        "Ethos-U55-128 (modelled by Vela)",
        [
            ("u55_128_cycles_modelled", 1e3, "thousand cycles", "^", "#009E73"),
            ("u55_128_flash_bytes_modelled", KIB, "flash, KiB", "v", "#CC79A7"),
        ],
    ),
]


def drawn(figure: Figure) -> tuple[bytes, bytes]:
    """The figure as PNG and as SVG; equal rows give equal files."""
    png, svg = io.BytesIO(), io.BytesIO()
    matplotlib.rcParams["svg.hashsalt"] = "pareto"  # with Date: nothing of the moment gets in
    figure.savefig(png, format="png")
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return png.getvalue(), svg.getvalue()


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
    rows = read_table(path, command("evaluate", path.parent), LAYER)
    chosen = [row for row in rows if row["variant"] == variant]
    if not chosen:
        known = ", ".join(dict.fromkeys(row["variant"] for row in rows))
        raise UserError(f"--layers {variant}: {path} has no such variant; it has {known}")
    return chosen


def draw_break_even(rows: list[dict]) -> Figure:
    """Costs against the share of zeros, the same in every layer; dense against sparse kernels."""
    figure = Figure(figsize=(12, 4.4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    zeros = [row["zeros_percent"] for row in rows]
    for panel, (label, lines) in zip(
        figure.subplots(1, len(BREAK_EVEN_PANELS)), BREAK_EVEN_PANELS, strict=True
    ):
        curves = [[row[key] / unit for row in rows] for key, unit, *_ in lines]
        for curve, (_, _, name, marker, color) in zip(curves, lines, strict=True):
            panel.plot(zeros, curve, marker=marker, color=color, label=name)
        even = crossing(zeros, *curves[:2]) if lines[0][2] == "dense kernels" else None
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
                fontsize=FONT,
            )
        panel.set_ylim(bottom=0)
        panel.set_xlabel("zeros in every layer (%)")
        panel.set_ylabel(label)
        panel.grid(color="#DDDDDD", lw=0.6)
        panel.legend(framealpha=1, edgecolor="none", loc="lower left")
    figure.suptitle("Where unstructured sparsity starts to pay, target by target")
    return figure
