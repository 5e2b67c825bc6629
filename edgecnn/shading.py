"""What a budget allows, in the Pareto picture: a shaded region, rings, the footnote. No torch."""

from edgecnn.budget import LIMITS, number, ranked
from edgecnn.marks import GREEN, RING_POINTS

BUDGET_NOTE = """
Budget: {budget}. Green: what a panel's own limit and the accuracy floor allow. Ringed: the variants \
that meet every limit{no_panel}. {best}
"""


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


def budget_note(rows, limits: dict[str, float], panels: set[str]) -> str:
    """The footnote of a picture with a budget: the limits, which have no panel, the best variant."""
    fitting = ranked(rows, limits)
    no_panel = [name for name in limits if name not in panels | {"accuracy"}]
    best = f"Best: {fitting[0]['variant']}." if fitting else "Nothing fits."
    budget = ", ".join(
        f"{name} at {'least' if LIMITS[name].floor else 'most'} {number(limit)}"
        for name, limit in limits.items()
    )
    no_panel = f" ({', '.join(no_panel)}, which no panel shows, included)" if no_panel else ""
    return BUDGET_NOTE.format(budget=budget, no_panel=no_panel, best=best).strip()
