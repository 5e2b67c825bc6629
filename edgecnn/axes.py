"""The axes of the Pareto picture: accuracy with a compressed band, costs with plain ticks. No torch."""

import numpy as np
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

LOG_RATIO = 5  # a cost that spans more than this gets a logarithmic axis
TICK_STEPS = [1, 2, 5, 10]
BAND_GAP = 1.5  # references further below the variants than this (points) share a compressed band
LEFT, RIGHT = 0.25, 0.07  # margins, as shares of what the costs span; names stand left of points
BAND_SHARE = 0.15  # the part of the panel's height which that band takes


def set_accuracy_axis(axes, own: list[float], theirs: list[float], images: str) -> None:
    """One accuracy axis for all panels; what others have far below shares a compressed band.

    own, theirs: the accuracies to make room for, in percent; images: what they are of.
    """
    low, high = min(own + theirs), max(own + theirs)
    room = 0.3 + 0.06 * (max(own) - min(own))  # for a name above the best point
    low, high = low - 0.4 - 0.04 * (high - low), high + room
    axes[0].set_ylim(low, high)  # before the scale, which has no room outside its ends
    label = f"accuracy (%), {images}"
    ticks = MaxNLocator(8, steps=TICK_STEPS).tick_values(low, high)
    if theirs and min(theirs) < min(own) - BAND_GAP:
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
    axes[0].set_ylabel(label, parse_math=False)


def set_cost_axis(panel, costs, label: str) -> None:
    """Logarithmic when the costs span much, always with plain numbers on the ticks."""
    low, high = min(costs), max(costs)
    if high / low > LOG_RATIO:
        panel.set_xscale("log")
        low, high = low * (low / high) ** LEFT, high * (high / low) ** RIGHT
        decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
        steps = (1, 2, 5) if high / low < 1000 else (1,)
        panel.xaxis.set_major_locator(FixedLocator([d * s for d in decades for s in steps]))
        panel.xaxis.set_minor_locator(NullLocator())
        label = label.replace("\n", ", log scale\n")
    else:
        span = high - low or high or 1
        low, high = max(0, low - LEFT * span), high + RIGHT * span
    panel.set_xlim(low, high)
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.set_xlabel(label)
