"""Variants held against one another: intervals, McNemar's test, dominance, seeds. Pure Python."""

import math
import re
import statistics

from edgecnn.names import DEFAULT_CRITERIA, is_pruned, variant_name

Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution
METHOD_ORDER = ("baseline", "control", "pruned", "channels")
CHANGE_KEYS = {
    "parent": "accuracy_change_points",
    "control": "accuracy_change_vs_control_points",
    "baseline": "accuracy_change_vs_baseline_points",
}


def wilson_interval_percent(correct: int, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion, in percent (Wilson 1927, JASA 22:209-212)."""
    p, z2 = correct / total, Z_95**2
    center = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(0.0, 100 * (center - half)), min(100.0, 100 * (center + half))


def mcnemar_p(gained: int, lost: int) -> float:
    """Exact two-sided p-value of McNemar's test, from the images that one variant alone gets right.

    Without a difference each of the n = gained + lost images falls on either side with chance 1/2:
    p = 2 P(X <= min(gained, lost)), X binomial (n, 1/2), at most 1. McNemar 1947, Psychometrika
    12:153-157, with the exact binomial distribution.
    """
    n, tail, ways = gained + lost, 0, 1
    for k in range(min(gained, lost) + 1):
        tail += ways  # n choose k
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)  # integers up to the one division


def dominates(a: dict, b: dict, costs=("size_bytes", "relative_energy")) -> bool:
    """Whether `a` is at least as good as `b` in accuracy and all costs, and better in one."""
    gains = [a["accuracy_percent"] - b["accuracy_percent"], *(b[cost] - a[cost] for cost in costs)]
    return min(gains) >= 0 and max(gains) > 0


def pareto_front(costs: list[float], accuracies: list[float]) -> list[int]:
    """Indices of the non-dominated points (least cost, most accuracy), by rising cost.

    A point is dominated when another costs no more and is no less accurate, and is better in one
    of the two. So of two points of equal cost only the more accurate one stays, of two equally
    accurate ones only the cheaper, and points equal in both stay together.
    """
    points = list(zip(costs, accuracies, strict=True))

    def dominated(cost, accuracy):
        return any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in points)

    front = [i for i, point in enumerate(points) if not dominated(*point)]
    return sorted(front, key=lambda i: costs[i])


def crossing(x: list[float], first: list[float], second: list[float]) -> float | None:
    """Where the second line falls below the first for good, linearly between points; None if never."""
    above = [b - a for a, b in zip(first, second, strict=True)]
    if above[-1] >= 0 or max(above) < 0:
        return None
    last = max(i for i, gap in enumerate(above) if gap >= 0)
    return x[last] + (x[last + 1] - x[last]) * above[last] / (above[last] - above[last + 1])


def run_of(row: dict) -> str:
    """The run of a row that front.read_runs joined to others; empty in a run's own rows."""
    return row["variant"].rpartition("/")[0]


def lowest_seed_rows(rows: list[dict]) -> list[dict]:
    """The rows of each run's lowest seed: those that the table, the picture and a budget compare."""
    first = {}
    for row in rows:
        run, seed = run_of(row), row.get("seed", 0)
        first[run] = min(seed, first.get(run, seed))
    return [row for row in rows if row.get("seed", 0) == first[run_of(row)]]


def group(row: dict) -> str:
    """The variant's name without its seed."""
    return row["variant"].replace(f"_seed{row['seed']}_", "_")


def held_against(
    row: dict, other: dict | None, name: str, hits: dict[str, list[bool]], last: dict[str, dict]
) -> dict:
    """What `row` gains and loses against `other` on the same images; None without the other.

    last: variant -> its row of the last metrics.json, which has it of files that are not here now.
    """
    pair = [] if other is None else [row, other]
    keys = (CHANGE_KEYS[name], *(f"images_{what}_vs_{name}" for what in ("gained", "lost")))
    keys += (f"mcnemar_p_vs_{name}",)
    if pair and all(r["variant"] in hits for r in pair):
        both = list(zip(*(hits[r["variant"]] for r in pair), strict=True))
        gained, lost = both.count((True, False)), both.count((False, True))
        change = round(row["accuracy_percent"] - other["accuracy_percent"], 4)
        return dict(zip(keys, (change, gained, lost, mcnemar_p(gained, lost)), strict=True))
    digests = [(r["checkpoint_sha256"], last.get(r["variant"], {})) for r in pair]
    same = pair and all(digest == then.get("checkpoint_sha256") for digest, then in digests)
    return {key: last[row["variant"]].get(key) if same else None for key in keys}


def parent_of(row: dict, by_name: dict[str, dict]) -> dict | None:
    """The row of a variant's parent; None where it was made again since: it is another one."""
    parent = by_name.get(row["parent"])
    return parent if parent and parent["checkpoint_sha256"] == row["parent_sha256"] else None


def equal_effort(row: dict, control: dict, by_name: dict[str, dict]) -> bool:
    """Whether a pruned variant was fine-tuned once, as long as its control and from the same weights.

    The same fine-tuning without pruning is what it has to be held against; later levels of a sweep
    took more.
    """
    fp32 = [v if v["precision"] == "fp32" else parent_of(v, by_name) for v in (row, control)]
    if not is_pruned(row["method"]) or None in fp32:
        return False
    start, epochs = ([v.get(key) for v in fp32] for key in ("parent_sha256", "epochs"))
    return start[0] is not None and start[0] == start[1] and epochs[0] == epochs[1]


def compare(rows: list[dict], hits: dict[str, list[bool]], before: list[dict] = ()) -> list[dict]:
    """Rows with what needs the others: changes, dominance, statistics over seeds.

    hits: variant -> which images are right, in one order. No two rows have one name. before: the
    rows of the last metrics.json; one whose checkpoint is not here is among `rows` too, without hits.
    """
    by_name = {row["variant"]: row for row in rows}
    last = {row["variant"]: row for row in before}
    compared = []
    for row in rows:
        parent = parent_of(row, by_name)
        control = f"{row['method'].rpartition('pruned_')[0]}control"  # after the same channels
        control = by_name.get(variant_name(control, row["precision"], seed=row["seed"]))
        control = control if control and equal_effort(row, control, by_name) else None
        baseline = by_name.get(variant_name("baseline", "fp32", seed=row["seed"]))
        baseline = baseline if baseline is not row else None
        better = [r for r in rows if r["seed"] == row["seed"] and dominates(r, row)]
        best = max(better, key=lambda r: r["accuracy_percent"], default=None)
        runs = [other["accuracy_percent"] for other in rows if group(other) == group(row)]
        compared.append(
            {
                **row,
                **held_against(row, parent, "parent", hits, last),
                **held_against(row, control, "control", hits, last),
                **held_against(row, baseline, "baseline", hits, last),
                "dominated_by": best and best["variant"],
                "seeds": len(runs),
                "accuracy_mean_percent": round(statistics.mean(runs), 4),
                "accuracy_std_points": round(statistics.stdev(runs), 4) if len(runs) > 1 else None,
            }
        )
    return compared


def sort_key(row: dict):
    """Baseline, controls, then pruned variants by percent; the default criterion first; by seed.

    Those with fewer channels come last, each followed by what was made of it.
    """
    family = row["method"].partition("_")[0]
    order = METHOD_ORDER.index(family) if family in METHOD_ORDER else len(METHOD_ORDER)
    method = row["method"].replace("_control", "_0")
    levels = [float(percent) for percent in re.findall(r"_(\d+(?:\.\d+)?)", method)]
    default = row["criterion"] in DEFAULT_CRITERIA.values()
    criterion = "" if default else row["criterion"] or ""
    return order, levels, criterion, group(row), row["seed"]
